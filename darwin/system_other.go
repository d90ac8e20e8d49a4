//go:build !darwin

package darwin

import (
	"errors"
	"fmt"
	"io"
)

// errNotDarwin is what every system call answers here.
var errNotDarwin = fmt.Errorf("this is not macOS: %w", errors.ErrUnsupported)

// A System is a Mac's kernel; on this system it only gives errors.
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
