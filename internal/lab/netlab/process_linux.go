package netlab

// Programs that run on a host.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopGrace is how long a program may take to end after SIGTERM before it is killed.
const stopGrace = 10 * time.Second

// Process is a program that runs on a host.
type Process struct {
	cmd  *exec.Cmd
	out  *syncBuffer
	done chan struct{} // closed when the program has ended
	err  error         // how it ended; set before done is closed
}

// Start starts a program on the host and returns without waiting for it. Its output is
// kept. It is stopped when the lab closes, and killed when this process dies. env is added
// to the environment.
func (h *Host) Start(env []string, name string, args ...string) (*Process, error) {
	p := &Process{out: &syncBuffer{}, done: make(chan struct{})}
	p.cmd = h.command(env, name, args)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	if err := h.call(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", name, h.Name, err)
	}
	h.lab.run.Go(func() error {
		p.err = p.cmd.Wait()
		close(p.done)
		return nil
	})
	h.lab.onClose(func() error {
		p.Stop()
		return nil
	})
	return p, nil
}

// command prepares a program. The caller starts it on the host's own thread, whose
// namespaces it inherits and with which it dies.
func (h *Host) command(env []string, name string, args []string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Dir = h.lab.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	return cmd
}

// Run runs a program on the host to its end and returns its output and exit status. It
// returns an error if the program couldn't be started, or was killed because the context
// ended.
func (h *Host) Run(ctx context.Context, stdin, name string, args ...string) (stdout, stderr string, status int, err error) {
	var out, talk bytes.Buffer
	cmd := h.command(nil, name, args)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewBufferString(stdin), &out, &talk
	if err := h.call(cmd.Start); err != nil {
		return "", "", -1, fmt.Errorf("run %s on %s: %w", name, h.Name, err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	err = cmd.Wait()
	if !stop() {
		return out.String(), talk.String(), -1, fmt.Errorf("run %s on %s: %w", name, h.Name, context.Cause(ctx))
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out.String(), talk.String(), exit.ExitCode(), nil
	}
	return out.String(), talk.String(), 0, err
}

// PID returns the program's process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Output returns what the program has printed so far to stdout and stderr.
func (p *Process) Output() string { return p.out.String() }

// Signal sends the program a signal.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Done returns a channel that is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns how the program ended, once it has; nil for exit status 0.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// Kill kills the program with SIGKILL, as a crash would end it, and waits for its end.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// Stop asks the program to end, kills it if it doesn't within ten seconds, and
// returns how it ended.
func (p *Process) Stop() error {
	p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.done:
		return p.err
	case <-time.After(stopGrace):
		p.Kill()
		return fmt.Errorf("stop process %d: still running %s after SIGTERM", p.PID(), stopGrace)
	}
}

// syncBuffer is a buffer for concurrent writes and reads.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
