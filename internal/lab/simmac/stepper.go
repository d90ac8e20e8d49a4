package simmac

import (
	"context"
	"io"
	"sync"

	"github.com/meshhelper/meshhelper/darwin"
)

// A Stepper adds calls of a host's Options.Step: also after each command and each routing
// message that the host sends within a step, so that a test can kill the helper between
// any two changes of the Mac. It is the host's Runner and Kernel, and [Stepper.Step] its
// Options.Step. Each start of a host takes a Stepper of its own.
type Stepper struct {
	darwin.Kernel
	runner darwin.Runner
	step   func(name string)

	mu   sync.Mutex
	open []string // the steps in progress, the innermost last
}

// NewStepper returns a Stepper for a host on a Mac. step is called in each call of the
// host's Options.Step and after each change, with the step's name.
func NewStepper(r darwin.Runner, k darwin.Kernel, step func(name string)) *Stepper {
	return &Stepper{Kernel: k, runner: r, step: step}
}

// Step is for the host's Options.Step, which is called before and after each step. Steps
// may nest, but not in one of the same name.
func (s *Stepper) Step(name string) {
	s.mu.Lock()
	if n := len(s.open); n > 0 && s.open[n-1] == name {
		s.open = s.open[:n-1]
	} else {
		s.open = append(s.open, name)
	}
	s.mu.Unlock()
	s.step(name)
}

// changed calls step if a step is in progress.
func (s *Stepper) changed() {
	s.mu.Lock()
	name := ""
	if n := len(s.open); n > 0 {
		name = s.open[n-1]
	}
	s.mu.Unlock()
	if name != "" {
		s.step(name)
	}
}

// Run implements darwin.Runner.
func (s *Stepper) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	stdout, stderr, status, err := s.runner.Run(ctx, stdin, path, args...)
	s.changed()
	return stdout, stderr, status, err
}

// OpenRoute implements darwin.Kernel.
func (s *Stepper) OpenRoute() (io.ReadWriteCloser, error) {
	socket, err := s.Kernel.OpenRoute()
	if err != nil {
		return nil, err
	}
	return steppedSocket{socket, s}, nil
}

// A steppedSocket is a routing socket of a [Stepper].
type steppedSocket struct {
	io.ReadWriteCloser
	s *Stepper
}

func (o steppedSocket) Write(b []byte) (int, error) {
	n, err := o.ReadWriteCloser.Write(b)
	o.s.changed()
	return n, err
}
