package macos

import (
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// sends checks the fate of one of the Mac's own packets.
func (g *rig) sends(src, dst string, want simmac.Fate, link string) {
	g.t.Helper()
	if o := g.mac.Send(syn(src, dst)); o.Fate != want || link != "" && o.Link != link {
		g.t.Errorf("%s to %s: %v by %q (%s), want %v by %q", src, dst, o.Fate, o.Link, o.Why, want, link)
	}
}

// TestBesideTailscale runs beside Tailscale, which owns part of the mesh prefix:
// Tailscale keeps its network and its resolver, and packets to our peers or to an
// unassigned mesh address leave by our tunnel or are dropped.
func TestBesideTailscale(t *testing.T) {
	for what, routes := range map[string][]string{"all of the prefix": nil, "single hosts": {"100.99.7.7/32", "100.88.0.0/16"}} {
		t.Run(what, func(t *testing.T) {
			g := newRig(t)
			other, err := g.mac.Tailscale(routes...)
			g.must(err)
			g.open()
			m := testMesh(2, everything, mesh.Routing)
			m.Former = []netip.Addr{addrOf("100.64.9.9")}
			g.enforce(m)
			g.clean(g.enforce(m))
			for _, dst := range []string{"100.99.7.7", "100.88.3.3", "100.100.100.100"} {
				g.sends("100.99.1.1", dst, simmac.Sent, other)
			}
			answer := syn("100.99.7.7", "100.99.1.1")
			answer.Flags, answer.Ack = pfconf.FlagSYN|pfconf.FlagACK, 1
			if o := g.mac.Receive(answer, other); o.Fate != simmac.Delivered {
				t.Errorf("an answer of its network: %v (%s)", o.Fate, o.Why)
			}
			g.sends("100.64.0.1", first, simmac.Sent, g.p.name)
			g.sends("100.99.1.1", "100.64.9.9", simmac.Dropped, "")
			if routes != nil {
				g.sends("203.0.113.1", "100.64.77.77", simmac.Dropped, "") // unassigned
			}
			g.arrives(g.p.name, first, "100.99.7.7", simmac.Dropped)
			g.arrives(other, "100.99.7.7", first, simmac.Dropped)
			g.must(g.mac.Kernel.DeleteRoute(netip.MustParsePrefix(first + "/32")))
			g.sends("100.99.1.1", first, simmac.Dropped, "") // the tunnel is down
		})
	}
}

// TestVPNByHalves has a VPN route the internet as two halves, and a bridge hold the
// default route: peers' packets leave by the VPN, with its address.
func TestVPNByHalves(t *testing.T) {
	g := newRig(t)
	name, err := g.mac.Kernel.CreateTunnel("utun", 1400)
	g.must(err)
	g.must(g.mac.Kernel.AddAddress(name, netip.MustParsePrefix("10.8.0.2/32")))
	n, err := darwin.Observe(g.mac)
	g.must(err)
	for _, half := range []string{"0.0.0.0/1", "128.0.0.0/1"} {
		g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: netip.MustParsePrefix(half), Index: n.Interface(name).Index, Flags: darwin.RouteUp | darwin.RouteStatic}))
	}
	g.open()
	r := g.enforce(testMesh(2, everything))
	g.clean(g.enforce(testMesh(2, everything)))
	if r.Host().Uplink4 != name || r.Host().Uplink6 != "en0" {
		t.Errorf("the uplinks are %q and %q", r.Host().Uplink4, r.Host().Uplink6)
	}
	if c := r.Class(addrOf("9.9.9.9")); c != policy.Internet {
		t.Errorf("the internet's class is %v", c)
	}
	if o := g.arrives(g.p.name, first, "9.9.9.9", simmac.Forwarded); o.Link != name || o.Packet.Src != addrOf("10.8.0.2") {
		t.Errorf("to the internet by %s from %v", o.Link, o.Packet.Src)
	}

	g = &rig{t: t, mac: simmac.New(simmac.Options{Seed: 1}), dir: t.TempDir()}
	g.must(g.mac.AddEthernet("bridge0", []string{"203.0.113.1/24"}, "203.0.113.254"))
	g.renew()
	g.open()
	g.enforce(testMesh(2, everything))
	if o := g.arrives(g.p.name, first, "9.9.9.9", simmac.Forwarded); o.Link != "bridge0" || o.Packet.Src != addrOf("203.0.113.1") {
		t.Errorf("with the bridge: to the internet by %s from %v", o.Link, o.Packet.Src)
	}
}

// TestVPNWithoutPrivateSpace has a VPN route the whole internet except private space, as
// the WireGuard apps do with "exclude private IPs": a peer that has only routing reaches
// the internet by the VPN.
func TestVPNWithoutPrivateSpace(t *testing.T) {
	g := newRig(t)
	name, err := g.mac.Kernel.CreateTunnel("utun", 1400)
	g.must(err)
	g.must(g.mac.Kernel.AddAddress(name, netip.MustParsePrefix("10.8.0.2/32")))
	n, err := darwin.Observe(g.mac)
	g.must(err)
	for _, p := range prefixes("1.0.0.0/8", "2.0.0.0/7", "4.0.0.0/6", "8.0.0.0/7", "11.0.0.0/8", "12.0.0.0/6", "16.0.0.0/4", "32.0.0.0/3",
		"64.0.0.0/3", "96.0.0.0/4", "112.0.0.0/5", "120.0.0.0/6", "124.0.0.0/7", "126.0.0.0/8", "128.0.0.0/3", "160.0.0.0/5",
		"168.0.0.0/6", "172.0.0.0/12", "172.32.0.0/11", "172.64.0.0/10", "172.128.0.0/9", "173.0.0.0/8", "174.0.0.0/7", "176.0.0.0/4",
		"192.0.0.0/9", "192.128.0.0/11", "192.160.0.0/13", "192.169.0.0/16", "192.170.0.0/15", "192.172.0.0/14", "192.176.0.0/12",
		"192.192.0.0/10", "193.0.0.0/8", "194.0.0.0/7", "196.0.0.0/6", "200.0.0.0/5", "208.0.0.0/4") {
		g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: p, Index: n.Interface(name).Index, Flags: darwin.RouteUp | darwin.RouteStatic}))
	}
	g.open()
	r := g.enforce(testMesh(2, mesh.Routing))
	if c := r.Class(addrOf("9.9.9.9")); r.Host().Uplink4 != name || c != policy.Internet {
		t.Errorf("the uplink is %q, the class of 9.9.9.9 %v", r.Host().Uplink4, c)
	}
	if o := g.arrives(g.p.name, first, "9.9.9.9", simmac.Forwarded); o.Link != name {
		t.Errorf("to the internet by %s", o.Link)
	}
	g.arrives(g.p.name, first, "192.168.77.9", simmac.Dropped)
}

// TestLoopbackAlias adds an address to lo0, as jails and VPNs do: it is this Mac's own,
// even while pf skips lo0, and the Mac's own packets to it aren't transit.
func TestLoopbackAlias(t *testing.T) {
	for _, skipped := range []bool{false, true} {
		g := newRig(t)
		g.must(g.mac.Kernel.AddAddress("lo0", netip.MustParsePrefix("10.254.254.254/32")))
		g.must(g.mac.Kernel.AddAddress("lo0", netip.MustParsePrefix("198.51.100.77/32")))
		n, err := darwin.Observe(g.mac)
		g.must(err)
		g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: netip.MustParsePrefix("10.77.0.0/16"), Index: n.Interface("lo0").Index, Flags: darwin.RouteUp | darwin.RouteStatic}))
		if skipped {
			g.must(g.mac.SkipLoopback())
		}
		g.open()
		g.enforce(testMesh(2, mesh.Routing|mesh.LAN, mesh.Incoming))
		for _, alias := range []string{"10.254.254.254", "198.51.100.77"} {
			g.arrives(g.p.name, first, alias, simmac.Dropped)
			g.arrives(g.p.name, second, alias, simmac.Delivered)
			g.sends("203.0.113.1", alias, simmac.Delivered, "")
			g.sends(alias, alias, simmac.Delivered, "")
		}
		g.arrives(g.p.name, first, "10.77.1.1", simmac.Dropped) // its route leads back here
		g.arrives(g.p.name, first, "10.78.1.1", simmac.Forwarded)
		g.clean(g.enforce(testMesh(2, mesh.Routing|mesh.LAN, mesh.Incoming)))
	}
}

// TestMulticastGroups checks that this Mac and its neighbours can join multicast groups
// while pf is on, and that peers can't.
func TestMulticastGroups(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, everything))
	report := pfsim.Packet{Src: addrOf("203.0.113.1"), Dst: addrOf("224.0.0.22"), Proto: 2, Options: true}
	var out, in, peer pfsim.Judgement
	g.mac.Judge(func(m *pfsim.PF) {
		out = m.Send(report, "en0")
		report.Src = addrOf("203.0.113.9")
		in = m.Receive(report, "en0")
		report.Src = addrOf(first)
		peer = m.Receive(report, g.p.name)
	})
	if out.Verdict != pfsim.VerdictPass || in.Verdict != pfsim.VerdictPass {
		t.Errorf("IGMP out %v, in %v", out.Verdict, in.Verdict)
	}
	if peer.Verdict == pfsim.VerdictPass {
		t.Error("a peer's IGMP passes")
	}
}

// TestWireGuardsOwnPackets gives a peer an endpoint inside the mesh prefix: WireGuard's
// packets to it leave, and no others do.
func TestWireGuardsOwnPackets(t *testing.T) {
	g := newRig(t)
	g.open()
	m := testMesh(2, everything)
	m.ListenPort = 51820
	g.enforce(m)
	p := syn("203.0.113.1", "100.90.5.2")
	p.Proto, p.Flags, p.Seq, p.Window, p.SrcPort, p.DstPort, p.Len = pfconf.ProtoUDP, 0, 0, 0, 51820, 51820, 148
	if o := g.mac.Send(p); o.Fate != simmac.Sent || o.Link != "en0" {
		t.Errorf("a handshake: %v by %q (%s)", o.Fate, o.Link, o.Why)
	}
	p.SrcPort = 40000
	if o := g.mac.Send(p); o.Fate != simmac.Dropped {
		t.Errorf("another packet there: %v", o.Fate)
	}
	in := p
	in.Src, in.Dst, in.SrcPort, in.DstPort = addrOf(first), addrOf("100.64.0.1"), 40000, 51820
	if o := g.mac.Receive(in, g.p.name); o.Fate != simmac.Dropped {
		t.Errorf("a tunnel inside the tunnel: %v", o.Fate)
	}
}

// TestHairpin sends to the router, which turns packets for WireGuard back: nothing passes
// to WireGuard's ports, not even on a flow from before the address or the port was known,
// and everything else passes.
func TestHairpin(t *testing.T) {
	g := newRig(t)
	g.open()
	m := testMesh(1, everything)
	m.ListenPort = 51820
	var old *policy.Ruleset
	enforce := func(outside []netip.Addr, port uint16) {
		h := g.compile(m).Host()
		h.Outside, h.OutsidePort = outside, port
		r := mustRuleset(t, m, h)
		g.must(g.p.Enforce(t.Context(), r))
		g.must(g.p.Cut(t.Context(), r, policy.Diff(old, r)))
		old = r
	}
	to := func(proto pfconf.Proto, src, dst string, port uint16, want simmac.Fate) {
		t.Helper()
		p := syn(src, dst)
		p.DstPort = port
		if proto == pfconf.ProtoUDP {
			p.Proto, p.Flags, p.Seq, p.Window, p.Len = pfconf.ProtoUDP, 0, 0, 0, 148
		}
		if o := g.mac.Receive(p, g.p.name); o.Fate != want {
			t.Errorf("%v from %s to %s port %d: %v (%s), want %v", proto, src, dst, port, o.Fate, o.Why, want)
		}
	}
	const router, router6, first6 = "192.168.77.254", "2600::1", "fd6d:6573:6800::2"
	ports := func(a, b simmac.Fate) {
		t.Helper()
		for src, dst := range map[string]string{first: router, first6: router6} {
			to(pfconf.ProtoUDP, src, dst, 51820, a)
			to(pfconf.ProtoUDP, src, dst, 4500, b)
			to(pfconf.ProtoUDP, src, dst, 443, simmac.Forwarded)
			to(pfconf.ProtoTCP, src, dst, 443, simmac.Forwarded)
			to(pfconf.ProtoTCP, src, dst, 51820, simmac.Forwarded)
		}
	}
	outside := []netip.Addr{addrOf(router), addrOf(router6)}
	enforce(nil, 0)
	ports(simmac.Forwarded, simmac.Forwarded)
	enforce(outside, 0)
	ports(simmac.Dropped, simmac.Forwarded)
	enforce(outside, 4500)
	ports(simmac.Dropped, simmac.Dropped)
	enforce(nil, 0)
	ports(simmac.Forwarded, simmac.Forwarded)
}
