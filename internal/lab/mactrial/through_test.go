package mactrial

// Another program's routes into the tunnel.

import (
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// TestNothingThroughAPeer has another program route networks into the tunnel: neither the
// guard nor pf alone passes the Mac's own packets to those networks, nor a peer's packets
// from there, be they replies or the first of a flow. Flows between the Mac and the peer
// run as before.
func TestNothingThroughAPeer(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	g.permit("C", everything)
	n, err := darwin.Observe(g.mac)
	g.must(err)
	far := both("9.9.9.9", "2620:fe::fe")
	for _, a := range far {
		g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: netip.PrefixFrom(a, a.BitLen()), Index: n.Interface(g.device().name).Index,
			Flags: darwin.RouteUp | darwin.RouteStatic}))
	}
	sent := 0
	for _, w := range []way{guarded, alone} {
		for family := range 2 {
			for _, proto := range protos {
				p := g.opening("", g.own[family], far[family], proto)
				if a := g.open(w, p); a.at != "" || a.o.Link != g.device().name && a.o.Why != "pf" {
					t.Errorf("%v: %+v got to %q (%s by pf's %s)", w, p, a.at, a.o.Why, ruleOf(a.o.Out))
				}
				back := p
				back.In = g.device().name
				back.Src, back.Dst, back.SrcPort, back.DstPort = p.Dst, p.Src, p.DstPort, p.SrcPort
				for _, reply := range []bool{true, false} {
					flags := uint8(netlab.SYN)
					if reply {
						flags |= netlab.ACK
					}
					if a := g.send(w, back, flags, reply); a.at != "" {
						t.Errorf("%v: %+v, as a reply %v, got to %q (pf's %s)", w, back, reply, a.at, ruleOf(a.o.In))
					}
				}
				toPeer := g.opening("", g.own[family], g.peers["C"][family], proto)
				if a := g.open(w, toPeer); a.at != "peer" || g.answer(w, a, netlab.SYN|netlab.ACK).at != "host" {
					t.Errorf("%v: %+v got to %q", w, toPeer, a.at)
				}
				sent += 5
			}
		}
	}
	t.Logf("%d packets", sent)
}
