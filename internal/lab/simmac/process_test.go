package simmac

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
)

// helper does what a helper does at its start, as far as it gets.
func helper(t *testing.T, p *Process) error {
	t.Helper()
	ctx := t.Context()
	d, err := p.CreateTUN("utun", 1420)
	if err != nil {
		return err
	}
	name, err := d.Name()
	if err != nil {
		return err
	}
	if err := darwin.NewIfconfig(p).AddAddress(ctx, name, netip.MustParseAddr("100.64.0.1")); err != nil {
		return err
	}
	n, err := darwin.Observe(p)
	if err != nil {
		return err
	}
	if err := darwin.NewRouter(p).Set(n.Interface(name).Index, []netip.Prefix{netip.MustParsePrefix("100.64.0.2/32")}); err != nil {
		return err
	}
	pf := darwin.NewPF(p)
	if err := pf.Load(ctx, anchor, "block all\n"); err != nil {
		return err
	}
	if _, err := pf.Enable(ctx); err != nil {
		return err
	}
	return darwin.NewSysctl(p, p).SetForwarding(ctx, darwin.IPv4, true)
}

func TestProcessSteps(t *testing.T) {
	m := newMac(t)
	p := m.Process()
	if err := helper(t, p); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"create utun",
		"ifconfig utun0 inet 100.64.0.1/32 100.64.0.1 alias",
		"route message 1",
		"pfctl -a " + anchor + " -f -",
		"pfctl -E",
		"sysctl -w net.inet.ip.forwarding=1",
	}
	if diff := cmp.Diff(want, p.Steps()); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
}

func TestProcessDiesAtEachStep(t *testing.T) {
	for n := 1; n <= 6; n++ {
		for _, after := range []bool{false, true} {
			m := newMac(t)
			p := m.Process()
			p.KillAt(n, after)
			if err := helper(t, p); !errors.Is(err, ErrKilled) || !p.Killed() {
				t.Errorf("step %d, after %v: %v", n, after, err)
			}
			if len(p.Steps()) != n {
				t.Errorf("step %d: went on to %q", n, p.Steps())
			}
			dump := m.Dump()
			if strings.Contains(dump, "utun0") || strings.Contains(dump, "100.64.0.2") {
				t.Errorf("step %d: the tunnel or its routes outlived the process", n)
			}
			// What the kernel keeps for no process in particular stays.
			for step, sign := range map[int]string{4: "[" + anchor + "]", 5: "1 tokens", 6: "net.inet.ip.forwarding 1"} {
				done := n > step || n == step && after
				if strings.Contains(dump, sign) != done {
					t.Errorf("killed at step %d, after %v: %q is left: %v", n, after, sign, !done)
				}
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
	if err := helper(t, p); !errors.Is(err, ErrKilled) {
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
	if err := helper(t, m.Process()); err != nil {
		t.Error(err)
	}
}

func TestLookingIsNoStep(t *testing.T) {
	m := newMac(t)
	p := m.Process()
	ctx := t.Context()
	pf := darwin.NewPF(p)
	pf.Info(ctx)
	pf.Rules(ctx, anchor)
	pf.Table(ctx, anchor, "t")
	pf.Skipped(ctx)
	darwin.NewSysctl(p, p).BootSession()
	if got := p.Steps(); len(got) != 0 {
		t.Errorf("steps %q", got)
	}
	must(t, pf.Kill(ctx, netip.MustParsePrefix("100.64.0.2/32")))
	if got := p.Steps(); !slices.Equal(got, []string{"pfctl -k 100.64.0.2", "pfctl -k 0.0.0.0/0 -k 100.64.0.2"}) {
		t.Errorf("steps %q", got)
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
