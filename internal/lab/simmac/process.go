package simmac

// Processes on the simulated Mac, which a test can kill.

import (
	"context"
	"errors"
	"io"
	"sync"

	"golang.zx2c4.com/wireguard/tun"
)

// ErrKilled is the error of each call of a killed process.
var ErrKilled = errors.New("the process was killed")

// A Process is a program that runs on the Mac as root, with the same methods as the Mac
// itself. When it is killed, its tunnels and sockets close, and its later calls fail
// without an effect. A test that kills the helper at a step calls [Process.Kill] from
// the function of a [Stepper].
type Process struct {
	mac *Mac

	mu      sync.Mutex
	dead    bool
	closers map[io.Closer]bool
}

// Process starts a program.
func (m *Mac) Process() *Process {
	return &Process{mac: m, closers: map[io.Closer]bool{}}
}

// Killed reports whether the process was killed.
func (p *Process) Killed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

// Kill ends the process as SIGKILL does. launchd isn't told.
func (p *Process) Kill() {
	p.mu.Lock()
	closers := p.closers
	p.closers, p.dead = nil, true
	p.mu.Unlock()
	for c := range closers {
		c.Close()
	}
}

// own registers c to be closed when the process ends. It returns an error if the process
// has ended; then the caller closes c.
func (p *Process) own(c io.Closer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead {
		return ErrKilled
	}
	p.closers[c] = true
	return nil
}

func (p *Process) disown(c io.Closer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.closers, c)
}

// Run implements darwin.Runner and launchd.Runner.
func (p *Process) Run(ctx context.Context, stdin []byte, file string, args ...string) (stdout, stderr []byte, status int, err error) {
	if p.Killed() {
		return nil, nil, -1, ErrKilled
	}
	stdout, stderr, status, err = p.mac.Run(ctx, stdin, file, args...)
	if p.Killed() {
		return nil, nil, -1, ErrKilled
	}
	return stdout, stderr, status, err
}

// Interfaces implements darwin.Kernel.
func (p *Process) Interfaces() ([]byte, error) {
	if p.Killed() {
		return nil, ErrKilled
	}
	return p.mac.Interfaces()
}

// Routes implements darwin.Kernel.
func (p *Process) Routes() ([]byte, error) {
	if p.Killed() {
		return nil, ErrKilled
	}
	return p.mac.Routes()
}

// Sysctl implements darwin.Kernel.
func (p *Process) Sysctl(name string) (string, error) {
	if p.Killed() {
		return "", ErrKilled
	}
	return p.mac.Sysctl(name)
}

// Table implements darwin.Kernel.
func (p *Process) Table(name string) ([]byte, error) {
	if p.Killed() {
		return nil, ErrKilled
	}
	return p.mac.Table(name)
}

// OpenRoute implements darwin.Kernel.
func (p *Process) OpenRoute() (io.ReadWriteCloser, error) {
	s, err := p.mac.OpenRoute()
	if err != nil {
		return nil, err
	}
	o := &processSocket{s, p}
	if err := p.own(o); err != nil {
		s.Close()
		return nil, err
	}
	return o, nil
}

// A processSocket is a routing socket of a process.
type processSocket struct {
	io.ReadWriteCloser
	p *Process
}

func (s *processSocket) Write(b []byte) (int, error) {
	if s.p.Killed() {
		return 0, ErrKilled
	}
	return s.ReadWriteCloser.Write(b)
}

func (s *processSocket) Close() error {
	s.p.disown(s)
	return s.ReadWriteCloser.Close()
}

// CreateTUN creates a utun device that closes with the process.
func (p *Process) CreateTUN(name string, mtu int) (tun.Device, error) {
	if p.Killed() {
		return nil, ErrKilled
	}
	d, err := p.mac.CreateTUN(name, mtu)
	if err != nil {
		return nil, err
	}
	if err := p.own(d); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}
