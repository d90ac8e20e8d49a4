//go:build !linux && !darwin

package host

import (
	"errors"
	"syscall"
)

// bindTo fails: no kernel but Linux's and macOS's has a mesh interface.
func bindTo(string) func(network, address string, c syscall.RawConn) error {
	return func(string, string, syscall.RawConn) error { return errors.ErrUnsupported }
}
