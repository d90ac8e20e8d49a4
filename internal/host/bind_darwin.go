package host

import (
	"net"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// bindTo has a socket send by no other interface (IP_BOUND_IF of ip(4)). It may still
// receive what comes in by another one: of TCP, no connection comes of it, for the answer
// leaves by this interface.
func bindTo(iface string) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		i, err := net.InterfaceByName(iface)
		if err != nil {
			return err
		}
		level, option := unix.IPPROTO_IP, unix.IP_BOUND_IF
		if strings.HasSuffix(network, "6") {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_BOUND_IF
		}
		var failed error
		err = c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), level, option, i.Index) })
		if err != nil {
			return err
		}
		return failed
	}
}
