// Package owned reads files that only root or the user that runs this process can have
// written, writes such files, and looks at the folders on the way to them: a program that
// runs as root must not believe what another user put there.
//
// Open and Read are for files, CheckAbove is for the folders above, and Replace and
// ReplaceFrom write a file that is whole after a crash at any moment: the only way in which
// the program changes a file that it, launchd or systemd reads later. On systems other than Unix nothing is
// checked: access lists, which the folder's set, are another matter.
package owned

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
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

// Replace gives the file at path new content, as [ReplaceFrom] does, and mode 0600.
func Replace(path string, content []byte) error {
	return ReplaceFrom(path, bytes.NewReader(content), 0o600)
}

// ReplaceFrom gives the file at path new content, this process's user as its owner and
// exactly mode, whatever the umask is. It returns when the file would outlive a loss of
// power: the file and its name are synced. After a crash at any moment path is the old
// file or the new one, whole, and [Tidy] removes what else is left. A link at path is
// replaced, not followed.
func ReplaceFrom(path string, content io.Reader, mode fs.FileMode) error {
	dir := filepath.Dir(path)
	temp, err := WriteTemp(dir, filepath.Base(path), content, mode)
	if err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return SyncDir(dir)
}

// tempSuffix ends the name of a temporary file. Neither launchd nor systemd loads a file
// with such a name, as at a boot before the rename.
const tempSuffix = ".tmp"

// WriteTemp writes a new file in dir that is to replace the one called name, and syncs it.
// With an error no file stays. Most callers want [Replace]; this is for those that write
// several files before they rename any.
func WriteTemp(dir, name string, content io.Reader, mode fs.FileMode) (path string, err error) {
	// CreateTemp makes it 0600 and exclusively, so no other process has it open.
	f, err := os.CreateTemp(dir, "."+name+".*"+tempSuffix)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, content)
	if err := errors.Join(err, share(f, mode), f.Sync(), f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// share gives a file another mode than 0600. Root's file then is of root's group, too: a
// folder may hand on its own (BSD's folders all do).
func share(f *os.File, mode fs.FileMode) error {
	if mode == 0o600 {
		return nil
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		return f.Chown(0, 0)
	}
	return nil
}

// Tidy removes from dir the temporary files of a process that was killed while it replaced
// files of these names, or of any name where none are given. The caller sees to it that no
// other process is replacing them now. What can't be removed costs some room, no more.
func Tidy(dir string, names ...string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if of, ok := tempOf(e.Name()); ok && (len(names) == 0 || slices.Contains(names, of)) {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// tempOf returns the name of the file that a temporary one was to replace.
func tempOf(temp string) (name string, ok bool) {
	rest, hidden := strings.CutPrefix(temp, ".")
	rest, suffixed := strings.CutSuffix(rest, tempSuffix)
	dot := strings.LastIndexByte(rest, '.')
	if !hidden || !suffixed || dot < 1 || strings.Trim(rest[dot+1:], "0123456789") != "" {
		return "", false
	}
	return rest[:dot], true
}

// Remove removes a file, if it exists, and returns when that would outlive a loss of power.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return SyncDir(filepath.Dir(path))
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
