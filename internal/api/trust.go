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

// ErrUntrusted is in the chain of an error if a user other than root and this process's own
// controls a socket, or could replace it. No request was sent then: such a user could answer
// with a configuration that leads a device to their own host.
var ErrUntrusted = errors.New("the socket can't be trusted")

// trusted reports whether a user is root or this process's own.
func trusted(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// trustedText names the trusted users, for messages.
func trustedText() string {
	if uid := os.Geteuid(); uid > 0 {
		return fmt.Sprintf("root or user %d", uid)
	}
	return "root"
}

// CheckSocket refuses a socket that a user other than root and this process's own may have
// made (ErrUntrusted). It checks the owner of the socket, and owner and mode of its folder
// and of those above. It follows links in the path of the folder, but not one at path
// itself. The result may be outdated by the time of a connection, so a Client also checks
// the process that answers.
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

// checkFolder refuses a folder that other users could replace, or make or replace a socket
// in. The sticky bit doesn't help: it keeps them from replacing a socket, but not from
// making it first.
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

// systemGroup is the highest gid of the groups without human members: 0, root or wheel, and
// 1, daemon or bin. They may have write access, because /var/run of a Mac belongs to root and
// daemon. Its mode is 0755 by the table hierarchy.not_sim in apple-oss-distributions/files
// (files-972; in hierarchy since files-520), but was 0775 before (private/var/run/Makefile of
// files-473), and an upgraded Mac may have kept that.
const systemGroup = 1

// checkOwner refuses a file of a user that isn't trusted.
func checkOwner(info fs.FileInfo, path string) error {
	uid, _, known := ownersOf(info)
	if known && !trusted(uid) {
		return fmt.Errorf("%w: %q belongs to user %d, not to %s", ErrUntrusted, path, uid, trustedText())
	}
	return nil
}

// dialTrusted connects to the socket at path if a trusted user's process listens on it.
func dialTrusted(ctx context.Context, path string) (net.Conn, error) {
	if err := CheckSocket(path); err != nil {
		return nil, err
	}
	c, err := dialPatient(ctx, path)
	if err != nil {
		return nil, err
	}
	// Another user's process may listen even if the owner of the file is trusted: it may have
	// been listening already when the file's owner was changed.
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

// dialPatient connects, and retries for up to dialTimeout while the queue of the socket is
// full. Linux reports that on a non-blocking socket by EAGAIN (connect(2)).
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
