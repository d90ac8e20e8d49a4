//go:build !linux && !darwin

package host

import (
	"errors"
	"syscall"
)

// bindTo fails: only the hosts for Linux and macOS have a mesh interface in the kernel.
func bindTo(string) func(network, address string, c syscall.RawConn) error {
	return func(string, string, syscall.RawConn) error { return errors.ErrUnsupported }
}
