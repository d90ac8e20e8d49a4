//go:build unix

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// sizeOf returns the width and the height of a terminal in characters, and 0 for
// anything else.
func sizeOf(f *os.File) (columns, rows int) {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0
	}
	return int(size.Col), int(size.Row)
}
