package mactrial

// Fragmented datagrams, and a peer that opens as many flows as it can.

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// withDF sets Don't Fragment on an IPv4 fragment.
func withDF(b []byte) []byte {
	b = bytes.Clone(b)
	sum := uint32(^binary.BigEndian.Uint16(b[10:])) + 0x4000
	b[6] |= 0x40
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum>>16+sum&0xffff))
	return b
}

// TestFragments sends fragmented datagrams through the Mac, from a peer and from the
// internet: their fate is the one that docs/pf.md states.
func TestFragments(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	g.permit("C", mesh.Routing)
	payload := bytes.Repeat([]byte("fragment"), 200)
	const size = 800
	for family, name := range []string{"IPv4", "IPv6"} {
		peer, far := g.peers["C"][family], server[family]
		// out sends the fragments as the peer does, and returns the outcome of the last
		// one that got anywhere.
		id := uint32(100)
		out := func(port uint16, order []int, df bool) simmac.Outcome {
			id++
			pieces := flowtest.Fragments(netlab.UDPPacket(netip.AddrPortFrom(peer, port), netip.AddrPortFrom(far, 9999), payload), id, size)
			var o simmac.Outcome
			for _, i := range order {
				p := pieces[i]
				if df && family == 0 { // IPv6 has no Don't Fragment bit
					p = withDF(p)
				}
				d := g.device()
				d.last = &simmac.Outcome{Why: "guard"}
				g.wg.Load().write(p)
				if d.last.Fate != simmac.Dropped {
					o = *d.last
				}
			}
			return o
		}
		sent := out(5000, []int{0, 1, 2}, false)
		if sent.Fate != simmac.Forwarded || sent.Link != uplink {
			t.Fatalf("%s from the peer: %v (%s)", name, sent.Fate, sent.Why)
		}
		if o := out(5001, []int{0, 1, 2}, true); family == 0 && o.Fate != simmac.Forwarded {
			t.Errorf("%s from the peer, with Don't Fragment: %v (%s)", name, o.Fate, o.Why)
		}
		// back answers the first datagram in fragments, and returns the outcome of the
		// last one that was forwarded.
		back := func(order []int, df bool) (o simmac.Outcome) {
			id++
			p := sent.Packet
			for _, i := range order {
				b := flowtest.Fragments(netlab.UDPPacket(netip.AddrPortFrom(p.Dst, p.DstPort), netip.AddrPortFrom(p.Src, p.SrcPort), payload), id, size)[i]
				if df {
					b = withDF(b)
				}
				if got := g.mac.Inject(uplink, b); got.Fate == simmac.Forwarded {
					o = got
				}
			}
			return o
		}
		for about, order := range map[string][]int{"in order": {0, 1, 2}, "out of order": {2, 0, 1}, "one twice": {0, 1, 1, 2}} {
			o := back(order, false)
			if reached := o.Fate == simmac.Forwarded && o.Packet.Dst == peer; reached != (family == 0) {
				t.Errorf("%s answer %s reached the peer: %v (%s)", name, about, reached, o.Why)
			}
		}
		if family == 0 {
			if o := back([]int{0, 1, 2}, true); o.Fate == simmac.Forwarded {
				t.Errorf("%s answer with Don't Fragment: %v", name, o.Fate)
			}
		}
		// Datagrams from the internet to this Mac itself, with fragments in any order.
		own := netip.MustParseAddr([]string{"203.0.113.1", "2001:db8:1::1"}[family])
		id++
		pieces := flowtest.Fragments(netlab.UDPPacket(netip.AddrPortFrom(far, 53), netip.AddrPortFrom(own, 4000), payload), id, size)
		delivered := 0
		for _, i := range []int{2, 0, 1} {
			if o := g.mac.Inject(uplink, pieces[i]); o.Fate == simmac.Delivered {
				delivered++
			}
		}
		if want := []int{1, 3}[family]; delivered != want {
			t.Errorf("%s for this Mac: %d packets reached its IP stack, want %d", name, delivered, want)
		}
	}
}

// TestFlood has one peer open flows as fast as it can, to every destination and in both
// families, through the guard and behind it: another peer and the Mac itself aren't
// affected, and the state table never fills up.
func TestFlood(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	g.add("D", "own")
	g.permit("C", everything)
	g.permit("D", everything)
	var running []flow
	for family := range 2 {
		for _, proto := range protos {
			running = append(running, g.run(guarded, "D", server[family], proto, family), g.run(guarded, "D", g.own[family], proto, family))
		}
	}
	states := func() int {
		n := 0
		g.mac.Judge(func(m *pfsim.PF) { n = m.StateCount() })
		return n
	}
	checks, err := g.d.Doctor(t.Context())
	g.must(err)
	if !slices.ContainsFunc(checks, func(c api.Check) bool {
		return c.Name == "flows" && c.OK && strings.Contains(c.Message, "of the 2500 entries")
	}) {
		t.Errorf("doctor says %+v", checks)
	}
	before := states()
	dsts := append(append(append([]netip.Addr{}, server[:]...), printer[:]...), g.own...)
	opened := 0
	for _, w := range []way{guarded, alone} {
		passed, most := 0, 0
		for n := range 20_000 {
			dst := dsts[n%len(dsts)]
			family := 0
			if dst.Is6() {
				family = 1
			}
			p := g.opening(g.device().name, g.peers["C"][family], dst, netlab.UDP)
			p.DstPort = uint16(1 + opened/40_000) // source ports repeat after 40,000 flows
			if opened++; g.open(w, p).at != "" {
				passed++
			}
			most = max(most, states()-before)
		}
		bound := 10_000 / 4
		if w == alone {
			bound = 10_000 / 2 // each of the peer's two addresses has a quarter
		}
		if most > bound {
			t.Errorf("%v: the peer has %d states, want at most %d", w, most, bound)
		}
		t.Logf("%v: %d flows tried, %d passed, %d states at most", w, opened, passed, most)
		for _, f := range running {
			if got := g.ends(f, 2); got != 4 {
				t.Errorf("%v: %d of 4 packets of %s arrived", w, got, f.name)
			}
		}
		for family := range 2 {
			g.run(w, "D", server[family], netlab.TCP, family)
			own := host.Packet{Packet: policy.Packet{Src: netip.MustParseAddr([]string{"203.0.113.1", "2001:db8:1::1"}[family]), Dst: server[family], Proto: policy.ProtoTCP, SrcPort: 7000 + uint16(w), DstPort: 443}}
			if a := g.open(w, own); a.at != uplink {
				t.Errorf("%v: the Mac's own connection got to %q (%s)", w, a.at, a.o.Why)
			}
		}
	}
}
