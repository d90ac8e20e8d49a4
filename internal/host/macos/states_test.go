package macos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// happenings is a backend on a simulated Mac and the changes that a test makes to it.
type happenings struct {
	*rig
	rng     *rand.Rand
	mesh    policy.Mesh
	old     *policy.Ruleset
	packets int
}

// happen returns what may happen to a Mac between two rulesets, by us or by other
// software. The helper's next round may be needed to undo it.
var happen = map[string]func(h *happenings){
	"permissions change": func(h *happenings) {
		for i := range h.mesh.Peers {
			h.mesh.Peers[i].Permissions = mesh.Granted(mesh.Permissions(h.rng.IntN(int(everything) + 1)))
		}
	},
	"peers come and go": func(h *happenings) {
		h.mesh = testMesh(1+h.rng.IntN(4), mesh.Permissions(h.rng.IntN(int(everything)+1)), everything)
	},
	"the anchor is flushed": func(h *happenings) { h.mac.FlushAnchor(h.p.path) },
	"the anchor is overwritten": func(h *happenings) {
		if h.p.loaded != nil { // while we have no anchor there, its rules belong to other software
			h.must(h.mac.LoadAnchor(h.p.path, "pass quick all\n"))
		}
	},
	"pf is disabled": func(h *happenings) { h.mac.PF.Disable() },
	"forwarding is flipped": func(h *happenings) {
		h.mac.Kernel.SetVariable("net.inet.ip.forwarding", "0")
		h.mac.Kernel.SetVariable("net.inet6.ip6.forwarding", "0")
	},
	"a tunnel address goes": func(h *happenings) {
		if err := h.mac.Kernel.RemoveAddress(h.p.name, hostAddresses[h.rng.IntN(2)]); err != nil {
			h.t.Log(err) // already removed
		}
	},
	"the main ruleset is loaded again": func(h *happenings) { h.must(h.mac.LoadMain(simmac.StockMain)) },
	"an address comes": func(h *happenings) {
		h.must(h.mac.Kernel.AddAddress("en5", netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(80 + h.rng.IntN(100)), 1}), 24)))
	},
	"the device dies": func(h *happenings) {
		h.dev.Close()
		h.open()
	},
	"the helper is killed": func(h *happenings) {
		h.dev.Close()
		h.renew()
		h.open()
		h.old = nil
	},
}

// round does what the daemon does: observe, compile, enforce, inspect, cut.
func (h *happenings) round() *policy.Ruleset {
	h.t.Helper()
	r := h.enforce(h.mesh)
	h.clean(r)
	h.must(h.p.Cut(h.t.Context(), r, policy.Diff(h.old, r)))
	h.old = r
	return r
}

// judge sends random packets and compares their fate with the policy. While pf isn't
// needed nothing is forwarded, and the guard enforces the rest.
func (h *happenings) judge(r *policy.Ruleset) {
	h.t.Helper()
	if !isNeeded(r) {
		return
	}
	host := r.Host()
	w := world{mesh: h.mesh, host: host}
	c := &comparison{t: h.t, rng: h.rng, w: w, r: r, portless: map[netip.Addr]bool{}}
	for range 40 {
		p := c.randomPacket()
		if p.In == meshInterface {
			p.In = h.p.name
		}
		if p.In == "" || p.In == loopback || !h.mac.Kernel.Has(p.In) || c.r.Class(p.Dst) == policy.Martian {
			continue
		}
		if p.In != h.p.name && slices.Contains(hostAddresses, p.Src) {
			continue // forged: pf stops it, though the policy doesn't require that
		}
		h.packets++
		v := p.Judge(r)
		o := h.mac.Receive(c.toPF(p), p.In)
		passed := o.Fate != simmac.Dropped
		right := passed == v.Pass
		switch {
		case v.Pass && !passed:
			right = o.Why != "pf" // it may stop for want of a route
		case passed && v.Exit == policy.ExitHost:
			right = o.Fate == simmac.Delivered
		case passed && v.Exit == policy.ExitUplink:
			right = o.Link == host.Uplink(p.Dst)
		case passed && o.Fate == simmac.Forwarded:
			right = o.Link != h.p.name
		}
		if !right {
			h.t.Fatalf("%+v: %v by %q (%s), policy %+v\nmesh %+v\nhost %+v", p, o.Fate, o.Link, o.Why, v, h.mesh, host)
		}
	}
}

// TestStates drives one backend through random events. After each the Mac enforces the
// policy, and at the end it is restored.
func TestStates(t *testing.T) {
	names := slices.Sorted(maps.Keys(happen))
	rounds, packets := 0, 0
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			h := &happenings{rig: newRig(t), rng: rand.New(rand.NewPCG(seed, 7)), mesh: testMesh(3, everything, mesh.Routing, 0)}
			h.mac.Kernel.SetVariable("net.inet.ip.forwarding", fmt.Sprint(seed%3/2))
			found := h.mac.Kernel.Variable("net.inet.ip.forwarding")
			h.open()
			h.judge(h.round())
			for range 12 {
				name := names[h.rng.IntN(len(names))]
				h.t.Log(name)
				happen[name](h)
				h.judge(h.round())
				rounds++
			}
			h.close()
			dump := h.mac.Dump()
			for _, left := range []string{"utun", "100.64.0.", "fd6d:", h.p.path, "mesh-"} {
				if strings.Contains(dump, left) {
					t.Errorf("%q remains:\n%s", left, dump)
				}
			}
			if h.mac.PF.Enabled() || h.journalExists() || h.mac.Kernel.Variable("net.inet6.ip6.forwarding") != "0" {
				t.Errorf("the host wasn't restored:\n%s", dump)
			}
			if now := h.mac.Kernel.Variable("net.inet.ip.forwarding"); found == "0" && now != "0" {
				t.Errorf("forwarding is %s", now)
			}
			packets += h.packets
		})
	}
	t.Logf("%d rounds, %d packets", rounds, packets)
}

// TestStatesThatCannotBeRead has pfctl fail to list the states once: Inspect reports it
// until the next look.
func TestStatesThatCannotBeRead(t *testing.T) {
	g := newRig(t)
	g.open()
	r := g.enforce(testMesh(1, everything))
	g.inspect(r)
	g.lost = "states"
	g.p.fullDue = true
	report := g.inspect(r)
	if g.lost != "" || len(report.Problems) != 1 || !strings.Contains(report.Problems[0].Message, "states can't be read") {
		t.Errorf("problems %+v", report.Problems)
	}
	g.p.fullDue = true
	g.clean(r)
}

// TestJudgingEndsWithItsContext judges foreign rules with an ended context.
func TestJudgingEndsWithItsContext(t *testing.T) {
	r := mustRuleset(t, testMesh(2, everything), testHost())
	a, err := Compile(r, AnchorOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if found, err := FindForeign(ctx, pfsim.New(pfsim.Options{}), a, r); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended context gives %v, %v", found, err)
	}
}
