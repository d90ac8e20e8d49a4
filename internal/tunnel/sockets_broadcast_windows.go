package tunnel

import "golang.org/x/sys/windows"

// noBroadcast clears SO_BROADCAST, which Go sets on every UDP socket (setDefaultSockopts in
// net/sockopt_windows.go).
func noBroadcast(fd uintptr) error {
	return windows.SetsockoptInt(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_BROADCAST, 0)
}
