package macos

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestClosesWithItsTimeUp ends Enforce's context at each of its steps: the step fails,
// and forwarding is still disabled, because closing has a time limit of its own.
func TestClosesWithItsTimeUp(t *testing.T) {
	tried := 0
	for _, step := range []string{StepAddresses, StepRoutes, StepAnchor, StepTables, StepEnable} {
		g := newRig(t)
		g.open()
		g.enforce(testMesh(2, everything, everything&^mesh.LAN))
		g.enforce(testMesh(2, everything, everything&^mesh.LAN))
		forwards := func() bool {
			return g.mac.Kernel.Variable("net.inet.ip.forwarding")+g.mac.Kernel.Variable("net.inet6.ip6.forwarding") != "00"
		}
		if !forwards() {
			t.Fatal("forwarding is already off")
		}
		switch step { // make Enforce take the step
		case StepAddresses:
			g.must(g.mac.Kernel.RemoveAddress(g.p.name, hostAddresses[0]))
		case StepAnchor:
			g.p.loaded = nil
		case StepEnable:
			g.mac.PF.Disable()
		}
		r := g.compile(testMesh(2, everything&^mesh.LAN, everything))
		ctx, cancel := context.WithCancel(t.Context())
		reached := false
		g.step = func(name string) {
			if name == step {
				reached = true
				cancel()
			}
		}
		err := g.p.Enforce(ctx, r)
		cancel()
		if !reached || err == nil {
			if step == StepRoutes { // the routing socket ignores the context
				continue
			}
			t.Errorf("%s: step reached %v, error %v", step, reached, err)
		}
		tried++
		if forwards() {
			t.Errorf("%s: forwarding stays on after %v", step, err)
		}
	}
	if tried < 4 {
		t.Errorf("only %d steps were tried", tried)
	}
}

// TestFillProblems checks that the limit of states is read from pf, and that a problem is
// reported once the state table is 90 % full.
func TestFillProblems(t *testing.T) {
	for limits, want := range map[string]uint64{
		"":                                  MaxStates,
		"states        hard limit    20000": 20_000,
		"src-nodes     hard limit    100\nstates        hard limit    500\n": 500,
		"states        hard limit    none":                                   MaxStates,
	} {
		if got := statesLimit(limits); got != want {
			t.Errorf("limits %q: %d states, want %d", limits, got, want)
		}
	}
	p := &Backend{}
	for states, says := range map[uint64]bool{0: false, 8_999: false, 9_000: true, 10_001: true} {
		p.states, p.most = states, MaxStates
		if ps := p.stateLimitProblems(); len(ps) > 0 != says || says && !strings.Contains(ps[0].Message, "of 10000 at most") {
			t.Errorf("%d states: problems %v", states, ps)
		}
	}
}

// blind is a kernel whose forwarding variables can't be read while on is set.
type blind struct {
	darwin.Kernel
	on *bool
}

func (b blind) Sysctl(name string) (string, error) {
	if *b.on && strings.HasSuffix(name, ".forwarding") {
		return "", errors.New("not permitted")
	}
	return b.Kernel.Sysctl(name)
}

// TestClosesUnseen calls Close while the forwarding variables can't be read: forwarding
// is off afterwards, the anchor stays because that can't be confirmed, and the next start
// restores everything.
func TestClosesUnseen(t *testing.T) {
	g := newRig(t)
	before := g.mac.Dump()
	var on bool
	p, err := New(Options{StateDir: g.dir, Runner: g, Kernel: blind{g.mac, &on}, CreateTUN: g.mac.CreateTUN})
	g.must(err)
	g.p = p
	g.open()
	g.enforce(testMesh(2, everything))
	on = true
	if left, err := g.p.Close(t.Context()); err == nil {
		t.Errorf("Close returned no error, only %v", left)
	}
	if v := g.mac.Kernel.Variable("net.inet.ip.forwarding") + g.mac.Kernel.Variable("net.inet6.ip6.forwarding"); v != "00" {
		t.Errorf("forwarding is %s", v)
	}
	if _, text, err := g.p.Rules(t.Context()); err != nil || !strings.Contains(text, "block") {
		t.Errorf("the anchor is gone: %q, %v", text, err)
	}
	on = false
	g.renew()
	g.close()
	if d := cmp.Diff(before, g.mac.Dump()); d != "" {
		t.Errorf("left behind: %s", d)
	}
}
