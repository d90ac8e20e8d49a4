//go:build unix

package tunnel

import "golang.org/x/sys/unix"

// noBroadcast clears SO_BROADCAST, which Go sets on every UDP socket (setDefaultSockopts in
// net/sockopt_linux.go and net/sockopt_bsd.go). The kernel then refuses to send to a
// broadcast address (socket(7)); Sockets says why that matters.
func noBroadcast(fd uintptr) error {
	return unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
}
