package simmac

// A killed process has no effect any more.

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
)

// helper does what a helper does at its start, as far as it gets, and calls step
// after each of its changes.
func helper(t *testing.T, p *Process, step func()) error {
	t.Helper()
	ctx := t.Context()
	d, err := p.CreateTUN("utun", 1420)
	if err != nil {
		return err
	}
	step()
	name, err := d.Name()
	if err != nil {
		return err
	}
	if err := darwin.NewIfconfig(p).AddAddress(ctx, name, netip.MustParseAddr("100.64.0.1")); err != nil {
		return err
	}
	step()
	n, err := darwin.Observe(p)
	if err != nil {
		return err
	}
	if err := darwin.NewRouter(p).Set(n.Interface(name).Index, []netip.Prefix{netip.MustParsePrefix("100.64.0.2/32")}); err != nil {
		return err
	}
	step()
	pf := darwin.NewPF(p)
	if err := pf.Load(ctx, anchor, "block all\n"); err != nil {
		return err
	}
	step()
	if _, err := pf.Enable(ctx); err != nil {
		return err
	}
	step()
	if err := darwin.NewSysctl(p, p).SetForwarding(ctx, darwin.IPv4, true); err != nil {
		return err
	}
	step()
	return nil
}

// TestProcessDiesAtEachStep kills a process after each of its changes, and so before
// the next.
func TestProcessDiesAtEachStep(t *testing.T) {
	const last = 6
	for n := 1; n <= last; n++ {
		m := newMac(t)
		p := m.Process()
		steps := 0
		err := helper(t, p, func() {
			if steps++; steps == n {
				p.Kill()
			}
		})
		if !p.Killed() || n < last && !errors.Is(err, ErrKilled) {
			t.Errorf("step %d: %v", n, err)
		}
		if steps != n {
			t.Errorf("killed after step %d, and went on to step %d", n, steps)
		}
		dump := m.Dump()
		if strings.Contains(dump, "utun0") || strings.Contains(dump, "100.64.0.2") {
			t.Errorf("step %d: the tunnel or its routes outlived the process", n)
		}
		// What the kernel keeps for no process in particular stays.
		for step, sign := range map[int]string{4: "[" + anchor + "]", 5: "1 tokens", 6: "net.inet.ip.forwarding 1"} {
			if done := n >= step; strings.Contains(dump, sign) != done {
				t.Errorf("killed after step %d: %q is left: %v", n, sign, !done)
			}
		}
	}
}

func TestKilledProcessHasNoEffect(t *testing.T) {
	m := newMac(t)
	p := m.Process()
	conn, err := p.OpenRoute()
	must(t, err)
	reader := make(chan error)
	go func() {
		_, err := conn.Read(make([]byte, 100))
		reader <- err
	}()
	p.Kill()
	if err := <-reader; err == nil {
		t.Error("the socket of a killed process still reads")
	}
	before := m.Dump()
	if err := helper(t, p, func() {}); !errors.Is(err, ErrKilled) {
		t.Errorf("a killed process goes on: %v", err)
	}
	if _, err := darwin.NewPF(p).Info(t.Context()); !errors.Is(err, ErrKilled) {
		t.Errorf("a killed process looks: %v", err)
	}
	if _, err := darwin.Observe(p); !errors.Is(err, ErrKilled) {
		t.Errorf("a killed process observes: %v", err)
	}
	if _, err := p.OpenRoute(); !errors.Is(err, ErrKilled) {
		t.Errorf("a killed process opens a socket: %v", err)
	}
	if diff := cmp.Diff(before, m.Dump()); diff != "" {
		t.Errorf("the Mac changed (-before +after):\n%s", diff)
	}
	// The next one starts on what is left.
	if err := helper(t, m.Process(), func() {}); err != nil {
		t.Error(err)
	}
}

func BenchmarkInject(b *testing.B) {
	m := newMac(b)
	newTunnel(b, m)
	packet := syn(netip.MustParseAddr("100.64.0.2"), netip.MustParseAddr("100.64.0.1"))
	b.ReportAllocs()
	for b.Loop() {
		if o := m.Inject("utun0", packet); o.Fate != Delivered {
			b.Fatal(o.Why)
		}
	}
}
