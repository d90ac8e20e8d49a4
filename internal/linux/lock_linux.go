package linux

import (
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// lockName is an abstract unix socket: its names belong to the network
// namespace, as everything does that two helpers would fight over, and it is
// gone with the process.
const lockName = "@meshhelper-lock"

// lock makes this process the only helper of its network namespace.
func lock() (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: lockName, Net: "unix"})
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("another helper runs on this host%s", lockHolder())
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", lockName, err)
	}
	return l, nil
}

// lockHolder says which process holds the lock: a program that could take it could
// also be a program that only wants the helper not to start.
func lockHolder() string {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: lockName, Net: "unix"})
	if err != nil {
		return ""
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return ""
	}
	var who string
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			who = fmt.Sprintf(" (process %d of user %d)", cred.Pid, cred.Uid)
		}
	})
	return who
}
