package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// outputFile is the new file of --output, to which a configuration with its private key is
// written. The command often runs as root, and another user may own the folder and replace
// it or the file with a link at any time. So both are opened once, and every later step
// uses the open descriptors instead of the path.
type outputFile struct {
	f    *os.File
	dir  *os.Root // the folder
	path string   // as given, for messages
	done bool     // whether the whole text is on disk, under this path
}

// openOutput creates the file of --output, if one was given, before the helper is asked to
// change anything: a change whose configuration has no place to go would have to be undone.
// Only the user can read the file (mode 0600). O_EXCL refuses an existing file and any
// symbolic link (open(2)).
func (o *peerAddOptions) openOutput() error {
	if o.output == "" {
		return nil
	}
	folder, name := filepath.Split(o.output)
	if name == "" {
		return fmt.Errorf("--output: %q is a folder: give a file in it", o.output)
	}
	dir, err := os.OpenRoot(filepath.Clean(folder))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("--output: folder %q doesn't exist: make it first, or choose another one", filepath.Clean(folder))
	}
	if err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	f, err := dir.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		dir.Close()
		if info, failed := os.Stat(o.output); failed == nil && info.IsDir() {
			return fmt.Errorf("--output: %q is a folder: give a file in it", o.output)
		}
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("--output: %q already exists and isn't overwritten: choose another name, or remove it", o.output)
		}
		return fmt.Errorf("--output: %w", err)
	}
	o.file = &outputFile{f: f, dir: dir, path: o.output}
	return nil
}

// closeOutput closes the file and returns err, the command's error. It removes a file that
// isn't complete, because writing it or a step before failed; if it can't, the error says
// so, too.
func (o *peerAddOptions) closeOutput(err error) error {
	if o.file == nil {
		return err
	}
	defer o.file.dir.Close()
	defer o.file.f.Close() // its error tells nothing new: the text is synced, or the file is removed
	if !o.file.done {
		return errors.Join(err, o.file.remove())
	}
	return err
}

// remove removes the file, but not another file that has its name by now. Renaming within
// the folder in the instant between the two steps can't be excluded, but then the user who
// owns the folder removes a file of that folder.
func (w *outputFile) remove() error {
	name := filepath.Base(w.path)
	if now, err := w.dir.Lstat(name); !w.is(now, err) {
		return fmt.Errorf("--output: the incomplete file that was created as %q wasn't removed, because it was renamed since; don't use it", w.path)
	}
	return w.dir.Remove(name)
}

// is reports whether now, the result of an Lstat with the error err, is the open file.
func (w *outputFile) is(now fs.FileInfo, err error) bool {
	created, statErr := w.f.Stat()
	return err == nil && statErr == nil && os.SameFile(now, created)
}

// write writes text and flushes it and the folder's entry to disk, since the private key
// exists nowhere else. It fails if the path no longer leads to the file: the user would look
// there and find another one.
func (w *outputFile) write(text string) error {
	_, err := w.f.WriteString(text)
	if err == nil {
		err = w.f.Sync()
	}
	if err != nil {
		return err
	}
	// Some file systems can't flush a folder (fsync(2): EINVAL). The file is still written.
	if dir, err := w.dir.Open("."); err == nil {
		_ = dir.Sync()
		dir.Close()
	}
	if now, err := os.Lstat(w.path); !w.is(now, err) {
		return fmt.Errorf("--output: %q no longer leads to the file that was created, because the folder or the file was renamed or replaced: choose a folder that no other user can change", w.path)
	}
	w.done = true
	return nil
}
