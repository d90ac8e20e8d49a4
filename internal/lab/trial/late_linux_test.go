package trial

// Permissions that end while the host is slow or full, or no helper runs.

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// badDay is a fault of B while permissions end.
type badDay struct {
	name string
	// prepare is called before the helper starts. begin causes the fault, and returns a
	// function that ends it.
	prepare func(*testing.T, *Mesh)
	begin   func(*testing.T, *Mesh) (end func())
	// saved means that changes can be saved.
	saved bool
	// stopped means that the helper itself is stopped until the end.
	stopped bool
}

var badDays = []badDay{
	{name: "frozen state disk", prepare: diskOfItsOwn, begin: freeze},
	{name: "full state disk", prepare: smallDisk, begin: fill},
	{name: "stderr that is not read", prepare: blockedStderr, begin: func(*testing.T, *Mesh) func() { return func() {} }, saved: true},
	{name: "helper stopped by a signal", prepare: func(*testing.T, *Mesh) {}, begin: suspend, saved: true, stopped: true},
}

// onB runs a program on B that must succeed.
func onB(t *testing.T, m *Mesh, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), commandWait)
	defer cancel()
	if _, talk, status, err := m.B.Run(ctx, "", name, args...); err != nil || status != 0 {
		t.Fatalf("%s %s: status %d, %v: %s", name, strings.Join(args, " "), status, err, talk)
	}
}

// mountPoint creates a new state directory.
func mountPoint(t *testing.T, m *Mesh) {
	t.Helper()
	m.stateDir = filepath.Join(m.Lab.Dir(), "disk")
	if err := os.Mkdir(m.stateDir, 0o700); err != nil {
		t.Fatal(err)
	}
}

// diskOfItsOwn puts the state on a file system that can be frozen.
func diskOfItsOwn(t *testing.T, m *Mesh) {
	t.Helper()
	for _, tool := range []string{"mkfs.ext4", "fsfreeze", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("no file system to freeze:", err)
		}
	}
	mountPoint(t, m)
	image := m.stateDir + ".img"
	if err := os.WriteFile(image, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	onB(t, m, "mkfs.ext4", "-q", image)
	ctx, cancel := context.WithTimeout(t.Context(), commandWait)
	defer cancel()
	if _, talk, status, err := m.B.Run(ctx, "", "mount", "-o", "loop", image, m.stateDir); err != nil || status != 0 {
		t.Skipf("no file system to freeze: mount: status %d, %v: %s", status, err, talk)
	}
	onB(t, m, "chmod", "0700", m.stateDir)
}

func freeze(t *testing.T, m *Mesh) func() {
	t.Helper()
	frozen := true
	thaw := func() {
		if frozen {
			frozen = false
			onB(t, m, "fsfreeze", "--unfreeze", m.stateDir)
		}
	}
	t.Cleanup(thaw) // otherwise no process with an open file on it could exit
	onB(t, m, "fsfreeze", "--freeze", m.stateDir)
	return thaw
}

// smallDisk puts the state on a disk with little space.
func smallDisk(t *testing.T, m *Mesh) {
	t.Helper()
	mountPoint(t, m)
	onB(t, m, "mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "none", m.stateDir)
}

func fill(t *testing.T, m *Mesh) func() {
	t.Helper()
	ballast := filepath.Join(m.stateDir, "ballast")
	ctx, cancel := context.WithTimeout(t.Context(), commandWait)
	defer cancel()
	// dd ends with an error when the disk is full.
	if _, talk, _, err := m.B.Run(ctx, "", "dd", "if=/dev/zero", "of="+ballast, "bs=512"); err != nil || !strings.Contains(talk, "No space left") {
		t.Fatalf("fill the disk: %v: %s", err, talk)
	}
	return func() { onB(t, m, "rm", ballast) }
}

// blockedStderr gives the helper a stderr pipe that is full and that no process reads.
func blockedStderr(t *testing.T, m *Mesh) {
	t.Helper()
	pipe := filepath.Join(m.Lab.Dir(), "stderr")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(pipe, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for size := 4096; size > 0; {
		if _, err := unix.Write(fd, make([]byte, size)); errors.Is(err, unix.EAGAIN) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	script := filepath.Join(m.Lab.Dir(), "blocked")
	text := "#!/bin/sh\nexec " + m.binary + ` "$@" 2>` + pipe + "\n"
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	m.helper = script
}

func suspend(t *testing.T, m *Mesh) func() {
	t.Helper()
	if err := m.Helper.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := func() {
		if err := m.Helper.Signal(unix.SIGCONT); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() { _ = m.Helper.Signal(unix.SIGCONT) }) // a stopped process can't exit
	return resume
}

// TestNothingIsLate has one permission expire and revokes another one while the helper
// can't save, can't log, or is stopped: no packet that is sent after the expiry, or after
// the command returned, arrives. The command returns, and reports if the change isn't
// saved.
func TestNothingIsLate(t *testing.T) {
	for _, day := range badDays {
		t.Run(day.name, func(t *testing.T) {
			m := newStage(t)
			day.prepare(t, m)
			start(t, m)
			addPeers(t, m)
			permit(t, m, "C", mesh.Incoming)
			permit(t, m, "D", everything)
			own := status(t, m).Address()
			do(t, m, "peer", "allow", "C", "routing", "--for", "1h")
			expiring := flows(t, m, m.C, m.I, netlab.Addresses().I)
			denied := flows(t, m, m.C, m.B, own)
			others := bystanders(t, m, m.D, m.I, netlab.Addresses().I)
			// The expiry is set once all flows run, as late as the machine needs.
			var until time.Time
			for lasts := 4 * time.Second; time.Until(until) < time.Second; lasts *= 2 {
				do(t, m, "peer", "allow", "C", "routing", "--for", lasts.String())
				until = grant(t, m, "C", "routing").Until
			}
			time.Sleep(time.Until(until.Add(-time.Second)))
			end := day.begin(t, m)

			// The deny returns at once, or when the stopped helper continues.
			type answer struct {
				Output
				at time.Time
			}
			answered := make(chan answer, 1)
			var asked time.Time
			deny := func() {
				o, _ := m.Do(context.WithoutCancel(t.Context()), "peer", "deny", "C", "incoming")
				answered <- answer{o, time.Now()}
			}
			time.Sleep(time.Until(until.Add(4 * time.Second)))
			if day.stopped {
				go deny()
				time.Sleep(time.Second)
				asked = time.Now()
				end()
			} else {
				asked = time.Now()
				deny()
			}
			a := <-answered
			mustEnd(t, denied, a.at)
			mustEnd(t, expiring, until)
			t.Logf("deny: status %d after %v: %s", a.Status, a.at.Sub(asked).Round(time.Millisecond), strings.TrimSpace(a.Stdout+a.Stderr))
			if a.at.Sub(asked) > 10*time.Second {
				t.Errorf("deny took %v", a.at.Sub(asked))
			}
			if day.saved != (a.Status == 0) || day.saved == strings.Contains(a.Stderr, "isn't saved") {
				t.Errorf("deny: status %d: %s%s", a.Status, a.Stdout, a.Stderr)
			}
			for _, f := range others {
				if err := f.WaitBothWays(20, generous); err != nil {
					t.Errorf("another peer's flow: %v", err)
				}
			}
			if !day.saved && !strings.Contains(problemsOf(status(t, m)), "saved") {
				t.Errorf("status doesn't report that a change isn't saved: %s", problemsOf(status(t, m)))
			}
			if !day.stopped {
				end()
			}
			for deadline := time.Now().Add(generous); strings.Contains(problemsOf(status(t, m)), "saved"); time.Sleep(100 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("the disk works again, but the change isn't saved: %s", problemsOf(status(t, m)))
				}
			}
			for _, list := range [][]*netlab.Flow{expiring, denied, others} {
				for _, f := range list {
					f.Stop()
				}
			}
			m.Helper.Kill()
			m.helper = m.binary
			start(t, m)
			for _, p := range []string{"routing", "incoming"} {
				if grant(t, m, "C", p).Allowed {
					t.Errorf("%s is back after a restart", p)
				}
			}
		})
	}
}

func problemsOf(s Status) string {
	var all []string
	for _, p := range s.Problems {
		all = append(all, p.Step+": "+p.Message)
	}
	return strings.Join(all, "; ")
}
