//go:build unix

package main

import (
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// sizeOf returns the width and height of a terminal in characters (ioctl_tty(2),
// TIOCGWINSZ), and 0, 0 if f is no terminal. A serial console may say 0, 0, too.
func sizeOf(f *os.File) (columns, rows int) {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0
	}
	return int(size.Col), int(size.Row)
}

// isNullDevice reports whether f is the null device, which discards what is written to it.
// A standard output that the caller closed is one, too: the Go runtime opens /dev/null in its
// place (runtime.checkfds, runtime/fds_unix.go). The device number counts rather than the
// file, because a container has a node of its own.
func isNullDevice(f *os.File) bool {
	is, err := f.Stat()
	if err != nil || is.Mode()&fs.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	if err != nil {
		return false
	}
	one, ok := is.Sys().(*syscall.Stat_t)
	other, known := null.Sys().(*syscall.Stat_t)
	return ok && known && one.Rdev == other.Rdev
}
