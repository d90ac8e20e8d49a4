//go:build !darwin

package darwin

import (
	"errors"
	"fmt"
	"io"
)

// errNotDarwin is the error of every method of System on this platform.
var errNotDarwin = fmt.Errorf("not macOS: %w", errors.ErrUnsupported)

// A System is a Mac's kernel. On this platform all of its methods fail with
// errors.ErrUnsupported.
type System struct{}

// Interfaces implements Kernel.
func (System) Interfaces() ([]byte, error) { return nil, errNotDarwin }

// Routes implements Kernel.
func (System) Routes() ([]byte, error) { return nil, errNotDarwin }

// OpenRoute implements Kernel.
func (System) OpenRoute() (io.ReadWriteCloser, error) { return nil, errNotDarwin }

// Sysctl implements Kernel.
func (System) Sysctl(string) (string, error) { return "", errNotDarwin }

// Table implements Kernel.
func (System) Table(string) ([]byte, error) { return nil, errNotDarwin }
