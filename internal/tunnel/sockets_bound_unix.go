//go:build unix && !linux

package tunnel

import "golang.org/x/sys/unix"

// bound reports whether fd is a socket without a pending error. One that the system made
// defunct has a pending error, or fails these calls.
func bound(fd uintptr) bool {
	pending, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil || pending != 0 {
		return false
	}
	_, err = unix.Getsockname(int(fd))
	return err == nil
}
