//go:build !unix

package main

import "os"

// sizeOf returns 0, 0, so that output is never wrapped: there is no TIOCGWINSZ here.
func sizeOf(*os.File) (columns, rows int) { return 0, 0 }

// isNullDevice reports false: only Unix tells a device's number, and only there does the Go
// runtime put the null device in the place of a closed standard output.
func isNullDevice(*os.File) bool { return false }
