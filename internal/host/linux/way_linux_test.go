package linux

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// wayOf looks up the way of a packet.
func (g *rig) wayOf(p host.Packet) host.Way {
	g.t.Helper()
	var w host.Way
	g.do(func() (err error) {
		w, err = g.p.Way(context.Background(), p)
		return err
	})
	return w
}

// TestWay looks up the ways of a peer's and the host's packets, with routes that drop
// packets and policy rules by source, port and interface.
func TestWay(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	a := netlab.Addresses()
	elsewhere := netip.MustParseAddr("198.51.100.1")
	m := meshOf(grants{ann: all, bob: all})
	from := m.Peers[0].Addresses[0]
	byUplink := host.Way{Interface: netlab.Uplink, Router: a.W.V4, Source: a.BUplink.V4}
	g.enforce(meshOf(grants{}))
	if got := g.wayOf(host.Packet{In: meshName, Packet: policy.Packet{Src: from, Dst: elsewhere}}); got != byUplink {
		t.Errorf("before forwarding is on: %+v", got)
	}
	g.enforce(m)
	g.ip(g.pic.B, `route add unreachable 198.19.1.0/24
		route add prohibit 198.19.2.0/24
		route add blackhole 198.19.3.0/24
		-6 route add unreachable 2001:db8:77::/64
		-6 route add prohibit 2001:db8:78::/64
		-6 route add blackhole 2001:db8:79::/64
		route add default via 10.99.0.2 dev vpn0 table 77
		rule add priority 100 iif `+meshName+` ipproto udp dport 443 lookup 77`)
	byVPN := host.Way{Interface: netlab.VPN, Router: netip.MustParseAddr("10.99.0.2"), Source: netip.MustParseAddr("10.99.0.1")}
	for _, tt := range []struct {
		about, to string
		proto     uint8
		dport     uint16
		own       bool
		want      host.Way
	}{
		{about: "a peer's", to: "198.51.100.1", want: byUplink},
		{about: "a peer's TCP", to: "198.51.100.1", proto: policy.ProtoTCP, dport: 443, want: byUplink},
		{about: "a peer's by a rule", to: "198.51.100.1", proto: policy.ProtoUDP, dport: 443, want: byVPN},
		{about: "the host's", to: "198.51.100.1", proto: policy.ProtoUDP, dport: 443, own: true, want: byUplink},
		{about: "a peer's ping", to: "198.51.100.1", proto: policy.ProtoICMP, want: byUplink},
		{about: "to the host", to: "203.0.113.2", want: host.Way{Local: true}},
		{about: "to the lan", to: "192.168.77.2", want: host.Way{Interface: netlab.LAN, Source: netip.MustParseAddr("192.168.77.1")}},
		{about: "unreachable", to: "198.19.1.1", want: host.Way{Refused: host.WayUnreachable}},
		{about: "prohibited", to: "198.19.2.1", want: host.Way{Refused: host.WayProhibited}},
		{about: "blackhole", to: "198.19.3.1", want: host.Way{Refused: host.WayBlackhole}},
		{about: "unreachable", to: "2001:db8:77::1", want: host.Way{Refused: host.WayUnreachable}},
		{about: "prohibited", to: "2001:db8:78::1", want: host.Way{Refused: host.WayProhibited}},
		{about: "blackhole", to: "2001:db8:79::1", want: host.Way{Refused: host.WayBlackhole}},
		{about: "another peer", to: m.Peers[1].Addresses[0].String(), want: host.Way{Interface: meshName, Source: own4}},
	} {
		to := netip.MustParseAddr(tt.to)
		p := host.Packet{In: meshName, Packet: policy.Packet{Src: from, Dst: to, Proto: tt.proto, SrcPort: 50000, DstPort: tt.dport}}
		if to.Is6() {
			p.Src = m.Peers[0].Addresses[1]
		}
		if tt.own {
			p.In, p.Src = "", netip.Addr{}
		}
		if got := g.wayOf(p); got != tt.want {
			t.Errorf("%s, to %v: %+v, want %+v", tt.about, to, got, tt.want)
		}
	}
	g.ip(g.pic.B, "route del default")
	if got := g.wayOf(host.Packet{In: meshName, Packet: policy.Packet{Src: from, Dst: elsewhere}}); got.Refused != host.WayNone && got.Refused != host.WayUnreachable {
		t.Errorf("without a default route: %+v", got)
	}
}

// TestAnswerOf checks that a route that drops packets has no interface, whatever the
// message says.
func TestAnswerOf(t *testing.T) {
	for kind := range uint8(16) {
		a := answerOf(nlconn.Route{Kind: kind, OIF: 7, Router: netip.MustParseAddr("192.0.2.1"), Src: netip.MustParseAddr("192.0.2.2")})
		if refused := slices.Contains([]uint8{unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT}, kind); refused != (a.refused != "") {
			t.Errorf("kind %d: refused as %q", kind, a.refused)
		}
		if a.refused != "" && a != (answer{refused: a.refused}) {
			t.Errorf("kind %d: %+v", kind, a)
		}
	}
}
