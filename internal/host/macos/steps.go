package macos

import (
	"context"
	"io"

	"github.com/meshhelper/meshhelper/darwin"
)

// A steppedRunner calls after when a command has run.
type steppedRunner struct {
	darwin.Runner
	after func()
}

// Run implements darwin.Runner.
func (r steppedRunner) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	stdout, stderr, status, err := r.Runner.Run(ctx, stdin, path, args...)
	r.after()
	return stdout, stderr, status, err
}

// A steppedKernel calls after when a routing message has been written.
type steppedKernel struct {
	darwin.Kernel
	after func()
}

// OpenRoute implements darwin.Kernel.
func (k steppedKernel) OpenRoute() (io.ReadWriteCloser, error) {
	s, err := k.Kernel.OpenRoute()
	if err != nil {
		return nil, err
	}
	return steppedSocket{s, k.after}, nil
}

// A steppedSocket is a routing socket of a [steppedKernel].
type steppedSocket struct {
	io.ReadWriteCloser
	after func()
}

func (s steppedSocket) Write(b []byte) (int, error) {
	n, err := s.ReadWriteCloser.Write(b)
	s.after()
	return n, err
}
