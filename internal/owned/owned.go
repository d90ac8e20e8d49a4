// Package owned reads files that only root or the user that runs this process can have
// written, writes such files, and looks at the folders on the way to them: a program that
// runs as root must not believe what another user put there.
//
// Open and Read are for files, CheckAbove is for the folders above, and Replace writes a
// file that is whole after a crash at any moment. On systems other than Unix nothing is
// checked: access lists, which the folder's set, are another matter.
package owned

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// ModeText returns a mode as ls writes it: the owners' bits and the sticky one in their
// places.
func ModeText(mode fs.FileMode) string {
	text := []byte(mode.Perm().String())
	if mode.IsDir() {
		text[0] = 'd'
	}
	for i, special := range []fs.FileMode{fs.ModeSetuid, fs.ModeSetgid, fs.ModeSticky} {
		letter := &text[3*i+3]
		switch {
		case mode&special == 0:
		case *letter == 'x':
			*letter = "sst"[i]
		default:
			*letter = "SST"[i]
		}
	}
	return string(text)
}

// ToClose says what to do about a folder that others may write to, which flag names. One
// for temporary files, which is sticky, has to stay as it is.
func ToClose(folder string, mode fs.FileMode, flag string) string {
	other := "name another folder with " + flag
	if mode&fs.ModeSticky != 0 {
		return other
	}
	return fmt.Sprintf("run: chmod go-w %q, or %s", folder, other)
}

// Read reads a file, which Open opens, of at most so many bytes.
func Read(path string, most int64) ([]byte, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("more than %d bytes", most)
	}
	if err != nil {
		return nil, fmt.Errorf("%q: %w", path, err)
	}
	return text, nil
}

// Replace gives the file at path new content, mode 0600 and this process's user as its
// owner, and returns when it would outlive a loss of power: the file and its name are
// synced. After a crash at any moment path is the old file or the new one, whole. A link
// at path is replaced, not followed.
func Replace(path string, content []byte) error {
	dir := filepath.Dir(path)
	temp, err := WriteTemp(dir, "."+filepath.Base(path)+".*", content)
	if err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return SyncDir(dir)
}

// WriteTemp writes a new file in dir, which is named by pattern as os.CreateTemp's are
// and has mode 0600, and syncs it. With an error no file stays.
func WriteTemp(dir, pattern string, content []byte) (path string, err error) {
	// CreateTemp makes it 0600 and exclusively, so no other process has it open.
	f, err := os.CreateTemp(dir, pattern)
	if err != nil {
		return "", err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// SyncDir has the names in dir, such as a renamed one, outlive a loss of power.
func SyncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil // it has no such operation
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// AboveError says of a folder, or of a link, on the way to another that a user who isn't
// trusted could put another in its place.
type AboveError struct {
	Path    string // the folder or the link
	Problem string // what is wrong with it
	Hint    string // what to do about it
}

func (e *AboveError) Error() string { return fmt.Sprintf("%q %s", e.Path, e.Problem) }
