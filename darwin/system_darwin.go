package darwin

import (
	"errors"
	"io"
	"os"
	"strconv"

	"golang.org/x/net/route"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// A System is this Mac's kernel.
type System struct{}

// Interfaces implements Kernel.
func (System) Interfaces() ([]byte, error) { return fetch(unix.NET_RT_IFLIST2) }

// Routes implements Kernel.
func (System) Routes() ([]byte, error) { return fetch(unix.NET_RT_DUMP2) }

// fetch reads a table, again if the kernel answers ENOMEM: the size is asked first, and the
// table may grow before it is read.
func fetch(kind route.RIBType) (b []byte, err error) {
	for range 10 {
		b, err = route.FetchRIB(unix.AF_UNSPEC, kind, 0)
		if !errors.Is(err, unix.ENOMEM) {
			break
		}
	}
	return b, err
}

// OpenRoute implements Kernel. Closing the socket ends a Read.
func (System) OpenRoute() (io.ReadWriteCloser, error) {
	// ForkLock isn't taken: at worst a child that is started in between inherits the socket,
	// which reveals nothing secret.
	fd, err := unix.Socket(unix.AF_ROUTE, unix.SOCK_RAW, unix.AF_UNSPEC)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	unix.CloseOnExec(fd)
	// Non-blocking, so that the runtime's poller waits and Close wakes it.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "route"), nil
}

// Sysctl implements Kernel.
func (System) Sysctl(name string) (string, error) {
	switch name {
	case xnu.IPv4Forwarding, xnu.IPv6Forwarding, xnu.IPv4CheckInterface, xnu.IPv6CheckInterface, xnu.PortFirst, xnu.PortLast, xnu.PortHiFirst, xnu.PortHiLast:
		n, err := unix.SysctlUint32(name)
		return strconv.FormatInt(int64(int32(n)), 10), err
	}
	return unix.Sysctl(name)
}

// Table implements Kernel. As in fetch, the list may grow between the two calls.
func (System) Table(name string) (b []byte, err error) {
	for range 10 {
		b, err = unix.SysctlRaw(name)
		if !errors.Is(err, unix.ENOMEM) {
			break
		}
	}
	return b, err
}
