package wanted

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/owned"
)

// The files in the state directory that this package writes, besides settingsFile. The host's
// journal and what was learned about peers are in the same directory.
const (
	stateFile = "state.json"      // the Document
	copyFile  = "state.last.json" // a copy of it, for a person; see store
	keyFile   = "host.key"        // the host's private key in base64, as wg(8) prints it
	lockFile  = "lock"            // empty; held by flock(2)
	clockFile = "clock.json"      // see mark
)

// store keeps the document on disk twice: in state.json, and in state.last.json, from
// which a person restores a damaged state.json. Both are replaced by rename(2), never
// written in place, so each is complete after a crash at any moment.
type store struct {
	dir   string
	files FileSystem
}

// FileSystem has the operations that fail on a full or broken disk, so that tests can
// make each of them fail.
type FileSystem interface {
	// WriteTemp writes a new file in dir, with mode 0600 and a name made from name, and
	// syncs it. After an error no file is left.
	WriteTemp(dir, name string, content []byte) (path string, err error)
	// Rename is rename(2): it replaces to.
	Rename(from, to string) error
	// Remove removes a file that WriteTemp made.
	Remove(path string) error
	// SyncDir syncs the directory itself. Only then do the renames in it survive a loss of
	// power.
	SyncDir(dir string) error
}

// load returns the document, or nil if the directory never had one. An unusable document
// is an error, and its files are left as they are: a person can still repair it, while
// starting with an empty mesh would lose every peer. A missing state.json beside an
// existing copy is unusable, too.
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
		return nil, api.Errorf(api.CodeInternal, "%v", err).WithHint("%s", s.hint(err))
	}
	return doc, nil
}

// hint returns the hint for a document that can't be used because of err. It never suggests a
// copy that isn't valid itself.
func (s *store) hint(err error) string {
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

// readDocument reads and decodes a document. The file must belong to root or the user that
// runs the helper; see owned.Read.
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

// save replaces the document on disk. After an error the old document is still in place,
// unless errUnsynced is in the chain: then the new one is, complete. When ctx ends before
// the first rename, save gives up.
func (s *store) save(ctx context.Context, doc *Document) error {
	text, err := doc.Encode()
	if err != nil {
		return err
	}
	if len(text) > maxDocument {
		return fmt.Errorf("the wanted state has %d bytes, the limit is %d", len(text), maxDocument)
	}
	return s.replace(ctx, text, stateFile, copyFile)
}

// replace gives all named files the same new content. It writes every temporary file
// before it renames the first, so a full disk changes none of them. The first rename makes
// the change; the copy, which comes second, is never newer.
func (s *store) replace(ctx context.Context, text []byte, names ...string) error {
	files := s.files
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

// unsyncedIf adds errUnsynced to the chain of err if the file was replaced before err
// occurred.
func unsyncedIf(changed bool, err error) error {
	if err == nil || !changed {
		return err
	}
	return fmt.Errorf("%w: %w", errUnsynced, err)
}

// DiskFiles is the FileSystem of the operating system.
type DiskFiles struct{}

// WriteTemp implements FileSystem.
func (DiskFiles) WriteTemp(dir, name string, content []byte) (path string, err error) {
	return owned.WriteTemp(dir, name, bytes.NewReader(content), 0o600)
}

// Rename implements FileSystem.
func (DiskFiles) Rename(from, to string) error { return os.Rename(from, to) }

// Remove implements FileSystem.
func (DiskFiles) Remove(path string) error { return os.Remove(path) }

// SyncDir implements FileSystem.
func (DiskFiles) SyncDir(dir string) error { return owned.SyncDir(dir) }

// openDir makes the state directory with mode 0700 if it doesn't exist. It refuses a
// directory that another user could replace, or could replace files in.
func openDir(dir string) error {
	// The first check comes before MkdirAll, which must not create anything in another
	// user's folder. The second covers the folders that MkdirAll made.
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

// checkAbove refuses a state directory below a folder that another user could rename or
// replace.
func checkAbove(dir string) error {
	err := owned.CheckAbove(dir)
	var above *owned.AboveError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &above):
		return api.Errorf(api.CodeInternal, "another user could replace state directory %q: %v", dir, above).WithHint("%s", above.Hint)
	}
	return fmt.Errorf("check the folders above the state directory: %w", err)
}
