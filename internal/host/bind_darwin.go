package host

import (
	"net"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// bindTo makes a socket send only by this interface (IP_BOUND_IF in ip(4)). The socket
// may still receive packets of other interfaces. For TCP no connection comes of it,
// because the answer leaves by this interface.
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
