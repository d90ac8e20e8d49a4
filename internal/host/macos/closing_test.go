package macos

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// badRunner is a Runner whose commands fail if bad reports true for them. With hang they
// block until their context ends.
type badRunner struct {
	darwin.Runner
	hang bool
	bad  func(command string) bool
}

func (b badRunner) Run(ctx context.Context, in []byte, path string, args ...string) ([]byte, []byte, int, error) {
	switch {
	case !b.bad(strings.Join(append([]string{path}, args...), " ")):
		return b.Runner.Run(ctx, in, path, args...)
	case b.hang:
		<-ctx.Done()
		return nil, nil, 0, ctx.Err()
	default:
		return nil, nil, 0, errors.New("made to fail")
	}
}

// TestForwardingGoesOffWhateverFails has each command and file that closing depends on
// fail or hang: after a failed step, when no peer routes any more, when Open replaces an
// interface and keeps its filter, and in Close. Forwarding is off wherever the sysctl
// itself works.
func TestForwardingGoesOffWhateverFails(t *testing.T) {
	never := func(string) bool { return false }
	contains := func(text string) func(string) bool {
		return func(command string) bool { return strings.Contains(command, text) }
	}
	for name, fault := range map[string]struct {
		pf, sysctl func(command string) bool
		hang       bool // the commands hang instead of failing
		timeUp     bool // ctx has ended at the first step
		noJournal  bool
		want       string // forwarding of IPv4 and IPv6 afterwards
	}{
		"pfctl fails":               {contains("pfctl"), never, false, false, false, "00"},
		"pfctl hangs":               {contains("pfctl"), never, true, true, false, "00"},
		"the time is up":            {never, never, false, true, false, "00"},
		"the journal can't be kept": {never, never, false, false, true, "00"},
		"IPv4's switch fails":       {never, contains(".ip.forwarding=0"), false, false, false, "10"},
		"IPv6's switch fails":       {never, contains("ip6.forwarding=0"), false, false, false, "01"},
		"IPv4's switch hangs":       {never, contains(".ip.forwarding=0"), true, false, false, "10"},
		"IPv6's switch hangs":       {never, contains("ip6.forwarding=0"), true, false, false, "01"},
	} {
		for when, do := range map[string]func(ctx context.Context, g *rig, less, none *policy.Ruleset) error{
			"a step failed": func(ctx context.Context, g *rig, less, none *policy.Ruleset) error {
				g.p.loaded = nil
				g.step = after(g.step, StepAnchor, func() { g.p.pf = darwin.NewPF(badRunner{g, false, contains("pfctl")}) })
				return g.p.Enforce(ctx, less)
			},
			"nothing routes": func(ctx context.Context, g *rig, less, none *policy.Ruleset) error {
				return g.p.Enforce(ctx, none)
			},
			"it is taken over": func(ctx context.Context, g *rig, less, none *policy.Ruleset) error { return g.p.keepFilter(ctx) },
			"the end": func(ctx context.Context, g *rig, less, none *policy.Ruleset) error {
				_, err := g.p.Close(ctx)
				return err
			},
		} {
			t.Run(name+", "+when, func(t *testing.T) {
				t.Parallel()
				g := newRig(t)
				g.open()
				g.enforce(testMesh(2, everything, everything))
				forwards := func() string {
					return g.mac.Kernel.Variable("net.inet.ip.forwarding") + g.mac.Kernel.Variable("net.inet6.ip6.forwarding")
				}
				if forwards() != "11" {
					t.Fatalf("forwarding is %s before the fault", forwards())
				}
				less, none := g.compile(testMesh(2, everything, everything&^mesh.LAN)), g.compile(testMesh(2, 0, 0))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if fault.timeUp {
					g.step = func(string) { cancel() }
				}
				if fault.hang {
					ctx, cancel = context.WithTimeout(ctx, time.Second)
					defer cancel()
				}
				g.p.pf = darwin.NewPF(badRunner{g, fault.hang, fault.pf})
				g.p.sysctl = darwin.NewSysctl(badRunner{g, fault.hang, fault.sysctl}, g.mac)
				if fault.noJournal {
					g.must(os.RemoveAll(g.dir))
				}
				err := do(ctx, g, less, none)
				if fault.noJournal {
					g.must(os.MkdirAll(g.dir, 0o700))
				}
				if got := forwards(); got != fault.want {
					t.Errorf("forwarding is %s, want %s, after: %v", got, fault.want, err)
				}
			})
		}
	}
}

// after wraps a step hook: it also calls do at the named step.
func after(step func(string), name string, do func()) func(string) {
	return func(now string) {
		if step != nil {
			step(now)
		}
		if now == name {
			do()
		}
	}
}

// TestKillThatFailsHoldsUpNoOther has one of pfctl's kills fail: the remaining kills
// still run.
func TestKillThatFailsHoldsUpNoOther(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, everything, everything))
	var tried int
	g.p.pf = darwin.NewPF(badRunner{g, false, func(command string) bool {
		if !strings.Contains(command, " -k ") {
			return false
		}
		tried++
		return tried == 1
	}})
	kills := slices.Concat(killAll(netip.MustParseAddr("100.64.0.2")), killAll(netip.MustParseAddr("100.64.0.3")))
	if err := g.p.kill(t.Context(), kills); err == nil || tried != len(kills) {
		t.Errorf("%d of %d kills were tried: %v", tried, len(kills), err)
	}
}

// TestInterfaceThatTakesTooLong has the creation of a new interface use up the context
// and fail: the old interface's name still disappears from the rules, because another
// program may get it.
func TestInterfaceThatTakesTooLong(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, everything))
	ctx, cancel := context.WithCancel(t.Context())
	g.p.o.CreateTUN = func(string, int) (tun.Device, error) {
		cancel()
		return nil, errors.New("made to fail")
	}
	m := testMesh(0)
	if _, err := g.p.Open(ctx, host.Interface{MTU: 1420, Addresses: m.Addresses, Prefixes: m.Prefixes}); err == nil {
		t.Error("Open succeeded")
	}
	if dump := g.mac.Dump(); !strings.Contains(dump, noInterface) {
		t.Errorf("the rules still name the removed interface:\n%s", dump)
	}
}
