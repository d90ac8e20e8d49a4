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

// maxLinks bounds the links on the way to a folder, as the kernels do (MAXSYMLINKS in
// Linux's include/linux/namei.h; xnu allows 32).
const maxLinks = 40

// systemGroup is the highest ID of the groups without human members: 0 is root or wheel,
// 1 is daemon or bin.
const systemGroup = 1

// CheckAbove walks from the root to dir, following each link, and returns an *AboveError
// for the first folder or link that a user other than root and the one that runs this
// process owns, or whose entries such a user may rename: that user could replace dir. It
// doesn't check dir itself, and stops at the first folder that doesn't exist.
//
// Only the owner of an entry or of the folder may rename an entry of a folder with the
// sticky bit (rename(2), unlink(2)). Since the owners of both are checked, such a folder
// may be writable by all, as /tmp is.
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
		if name == ".." { // in a link's target; the parent was checked on the way here
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

// names returns the elements of a path. It keeps "..", which can't be resolved without
// following the links before it.
func names(path string) (out []string) {
	for name := range strings.SplitSeq(path, "/") {
		if name != "" && name != "." {
			out = append(out, name)
		}
	}
	return out
}

// checkFolder fails for a folder whose entries another user may rename.
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
		return &AboveError{path, fmt.Sprintf("has mode %s: any user may replace files in it", ModeText(mode)), fmt.Sprintf("run: chmod o-w %q", path)}
	case mode.Perm()&0o020 != 0 && gid > systemGroup && (os.Geteuid() == 0 || int(gid) != os.Getegid()):
		return &AboveError{path, fmt.Sprintf("has mode %s: group %d may replace files in it", ModeText(mode), gid), fmt.Sprintf("run: chmod g-w %q", path)}
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

// Open opens a file for reading. It fails for a symbolic link, for anything but a regular
// file, and for a file that belongs to another user or that other users may write to. It
// doesn't block on a FIFO without a writer.
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

// Check fails for an open file that another user could have written.
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

// NoLink returns err, the error of opening path with O_NOFOLLOW, with a plain message if
// path is a link: the text of ELOOP doesn't say so (open(2)).
func NoLink(path string, err error) error {
	if info, e := os.Lstat(path); e == nil && info.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("%q is a link, which isn't followed: %w", path, err)
	}
	return err
}
