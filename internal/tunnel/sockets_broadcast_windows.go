package tunnel

import "golang.org/x/sys/windows"

// noBroadcast takes back what Go lets each UDP socket do (setDefaultSockopts in
// net/sockopt_windows.go).
func noBroadcast(fd uintptr) error {
	return windows.SetsockoptInt(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_BROADCAST, 0)
}
