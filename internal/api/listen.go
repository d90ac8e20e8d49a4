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

// MaxSocketPath is the longest path of a socket in bytes: sun_path holds 104
// bytes with its end on macOS (sys/un.h), 108 on Linux.
const MaxSocketPath = 103

// ErrHeld is in the chain of Listen's error when another helper answers on the
// socket.
var ErrHeld = errors.New("another helper answers there")

// dialTimeout bounds how long a socket may take to accept. A living helper's
// kernel accepts at once; a stopped one's queue may be full.
const dialTimeout = 2 * time.Second

// Listen makes the socket at path, which every local user may connect to. It
// removes a socket that no process holds any more, and nothing else: not a socket
// that a process answers on (ErrHeld), nor a file of another kind. The folder
// must be root's or this user's, and one that no other user may write to, or
// others could put their own socket there.
func Listen(path string) (*net.UnixListener, error) {
	l, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("listen on socket %q: %w", path, err)
	}
	return l, nil
}

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
	// What a user may do is decided by credentials, not by the mode.
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// CheckSocketPath refuses a path that doesn't fit a socket address on every
// system.
func CheckSocketPath(path string) error {
	switch {
	case path == "":
		return errors.New("socket path is empty")
	case len(path) > MaxSocketPath:
		return fmt.Errorf("socket path %q has %d bytes, at most %d fit", path, len(path), MaxSocketPath)
	}
	return nil
}

// The times that a socket which refuses is dialled again, and how long between: one
// that its helper has bound and doesn't listen on yet refuses, too, and so does on a
// Mac one whose queue is full (unp_connect in xnu bsd/kern/uipc_usrreq.c).
const (
	refusals    = 4
	refusalWait = 100 * time.Millisecond
)

// removeDead removes the socket at path if no process answers on it. Dialling
// first is what keeps a second helper from taking a living one's socket away.
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
			// Anything else, such as a full queue, is a holder that doesn't answer.
			return fmt.Errorf("%w, or is stuck: %w", ErrHeld, err)
		}
		time.Sleep(refusalWait)
	}
	return removeSame(path, info)
}

// removeSame removes the file at path if it is still the one that was looked at. A
// helper that starts at the same moment may have put its own there since.
func removeSame(path string, was fs.FileInfo) error {
	aside := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.Rename(path, aside); err != nil {
		return err
	}
	is, err := os.Lstat(aside)
	if err == nil && !os.SameFile(was, is) {
		// Link doesn't replace what may be at path by now.
		err = errors.Join(ErrHeld, os.Link(aside, path))
	}
	return errors.Join(err, os.Remove(aside))
}
