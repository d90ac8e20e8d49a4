package main

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/install"
	"github.com/meshhelper/meshhelper/internal/reconcile"
	"github.com/meshhelper/meshhelper/internal/systemd"
)

// A manager is a service manager's end of NOTIFY_SOCKET.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
}

func newManager(t *testing.T, address string) *manager {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &manager{t, c}
}

// next returns the lines of the next datagram, or nil after the time.
func (m *manager) next(within time.Duration) []string {
	m.t.Helper()
	m.conn.SetReadDeadline(time.Now().Add(within))
	b := make([]byte, 4096)
	n, err := m.conn.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.Split(string(b[:n]), "\n")
}

// await reads until a datagram has the line, and returns all lines before.
func (m *manager) await(line string) (before []string) {
	m.t.Helper()
	for late := time.Now().Add(limit); ; {
		lines := m.next(time.Until(late))
		if lines == nil {
			m.t.Fatalf("the manager wasn't told %s, but %q", line, before)
		}
		if slices.Contains(lines, line) {
			return before
		}
		before = append(before, lines...)
	}
}

// TestServiceManagerIsTold starts the real program as systemd does, and has its loop
// hang: it says that it is ready when it enforces and not before, gives signs of life
// while the loop turns and none while it hangs, and says that it ends.
func TestServiceManagerIsTold(t *testing.T) {
	for _, kind := range []string{"path", "abstract"} {
		t.Run(kind, func(t *testing.T) {
			name := link(t)
			dir := filepath.Dir(name)
			address := filepath.Join(dir, "notify")
			if kind == "abstract" {
				address = "@" + address
			}
			faults := filepath.Join(dir, "faults")
			if err := os.Mkdir(faults, 0o700); err != nil {
				t.Fatal(err)
			}
			// The first ruleset isn't loaded until the test lets it go on.
			release := hold(t, faults, "enforce")
			m := newManager(t, address)
			cmd := exec.Command(name, "run", "--platform", "fake", "--tick", "100ms", "--listen-port", "0",
				"--state-dir", filepath.Join(dir, "state"), "--socket", filepath.Join(dir, "s"))
			cmd.Env = append(os.Environ(), "FAULTS="+faults, "NOTIFY_SOCKET="+address, "WATCHDOG_USEC=1000000")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			t.Cleanup(func() { cmd.Process.Kill() })

			letGo := release()
			m.mustBeSilent("before the first ruleset is loaded")
			letGo()
			m.await(systemd.Ready)
			m.await(systemd.Alive)
			m.await(systemd.Alive)

			letGo = hold(t, faults, "observe")()
			m.mustBeSilent("while its loop hangs")
			letGo()
			m.await(systemd.Alive)

			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			m.await(systemd.Stopping)
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}

// mustBeSilent reads what was told until now, and wants that then neither readiness nor
// a sign of life comes for ten looks at the host.
func (m *manager) mustBeSilent(when string) {
	m.t.Helper()
	for m.next(time.Millisecond) != nil {
	}
	for lines := m.next(time.Second); lines != nil; lines = m.next(time.Second) {
		if slices.Contains(lines, systemd.Ready) || slices.Contains(lines, systemd.Alive) {
			m.t.Fatalf("%s it said %q", when, lines)
		}
	}
}

// hold has a step of the fake host hang. It returns a function that waits until the
// helper is in the step, and returns what lets it go on, with an error.
func hold(t *testing.T, faults, step string) (waitFor func() (letGo func())) {
	t.Helper()
	path := filepath.Join(faults, step)
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return func() func() {
		t.Helper()
		for late := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
			// A pipe that is opened to be read from can be written to.
			fd, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
			if err == nil {
				return func() {
					os.Remove(path)
					syscall.Close(fd)
				}
			}
			if time.Now().After(late) {
				t.Fatalf("the helper isn't in %s: %v", step, err)
			}
		}
	}
}

// TestBadServiceManager has an environment that no service manager makes: the helper
// says so and doesn't start, for nothing would end it when it hangs.
func TestBadServiceManager(t *testing.T) {
	for address, want := range map[string]string{
		"relative":      "neither an absolute path nor an abstract name",
		"/nonexistent/": "connect to the service manager",
	} {
		name := link(t)
		dir := filepath.Dir(name)
		cmd := exec.Command(name, "run", "--platform", "fake", "--listen-port", "0",
			"--state-dir", filepath.Join(dir, "state"), "--socket", filepath.Join(dir, "s"))
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+address)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("NOTIFY_SOCKET=%s: %v\n%s", address, err, out)
		}
	}
}

// TestWatchdogLetsARoundEnd wants the installed helper's watchdog to leave the loop the
// time in which its steps end by their own limits, and the wait between two rounds.
func TestWatchdogLetsARoundEnd(t *testing.T) {
	if least := reconcile.RoundLimit + daemon.DefaultTick; install.WatchdogTime <= least {
		t.Errorf("the watchdog ends the helper after %v, and a round that is well may take %v", install.WatchdogTime, least)
	}
}
