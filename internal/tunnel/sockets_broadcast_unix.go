//go:build unix

package tunnel

import "golang.org/x/sys/unix"

// noBroadcast takes back what Go lets each UDP socket do (setDefaultSockopts in
// net/sockopt_linux.go and net/sockopt_bsd.go): the kernel then refuses to send to a
// broadcast address (socket(7)).
func noBroadcast(fd uintptr) error {
	return unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
}
