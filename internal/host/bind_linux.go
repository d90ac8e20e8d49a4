package host

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// bindTo binds a socket to an interface: it neither receives from nor sends by any other
// (SO_BINDTODEVICE in socket(7)).
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
