package wanted

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/owned"
)

// The files in the state directory that this package writes, settingsFile excepted. The
// host's journal and what was learned about peers stand beside them.
const (
	stateFile = "state.json"
	copyFile  = "state.last.json"
	keyFile   = "host.key"
	lockFile  = "lock"
	clockFile = "clock.json" // see mark
)

// store keeps the document on disk twice: in state.json, and as the last good
// copy for a person whose state.json was damaged. Both are replaced, never
// written into, so that each is whole after a crash at any moment.
type store struct {
	dir string
	fs  atomic.Pointer[FileSystem] // nil: the host's
}

func (s *store) files() FileSystem {
	if fs := s.fs.Load(); fs != nil {
		return *fs
	}
	return DiskFiles{}
}

// FileSystem is what a full or broken disk makes fail; tests replace it.
type FileSystem interface {
	// WriteTemp writes a new file that only its owner may read, and syncs it.
	WriteTemp(dir, name string, content []byte) (path string, err error)
	Rename(from, to string) error
	Remove(path string) error
	SyncDir(dir string) error
}

// load returns the document, or nil where there never was one. A document that
// can't be used is an error, and nothing is touched: what its owner wanted is
// better mended by a person than forgotten by a program.
func (s *store) load() (*Document, error) {
	path := filepath.Join(s.dir, stateFile)
	doc, err := readDocument(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, kept := os.Lstat(filepath.Join(s.dir, copyFile)); errors.Is(kept, fs.ErrNotExist) {
			return nil, nil
		}
		err = fmt.Errorf("read wanted state %q: it is missing", path)
	}
	if err != nil {
		return nil, api.Errorf(api.CodeInternal, "%v", err).WithHint("%s", s.advice(err))
	}
	return doc, nil
}

// advice says what to do about a document that can't be used.
func (s *store) advice(err error) string {
	if errors.Is(err, errNewer) {
		return "nothing was touched; run the newer meshhelper again"
	}
	path := filepath.Join(s.dir, copyFile)
	good, err := readDocument(path)
	if err != nil {
		return fmt.Sprintf("nothing was touched; there is no good copy either (%v): move both files away to start anew with the same key", err)
	}
	return fmt.Sprintf("nothing was touched; the last good copy is %q (generation %d, %d peers): copy it over %q",
		path, good.Generation, len(good.Peers), filepath.Join(s.dir, stateFile))
}

func readDocument(path string) (*Document, error) {
	text, err := owned.Read(path, maxDocument)
	if err != nil {
		return nil, fmt.Errorf("read wanted state: %w", err)
	}
	doc, err := Decode(text)
	if err != nil {
		return nil, fmt.Errorf("read wanted state %q: %w", path, err)
	}
	return doc, nil
}

// save replaces the document on disk. After an error the old one is still there, or,
// where errUnsynced is in its chain, the new one is, whole. It gives up between two
// steps when ctx ends.
func (s *store) save(ctx context.Context, doc *Document) error {
	text, err := doc.Encode()
	if err != nil {
		return err
	}
	if len(text) > maxDocument {
		return fmt.Errorf("the wanted state has %d bytes, at most %d", len(text), maxDocument)
	}
	return s.replace(ctx, text, stateFile, copyFile)
}

// replace gives files the same new content, and writes it for each before it renames
// any, so that a full disk changes none. The first file's rename makes the change; the
// copy is never ahead of it.
func (s *store) replace(ctx context.Context, text []byte, names ...string) error {
	files := s.files()
	var temps []string
	defer func() {
		for _, t := range temps {
			_ = files.Remove(t)
		}
	}()
	for _, name := range names {
		temp, err := files.WriteTemp(s.dir, name, text)
		if err != nil {
			return err
		}
		temps = append(temps, temp)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	for i, name := range names {
		if err := files.Rename(temps[0], filepath.Join(s.dir, name)); err != nil {
			return unsyncedIf(i > 0, err)
		}
		temps = temps[1:]
	}
	return unsyncedIf(true, files.SyncDir(s.dir))
}

// unsyncedIf returns an error that came after the change was made with errUnsynced in
// its chain.
func unsyncedIf(changed bool, err error) error {
	if err == nil || !changed {
		return err
	}
	return fmt.Errorf("%w: %w", errUnsynced, err)
}

// DiskFiles is the FileSystem of the host.
type DiskFiles struct{}

func (DiskFiles) WriteTemp(dir, name string, content []byte) (path string, err error) {
	return owned.WriteTemp(dir, name, bytes.NewReader(content), 0o600)
}

func (DiskFiles) Rename(from, to string) error { return os.Rename(from, to) }

func (DiskFiles) Remove(path string) error { return os.Remove(path) }

func (DiskFiles) SyncDir(dir string) error { return owned.SyncDir(dir) }

// openDir makes the state directory if it doesn't exist, and refuses one in which
// others could replace the files, or that they could replace itself.
func openDir(dir string) error {
	// Before it is made, so that nothing is put in a folder of another user's; and again
	// of those that were made.
	for range 2 {
		if err := checkAbove(dir); err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
	}
	return checkDir(dir)
}

func checkAbove(dir string) error {
	err := owned.CheckAbove(dir)
	var above *owned.AboveError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &above):
		return api.Errorf(api.CodeInternal, "another user could replace state directory %q: %v", dir, above).WithHint("%s", above.Hint)
	}
	return fmt.Errorf("look above state directory: %w", err)
}
