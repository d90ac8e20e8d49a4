package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/meshhelper/meshhelper/internal/owned"
)

// ErrUntrusted is in the chain of an error when a socket, or the folder that it is in,
// may be another user's than root's or the caller's own. Nothing was asked then: what
// answers could lie, and a person would hand a configuration on that leads to it.
var ErrUntrusted = errors.New("the socket can't be trusted")

// trusted reports whether a user is root or this process's own.
func trusted(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// trustedText names the users that are trusted.
func trustedText() string {
	if uid := os.Geteuid(); uid > 0 {
		return fmt.Sprintf("root or user %d", uid)
	}
	return "root"
}

// CheckSocket refuses a socket that another user than root or this process's own may
// have made (ErrUntrusted): by its owner, by the folder that it is in, and by those above that. Links are
// followed in the path to the folder, and not from there on. What it finds may change;
// a Client also looks at the process that answers.
func CheckSocket(path string) error {
	if err := CheckSocketPath(path); err != nil {
		return err
	}
	if err := checkFolder(filepath.Dir(path)); err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("%w: %q is not a socket", ErrUntrusted, path)
	}
	return checkOwner(info, path)
}

// checkFolder refuses a folder in which others than root and this user could make or
// replace a socket, and one that they could replace: by each folder above, and each link
// on the way. The sticky bit keeps them from replacing it, not from being first.
func checkFolder(folder string) error {
	var above *owned.AboveError
	if err := owned.CheckAbove(folder); errors.As(err, &above) {
		return fmt.Errorf("%w: folder %q: %w; %s", ErrUntrusted, folder, above, above.Hint)
	} else if err != nil {
		return err
	}
	info, err := os.Stat(folder)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%w: %q is not a folder", ErrUntrusted, folder)
	}
	if err := checkOwner(info, folder); err != nil {
		return err
	}
	_, gid, known := ownersOf(info)
	if mode := info.Mode().Perm(); known && (mode&0o002 != 0 || mode&0o020 != 0 && gid > systemGroup) {
		return fmt.Errorf("%w: others could make or replace the socket in folder %q, which has mode %s; %s", ErrUntrusted, folder, owned.ModeText(info.Mode()), owned.ToClose(folder, info.Mode(), "--socket"))
	}
	return nil
}

// systemGroup is the highest number of the groups that no person is in: 0, root or
// wheel, and 1, daemon or bin. A Mac's /var/run belongs to root and daemon: with mode
// 0755 by the table hierarchy.not_sim of apple-oss-distributions/files (files-972; so
// in hierarchy since files-520), and with 0775 by private/var/run/Makefile of before
// (files-473), which a Mac may have kept.
const systemGroup = 1

func checkOwner(info fs.FileInfo, path string) error {
	uid, _, known := ownersOf(info)
	if known && !trusted(uid) {
		return fmt.Errorf("%w: %q belongs to user %d, not to %s", ErrUntrusted, path, uid, trustedText())
	}
	return nil
}

// dialTrusted connects to the helper at path, and to no other process.
func dialTrusted(ctx context.Context, path string) (net.Conn, error) {
	if err := CheckSocket(path); err != nil {
		return nil, err
	}
	c, err := dialPatient(ctx, path)
	if err != nil {
		return nil, err
	}
	// The owner of the file may be right, and another process may listen on it all the
	// same: it could have been there when the file changed hands.
	who, err := connCredentials(c.(*net.UnixConn))
	switch {
	case err != nil:
		err = fmt.Errorf("%w: the user that answers isn't known: %w", ErrUntrusted, err)
	case !trusted(who.UID):
		err = fmt.Errorf("%w: user %d answers there, not %s", ErrUntrusted, who.UID, trustedText())
	default:
		return c, nil
	}
	c.Close()
	return nil, err
}

// dialPatient tries again while the queue of the socket is full, which Linux tells a
// socket that doesn't block by EAGAIN (connect(2)).
func dialPatient(ctx context.Context, path string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if !errors.Is(err, syscall.EAGAIN) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(10 * time.Millisecond):
		}
	}
}
