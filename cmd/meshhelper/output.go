package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// outputFile is the new file that a configuration with a private key is written to.
type outputFile struct {
	f    *os.File
	path string
	done bool // whether all of it is on the disk
}

// create makes the file of --output, where one was given, before anything is changed. It
// is there for nobody else: one that exists, also as a link, isn't used.
func (o *peerAddOptions) create() error {
	if o.output == "" {
		return nil
	}
	f, err := os.OpenFile(o.output, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("--output: %q already exists, and isn't written over: choose another name, or remove it", o.output)
	}
	if err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	o.file = &outputFile{f: f, path: o.output}
	return nil
}

// end closes the file. One that isn't whole is removed, and so is that of a command that
// failed before the file was written.
func (o *peerAddOptions) end(err error) error {
	if o.file == nil {
		return err
	}
	o.file.f.Close() // everything is on the disk, or the file goes
	if !o.file.done {
		return errors.Join(err, os.Remove(o.file.path))
	}
	return err
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
	if dir, err := os.Open(filepath.Dir(w.path)); err == nil {
		_ = dir.Sync()
		dir.Close()
	}
	w.done = true
	return nil
}
