package mactrial

// Changes that other software makes to the Mac while the helper runs, and their repair.

import (
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// A happening is a change that other software makes to the Mac while the helper runs.
type happening struct {
	do func(g *rig)
	// undo reverts a change that the helper can't repair.
	undo func(g *rig)
}

var happenings = map[string]happening{
	"pf disabled by pfctl -d": {do: func(g *rig) { g.mac.PF.Disable() }},
	"our token given back by another process": {do: func(g *rig) {
		for _, r := range g.mac.PF.Tokens() {
			g.must(darwin.NewPF(g.mac).Release(g.t.Context(), darwin.Token(r.Token)))
		}
	}},
	"our anchor flushed":     {do: func(g *rig) { g.mac.FlushAnchor(anchor) }},
	"our anchor overwritten": {do: func(g *rig) { g.must(g.mac.LoadAnchor(anchor, "pass quick all\n")) }},
	"the main ruleset flushed": {do: func(g *rig) { g.mac.FlushMain() },
		undo: func(g *rig) { g.must(g.mac.LoadMain(simmac.StockMain)) }},
	"the main ruleset loaded without the hooks": {do: func(g *rig) { g.must(g.mac.LoadMain("pass all\n")) },
		undo: func(g *rig) { g.must(g.mac.LoadMain(simmac.StockMain)) }},
	"the main ruleset loaded again": {do: func(g *rig) { g.must(g.mac.LoadMain(simmac.StockMain)) }},
	"forwarding flipped off": {do: func(g *rig) {
		g.mac.Kernel.SetVariable("net.inet.ip.forwarding", "0")
		g.mac.Kernel.SetVariable("net.inet6.ip6.forwarding", "0")
	}},
	"the tunnel's addresses deleted": {do: func(g *rig) {
		for _, a := range g.own {
			g.must(g.mac.Kernel.RemoveAddress(g.device().name, a))
		}
	}},
	"a peer's routes deleted": {do: func(g *rig) {
		for _, a := range g.peers["C"] {
			g.must(g.mac.Kernel.DeleteRoute(netip.PrefixFrom(a, a.BitLen())))
		}
	}},
	"the uplink changed": {do: func(g *rig) { g.moveDefault(lan) }, undo: func(g *rig) { g.moveDefault(uplink) }},
	"another VPN gone":   {do: func(g *rig) { g.mac.Kernel.RemoveInterface(vpn) }, undo: (*rig).addVPN},
	"the tunnel gone":    {do: func(g *rig) { g.wg.Load().Close() }},
	"asleep and awake":   {do: func(g *rig) { g.mac.Sleep(time.Hour) }},
	"Internet Sharing on": {do: func(g *rig) { g.must(g.mac.InternetSharing(uplink)) },
		undo: func(g *rig) { g.must(g.mac.StopInternetSharing()) }},
}

// moveDefault moves the default routes to another interface.
func (g *rig) moveDefault(to string) {
	g.t.Helper()
	gateways := map[string][]netip.Addr{uplink: both("203.0.113.254", "2001:db8:1::fe"), lan: both("192.168.77.254", "2001:db8:5::fe")}[to]
	n, err := darwin.Observe(g.mac)
	g.must(err)
	for _, gw := range gateways {
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if gw.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		g.must(g.mac.Kernel.DeleteRoute(all))
		g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: all, Gateway: gw, Index: n.Interface(to).Index,
			Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteStatic}))
	}
}

// found returns the families that the Mac forwards without the helper.
func (g *rig) found() (f policy.Families) {
	f.IPv4 = g.mac.Kernel.Has("bridge100")
	return f
}

// A leakage counts the packets that must not pass, and those of them that passed.
type leakage struct{ sent, leaks int }

// never returns packets that no permissions used with it let pass: between peers, and
// from other hosts to peers.
func (g *rig) never() (out []host.Packet) {
	for family := range 2 {
		for _, proto := range protos {
			o := func(in string, src, dst netip.Addr) { out = append(out, g.opening(in, src, dst, proto)) }
			a, c := g.peers["A"][family], g.peers["C"][family]
			o(g.device().name, c, a)
			o(g.device().name, a, c)
			o(g.device().name, c, printer[family])
			o(g.device().name, c, g.own[family])
			o(g.device().name, server[family], printer[family])
			for _, in := range []string{uplink, lan} {
				o(in, server[family], c)
				o(in, printer[family], a)
			}
		}
	}
	return out
}

// mustNotPass sends the packets of never, and more. It holds the helper's steps
// meanwhile.
func (l *leakage) mustNotPass(g *rig, when string, more ...host.Packet) {
	g.t.Helper()
	g.probing.Lock()
	defer g.probing.Unlock()
	l.probe(g, when, more...)
}

// probe is mustNotPass for a caller that already holds the helper's steps.
func (l *leakage) probe(g *rig, when string, more ...host.Packet) {
	g.t.Helper()
	if g.device() == nil {
		return
	}
	for _, p := range append(g.never(), more...) {
		l.sent++
		if a := g.open(guarded, p); a.at != "" {
			if l.leaks++; l.leaks < 20 {
				g.t.Errorf("%s: %+v leaked to %q (pf: %s, %s)", when, p, a.at, ruleOf(a.o.In), ruleOf(a.o.Out))
			}
		}
	}
}

// forwards checks pf alone, behind the guard: it must not forward a packet of never.
func (l *leakage) forwards(g *rig, when string) {
	g.t.Helper()
	for _, p := range g.never() {
		l.sent++
		if a := g.open(alone, p); a.o.Fate == simmac.Forwarded {
			if l.leaks++; l.leaks < 20 {
				g.t.Errorf("%s: pf alone: %+v leaked to %q", when, p, a.at)
			}
		}
	}
}

// looked waits until the helper has run a whole round that began after the call, and
// probes meanwhile. It reports whether the helper enforces. If not, forwarding must be
// off.
func (g *rig) looked(what string, l *leakage) bool {
	g.t.Helper()
	first := g.rounds.Load()
	g.wait("the helper has looked after: "+what, func() bool {
		l.mustNotPass(g, what)
		s := g.d.Status()
		return g.rounds.Load() >= first+3 && (s.State == api.Enforcing || len(s.Problems) > 0)
	})
	if g.d.Status().State == api.Enforcing {
		return true
	}
	for _, v := range []string{"net.inet.ip.forwarding", "net.inet6.ip6.forwarding"} {
		if g.mac.Kernel.Variable(v) != "0" {
			g.t.Errorf("%s: closed, but %s is on", what, v)
		}
	}
	return false
}

// TestDrift has other software change the Mac while the helper runs. Neither at once nor
// during the repair does a forbidden packet pass. Afterwards the whole truth table holds
// again, and at the end the Mac is restored.
func TestDrift(t *testing.T) {
	l, verdicts, differences := &leakage{}, 0, 0
	for _, name := range slices.Sorted(maps.Keys(happenings)) {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			found := g.mac.Dump()
			g.start()
			g.add("A", "own")
			g.add("C", "external")
			g.add("D", "own")
			g.permit("A", everything)
			g.permit("C", mesh.Routing)
			h, binds := happenings[name], g.binds.Load()
			j := &judge{g: g}

			h.do(g)
			if g.looked(name, l) {
				j.all(g.rules(g.may, g.found()))
			} else if h.undo == nil {
				t.Errorf("not repaired: %+v", g.d.Status().Problems)
			}
			if h.undo != nil {
				h.undo(g)
				if !g.looked(name+", undone", l) {
					g.wait("it enforces again", func() bool { return g.d.Status().State == api.Enforcing })
				}
				j.all(g.rules(g.may, g.found()))
			}
			if name == "asleep and awake" && g.binds.Load() == binds {
				t.Error("the sockets weren't reopened after the sleep")
			}
			verdicts, differences = verdicts+j.verdicts, differences+j.differences
			g.stop()
			g.asFound(found)
		})
	}
	t.Logf("%d changes: %d packets that must not pass, %d leaks; %d verdicts after them, %d differences",
		len(happenings), l.sent, l.leaks, verdicts, differences)
}

// TestLooksSeeALeak overwrites our anchor and probes before the helper repairs it. pf
// alone must be seen to leak, or the other tests prove nothing; the guard must hold.
func TestLooksSeeALeak(t *testing.T) {
	g := newRig(t)
	g.tick = time.Hour
	g.start()
	g.add("A", "own")
	g.add("C", "external")
	g.permit("C", mesh.Routing)
	g.must(g.mac.LoadAnchor(anchor, "pass quick all\n"))
	passed := 0
	for _, p := range g.never() {
		if g.open(alone, p).at != "" {
			passed++
		}
	}
	if passed == 0 {
		t.Error("pf passes everything, but no packet was seen to pass")
	}
	l := &leakage{}
	l.mustNotPass(g, "the guard alone")
	t.Logf("pf alone passed %d of %d, the guard %d", passed, len(g.never()), l.leaks)
}
