//go:build !linux

package netlab

// What is left of the package where there are no network namespaces.

import (
	"fmt"
	"runtime"
)

// Main runs a program that would use hosts; here there are none.
func Main(run func() int) int { return run() }

// Unavailable says why no hosts can be made by this process.
func Unavailable() error {
	return fmt.Errorf("make network namespaces: Linux has them, %s doesn't", runtime.GOOS)
}
