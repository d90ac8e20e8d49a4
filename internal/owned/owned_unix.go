//go:build unix

package owned

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxLinks bounds the links on the way to a folder, as the kernel does (MAXSYMLINKS in
// Linux's include/linux/namei.h; xnu allows 32).
const maxLinks = 40

// systemGroup is the highest number of the groups that no person is in: 0, root or
// wheel, and 1, daemon or bin.
const systemGroup = 1

// CheckAbove follows the way to a folder from the root on, through each link, and returns
// an *AboveError for a folder on it, or a link, that another user than root and the one
// that runs this process owns, or whose entries such a user may rename: then that user
// could put another folder in place of the one that is looked for. The last folder itself
// is the caller's to check. The way may end early, where a folder doesn't exist yet.
//
// The entries of a folder with the sticky bit are renamed by their owner and the folder's
// only (rename(2), unlink(2)), and their owners are checked, so that such a folder may be
// one that all may write to.
func CheckAbove(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	at, left, links := "/", names(dir), 0
	for len(left) > 0 {
		if err := checkFolder(at); err != nil {
			return err
		}
		name := left[0]
		left = left[1:]
		if name == ".." { // of a link; the folder above was checked on the way here
			at = filepath.Dir(at)
			continue
		}
		next := filepath.Join(at, name)
		info, err := os.Lstat(next)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			at = next
			continue
		}
		if err := checkOwner(next, info); err != nil {
			return err
		}
		if links++; links > maxLinks {
			return fmt.Errorf("%q: more than %d links", dir, maxLinks)
		}
		to, err := os.Readlink(next)
		if err != nil {
			return err
		}
		if filepath.IsAbs(to) {
			at = "/"
		}
		left = append(names(to), left...)
	}
	return nil
}

// names returns the names in a path, with each "..", which may follow a link.
func names(path string) (out []string) {
	for name := range strings.SplitSeq(path, "/") {
		if name != "" && name != "." {
			out = append(out, name)
		}
	}
	return out
}

// checkFolder refuses a folder whose entries another user may rename.
func checkFolder(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%q is not a folder", path)
	}
	if err := checkOwner(path, info); err != nil {
		return err
	}
	if info.Mode()&fs.ModeSticky != 0 {
		return nil
	}
	mode := info.Mode()
	switch gid := info.Sys().(*syscall.Stat_t).Gid; {
	case mode.Perm()&0o002 != 0:
		return &AboveError{path, fmt.Sprintf("has mode %s: any user may replace what is in it", ModeText(mode)), fmt.Sprintf("run: chmod o-w %q", path)}
	case mode.Perm()&0o020 != 0 && gid > systemGroup && (os.Geteuid() == 0 || int(gid) != os.Getegid()):
		return &AboveError{path, fmt.Sprintf("has mode %s: group %d may replace what is in it", ModeText(mode), gid), fmt.Sprintf("run: chmod g-w %q", path)}
	}
	return nil
}

func checkOwner(path string, info fs.FileInfo) error {
	if uid, ok := Trusted(info); !ok {
		return &AboveError{path, fmt.Sprintf("belongs to user %d, not to root or the user that runs the helper", uid),
			fmt.Sprintf("name a path that leads through no folder of another user's, or run: chown -h %d %q", os.Geteuid(), path)}
	}
	return nil
}

// Trusted returns a file's owner, and whether that is root or the user that runs this
// process.
func Trusted(info fs.FileInfo) (uid uint32, ok bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return st.Uid, st.Uid == 0 || int(st.Uid) == os.Geteuid()
}

// Open opens a file for reading. It refuses a link, what isn't a regular file, and
// one that belongs to another user or that others may write to. Opening doesn't wait,
// as it would for the writer of a FIFO.
func Open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, NoLink(path, err)
	}
	if err := Check(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Check refuses an open file that another user could have written.
func Check(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	switch uid, ok := Trusted(info); {
	case !info.Mode().IsRegular():
		return fmt.Errorf("%q is not a regular file", f.Name())
	case !ok:
		return fmt.Errorf("%q belongs to user %d, not to root or the user that runs the helper; run: chown %d %q", f.Name(), uid, os.Geteuid(), f.Name())
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%q has mode %v: others may write to it", f.Name(), info.Mode().Perm())
	}
	return nil
}

// NoLink says in plain words that a file is a link: ELOOP of open(2) doesn't.
func NoLink(path string, err error) error {
	if info, e := os.Lstat(path); e == nil && info.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("%q is a link, which isn't followed: %w", path, err)
	}
	return err
}
