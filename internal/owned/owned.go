// Package owned reads and writes files that only root, or the user that runs this process,
// can have written, and checks the folders above them: a program that runs as root must not
// trust a file that another user put there.
//
// [Open] and [Read] check the file itself, [CheckAbove] the folders on the way to it.
// [Replace] and [ReplaceFrom] write a file that is whole after a crash at any moment; the
// program changes no file that it, launchd or systemd reads later in any other way.
//
// On systems other than Unix nothing is checked: there access control lists, which a file
// inherits from its folder, decide.
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

// ModeText returns a mode as ls(1) prints it, with the setuid, setgid and sticky bits in
// the places of x. Of the file types it knows only a directory.
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

// ToClose returns the hint for a folder that other users may write to and that flag names.
// It doesn't advise to change a sticky folder, such as /tmp, which has to stay writable.
func ToClose(folder string, mode fs.FileMode, flag string) string {
	other := "name another folder with " + flag
	if mode&fs.ModeSticky != 0 {
		return other
	}
	return fmt.Sprintf("run: chmod go-w %q, or %s", folder, other)
}

// Read opens a file as [Open] does and returns its content, which may have at most most
// bytes.
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

// Replace replaces the file at path by content, as [ReplaceFrom] does, with mode 0600.
func Replace(path string, content []byte) error {
	return ReplaceFrom(path, bytes.NewReader(content), 0o600)
}

// ReplaceFrom replaces the file at path, or creates it, with this process's user as its
// owner and exactly mode, whatever the umask is. It returns once the content and the name
// are synced, so that they survive a loss of power. After a crash at any moment path is
// either the old file or the new one, whole; [Tidy] removes a temporary file that is left.
// A symbolic link at path is replaced, not followed.
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
// with such a name at boot, if a crash left one.
const tempSuffix = ".tmp"

// WriteTemp writes and syncs a new file in dir, which the caller then renames to name, and
// returns its path. After an error no file is left. Most callers want [Replace]; WriteTemp
// is for those that write several files before they rename any.
func WriteTemp(dir, name string, content io.Reader, mode fs.FileMode) (path string, err error) {
	// CreateTemp uses mode 0600 and O_EXCL, so no other process has the file open.
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

// share sets a file's mode. A file of root's that others may read also gets root's group:
// a new file may have its folder's group (on BSD it always does, open(2)).
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
// a file with one of the names, or any file if there are no names. The caller must ensure
// that no other process is replacing them at the same time. Errors are ignored: a file that
// stays only takes space.
func Tidy(dir string, names ...string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if of, ok := tempOf(e.Name()); ok && (len(names) == 0 || slices.Contains(names, of)) {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// tempOf returns the name that WriteTemp was called with for a temporary file.
func tempOf(temp string) (name string, ok bool) {
	rest, hidden := strings.CutPrefix(temp, ".")
	rest, suffixed := strings.CutSuffix(rest, tempSuffix)
	dot := strings.LastIndexByte(rest, '.')
	if !hidden || !suffixed || dot < 1 || strings.Trim(rest[dot+1:], "0123456789") != "" {
		return "", false
	}
	return rest[:dot], true
}

// Remove removes a file, if it exists, and syncs its folder, so that the removal survives a
// loss of power.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir syncs the names in dir, so that a rename survives a loss of power.
func SyncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil // Windows can't sync a folder
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// An AboveError is a folder or a link on the way to a path that a user who isn't trusted
// could replace, or whose entries such a user could.
type AboveError struct {
	Path    string // the folder or the link
	Problem string // what is wrong with it
	Hint    string // what to do about it
}

func (e *AboveError) Error() string { return fmt.Sprintf("%q %s", e.Path, e.Problem) }
