package flow

import (
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// model is the flow table as docs/policy.md describes it, in its simplest form: one unbounded
// map, and no cache, so that each packet is judged anew.
type model struct {
	rules *policy.Ruleset
	flows map[tuple]*modelFlow // by the tuple of the packets that the peer's end sends
}

type modelFlow struct {
	byHost, cut bool
	peer        mesh.PublicKey
}

// packetOf is a packet of the test: its fields, and its bytes on the wire.
type packetOf struct {
	tuple
	opens, isError bool
	quote          tuple
	wire           []byte
}

func (m *model) peer(a netip.Addr) (mesh.PublicKey, bool) {
	i, ok := m.rules.PeerByAddr(a)
	if !ok {
		return mesh.PublicKey{}, false
	}
	return m.rules.Peers()[i].PublicKey, true
}

// addressOf returns a in the form that tuples hold.
func addressOf(a netip.Addr) address {
	b := a.As16()
	return address6(b[:])
}

// described returns t as the policy sees it.
func described(t tuple) (p policy.Packet) {
	t.describe(&p)
	return p
}

func (m *model) hostMay(t tuple) bool {
	p := described(t)
	if p.Src != flowtest.HostB4 && p.Src != flowtest.HostB6 {
		return false
	}
	v := m.rules.FromHost(p)
	if v.Rule == policy.RuleHostToPeer || !v.Pass {
		return v.Pass
	}
	class := m.rules.Class(p.Dst)
	return m.rules.Mesh().ThroughPeer && t.proto != 47 && (class == policy.Internet || class == policy.OnLAN)
}

func (m *model) peerMay(t tuple) bool { return m.rules.FromPeer(described(t)).Pass }

// mayOpen reports whether the opener of f may open it now; the peer's end sends t.
func (m *model) mayOpen(f *modelFlow, t tuple) bool {
	if f.byHost {
		return m.hostMay(t.reversed())
	}
	return m.peerMay(t)
}

func (m *model) fromPeer(p packetOf) bool {
	_, known := m.peer(p.from.netip(p.v6))
	if p.isError {
		sentTo := p.quote.reversed() // the tuple of the peer's end
		f := m.flows[sentTo]
		if known {
			a, _ := m.peer(p.quote.to.netip(p.v6))
			b, _ := m.peer(p.from.netip(p.v6))
			known = a == b
			return known && f != nil && !f.cut && p.quote.from == p.to && m.mayOpen(f, sentTo)
		}
		_, toPeer := m.peer(p.quote.to.netip(p.v6))
		return !toPeer && f != nil && !f.cut && p.quote.from == p.to && m.mayOpen(f, sentTo)
	}
	f := m.flows[p.tuple]
	if !known {
		return f != nil && f.byHost && !f.cut && m.mayOpen(f, p.tuple)
	}
	if f != nil && f.byHost && !f.cut && m.mayOpen(f, p.tuple) {
		return true
	}
	if !m.peerMayPacket(p) {
		if f != nil {
			f.cut = true
		}
		return false
	}
	if (f == nil || f.cut || f.byHost) && !p.opens {
		return false
	}
	id, _ := m.peer(p.from.netip(p.v6))
	m.flows[p.tuple] = &modelFlow{peer: id}
	return true
}

// peerMayPacket judges a packet by itself. The tuple of an ICMP answer has the type of the
// query, so the type is replaced by that of the answer.
func (m *model) peerMayPacket(p packetOf) bool {
	ask := described(p.tuple)
	if p.isICMP() && !p.opens {
		ask.ICMPType = 0
		if p.v6 {
			ask.ICMPType = 129
		}
	}
	return m.rules.FromPeer(ask).Pass
}

func (m *model) toPeer(p packetOf) bool {
	far := p.tuple.reversed()
	if p.isError {
		f := m.flows[p.quote]
		_, known := m.peer(p.to.netip(p.v6))
		return known && f != nil && !f.cut && p.quote.from == p.to && m.mayOpen(f, p.quote)
	}
	f := m.flows[far]
	if f == nil {
		if !m.hostMay(p.tuple) {
			return false
		}
		if p.opens {
			id, _ := m.peer(p.to.netip(p.v6))
			m.flows[far] = &modelFlow{byHost: true, peer: id}
		}
		return true
	}
	if f.cut && !f.byHost {
		return false
	}
	f.cut = !m.mayOpen(f, far)
	return !f.cut
}

// set puts r in force, and cuts the flows that r refuses to peers that lost a permission.
func (m *model) set(r *policy.Ruleset) {
	narrowed := policy.Diff(m.rules, r)
	m.rules = r
	for _, n := range narrowed {
		for t, f := range m.flows {
			if f.peer == n.PublicKey && (n.Removed || !m.mayOpen(f, t)) {
				f.cut = true
			}
		}
	}
}

// drawPacket draws a packet from few addresses and ports, so that most packets belong to
// flows of others.
func drawPacket(t *rapid.T, d Direction) packetOf {
	ends := []netip.Addr{flowtest.PeerC4, flowtest.PeerA4, flowtest.HostB4, flowtest.HostL4, flowtest.Net4, flowtest.LAN4}
	v6 := rapid.IntRange(0, 3).Draw(t, "v6") == 0
	if v6 {
		ends = []netip.Addr{flowtest.PeerC6, flowtest.PeerA6, flowtest.HostB6, flowtest.Net6, flowtest.LAN6}
	}
	src := rapid.SampledFrom(ends).Draw(t, "src")
	dst := rapid.SampledFrom(ends).Draw(t, "dst")
	// Mostly packets that a tunnel may carry: with a peer at the far end.
	if rapid.IntRange(0, 7).Draw(t, "sane") > 0 {
		peer := rapid.SampledFrom(ends[:2]).Draw(t, "peer")
		if d == FromPeer {
			src = peer
		} else {
			dst = peer
		}
	}
	p := packetOf{tuple: tuple{from: addressOf(src), to: addressOf(dst), v6: v6}}
	port := func(label string) uint16 { return rapid.SampledFrom([]uint16{53, 443}).Draw(t, label) }
	switch rapid.IntRange(0, 3).Draw(t, "proto") {
	case 0:
		flags := rapid.SampledFrom([]uint8{flowtest.SYN, flowtest.ACK, flowtest.ACK, flowtest.SYN | flowtest.ACK, flowtest.FIN | flowtest.ACK, flowtest.RST}).Draw(t, "flags")
		p.proto, p.fromPort, p.toPort = flowtest.TCP, port("sport"), port("dport")
		p.opens = flags != flowtest.RST && flags != flowtest.SYN|flowtest.ACK
		p.wire = flowtest.TCPSegment(at(src, p.fromPort), at(dst, p.toPort), flags, 4)
	case 1:
		p.proto, p.fromPort, p.toPort, p.opens = flowtest.UDP, port("sport"), port("dport"), true
		p.wire = flowtest.Datagram(at(src, p.fromPort), at(dst, p.toPort), 4)
	case 2:
		drawEcho(t, &p, src, dst)
	case 3:
		p.proto = 47 // GRE, which opens no flow
		p.wire = flowtest.IP(src, dst, 47, make([]byte, 8))
	}
	return p
}

func drawEcho(t *rapid.T, p *packetOf, src, dst netip.Addr) {
	const id = 5
	request := uint16(8)
	p.proto = flowtest.ICMP
	if p.v6 {
		p.proto, request = flowtest.ICMPv6, 128
	}
	reply := rapid.Bool().Draw(t, "reply")
	p.wire, p.opens = flowtest.Echo(src, dst, id, reply, 4), !reply
	if p.fromPort, p.toPort = id, request<<8; reply {
		p.fromPort, p.toPort = p.toPort, p.fromPort
	}
}

// drawError returns an ICMP error about p, sent to the source of p.
func drawError(t *rapid.T, p packetOf) packetOf {
	by := rapid.SampledFrom([]netip.Addr{p.to.netip(p.v6), flowtest.Net4, flowtest.PeerC4, flowtest.HostB4}).Draw(t, "by")
	if by.Is6() != p.v6 {
		by = p.to.netip(p.v6)
	}
	e := packetOf{tuple: tuple{from: addressOf(by), to: p.from, v6: p.v6, proto: flowtest.ICMP}, isError: true, quote: p.tuple}
	icmpType := uint8(11)
	if p.v6 {
		e.proto, icmpType = flowtest.ICMPv6, 3
	}
	e.wire = flowtest.ICMPMessage(by, p.from.netip(p.v6), icmpType, 0, p.wire)
	return e
}

// TestAgainstModel plays random packets, changes of the ruleset and pauses, and compares each
// verdict with the model's. Independent of the model it checks what the policy promises: a
// packet from a peer passes only if the peer may send it now or if it answers the host, and
// a packet to a peer only if the host sends it or if it answers the peer.
func TestAgainstModel(t *testing.T) {
	judged, passed := 0, 0
	rapid.Check(t, func(rt *rapid.T) {
		l := newLab(t, 7, Options{})
		m := &model{rules: l.view.Ruleset(), flows: map[tuple]*modelFlow{}}
		sent := map[tuple]Direction{}
		for range rapid.IntRange(1, 150).Draw(rt, "steps") {
			switch rapid.IntRange(0, 19).Draw(rt, "step") {
			case 0:
				r := drawRuleset(rt, t)
				l.set(r)
				m.set(r)
			case 1:
				if rapid.IntRange(0, 9).Draw(rt, "long") == 0 {
					l.later(25 * time.Hour)
					m.flows = map[tuple]*modelFlow{}
				} else {
					l.later(time.Millisecond)
				}
			default:
				d := Direction(rapid.IntRange(0, 1).Draw(rt, "direction"))
				p := drawPacket(rt, d)
				if rapid.IntRange(0, 5).Draw(rt, "error") == 0 {
					p, d = drawError(rt, p), 1-d
				}
				judged++
				if compare(rt, l, m, sent, p, d) {
					passed++
				}
			}
		}
	})
	t.Logf("%d packets judged, %d passed", judged, passed)
	if passed == 0 || passed == judged {
		t.Error("all packets passed or none did, so the test shows nothing")
	}
}

func drawRuleset(rt *rapid.T, t *testing.T) *policy.Ruleset {
	m := flowtest.Mesh(mesh.Permissions(rapid.IntRange(0, int(mesh.All)).Draw(rt, "c")))
	m.Peers[1].Permissions = mesh.Granted(mesh.Permissions(rapid.IntRange(0, int(mesh.All)).Draw(rt, "a")))
	m.Serves = policy.Services(rapid.IntRange(0, int(policy.EveryService)).Draw(rt, "serves"))
	m.ThroughPeer = rapid.Bool().Draw(rt, "through a peer")
	if rapid.IntRange(0, 4).Draw(rt, "remove") == 0 {
		m.Peers = m.Peers[1:]
	}
	return flowtest.Compile(t, m)
}

func compare(t *rapid.T, l *lab, m *model, sent map[tuple]Direction, p packetOf, d Direction) bool {
	want := false
	if d == FromPeer {
		want = m.fromPeer(p)
	} else {
		want = m.toPeer(p)
	}
	got := l.judge(p.wire, d)
	if (got.Action == Pass) != want {
		t.Fatalf("direction %d, %+v: %+v, the model says %v", d, p, got, want)
	}
	if !want || p.isError {
		return want
	}
	promised(t, m, sent, p, d)
	sent[p.tuple] = d
	return true
}

// promised checks that a packet that passes is permitted by itself or answers an earlier one.
func promised(t *rapid.T, m *model, sent map[tuple]Direction, p packetOf, d Direction) {
	by, answers := sent[p.tuple.reversed()]
	answers = answers && by != d
	switch {
	case d == FromPeer && m.peerMayPacket(p), d == FromPeer && answers && m.hostMay(p.tuple.reversed()):
	case d == ToPeer && (p.from.netip(p.v6) == flowtest.HostB4 || p.from.netip(p.v6) == flowtest.HostB6):
	case d == ToPeer && answers && m.peerMay(p.tuple.reversed()):
	default:
		t.Fatalf("direction %d, %+v passes, but is neither permitted nor an answer", d, p)
	}
}
