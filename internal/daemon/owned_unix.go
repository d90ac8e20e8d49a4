//go:build unix

package daemon

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/api"
)

// checkDir refuses a state directory that belongs to another user than root and the
// one that runs the helper, or that others may write to: they could replace the files
// in it. The same of a link that leads there, and of a directory above it in which any
// user may rename what is another's (one that all may write to, without the sticky bit).
func checkDir(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("look at state directory: %w", err)
	}
	link, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("look at state directory: %w", err)
	}
	if uid, ok := trusted(link); !ok {
		return foreignDir(dir, uid)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at state directory: %w", err)
	}
	switch uid, ok := trusted(info); {
	case !info.IsDir():
		return api.Errorf(api.CodeInternal, "state directory %q is not a directory", dir).WithHint("name a directory with --state-dir")
	case !ok:
		return foreignDir(dir, uid)
	case info.Mode().Perm()&0o022 != 0:
		return api.Errorf(api.CodeInternal, "state directory %q has mode %v: others may write to it", dir, info.Mode().Perm()).
			WithHint("run: chmod go-w %q", dir)
	}
	return checkAbove(dir)
}

func foreignDir(dir string, uid uint32) error {
	return api.Errorf(api.CodeInternal, "state directory %q belongs to user %d, not to root or the user that runs the helper", dir, uid).
		WithHint("run: chown %d %q, after a look at what is in it", os.Geteuid(), dir)
}

func checkAbove(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fmt.Errorf("look at state directory: %w", err)
	}
	for at := filepath.Dir(real); ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if err != nil {
			return fmt.Errorf("look above state directory: %w", err)
		}
		if info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0 {
			return api.Errorf(api.CodeInternal, "state directory %q is in %q, where any user may replace it", dir, at).
				WithHint("run: chmod o-w %q", at)
		}
		if at == filepath.Dir(at) {
			return nil
		}
	}
}

// trusted returns a file's owner, and whether that is root or the user that runs the
// helper.
func trusted(info fs.FileInfo) (uid uint32, ok bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return st.Uid, st.Uid == 0 || int(st.Uid) == os.Geteuid()
}

// openOwned opens a file for reading. It refuses a link, what isn't a regular file, and
// one that belongs to another user or that others may write to. Opening doesn't wait,
// as it would for the writer of a FIFO.
func openOwned(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, noLink(path, err)
	}
	if err := checkOwned(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// checkOwned refuses an open file that another user could have written.
func checkOwned(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	switch uid, ok := trusted(info); {
	case !info.Mode().IsRegular():
		return fmt.Errorf("%q is not a regular file", f.Name())
	case !ok:
		return fmt.Errorf("%q belongs to user %d, not to root or the user that runs the helper", f.Name(), uid)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%q has mode %v: others may write to it", f.Name(), info.Mode().Perm())
	}
	return nil
}

// noLink says in plain words that a file is a link: ELOOP of open(2) doesn't.
func noLink(path string, err error) error {
	if info, e := os.Lstat(path); e == nil && info.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("%q is a link, which isn't followed: %w", path, err)
	}
	return err
}
