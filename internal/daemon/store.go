package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/meshhelper/meshhelper/internal/api"
)

// The files in the state directory. The platform's journal stands beside them.
const (
	stateFile = "state.json"
	copyFile  = "state.last.json"
	keyFile   = "host.key"
	lockFile  = "lock"

	tempPattern = ".state.*"
)

// store keeps the document on disk twice: in state.json, and as the last good
// copy for a person whose state.json was damaged. Both are replaced, never
// written into, so that each is whole after a crash at any moment.
type store struct {
	dir string
	fs  fileSystem
}

// fileSystem is what a full or broken disk makes fail; tests replace it.
type fileSystem interface {
	// WriteTemp writes a new file that only its owner may read, and syncs it.
	WriteTemp(dir, pattern string, content []byte) (path string, err error)
	Rename(from, to string) error
	Remove(path string) error
	SyncDir(dir string) error
}

// load returns the document, or nil where there never was one. A document that
// can't be used is an error, and nothing is touched: what its owner wanted is
// better mended by a person than forgotten by a program.
func (s *store) load() (*document, error) {
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

func readDocument(path string) (*document, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read wanted state: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err == nil && len(text) > maxDocument {
		err = fmt.Errorf("more than %d bytes", maxDocument)
	}
	if err != nil {
		return nil, fmt.Errorf("read wanted state %q: %w", path, err)
	}
	doc, err := decodeDocument(text)
	if err != nil {
		return nil, fmt.Errorf("read wanted state %q: %w", path, err)
	}
	return doc, nil
}

// tidy removes the temporary files of a helper that was killed while it saved.
func (s *store) tidy() {
	for _, pattern := range []string{tempPattern, "." + keyFile + ".*"} {
		left, _ := filepath.Glob(filepath.Join(s.dir, pattern)) // the patterns are right
		for _, path := range left {
			_ = s.fs.Remove(path) // it costs some room, no more
		}
	}
}

// save replaces the document on disk. After an error the old one is still
// there, or the new one is, whole.
func (s *store) save(doc *document) error {
	text, err := doc.encode()
	if err != nil {
		return err
	}
	if len(text) > maxDocument {
		return fmt.Errorf("save wanted state: %d bytes, at most %d", len(text), maxDocument)
	}
	if err := s.replaceBoth(text); err != nil {
		return fmt.Errorf("save wanted state: %w", err)
	}
	return nil
}

// replaceBoth writes both files before it renames either, so that a full disk
// changes neither.
func (s *store) replaceBoth(text []byte) error {
	var temps []string
	defer func() {
		for _, t := range temps {
			_ = s.fs.Remove(t)
		}
	}()
	for range 2 {
		temp, err := s.fs.WriteTemp(s.dir, tempPattern, text)
		if err != nil {
			return err
		}
		temps = append(temps, temp)
	}
	for _, name := range []string{copyFile, stateFile} {
		if err := s.fs.Rename(temps[0], filepath.Join(s.dir, name)); err != nil {
			return err
		}
		temps = temps[1:]
	}
	return s.fs.SyncDir(s.dir)
}

// diskFiles is the fileSystem of the host.
type diskFiles struct{}

func (diskFiles) WriteTemp(dir, pattern string, content []byte) (path string, err error) {
	// CreateTemp makes it 0600 and exclusively.
	f, err := os.CreateTemp(dir, pattern)
	if err != nil {
		return "", err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		_ = os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

func (diskFiles) Rename(from, to string) error { return os.Rename(from, to) }

func (diskFiles) Remove(path string) error { return os.Remove(path) }

func (diskFiles) SyncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil // it has no such operation
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// openDir makes the state directory if it doesn't exist, and refuses one in which
// others could replace the files.
func openDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at state directory: %w", err)
	}
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o022 != 0 {
		return api.Errorf(api.CodeInternal, "state directory %q has mode %v: others may write to it", dir, info.Mode().Perm()).
			WithHint("run: chmod go-w %q", dir)
	}
	return nil
}
