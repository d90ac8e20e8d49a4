package api

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// MaxSocketPath is the greatest length of a socket's path in bytes: sun_path has 104 bytes
// on macOS (sys/un.h) and 108 on Linux (unix(7)), including the final NUL.
const MaxSocketPath = 103

// ErrHeld is in the chain of Listen's error when another helper answers on the
// socket.
var ErrHeld = errors.New("another helper answers there")

// dialTimeout limits how long connecting may take. The kernel completes a connection at once
// while the queue of the socket has room; that of a stopped process may be full.
const dialTimeout = 2 * time.Second

// Listen makes the socket at path, with mode 0666: every local user may connect. It replaces
// a socket that no process listens on, and nothing else: neither one that a process answers
// on (ErrHeld) nor a file of another kind. The folder must belong to root or this user, and
// no other user may write to it, or others could put their own socket there.
func Listen(path string) (*net.UnixListener, error) {
	l, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("listen on socket %q: %w", path, err)
	}
	return l, nil
}

// listen is Listen without the context in its errors.
func listen(path string) (*net.UnixListener, error) {
	if err := CheckSocketPath(path); err != nil {
		return nil, err
	}
	if err := checkFolder(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if err := removeDead(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	// The rights of a user depend on the credentials, not on the mode.
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// CheckSocketPath refuses a path that is empty or longer than MaxSocketPath, on every system
// the same.
func CheckSocketPath(path string) error {
	switch {
	case path == "":
		return errors.New("socket path is empty")
	case len(path) > MaxSocketPath:
		return fmt.Errorf("socket path %q has %d bytes, at most %d fit", path, len(path), MaxSocketPath)
	}
	return nil
}

// How often a socket must refuse a connection to count as dead, and the pause after each
// attempt. A socket between bind(2) and listen(2) refuses, too, and so does, on macOS, one
// with a full queue (unp_connect in xnu bsd/kern/uipc_usrreq.c).
const (
	refusals    = 4
	refusalWait = 100 * time.Millisecond
)

// removeDead removes the socket at path if no process answers on it. It dials first, so that
// a second helper doesn't remove the socket of a running one.
func removeDead(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("%q is not a socket, it is left alone", path)
	}
	for range refusals {
		c, err := net.DialTimeout("unix", path, dialTimeout)
		switch {
		case err == nil:
			c.Close()
			return ErrHeld
		case !errors.Is(err, syscall.ECONNREFUSED):
			// Any other error, such as that of a full queue, means that a process has the socket.
			return fmt.Errorf("%w, or is stuck: %w", ErrHeld, err)
		}
		time.Sleep(refusalWait)
	}
	return removeSame(path, info)
}

// removeSame removes the file at path if it is still the one that was. Another helper that
// starts at the same moment may have replaced it since. The file is renamed first, as there
// is no system call that removes a file by identity.
func removeSame(path string, was fs.FileInfo) error {
	aside := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.Rename(path, aside); err != nil {
		return err
	}
	is, err := os.Lstat(aside)
	if err == nil && !os.SameFile(was, is) {
		// Put it back, by link(2), which doesn't replace a file that is at path by now.
		err = errors.Join(ErrHeld, os.Link(aside, path))
	}
	return errors.Join(err, os.Remove(aside))
}
