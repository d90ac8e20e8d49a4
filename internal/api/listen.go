package api

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
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
// must be one that only its owner may write to, or others could put their own
// socket there.
func Listen(path string) (*net.UnixListener, error) {
	if err := CheckSocketPath(path); err != nil {
		return nil, err
	}
	if err := checkFolder(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("listen on socket %q: %w", path, err)
	}
	if err := removeDead(path); err != nil {
		return nil, fmt.Errorf("listen on socket %q: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on socket %q: %w", path, err)
	}
	// What a user may do is decided by credentials, not by the mode.
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on socket %q: %w", path, err)
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

// checkFolder refuses a folder where others than its owner can replace the
// socket. The sticky bit keeps them from that, though not from being first.
func checkFolder(folder string) error {
	info, err := os.Stat(folder)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("folder %q has mode %v: others could replace the socket", folder, info.Mode().Perm())
	}
	return nil
}

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
	c, err := net.DialTimeout("unix", path, dialTimeout)
	switch {
	case err == nil:
		c.Close()
		return ErrHeld
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	}
	// Anything else, such as a full queue, is a holder that doesn't answer.
	return fmt.Errorf("%w, or is stuck: %w", ErrHeld, err)
}

// The bounds on connections at a time. A user who may change has a bound of its own,
// so that no stranger can use up the operator's.
const (
	maxPerUser     = 16
	maxPerOperator = 256
	maxStrangers   = 128
)

// limited is a listener that knows the user who connects and refuses a connection too
// many, by closing it.
type limited struct {
	*net.UnixListener
	access Access

	mu        sync.Mutex
	byUser    map[uint32]int
	strangers int
}

func newLimited(l *net.UnixListener, a Access) *limited {
	return &limited{UnixListener: l, access: a, byUser: map[uint32]int{}}
}

// Accept returns the next connection that is within bounds, as a *peerConn.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		who, err := connCredentials(c)
		if err != nil || !l.enter(who) {
			c.Close()
			continue
		}
		return l.conn(c, who), nil
	}
}

func (l *limited) conn(c net.Conn, who Credentials) *peerConn {
	return &peerConn{
		Conn:    c,
		who:     who,
		leave:   sync.OnceFunc(func() { l.leave(who) }),
		mayRead: sync.OnceValue(func() bool { return l.access.MayRead(who) }),
	}
}

func connCredentials(c *net.UnixConn) (who Credentials, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Credentials{}, err
	}
	if cerr := raw.Control(func(fd uintptr) { who, err = credentialsOf(int(fd)) }); cerr != nil {
		return Credentials{}, cerr
	}
	return who, err
}

// enter counts a connection, or reports that it is one too many.
func (l *limited) enter(who Credentials) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	stranger := !l.access.MayChange(who)
	switch {
	case !stranger && l.byUser[who.UID] >= maxPerOperator:
		return false
	case stranger && (l.byUser[who.UID] >= maxPerUser || l.strangers >= maxStrangers):
		return false
	}
	l.byUser[who.UID]++
	if stranger {
		l.strangers++
	}
	return true
}

func (l *limited) leave(who Credentials) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byUser[who.UID]--; l.byUser[who.UID] == 0 {
		delete(l.byUser, who.UID)
	}
	if !l.access.MayChange(who) {
		l.strangers--
	}
}

// peerConn is a connection whose other end is known.
type peerConn struct {
	net.Conn
	who Credentials
	// mayRead asks the user database once per connection.
	mayRead func() bool
	leave   func()
}

// Close closes the connection and gives its place free.
func (c *peerConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
