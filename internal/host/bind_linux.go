package host

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// bindTo binds a socket to an interface: it receives nothing that comes in by another, and
// sends by no other (SO_BINDTODEVICE of socket(7)).
func bindTo(iface string) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.BindToDevice(int(fd), iface) })
		if err != nil {
			return err
		}
		return failed
	}
}
