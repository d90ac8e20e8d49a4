package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// outputFile is the new file that a configuration with a private key is written to. Its
// folder may be another user's, who may put a link to a third one in its place at any time:
// it is opened once.
type outputFile struct {
	f    *os.File
	dir  *os.Root
	path string
	done bool // whether all of it is on the disk
}

// create makes the file of --output, where one was given, before anything is changed. It
// is there for nobody else: one that exists, also as a link, isn't used.
func (o *peerAddOptions) create() error {
	if o.output == "" {
		return nil
	}
	folder, name := filepath.Split(o.output)
	if name == "" {
		return fmt.Errorf("--output: %q is a folder: give a file in it", o.output)
	}
	dir, err := os.OpenRoot(filepath.Clean(folder))
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
			return fmt.Errorf("--output: %q already exists, and isn't written over: choose another name, or remove it", o.output)
		}
		return fmt.Errorf("--output: %w", err)
	}
	o.file = &outputFile{f: f, dir: dir, path: o.output}
	return nil
}

// end closes the file. One that isn't whole is removed, and so is that of a command that
// failed before the file was written.
func (o *peerAddOptions) end(err error) error {
	if o.file == nil {
		return err
	}
	defer o.file.dir.Close()
	defer o.file.f.Close() // everything is on the disk, or the file goes
	if !o.file.done {
		return errors.Join(err, o.file.remove())
	}
	return err
}

// remove removes the file, and no other that has its name by now.
func (w *outputFile) remove() error {
	name := filepath.Base(w.path)
	if now, err := w.dir.Lstat(name); !w.is(now, err) {
		return fmt.Errorf("--output: the file that was made as %q isn't removed, for it has another name by now; it is void", w.path)
	}
	return w.dir.Remove(name)
}

// is reports whether now is the file.
func (w *outputFile) is(now fs.FileInfo, err error) bool {
	made, statErr := w.f.Stat()
	return err == nil && statErr == nil && os.SameFile(now, made)
}

// write puts text on the disk, with the file's name in its folder.
func (w *outputFile) write(text string) error {
	_, err := w.f.WriteString(text)
	if err == nil {
		err = w.f.Sync()
	}
	if err != nil {
		return err
	}
	// Where a folder can't be flushed, as on some file systems, the file is there all
	// the same.
	if dir, err := w.dir.Open("."); err == nil {
		_ = dir.Sync()
		dir.Close()
	}
	if now, err := os.Lstat(w.path); !w.is(now, err) {
		return fmt.Errorf("--output: %q doesn't lead to the file that was made any more, for its folder or its name was changed meanwhile: choose a folder that no other user can change", w.path)
	}
	w.done = true
	return nil
}
