package trial

// Kills of the helper at its steps.

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// stepper gets a message from the helper in each call of the host's Options.Step, before
// and after each step, and answers it, except for one call that it leaves waiting.
type stepper struct {
	listener *net.UnixListener
	stopped  chan halt

	mu     sync.Mutex
	names  []string      // step names, one for each call of this life
	stopAt int           // index of the call that isn't answered; -1 for none
	conn   *net.UnixConn // to the running helper
	closed bool
}

// halt is a helper that waits in a call of Options.Step.
type halt struct {
	name   string
	pid    int
	resume func()
}

// newStepper has the mesh run a helper that reports to the stepper.
func newStepper(t *testing.T, m *Mesh) *stepper {
	t.Helper()
	path := filepath.Join(m.Lab.Dir(), "steps")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	s := &stepper{listener: l, stopAt: -1, stopped: make(chan halt, 1)}
	m.env = []string{"TRIAL_STEPS=" + path}
	use(t, m, "meshhelper-stepped", stepped)
	var run errgroup.Group
	run.Go(s.serve)
	t.Cleanup(func() {
		s.close()
		run.Wait()
	})
	return s
}

// serve answers one helper after another. A connection ends when its helper dies.
func (s *stepper) serve() error {
	for {
		conn, err := s.listener.AcceptUnix()
		if err != nil {
			return nil // closed
		}
		if !s.serves(conn) {
			return conn.Close()
		}
		for scan := bufio.NewScanner(conn); scan.Scan(); {
			s.step(conn, scan.Text())
		}
		conn.Close()
	}
}

// serves records the connection of the running helper, and reports false after close.
func (s *stepper) serves(conn *net.UnixConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = conn
	return !s.closed
}

// close closes the listener, and the connection of the helper, which may be waiting.
func (s *stepper) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.listener.Close()
	if s.conn != nil {
		s.conn.Close()
	}
}

func (s *stepper) step(conn *net.UnixConn, name string) {
	resume := func() { _, _ = conn.Write([]byte{'\n'}) }
	s.mu.Lock()
	s.names = append(s.names, name)
	here := len(s.names)-1 == s.stopAt
	s.mu.Unlock()
	if !here {
		resume()
		return
	}
	s.stopped <- halt{name, peerOf(conn), resume}
}

// peerOf returns the process at the other end.
func peerOf(conn *net.UnixConn) (pid int) {
	if raw, err := conn.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				pid = int(cred.Pid)
			}
		})
	}
	return pid
}

// begin resets the count, and sets the call to stop in.
func (s *stepper) begin(at int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names, s.stopAt = nil, at
}

// life starts a helper, grants and revokes permissions, and stops it. It returns an error
// if the helper is killed. After each deny it adds the packets that must no longer pass
// to the prober.
func life(ctx context.Context, m *Mesh, p *prober) error {
	if err := m.Start(ctx); err != nil {
		return err
	}
	p.guarded(true)
	if err := m.Peers["C"].End.Renew(); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"peer", "allow", "C", "routing"}, {"peer", "allow", "D", "routing", "lan"},
		{"peer", "deny", "C", "routing"}, {"peer", "deny", "D", "lan"}, {"peer", "deny", "D", "routing"},
	} {
		if _, err := m.Do(ctx, args...); err != nil {
			return err
		}
		switch {
		case args[2] == "C" && args[1] == "deny":
			p.add(p.aim(m.C, "wg0", m.Peers["C"].Addresses, netlab.Addresses().I, "C after its deny")...)
		case args[2] == "D" && args[3] == "lan" && args[1] == "deny":
			p.add(p.aim(m.D, "wg0", m.Peers["D"].Addresses, netlab.Addresses().L, "D after its deny")...)
		}
	}
	p.guarded(false)
	return m.Stop()
}

// TestKilledAtEveryStep kills the helper, the real process, at its steps of start, change
// and stop and between them. Packets that must not pass are sent all the time: before the
// kill, while the helper is dead, and after the next one started. After each round the
// host is in its original state.
func TestKilledAtEveryStep(t *testing.T) {
	kills := 24
	if *soak {
		kills = 200
	}
	m := newStage(t)
	before := snapshot(t, m.B)
	s := newStepper(t, m)
	start(t, m)
	addPeers(t, m)
	own := status(t, m).Address()
	stop(t, m)
	leftAlone(t, before, m)

	p := startProber(t, m)
	p.set(p.never(own, true))
	s.begin(-1)
	if err := life(t.Context(), m, p); err != nil {
		t.Fatal(err)
	}
	steps := slices.Clone(s.names)
	leftAlone(t, before, m)
	p.mustHold(t, "a life without a kill")

	random := rand.New(rand.NewPCG(4, 2))
	died := map[string]int{}
	for n, at := range targets(steps, kills) {
		p.set(p.never(own, true))
		s.begin(at)
		var run errgroup.Group
		run.Go(func() error { return life(t.Context(), m, p) })
		var here halt
		select {
		case here = <-s.stopped:
		case <-time.After(generous):
			t.Fatalf("kill %d: call %d of %d of Step wasn't reached", n, at, len(steps))
		}
		p.rounds(t, 1)
		where := fmt.Sprintf("killed in call %d of Step, %q", at, here.name)
		if n%3 == 2 {
			delay := time.Duration(random.IntN(3000)) * time.Microsecond
			where = fmt.Sprintf("killed %s after call %d of Step, %q", delay, at, here.name)
			here.resume()
			time.Sleep(delay)
		}
		if err := unix.Kill(here.pid, unix.SIGKILL); err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		died[here.name]++
		// A helper that was leaving may have exited before the signal arrived.
		if err := run.Wait(); err == nil && n%3 != 2 {
			t.Fatalf("%s, but the helper exited without an error", where)
		}
		if m.Helper != nil {
			<-m.Helper.Done()
		}
		p.rounds(t, 3) // while the helper is dead
		p.mustHold(t, where)
		s.begin(-1)
		start(t, m)
		p.rounds(t, 1)
		p.mustHold(t, where+", while the next one started")
		again(t, m, p)
		p.mustHold(t, where+", after the next one started")
		p.guarded(false)
		stop(t, m)
		p.mustHold(t, where+", when the next one ended")
		leftAlone(t, before, m)
		if t.Failed() {
			t.Fatal(where)
		}
	}
	p.rounds(t, 1)
	p.mustHold(t, "at the end")
	t.Logf("killed %d times at %d of %d kinds of step, in lives of %d calls of Step; sent %d packets that must not pass: 0 passed",
		kills, len(died), len(slices.Compact(slices.Sorted(slices.Values(steps)))), len(steps), p.sent.Load())
}

// targets returns the indexes of the steps to kill at: the first of each kind, and the
// rest of the requested number spread evenly.
func targets(steps []string, kills int) (list []int) {
	for at, name := range steps {
		if slices.Index(steps, name) == at {
			list = append(list, at)
		}
	}
	for more, n := kills-len(list), 0; n < more; n++ {
		if more > len(steps) {
			list = append(list, n%len(steps))
		} else {
			list = append(list, n*len(steps)/more)
		}
	}
	return list
}

// again waits until C's packets reach the guard of the restarted helper, sends all shots
// a few more times, and revokes the permissions.
func again(t *testing.T, m *Mesh, p *prober) {
	t.Helper()
	if s := status(t, m); s.State != "enforcing" || s.Enforced != s.Generation {
		t.Fatalf("restarted: %s, enforced %d of %d: %+v", s.State, s.Enforced, s.Generation, s.Problems)
	}
	if err := m.Peers["C"].End.Renew(); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(generous); refused(t, m, "C", "mesh") == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("no packet of C's arrives at the guard, so the test proves nothing")
		}
	}
	p.guarded(true)
	p.rounds(t, 2)
	permit(t, m, "C", 0)
	permit(t, m, "D", mesh.Incoming)
}

// refused returns how many of a peer's packets of a class were refused.
func refused(t *testing.T, m *Mesh, peer, class string) int {
	t.Helper()
	for _, p := range status(t, m).Peers {
		if p.Name == peer {
			return p.Refused[class]
		}
	}
	t.Fatalf("status knows no peer %q", peer)
	return 0
}
