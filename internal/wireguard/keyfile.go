package wireguard

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

// keyFileLimit bounds what is read from a key file, in bytes: the key and
// some white space.
const keyFileLimit = 256

// ErrExposedKey is in the chain of ReadKeyFile's error when others than the
// owner may read or write the file.
var ErrExposedKey = errors.New("others than the owner have access")

// ReadKeyFile reads a private key from the file that WriteKeyFile wrote. It
// refuses links, everything that isn't a regular file, and files that group or
// others may access; a file that doesn't exist gives fs.ErrNotExist.
func ReadKeyFile(path string) (PrivateKey, error) {
	text, err := readPrivate(path)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("read key file: %w", err)
	}
	key, err := ParsePrivateKey(strings.TrimSpace(text))
	if err != nil {
		return PrivateKey{}, fmt.Errorf("read key file %q: %w", path, err)
	}
	return key, nil
}

// readPrivate reads a small file after checking, on the open file, that it is
// the one that stands in the folder itself and that only its owner may use it.
func readPrivate(path string) (string, error) {
	named, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	// Checked before it is opened: opening a FIFO would wait for a writer.
	if !named.Mode().IsRegular() {
		return "", fmt.Errorf("%q is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	opened, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !os.SameFile(named, opened) {
		return "", fmt.Errorf("%q changed while it was opened", path)
	}
	// Windows has no such mode bits; Go makes them up there.
	if exposed := opened.Mode().Perm() & 0o077; exposed != 0 && runtime.GOOS != "windows" {
		return "", fmt.Errorf("%q has mode %v: %w", path, opened.Mode().Perm(), ErrExposedKey)
	}
	text, err := io.ReadAll(io.LimitReader(f, keyFileLimit))
	return string(text), err
}

// WriteKeyFile writes key to path with mode 0600, replacing what was there.
// After a crash at any moment path holds the old file or the new one, whole.
func WriteKeyFile(path string, key PrivateKey) error {
	if err := writeAtomic(path, key.Reveal()+"\n"); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	return nil
}

// writeAtomic writes a temporary file beside path, syncs it, renames it over
// path and syncs the folder. CreateTemp makes the file 0600 and exclusively,
// so no process can have it open before.
func writeAtomic(path, text string) (err error) {
	folder := filepath.Dir(path)
	f, err := os.CreateTemp(folder, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.WriteString(text); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncFolder(folder)
}

// syncFolder makes a rename in folder survive a power cut.
func syncFolder(folder string) error {
	// Windows can't sync a folder.
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(folder)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// LoadKey returns the key that the file at path holds, or draws one from
// random and writes it there when there is no file. A damaged or exposed file
// is an error, never replaced: a new key would be a new mesh.
func LoadKey(path string, random io.Reader) (PrivateKey, error) {
	key, err := ReadKeyFile(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key, err = GeneratePrivateKey(random)
	if err != nil {
		return PrivateKey{}, err
	}
	return key, WriteKeyFile(path, key)
}
