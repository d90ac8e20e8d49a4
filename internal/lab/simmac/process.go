package simmac

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"

	"golang.zx2c4.com/wireguard/tun"
)

// ErrKilled is what a killed process's calls give: it doesn't live to see them.
var ErrKilled = errors.New("the process was killed")

// A Process is a program that runs on the Mac as root, with the same seams as the
// Mac itself. It can be killed at any of its steps, which are the commands and
// routing messages that may change the Mac and the making of tunnels: then its
// tunnels and sockets close, and nothing that it still tries has an effect.
type Process struct {
	mac *Mac

	mu      sync.Mutex
	steps   []string
	crash   crashPoint
	dead    bool
	closers map[io.Closer]bool
}

// A crashPoint is the step at which a process is killed.
type crashPoint struct {
	step  int // from 1; 0: none
	after bool
}

// Process starts a program.
func (m *Mac) Process() *Process {
	return &Process{mac: m, closers: map[io.Closer]bool{}}
}

// KillAt kills the process at its nth step from the start, counted from 1: before
// the step has an effect, or after it had one and before the process knows.
func (p *Process) KillAt(n int, after bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.crash = crashPoint{n, after}
}

// Steps returns the steps so far, as one would type them.
func (p *Process) Steps() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.steps...)
}

// Killed reports whether the process was killed.
func (p *Process) Killed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

// Kill ends the process as SIGKILL does. launchd and others stay as they are.
func (p *Process) Kill() {
	p.mu.Lock()
	closers := p.closers
	p.closers, p.dead = nil, true
	p.mu.Unlock()
	for c := range closers {
		c.Close()
	}
}

// do runs one step, or dies at it.
func (p *Process) do(name string, step func() error) error {
	p.mu.Lock()
	if p.dead {
		p.mu.Unlock()
		return ErrKilled
	}
	p.steps = append(p.steps, name)
	here := len(p.steps) == p.crash.step
	after := p.crash.after
	p.mu.Unlock()
	if here && !after {
		p.Kill()
		return ErrKilled
	}
	err := step()
	if here {
		p.Kill()
		return ErrKilled
	}
	return err
}

// own closes c when the process ends. If it has ended, the caller closes it.
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

// looking are the arguments of commands that change nothing.
var looking = []string{"-s", "-T show", "-T test", "-n", "print", "print-disabled", "dumpbtm", "--dns",
	"--getglobalstate", "--getblockall", "--listapps", "--getappblocked"}

func onlyLooks(file, line string) bool {
	// `ifconfig NAME inet6` shows addresses.
	if f := strings.Fields(line); path.Base(file) == "ifconfig" && len(f) == 2 && f[1] == "inet6" {
		return true
	}
	for _, l := range looking {
		if strings.Contains(" "+line+" ", " "+l+" ") {
			return path.Base(file) != "pfctl" || l != "-n"
		}
	}
	return false
}

// Run implements darwin.Runner and launchd.Runner.
func (p *Process) Run(ctx context.Context, stdin []byte, file string, args ...string) (stdout, stderr []byte, status int, err error) {
	run := func() error {
		stdout, stderr, status, err = p.mac.Run(ctx, stdin, file, args...)
		return err
	}
	line := strings.Join(args, " ")
	if !onlyLooks(file, line) {
		err = p.do(path.Base(file)+" "+line, run)
	} else if p.Killed() {
		err = ErrKilled
	} else {
		err = run()
	}
	if err != nil {
		return nil, nil, -1, err
	}
	return stdout, stderr, status, nil
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

func (s *processSocket) Write(b []byte) (n int, err error) {
	err = s.p.do(fmt.Sprintf("route message %d", b[min(3, len(b)-1)]), func() error {
		n, err = s.ReadWriteCloser.Write(b)
		return err
	})
	return n, err
}

func (s *processSocket) Close() error {
	s.p.disown(s)
	return s.ReadWriteCloser.Close()
}

// CreateTUN makes a utun device of the process.
func (p *Process) CreateTUN(name string, mtu int) (d tun.Device, err error) {
	err = p.do("create "+name, func() error {
		d, err = p.mac.CreateTUN(name, mtu)
		if err == nil {
			err = p.own(d)
		}
		return err
	})
	if err != nil {
		if d != nil {
			d.Close()
		}
		return nil, err
	}
	return d, nil
}
