package flow

import (
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

const (
	incoming = mesh.Incoming
	routing  = mesh.Routing
	lan      = mesh.LAN
)

// lab is a flow table with the ruleset of the test picture and a clock that only the test
// advances.
type lab struct {
	t     testing.TB
	clock time.Time
	table *Table
	view  *View

	flooded int // flows that flood has tried to open
}

func newLab(t testing.TB, c mesh.Permissions, o Options) *lab {
	l := &lab{t: t, clock: time.Unix(1_700_000_000, 0)}
	o.Now = func() time.Time { return l.clock }
	l.table = New(o)
	l.set(flowtest.Picture(t, c))
	return l
}

// set puts a ruleset in force as the guard does.
func (l *lab) set(r *policy.Ruleset) {
	old := l.view
	l.view = l.table.Use(r)
	l.view.CutRefused(old)
}

func (l *lab) allow(c mesh.Permissions) { l.set(flowtest.Picture(l.t, c)) }

// through is like allow, for a host that routes its own traffic through a peer.
func (l *lab) through(c mesh.Permissions) {
	m := flowtest.Mesh(c)
	m.ThroughPeer = true
	l.set(flowtest.Compile(l.t, m))
}

func (l *lab) later(d time.Duration) { l.clock = l.clock.Add(d) }

func (l *lab) judge(p []byte, d Direction) Decision { return l.view.Judge(p, d, l.table.Now()) }

// from and to check that packets from a peer, or to one, pass or are refused, as want says.
func (l *lab) from(want bool, packets ...[]byte) {
	l.t.Helper()
	l.demand(want, FromPeer, packets)
}

func (l *lab) to(want bool, packets ...[]byte) {
	l.t.Helper()
	l.demand(want, ToPeer, packets)
}

func (l *lab) demand(want bool, d Direction, packets [][]byte) {
	l.t.Helper()
	for i, p := range packets {
		if v := l.judge(p, d); (v.Action == Pass) != want {
			l.t.Errorf("packet %d: %+v, want pass %v", i, v, want)
		}
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// conversation makes the packets of one flow and their answers.
type conversation struct {
	name    string
	ask     func(flags uint8) []byte
	answer  func(flags uint8) []byte
	strayer func() []byte // like answer, but of no flow
}

// conversations returns one conversation of each protocol between two ends.
func conversations(opener, other netip.Addr) []conversation {
	return []conversation{
		{"tcp",
			func(flags uint8) []byte { return flowtest.TCPSegment(at(opener, 40000), at(other, 443), flags, 10) },
			func(flags uint8) []byte { return flowtest.TCPSegment(at(other, 443), at(opener, 40000), flags, 10) },
			func() []byte { return flowtest.TCPSegment(at(other, 443), at(opener, 40001), flowtest.ACK, 10) }},
		{"udp",
			func(uint8) []byte { return flowtest.Datagram(at(opener, 5000), at(other, 53), 10) },
			func(uint8) []byte { return flowtest.Datagram(at(other, 53), at(opener, 5000), 10) },
			func() []byte { return flowtest.Datagram(at(other, 54), at(opener, 5000), 10) }},
		{"icmp",
			func(uint8) []byte { return flowtest.Echo(opener, other, 7, false, 10) },
			func(uint8) []byte { return flowtest.Echo(other, opener, 7, true, 10) },
			func() []byte { return flowtest.Echo(other, opener, 7, false, 10) }},
	}
}

// TestPeerOpens plays conversations that C opens: refused without the permissions, passing
// with them, cut when they are removed, and opened again by C once they are granted again.
func TestPeerOpens(t *testing.T) {
	for _, tt := range []struct {
		about     string
		needs     mesh.Permissions
		peer, dst netip.Addr
	}{
		{"internet", routing, flowtest.PeerC4, flowtest.Net4},
		{"internet6", routing, flowtest.PeerC6, flowtest.Net6},
		{"lan", routing | lan, flowtest.PeerC4, flowtest.LAN4},
		{"lan6", routing | lan, flowtest.PeerC6, flowtest.LAN6},
		{"host", incoming, flowtest.PeerC4, flowtest.HostB4},
		{"host6", incoming, flowtest.PeerC6, flowtest.HostB6},
		{"host on its lan", incoming, flowtest.PeerC4, flowtest.HostL4},
	} {
		for _, c := range conversations(tt.peer, tt.dst) {
			t.Run(tt.about+" "+c.name, func(t *testing.T) {
				l := newLab(t, 7&^tt.needs, Options{})
				// Packets of the host itself may pass without a flow.
				byHost := tt.dst == flowtest.HostB4 || tt.dst == flowtest.HostB6
				l.from(false, c.ask(flowtest.SYN))
				if !byHost {
					l.to(false, c.answer(flowtest.SYN|flowtest.ACK), c.strayer())
				}
				l.allow(tt.needs)
				l.from(true, c.ask(flowtest.SYN))
				l.to(true, c.answer(flowtest.SYN|flowtest.ACK))
				l.from(true, c.ask(flowtest.ACK), c.ask(flowtest.ACK))
				l.to(true, c.answer(flowtest.ACK), c.answer(flowtest.ACK))
				l.to(byHost, c.strayer())

				l.allow(7 &^ tt.needs)
				// Both ends go on sending for a while.
				for range 20 {
					l.later(time.Second)
					l.to(false, c.answer(flowtest.ACK))
					l.from(false, c.ask(flowtest.ACK))
					l.to(false, c.answer(flowtest.ACK))
				}
				l.allow(7)
				l.to(false, c.answer(flowtest.ACK))
				l.from(true, c.ask(flowtest.ACK))
				l.to(true, c.answer(flowtest.ACK))
			})
		}
	}
}

// TestCutStaysDead has only the host go on sending in a cut flow. After a day its packets
// still don't open the flow in the other direction, but the host may open another flow, and
// the same one after a pause of 25 hours.
func TestCutStaysDead(t *testing.T) {
	for _, c := range conversations(flowtest.PeerC4, flowtest.HostB4) {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, incoming, Options{})
			l.from(true, c.ask(flowtest.SYN))
			l.to(true, c.answer(flowtest.ACK))
			l.from(true, c.ask(flowtest.ACK))
			l.allow(routing)
			for range 24 * 3600 / 9 {
				l.later(9 * time.Second)
				l.to(false, c.answer(flowtest.ACK))
			}
			l.from(false, c.ask(flowtest.ACK))
			l.to(true, c.strayer())
			l.later(25 * time.Hour)
			l.to(true, c.answer(flowtest.ACK))
		})
	}
}

// TestCutAnswersStayDead has a peer that may only route query the host's DNS server, and lose
// its permission before the answer. With UDP the packet filter alone couldn't tell the answer
// from a flow that the host opens. The flow stays cut for as long as the host goes on
// sending, and for its timeout afterwards.
func TestCutAnswersStayDead(t *testing.T) {
	for _, ends := range [][2]netip.Addr{{flowtest.PeerC4, flowtest.HostB4}, {flowtest.PeerC6, flowtest.HostB6}} {
		for _, asked := range []int{1, 2} {
			m := flowtest.Mesh(routing)
			m.Serves = policy.DNS
			l := newLab(t, 0, Options{})
			l.set(flowtest.Compile(t, m))
			c := conversations(ends[0], ends[1])[1]
			timeout := UDPFirst
			for range asked {
				l.from(true, c.ask(0))
			}
			if asked > 1 {
				timeout = UDPMultiple
			}
			l.allow(0)
			for range 100 {
				l.to(false, c.answer(0))
				l.later(timeout)
			}
			l.from(false, c.ask(0))
			l.to(false, c.answer(0))
			// The host may send to C by other ports, and by the same ports once the flow has
			// timed out.
			l.to(true, c.strayer())
			l.later(timeout + purge + time.Second)
			l.to(true, c.answer(0))
		}
	}
}

// TestHostOpens plays conversations that the host opens to C, which has no permissions at
// first: C's answers pass, whatever it is granted meanwhile.
func TestHostOpens(t *testing.T) {
	for _, ends := range [][2]netip.Addr{{flowtest.HostB4, flowtest.PeerC4}, {flowtest.HostB6, flowtest.PeerC6}} {
		for _, c := range conversations(ends[0], ends[1]) {
			t.Run(c.name, func(t *testing.T) {
				l := newLab(t, 0, Options{})
				l.from(false, c.answer(flowtest.ACK))
				l.to(true, c.ask(flowtest.SYN))
				l.from(true, c.answer(flowtest.SYN|flowtest.ACK))
				l.to(true, c.ask(flowtest.ACK))
				l.from(false, c.strayer())
				l.allow(routing)
				l.from(true, c.answer(flowtest.ACK))
				l.allow(incoming)
				l.from(true, c.answer(flowtest.ACK))
				l.allow(0)
				l.from(true, c.answer(flowtest.ACK))
				// After a silence longer than the timeout, the host has to open the flow again.
				l.later(25 * time.Hour)
				l.from(false, c.answer(flowtest.ACK))
				l.to(true, c.ask(flowtest.ACK))
				l.from(true, c.answer(flowtest.ACK))
			})
		}
	}
}

// TestOnlyTheHostOpens sends to C from every other host: nothing passes.
func TestOnlyTheHostOpens(t *testing.T) {
	l := newLab(t, 7, Options{})
	for _, src := range []netip.Addr{
		flowtest.PeerA4, flowtest.PeerA6, flowtest.LAN4, flowtest.LAN6, flowtest.Net4, flowtest.Net6, flowtest.HostL4,
		netip.MustParseAddr("100.64.9.9"), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("fe80::1"),
	} {
		dst := flowtest.PeerC4
		if src.Is6() {
			dst = flowtest.PeerC6
		}
		for _, c := range conversations(src, dst) {
			l.to(false, c.ask(flowtest.SYN), c.ask(flowtest.ACK))
		}
	}
	// A packet to a destination beyond a peer passes only from the host's mesh address, and
	// only to a destination that may be routed through a peer.
	for range 2 {
		for _, c := range conversations(flowtest.LAN4, flowtest.Net4) {
			l.to(false, c.ask(flowtest.SYN))
		}
		for _, dst := range []string{"100.64.9.9", "224.0.0.251", "255.255.255.255", "127.0.0.1"} {
			for _, c := range conversations(flowtest.HostB4, netip.MustParseAddr(dst)) {
				l.to(false, c.ask(flowtest.SYN))
			}
		}
		l.through(7)
	}
}

// TestPeersNeverMeet sends between C and A in both directions: nothing passes.
func TestPeersNeverMeet(t *testing.T) {
	l := newLab(t, 7, Options{})
	for _, ends := range [][2]netip.Addr{{flowtest.PeerC4, flowtest.PeerA4}, {flowtest.PeerC6, flowtest.PeerA6}} {
		for _, c := range conversations(ends[0], ends[1]) {
			for range 2 {
				l.from(false, c.ask(flowtest.SYN), c.answer(flowtest.SYN|flowtest.ACK))
				l.to(false, c.ask(flowtest.SYN), c.answer(flowtest.ACK))
			}
		}
	}
}

// TestThroughPeer plays the host's own traffic through a peer: packets in return have the
// sources of other hosts, and pass only as answers.
func TestThroughPeer(t *testing.T) {
	for _, c := range conversations(flowtest.HostB4, flowtest.Net4) {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, 7, Options{})
			l.through(7)
			l.from(false, c.answer(flowtest.ACK), c.strayer())
			l.to(true, c.ask(flowtest.SYN))
			l.from(true, c.answer(flowtest.SYN|flowtest.ACK))
			l.to(true, c.ask(flowtest.ACK))
			l.from(true, c.answer(flowtest.ACK))
			l.from(false, c.strayer())
			router := netip.MustParseAddr("192.0.2.1")
			l.from(true, flowtest.ICMPMessage(router, flowtest.HostB4, 11, 0, c.ask(flowtest.ACK)))
			l.from(false, flowtest.ICMPMessage(router, flowtest.PeerA4, 11, 0, c.ask(flowtest.ACK)))
			l.from(false, flowtest.ICMPMessage(router, flowtest.HostB4, 11, 0, c.answer(flowtest.ACK)))

			l.allow(7) // the host no longer routes through a peer
			l.from(false, c.answer(flowtest.ACK), flowtest.ICMPMessage(router, flowtest.HostB4, 11, 0, c.ask(flowtest.ACK)))
			l.to(false, c.ask(flowtest.ACK))
			l.from(false, c.answer(flowtest.ACK))
		})
	}
}

// TestNothingThroughPeer plays the same traffic while the host doesn't route through a peer:
// in neither direction does a packet pass that isn't to or from a peer's address.
func TestNothingThroughPeer(t *testing.T) {
	for _, ends := range [][2]netip.Addr{
		{flowtest.HostB4, flowtest.Net4}, {flowtest.HostB6, flowtest.Net6}, {flowtest.HostB4, flowtest.LAN4}, {flowtest.HostB6, flowtest.LAN6},
	} {
		l := newLab(t, 7, Options{})
		for _, c := range conversations(ends[0], ends[1]) {
			l.from(false, c.answer(flowtest.ACK))
			l.to(false, c.ask(flowtest.SYN), c.ask(flowtest.ACK))
			l.to(false, flowtest.Fragments(c.ask(flowtest.SYN), 7, 24)...)
			l.from(false, c.answer(flowtest.SYN|flowtest.ACK), c.answer(flowtest.ACK), c.strayer())
			l.from(false, flowtest.Fragments(c.answer(flowtest.ACK), 8, 24)...)
			for icmpType := range uint8(20) {
				l.from(false, flowtest.ICMPMessage(ends[1], ends[0], icmpType, 0, c.ask(flowtest.ACK)))
				l.to(false, flowtest.ICMPMessage(ends[0], ends[1], icmpType, 0, c.answer(flowtest.ACK)))
			}
		}
	}
}

// TestErrors plays ICMP errors about flows of C with the internet: they pass in both
// directions while the flow runs, and only when they quote a packet of it.
func TestErrors(t *testing.T) {
	router4, router6 := netip.MustParseAddr("10.255.0.1"), netip.MustParseAddr("2001:db8:ffff::1")
	for _, tt := range []struct {
		opener, other, router netip.Addr
		types                 []uint8
	}{
		{flowtest.PeerC4, flowtest.Net4, router4, []uint8{3, 11, 12}},
		{flowtest.PeerC6, flowtest.Net6, router6, []uint8{1, 2, 3, 4}},
	} {
		for _, c := range conversations(tt.opener, tt.other) {
			l := newLab(t, routing, Options{})
			about := func(src, dst netip.Addr, icmpType uint8, quoted []byte) []byte {
				return flowtest.ICMPMessage(src, dst, icmpType, 0, quoted[:min(len(quoted), 48)])
			}
			for _, icmpType := range tt.types {
				toC := about(tt.router, tt.opener, icmpType, c.ask(flowtest.ACK))
				fromC := about(tt.opener, tt.other, icmpType, c.answer(flowtest.ACK))
				l.later(48 * time.Hour)
				l.allow(routing)
				l.to(false, toC)
				l.from(false, fromC)
				l.from(true, c.ask(flowtest.SYN))
				l.to(true, toC)
				l.from(true, fromC)
				// Refused: errors about the other direction or another flow, to another host than the
				// sender of the quoted packet, with a quote cut short, and about an error.
				l.to(false, about(tt.router, tt.opener, icmpType, c.answer(flowtest.ACK)), about(tt.router, tt.opener, icmpType, c.strayer()))
				l.from(false, about(tt.opener, tt.router, icmpType, c.answer(flowtest.ACK)), about(tt.opener, tt.other, icmpType, c.ask(flowtest.ACK)))
				header := len(c.ask(0)) - len(c.ask(0)[20:])
				l.to(false, about(tt.router, tt.opener, icmpType, c.ask(flowtest.ACK)[:header-1]))
				l.to(false, about(tt.router, tt.opener, icmpType, toC))

				l.allow(0)
				l.to(false, toC)
				l.from(false, fromC)
				l.allow(routing) // the flow stays cut until C sends
				l.to(false, toC)
				l.from(false, fromC)
			}
		}
	}
}

// TestErrorOfPeerOnly sends errors about a flow of C: one from A is refused, one from C
// passes.
func TestErrorOfPeerOnly(t *testing.T) {
	l := newLab(t, routing, Options{})
	c := conversations(flowtest.PeerC4, flowtest.Net4)[0]
	l.from(true, c.ask(flowtest.SYN))
	l.from(false, flowtest.ICMPMessage(flowtest.PeerA4, flowtest.Net4, 3, 3, c.answer(flowtest.ACK)))
	l.from(true, flowtest.ICMPMessage(flowtest.PeerC4, flowtest.Net4, 3, 3, c.answer(flowtest.ACK)))
	// An error of C about a packet of the host passes only after the host sent that packet.
	h := conversations(flowtest.HostB4, flowtest.PeerC4)[1]
	refused := flowtest.ICMPMessage(flowtest.PeerC4, flowtest.HostB4, 3, 3, h.ask(0))
	l.from(false, refused)
	l.to(true, h.ask(0))
	l.from(true, refused)
}

// TestRedirectsNeverPass sends ICMP redirects (type 5, and 137 of ICMPv6) about a running flow
// in both directions: they are refused, though other errors about it would pass.
func TestRedirectsNeverPass(t *testing.T) {
	l := newLab(t, 7, Options{})
	c := conversations(flowtest.PeerC4, flowtest.Net4)[0]
	l.from(true, c.ask(flowtest.SYN))
	l.from(false, flowtest.ICMPMessage(flowtest.PeerC4, flowtest.HostB4, 5, 1, c.answer(0)), flowtest.ICMPMessage(flowtest.PeerC6, flowtest.HostB6, 137, 0, c.answer(0)))
	l.to(false, flowtest.ICMPMessage(flowtest.HostB4, flowtest.PeerC4, 5, 1, c.ask(0)), flowtest.ICMPMessage(flowtest.HostB6, flowtest.PeerC6, 137, 0, c.ask(0)),
		flowtest.ICMPMessage(flowtest.HostB4, flowtest.Net4, 5, 1, c.ask(0)))
}

// TestUnsolicitedAnswers has C send packets that look like answers, and others that can't
// open a flow. A packet filter may create a state for such a packet (pf does, with flags
// any), so it passes only in a running flow.
func TestUnsolicitedAnswers(t *testing.T) {
	l := newLab(t, incoming|routing, Options{})
	for _, ends := range [][2]netip.Addr{{flowtest.PeerC4, flowtest.Net4}, {flowtest.PeerC6, flowtest.Net6}, {flowtest.PeerC4, flowtest.HostB4}} {
		peer, other := ends[0], ends[1]
		segment := func(flags uint8) []byte { return flowtest.TCPSegment(at(peer, 22), at(other, 9), flags, 0) }
		l.from(false,
			flowtest.Echo(peer, other, 9, true, 8), segment(flowtest.SYN|flowtest.ACK), segment(flowtest.RST), segment(flowtest.RST|flowtest.ACK),
			flowtest.ICMPMessage(peer, other, 42, 0, nil), flowtest.ICMPMessage(peer, other, 160, 0, nil))
		if v := l.judge(segment(flowtest.RST), FromPeer); v.Rule != policy.RuleUnasked || v.Action != Drop {
			t.Errorf("a reset without a flow: %+v", v)
		}
		if s := l.view.Stats(0); s.Flows != 0 || s.Held != 0 || s.Full != 0 {
			t.Errorf("flows after refused packets: %+v, want none", s)
		}
		byHost := other == flowtest.HostB4
		l.to(byHost, flowtest.Echo(other, peer, 9, false, 8), flowtest.TCPSegment(at(other, 9), at(peer, 22), flowtest.ACK, 0))
	}
	// In a flow such a segment passes.
	c := conversations(flowtest.PeerC4, flowtest.Net4)[0]
	l.from(true, c.ask(flowtest.SYN), c.ask(flowtest.SYN|flowtest.ACK), c.ask(flowtest.RST))
	// An answer of the host without a flow passes, but doesn't open one.
	l.allow(0)
	l.to(true, flowtest.TCPSegment(at(flowtest.HostB4, 22), at(flowtest.PeerC4, 9), flowtest.SYN|flowtest.ACK, 0))
	l.from(false, flowtest.TCPSegment(at(flowtest.PeerC4, 9), at(flowtest.HostB4, 22), flowtest.ACK, 0))
}

// TestOtherProtocolsOpenNothing sends packets of protocols other than TCP, UDP and ICMP, the
// ICMP of the other address family included, from C, which has every permission, and back:
// none passes, whole or in fragments, and no flow opens.
func TestOtherProtocolsOpenNothing(t *testing.T) {
	const gre, esp, ah, dccp, ospf, sctp, udpLite, hip = 47, 50, 51, 33, 89, 132, 136, 139
	l := newLab(t, 7, Options{})
	for _, proto := range []uint8{0, gre, esp, ah, 4, 41, dccp, ospf, sctp, udpLite, hip, 59, 255, flowtest.ICMP, flowtest.ICMPv6} {
		for _, ends := range [][2]netip.Addr{{flowtest.PeerC4, flowtest.Net4}, {flowtest.PeerC6, flowtest.Net6}, {flowtest.PeerC4, flowtest.HostB4}, {flowtest.PeerC4, flowtest.LAN4}} {
			peer, other := ends[0], ends[1]
			if proto == flowtest.ICMP && peer.Is4() || proto == flowtest.ICMPv6 && peer.Is6() {
				continue
			}
			p := flowtest.IP(peer, other, proto, make([]byte, 24))
			l.from(false, p, flowtest.Fragment(p, 1, 0, true, make([]byte, 24)), flowtest.Fragment(p, 1, 24, false, make([]byte, 24)))
			if other != flowtest.HostB4 {
				l.to(false, flowtest.IP(other, peer, proto, make([]byte, 24)))
			}
			l.to(false, flowtest.ICMPMessage(other, peer, map[bool]uint8{false: 3, true: 1}[peer.Is6()], 0, p))
		}
	}
	if s := l.view.Stats(0); s.Flows != 0 {
		t.Errorf("%d flows were opened, want none", s.Flows)
	}
}

// TestChangeHoldsAtOnce judges by a new view before the flows of the old one are cut, while
// the old view is still in use: the new view refuses the flow at once.
func TestChangeHoldsAtOnce(t *testing.T) {
	l := newLab(t, 7, Options{})
	c := conversations(flowtest.PeerC4, flowtest.Net4)[1]
	for range 3 {
		l.from(true, c.ask(0))
		l.to(true, c.answer(0))
	}
	old := l.view
	l.view = l.table.Use(flowtest.Picture(t, 0))
	l.to(false, c.answer(0))
	l.from(false, c.ask(0))
	if v := old.Judge(c.ask(0), FromPeer, l.table.Now()); v.Action != Pass {
		t.Errorf("by the old view: %+v, want pass", v)
	}
	l.to(false, c.answer(0))
	l.from(false, c.ask(0))
	l.view.CutRefused(old)
	l.to(false, c.answer(0))
}

// TestRemovedPeer removes C, adds it again, and then gives its address to a peer with another
// key: C's flows stay cut, and the new peer doesn't inherit them.
func TestRemovedPeer(t *testing.T) {
	l := newLab(t, 7, Options{})
	host := conversations(flowtest.PeerC4, flowtest.HostB4)[0]
	net := conversations(flowtest.PeerC4, flowtest.Net4)[0]
	for _, c := range []conversation{host, net} {
		l.from(true, c.ask(flowtest.SYN))
		l.to(true, c.answer(flowtest.ACK))
	}
	byHost := conversations(flowtest.HostB4, flowtest.PeerC4)[1]
	l.to(true, byHost.ask(0))
	l.from(true, byHost.answer(0))
	without := flowtest.Mesh(7)
	without.Peers = without.Peers[1:]
	l.set(flowtest.Compile(t, without))
	l.from(false, host.ask(flowtest.ACK), net.ask(flowtest.ACK))
	l.to(false, host.answer(flowtest.ACK), net.answer(flowtest.ACK))
	l.allow(0)
	l.to(false, host.answer(flowtest.ACK), net.answer(flowtest.ACK))
	l.from(false, byHost.answer(0))
	l.to(true, byHost.ask(0))
	l.from(true, byHost.answer(0))

	other := flowtest.Mesh(routing)
	other.Peers[0].PublicKey = mesh.PublicKey{'D'}
	l.set(flowtest.Compile(t, other))
	l.to(false, net.answer(flowtest.ACK))
	l.from(false, host.ask(flowtest.ACK))

	// The table drops C's share once all flows in it have timed out.
	l.later(49 * time.Hour)
	l.set(flowtest.Compile(t, other))
	if got := len(l.table.shares); got != 2 {
		t.Errorf("%d shares remembered, want 2", got)
	}
}

// TestAnswers counts the ICMP answers to refused packets: at most answerBurst at once and
// answerRate a second, and none to packets that are refused in silence.
func TestAnswers(t *testing.T) {
	l := newLab(t, 0, Options{})
	count := func(p []byte) (n int) {
		for range 100 {
			if l.judge(p, FromPeer).Action == Answer {
				n++
			}
		}
		return n
	}
	syn := flowtest.TCPSegment(at(flowtest.PeerC4, 1), at(flowtest.Net4, 2), flowtest.SYN, 0)
	if got := count(syn); got != answerBurst {
		t.Errorf("%d answers at once, want %d", got, answerBurst)
	}
	l.later(time.Second)
	if got := count(syn); got != answerRate {
		t.Errorf("%d answers after a second, want %d", got, answerRate)
	}
	l.later(time.Hour)
	for _, silent := range [][]byte{
		flowtest.TCPSegment(at(flowtest.PeerC4, 1), at(flowtest.PeerA4, 2), flowtest.SYN, 0),
		flowtest.Datagram(at(flowtest.PeerC4, 1), at(netip.MustParseAddr("224.0.0.251"), 5353), 0),
		flowtest.Datagram(at(netip.MustParseAddr("100.64.0.77"), 1), at(flowtest.Net4, 2), 0),
		flowtest.ICMPMessage(flowtest.PeerC4, flowtest.Net4, 3, 3, syn),
		syn[:30],
	} {
		if got := count(silent); got != 0 {
			t.Errorf("%d answers to %x, want none", got, silent)
		}
	}
	stats := l.view.Stats(0)
	if stats.Flows != 0 {
		t.Errorf("refused packets opened %d flows, want none", stats.Flows)
	}
}

// TestTally checks the statistics after packets that pass and packets that are refused: bytes
// of routed packets, refusals by class, and an example of a refused packet.
func TestTally(t *testing.T) {
	l := newLab(t, routing, Options{})
	now := l.table.Now()
	var tally Tally
	add := func(p []byte, d Direction) { tally.Add(l.view.Judge(p, d, now), p, d, now) }
	c := conversations(flowtest.PeerC4, flowtest.Net4)[1]
	for range 3 {
		add(c.ask(0), FromPeer)
	}
	add(flowtest.Datagram(at(flowtest.PeerC4, 1), at(flowtest.HostB4, 2), 0), FromPeer)
	add(flowtest.Datagram(at(flowtest.PeerC4, 1), at(flowtest.PeerA4, 2), 0), FromPeer)
	add(flowtest.Datagram(at(flowtest.PeerC4, 1), at(flowtest.LAN4, 2), 0), FromPeer)
	add(flowtest.Datagram(at(flowtest.PeerA4, 1), at(flowtest.HostB4, 2), 0), FromPeer)
	tally.Flush(FromPeer, now)
	add(c.answer(0), ToPeer)
	add(c.strayer(), ToPeer)
	tally.Flush(ToPeer, now)
	got := l.view.Stats(0)
	want := Stats{
		Refused: [policy.NumClasses]uint64{0: 1, policy.Self: 1, policy.InMesh: 1, policy.OnLAN: 1},
		RxBytes: 3 * 38, TxBytes: 38, LastRouted: got.LastRouted, Flows: 1, Held: 1, Limit: maxPerPeer,
		Example: Refused{To: flowtest.HostB4, Proto: policy.ProtoUDP, Port: 2}, // the first refusal since the last call of Stats
	}
	if got != want || !got.LastRouted.Equal(l.clock) {
		t.Errorf("got %+v, want %+v at %v", got, want, l.clock)
	}
	if a := l.view.Stats(1); a.RxBytes != 0 || a.Flows != 1 {
		t.Errorf("A, which routes nothing, has %+v", a)
	}
}

// TestTunnelInTunnel has peers send to WireGuard's port at each address of the host, whole
// and in fragments, as requests and as answers. Nothing passes in either direction, while
// other ports of the host, and the same port of other hosts, can be reached.
func TestTunnelInTunnel(t *testing.T) {
	const port = 51820
	m := flowtest.Mesh(7)
	m.ListenPort, m.Serves = port, policy.DNS
	l := newLab(t, 0, Options{})
	l.set(flowtest.Compile(t, m))
	own := []netip.Addr{flowtest.HostB4, flowtest.HostB6}
	for _, i := range flowtest.Host().Interfaces {
		for _, p := range i.Addresses {
			own = append(own, p.Addr())
		}
	}
	for id, host := range own {
		peer, a := flowtest.PeerC4, flowtest.PeerA4
		if host.Is6() {
			peer, a = flowtest.PeerC6, flowtest.PeerA6
		}
		for _, src := range []netip.Addr{peer, a} {
			for _, from := range []uint16{port, 9} {
				to := flowtest.Datagram(at(src, from), at(host, port), 100)
				l.from(false, to)
				l.from(false, flowtest.Fragments(to, uint32(id), 40)...)
				l.to(false, flowtest.Datagram(at(host, port), at(src, from), 100))
				l.from(false, to) // as an answer
			}
		}
		l.from(true, flowtest.Datagram(at(peer, port), at(host, port+1), 8), flowtest.TCPSegment(at(peer, 9), at(host, port), flowtest.SYN, 0))
	}
	for _, other := range []netip.Addr{flowtest.Net4, flowtest.LAN4} {
		l.from(true, flowtest.Datagram(at(flowtest.PeerC4, 9), at(other, port), 8))
	}

	// To the outside addresses of the router in front, which would send such a packet back to
	// the host (hairpin NAT).
	h := flowtest.Host()
	h.Outside, h.OutsidePort = []netip.Addr{flowtest.Net4, flowtest.Net6}, port+7
	r, err := policy.Compile(m, h, time.Unix(1_700_000_000, 0))
	if err != nil {
		t.Fatal(err)
	}
	l.set(r)
	for id, ends := range [][2]netip.Addr{{flowtest.PeerC4, flowtest.Net4}, {flowtest.PeerC6, flowtest.Net6}} {
		for _, to := range []uint16{port, port + 7} {
			out := flowtest.Datagram(at(ends[0], 9), at(ends[1], to), 100)
			l.from(false, out)
			l.from(false, flowtest.Fragments(out, uint32(100+id), 40)...)
			l.to(false, flowtest.Datagram(at(ends[1], to), at(ends[0], 9), 100))
		}
		l.from(true, flowtest.Datagram(at(ends[0], 9), at(ends[1], port+1), 8), flowtest.TCPSegment(at(ends[0], 9), at(ends[1], port), flowtest.SYN, 0))
	}
	l.set(flowtest.Compile(t, m))

	// While the host routes through a peer, packets of its own tunnel don't enter the tunnel,
	// and packets that claim to be their answers don't pass.
	m.ThroughPeer = true
	l.set(flowtest.Compile(t, m))
	for _, ends := range [][2]netip.Addr{{flowtest.HostB4, flowtest.Net4}, {flowtest.HostB6, flowtest.Net6}} {
		out, back := flowtest.Datagram(at(ends[0], port), at(ends[1], port), 100), flowtest.Datagram(at(ends[1], port), at(ends[0], port), 100)
		l.to(false, out)
		l.to(false, flowtest.Fragments(out, 7, 40)...)
		l.from(false, back)
		l.from(false, flowtest.Fragments(back, 7, 40)...)
		l.to(true, flowtest.Datagram(at(ends[0], 9), at(ends[1], port), 100))
		l.from(true, flowtest.Datagram(at(ends[1], port), at(ends[0], 9), 100))
	}
}
