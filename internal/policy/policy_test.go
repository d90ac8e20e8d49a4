package policy

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

var (
	start = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

	hostA4 = netip.MustParseAddr("100.64.0.1")
	hostA6 = netip.MustParseAddr("fd6d:6573:6800::1")
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// picture is the mesh of host B in docs/policy.md: the external peer C with the given
// permissions, and the own peer A.
func picture(c mesh.Permissions) Mesh {
	return Mesh{
		Prefixes:  []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6},
		Addresses: []netip.Addr{hostA4, hostA6},
		Peers: []mesh.Peer{
			{PublicKey: mesh.PublicKey{'C'}, Name: "c", Addresses: mesh.Addresses{addr("100.64.0.3"), addr("fd6d:6573:6800::3")}, Permissions: mesh.Granted(c)},
			{PublicKey: mesh.PublicKey{'A'}, Name: "a", Addresses: mesh.Addresses{addr("100.64.0.2"), addr("fd6d:6573:6800::2")}, Permissions: mesh.Granted(mesh.Incoming)},
		},
	}
}

func pictureHost() Host {
	pp := func(texts ...string) []netip.Prefix { return prefixes(texts...) }
	return Host{
		Interface: "utun7", Uplink4: "en0", Uplink6: "en0",
		Forwarding: Families{true, true},
		Interfaces: []Interface{
			{"en0", pp("203.0.113.9/24", "2001:db8:1::9/64", "fe80::9/64")},
			{"en5", pp("192.168.77.1/24", "2001:db8:77::1/64")},
			{"en6", pp("198.51.100.1/25", "169.254.3.4/16")},
			{"ppp0", pp("192.0.2.8/31")},
			{"utun7", pp("100.64.0.1/32", "fd6d:6573:6800::1/128")},
		},
		Routes: []Route{
			{prefix("198.18.0.0/16"), "utun3"},
			{prefix("2001:db8:18::/48"), "utun3"},
			{prefix("0.0.0.0/0"), "en0"},
			{prefix("100.64.0.2/32"), "utun7"},
		},
	}
}

// sent is a packet with the interface on which it arrives, which is empty for a packet of
// the host itself.
type sent struct {
	In string
	Packet
}

// decide calls the method of Ruleset that judges packets from the origin of p.
func (r *Ruleset) decide(p sent) Verdict {
	switch {
	case p.In == r.host.Interface:
		return r.FromPeer(p.Packet)
	case p.In == "", IsLoopback(p.In):
		return r.FromHost(p.Packet)
	}
	return r.FromElsewhere(p.Packet)
}

func compile(t testing.TB, m Mesh, h Host) *Ruleset {
	t.Helper()
	r, err := Compile(m, h, start)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestFromPeer checks the table "From a peer" of docs/policy.md: the class of each
// destination, and the verdict under every set of permissions.
func TestFromPeer(t *testing.T) {
	never := func(mesh.Permissions) bool { return false }
	incoming := func(p mesh.Permissions) bool { return p.Has(mesh.Incoming) }
	both := func(p mesh.Permissions) bool { return p.Has(mesh.Routing | mesh.LAN) }
	routing := func(p mesh.Permissions) bool { return p.Has(mesh.Routing) }
	for _, tt := range []struct {
		class  Class
		passes func(mesh.Permissions) bool
		dsts   string
	}{
		{Martian, never, "0.0.0.0 0.1.2.3 127.0.0.1 224.0.0.251 239.255.255.250 240.0.0.1 255.255.255.255"},
		{Martian, never, "203.0.113.0 203.0.113.255 192.168.77.255 192.168.77.0 198.51.100.127 169.254.255.255"},
		{Martian, never, ":: ::1 ff02::1 ff0e::1 fe80::1 fe80::9 ::ffff:8.8.8.8"},
		{Martian, never, "192.0.0.2 192.0.0.170 ::8.8.8.8 ::ffff:0:1 100::1 fec0::1 feff::1 2001::1 2001:0:4136:e378:8000:63bf:f7f7:f7f7"},
		{Martian, never, "64:ff9b::127.0.0.1 64:ff9b::203.0.113.255 64:ff9b::192.0.0.8 2002:7f00:1::1 2002:e000:fb:: 2002:cb00:71ff:1::1"},
		{Martian, never, "64:ff9b::203.0.113.9 64:ff9b::100.64.0.1 64:ff9b::100.64.0.2 64:ff9b::100.127.0.9 2002:cb00:7109::1 2002:6440:2::1"},
		{Self, incoming, "100.64.0.1 fd6d:6573:6800::1 203.0.113.9 192.168.77.1 198.51.100.1 192.0.2.8 2001:db8:1::9"},
		{InMesh, never, "100.64.0.2 100.64.0.3 100.127.255.254 fd6d:6573:6800::2 fd6d:6573:6800:ffff::1"},
		{OnLAN, both, "10.1.2.3 172.31.0.1 192.168.77.9 192.168.1.1 169.254.169.254 fd00::1 fc12::1"},
		{OnLAN, both, "203.0.113.1 198.51.100.5 192.0.2.9 198.18.7.7 198.19.0.1 2001:db8:18::5 2001:db8:77::5 2001:db8:1::1"},
		{OnLAN, both, "64:ff9b::10.1.2.3 64:ff9b::203.0.113.1 64:ff9b::198.18.7.7 64:ff9b:1::8.8.8.8 64:ff9b:1:ffff::1 2002:a01:203::1 2002:c0a8:4d09:ffff::1"},
		{Internet, routing, "8.8.8.8 198.51.100.128 198.20.0.1 192.0.1.1 203.0.114.0 2001:db8:19::1 2600::1 64:ff9b::8.8.8.8 64:ff9a::10.0.0.1 2002:808:808::1 2001:1::1 100:0:0:1::1 2003::1"},
	} {
		for p := range mesh.All + 1 {
			r := compile(t, picture(p), pictureHost())
			for _, dst := range strings.Fields(tt.dsts) {
				d := addr(dst)
				src := addr("100.64.0.3")
				if d.Is6() {
					src = addr("fd6d:6573:6800::3")
				}
				v := r.FromPeer(Packet{Src: src, Dst: d, Proto: ProtoUDP, DstPort: 53})
				if v.Class != tt.class || v.Pass != tt.passes(p) || v.Peer != 0 {
					t.Errorf("%v with %v: got %+v, want class %v, pass %v", dst, p, v, tt.class, tt.passes(p))
				}
				if v.Pass != (v.Exit != ExitNone) {
					t.Errorf("%v with %v: pass %v but exit %v", dst, p, v.Pass, v.Exit)
				}
				if v.Pass && v.Missing != 0 {
					t.Errorf("%v with %v: passes, but %v is reported as missing", dst, p, v.Missing)
				}
			}
		}
	}
}

// TestMissing checks the permissions that a verdict reports as missing, which must be those
// that would let the packet pass. A refusal is answered exactly if there are any.
func TestMissing(t *testing.T) {
	for _, tt := range []struct {
		have    mesh.Permissions
		dst     string
		missing mesh.Permissions
	}{
		{0, "203.0.113.9", mesh.Incoming},
		{0, "10.0.0.1", mesh.Routing | mesh.LAN},
		{mesh.LAN, "10.0.0.1", mesh.Routing | mesh.LAN}, // lan without routing has no effect
		{mesh.Routing, "10.0.0.1", mesh.LAN},
		{mesh.LAN, "8.8.8.8", mesh.Routing},
		{0, "100.64.0.2", 0}, // no permission opens the mesh
	} {
		v := compile(t, picture(tt.have), pictureHost()).FromPeer(Packet{Src: addr("100.64.0.3"), Dst: addr(tt.dst), Proto: ProtoUDP})
		if v.Pass || v.Missing != tt.missing || v.Answered() != (tt.missing != 0) {
			t.Errorf("%v with %v: got %+v, want missing %v", tt.dst, tt.have, v, tt.missing)
		}
	}
}

// TestRules checks the rules that don't depend on the destination's class.
func TestRules(t *testing.T) {
	c4, c6, a4 := addr("100.64.0.3"), addr("fd6d:6573:6800::3"), addr("100.64.0.2")
	inet, lan := addr("8.8.8.8"), addr("192.168.77.9")
	for _, tt := range []struct {
		about string
		host  func(*Host)
		p     sent
		rule  Rule
	}{
		{"malformed", nil, sent{"utun7", Packet{Src: c4, Dst: inet, Malformed: true, Proto: ProtoUDP}}, RuleMalformed},
		{"families mixed", nil, sent{"utun7", Packet{Src: c4, Dst: addr("2600::1"), Proto: ProtoUDP}}, RuleMalformed},
		{"source of another", nil, sent{"utun7", Packet{Src: inet, Dst: lan, Proto: ProtoUDP}}, RuleSpoofed},
		{"host's own source", nil, sent{"utun7", Packet{Src: hostA4, Dst: inet, Proto: ProtoUDP}}, RuleSpoofed},
		{"redirect", nil, sent{"utun7", Packet{Src: c4, Dst: inet, Proto: ProtoICMP, ICMPType: 5}}, RuleRedirect},
		{"redirect v6", nil, sent{"utun7", Packet{Src: c6, Dst: addr("2600::1"), Proto: ProtoICMPv6, ICMPType: 137}}, RuleRedirect},
		{"error without flow", nil, sent{"utun7", Packet{Src: c4, Dst: inet, Proto: ProtoICMP, ICMPType: 3}}, RuleUnquoted},
		{"number 1 in IPv6 is no ICMP", nil, sent{"utun7", Packet{Src: c6, Dst: addr("2600::1"), Proto: ProtoICMP, ICMPType: 3}}, RuleProtocol},
		{"another protocol", nil, sent{"utun7", Packet{Src: c4, Dst: inet, Proto: 47}}, RuleProtocol},
		{"another protocol to a peer", nil, sent{"", Packet{Src: hostA4, Dst: c4, Proto: 41}}, RuleProtocol},
		{"IPv6's ICMP in IPv4", nil, sent{"utun7", Packet{Src: c4, Dst: inet, Proto: ProtoICMPv6}}, RuleProtocol},
		{"another protocol on the LAN", nil, sent{"", Packet{Src: addr("192.168.77.1"), Dst: lan, Proto: 47}}, RuleNotOurs},
		{"no forwarding", func(h *Host) { h.Forwarding.IPv6 = false }, sent{"utun7", Packet{Src: c6, Dst: addr("2600::1"), Proto: ProtoUDP}}, RuleNoForwarding},
		{"no forwarding, lan", func(h *Host) { h.Forwarding.IPv4 = false }, sent{"utun7", Packet{Src: c4, Dst: lan, Proto: ProtoUDP}}, RuleNoForwarding},
		{"no uplink", func(h *Host) { h.Uplink4 = "" }, sent{"utun7", Packet{Src: c4, Dst: inet, Proto: ProtoUDP}}, RuleNoUplink},
		{"peer's source elsewhere", nil, sent{"en5", Packet{Src: c4, Dst: inet, Proto: ProtoUDP}}, RuleSpoofed},
		{"peer's source to the host elsewhere", nil, sent{"en0", Packet{Src: a4, Dst: addr("203.0.113.9"), Proto: ProtoUDP}}, RuleSpoofed},
		{"posing as the host", func(h *Host) { h.FoundForwarding.IPv4 = true }, sent{"en5", Packet{Src: hostA4, Dst: inet, Proto: ProtoUDP}}, RuleSpoofed},
		{"to the host's mesh address", nil, sent{"en5", Packet{Src: lan, Dst: hostA4, Proto: ProtoUDP}}, RuleToHost},
		{"to it by loopback", nil, sent{"lo0", Packet{Src: hostA4, Dst: hostA4, Proto: ProtoUDP}}, RuleNotOurs},
		{"LAN to a peer", nil, sent{"en5", Packet{Src: lan, Dst: c4, Proto: ProtoUDP}}, RuleToPeer},
		{"LAN to an unassigned address", nil, sent{"en5", Packet{Src: lan, Dst: addr("100.100.1.1"), Proto: ProtoUDP}}, RuleUnassigned},
		{"host to an unassigned address", nil, sent{"", Packet{Src: hostA4, Dst: addr("100.100.1.1"), Proto: ProtoUDP}}, RuleUnassigned},
		{"host to a peer", nil, sent{"", Packet{Src: hostA4, Dst: c4, Proto: ProtoUDP}}, RuleHostToPeer},
		{"host to a peer with another source", nil, sent{"", Packet{Src: addr("192.168.77.1"), Dst: c4, Proto: ProtoUDP}}, RuleForeignSource},
		{"host redirects a peer", nil, sent{"", Packet{Src: hostA4, Dst: c4, Proto: ProtoICMP, ICMPType: 5}}, RuleRedirect},
		{"host to the internet", nil, sent{"", Packet{Src: addr("203.0.113.9"), Dst: inet, Proto: ProtoUDP}}, RuleNotOurs},
		{"LAN to the host", nil, sent{"en5", Packet{Src: lan, Dst: addr("192.168.77.1"), Proto: ProtoUDP}}, RuleNotOurs},
		{"transit, found off", nil, sent{"en5", Packet{Src: lan, Dst: inet, Proto: ProtoUDP}}, RuleClosedTransit},
		{"transit, found on", func(h *Host) { h.FoundForwarding.IPv4 = true }, sent{"en5", Packet{Src: lan, Dst: inet, Proto: ProtoUDP}}, RuleTransit},
		{"transit with an unused mesh source", func(h *Host) { h.FoundForwarding.IPv4 = true }, sent{"en0", Packet{Src: addr("100.99.0.1"), Dst: lan, Proto: ProtoUDP}}, RuleTransit},
		{"carrier's own prefix", func(h *Host) {
			h.Interfaces[0].Addresses = append(h.Interfaces[0].Addresses, prefix("100.80.0.7/20"))
		}, sent{"", Packet{Src: addr("100.80.0.7"), Dst: addr("100.80.0.1"), Proto: ProtoUDP}}, RuleNotOurs},
		{"carrier's router outside its prefix", func(h *Host) {
			h.Interfaces[0].Addresses = append(h.Interfaces[0].Addresses, prefix("100.80.0.7/20"))
		}, sent{"", Packet{Src: addr("100.80.0.7"), Dst: addr("100.127.0.1"), Proto: ProtoUDP}}, RuleNotOurs},
		{"peer inside the carrier's prefix", func(h *Host) {
			h.Interfaces[0].Addresses = append(h.Interfaces[0].Addresses, prefix("100.64.0.7/10"))
		}, sent{"", Packet{Src: addr("100.64.0.7"), Dst: c4, Proto: ProtoUDP}}, RuleForeignSource},
		{"host's resolver", func(h *Host) { h.Resolvers = []netip.Addr{addr("100.100.2.136")} },
			sent{"", Packet{Src: addr("203.0.113.9"), Dst: addr("100.100.2.136"), Proto: ProtoUDP}}, RuleNotOurs},
		{"host's resolver from a peer", func(h *Host) { h.Resolvers = []netip.Addr{addr("100.100.2.136")} },
			sent{"utun7", Packet{Src: c4, Dst: addr("100.100.2.136"), Proto: ProtoUDP}}, RuleMesh},
		{"loopback alias from a peer", func(h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"lo0", prefixes("127.0.0.1/8", "10.254.254.254/8", "::1/128")})
		}, sent{"utun7", Packet{Src: c4, Dst: addr("10.254.254.254"), Proto: ProtoUDP}}, RuleIncoming},
		{"loopback alias attaches nothing", func(h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"lo0", prefixes("9.254.254.254/8")})
		}, sent{"utun7", Packet{Src: c4, Dst: addr("9.1.1.1"), Proto: ProtoUDP}}, RuleInternet},
		{"loopback itself from a peer", func(h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"lo0", prefixes("127.0.0.1/8")})
		}, sent{"utun7", Packet{Src: c4, Dst: addr("127.0.0.1"), Proto: ProtoUDP}}, RuleMartian},
		{"carrier's prefix from a peer", func(h *Host) {
			h.Interfaces[0].Addresses = append(h.Interfaces[0].Addresses, prefix("100.80.0.7/20"))
		}, sent{"utun7", Packet{Src: c4, Dst: addr("100.80.0.1"), Proto: ProtoUDP}}, RuleMesh},
	} {
		t.Run(tt.about, func(t *testing.T) {
			h := pictureHost()
			if tt.host != nil {
				tt.host(&h)
			}
			v := compile(t, picture(mesh.Incoming|mesh.Routing|mesh.LAN), h).decide(tt.p)
			if v.Rule != tt.rule {
				t.Errorf("got %q, want %q", v.Rule, tt.rule)
			}
			if v.Pass != (tt.rule < RuleMalformed) {
				t.Errorf("pass %v by %q", v.Pass, v.Rule)
			}
		})
	}
}

// TestServices sends to each service of the host, and to another port, protocol and address,
// from a peer with each set of permissions. A packet to the service passes with incoming, or
// with the permission that the service needs while it is served; the others need incoming.
func TestServices(t *testing.T) {
	for _, s := range AllServices {
		t.Run(s.Name, func(t *testing.T) {
			for p := range mesh.All + 1 {
				for _, serves := range []Services{0, EveryService &^ s.Set, s.Set, EveryService} {
					m := picture(p)
					m.Serves = serves
					r := compile(t, m, pictureHost())
					to := Packet{Src: addr("100.64.0.3"), Dst: hostA4, Proto: s.Protos[0], DstPort: s.Port}
					want := p.Has(mesh.Incoming) || serves.Has(s.Set) && p.Has(s.Needs)
					if got := r.FromPeer(to).Pass; got != want {
						t.Errorf("with %v, serving %b: pass %v, want %v", p, serves, got, want)
					}
					for _, other := range []func(*Packet){
						func(p *Packet) { p.DstPort = 4443 },
						func(p *Packet) { p.Proto = ProtoICMP },
						func(p *Packet) { p.Dst = addr("192.168.77.1") },
					} {
						q := to
						other(&q)
						if got, want := r.FromPeer(q).Pass, p.Has(mesh.Incoming); got != want {
							t.Errorf("%+v with %v, serving %b: pass %v, want %v", q, p, serves, got, want)
						}
					}
				}
			}
		})
	}
}

// TestListenPort checks that UDP from inside the tunnel to WireGuard's own port is refused
// at the host's addresses, and only there.
func TestListenPort(t *testing.T) {
	m := picture(7)
	m.ListenPort = 51820
	for _, tt := range []struct {
		dst   netip.Addr
		proto uint8
		port  uint16
		rule  Rule
	}{
		{hostA4, ProtoUDP, 51820, RuleWireGuard},
		{addr("192.168.77.1"), ProtoUDP, 51820, RuleWireGuard},
		{hostA4, ProtoUDP, 51821, RuleIncoming},
		{hostA4, ProtoTCP, 51820, RuleIncoming},
		{addr("8.8.8.8"), ProtoUDP, 51820, RuleInternet},
		{addr("192.168.77.9"), ProtoUDP, 51820, RuleLAN},
	} {
		v := compile(t, m, pictureHost()).FromPeer(Packet{Src: addr("100.64.0.3"), Dst: tt.dst, Proto: tt.proto, DstPort: tt.port})
		if v.Rule != tt.rule || v.Answered() {
			t.Errorf("%v protocol %d port %d: %q, want %q; answered %v", tt.dst, tt.proto, tt.port, v.Rule, tt.rule, v.Answered())
		}
	}
}

// TestHairpin checks that UDP to WireGuard's port is refused at the outside addresses of the
// router in front, which would send such packets back to the host (hairpin NAT), and that
// any other packet to these addresses is judged as class lan.
func TestHairpin(t *testing.T) {
	m, h := picture(mesh.Routing|mesh.LAN), pictureHost()
	m.ListenPort, h.OutsidePort = 51820, 4500
	h.Outside = []netip.Addr{addr("203.0.114.7"), addr("2001:db8:9::7"), addr("192.168.1.7"), addr("203.0.113.9"), addr("100.64.0.2")}
	for _, tt := range []struct {
		dst   string
		proto uint8
		port  uint16
		rule  Rule
	}{
		{"203.0.114.7", ProtoUDP, 51820, RuleHairpin},
		{"203.0.114.7", ProtoUDP, 4500, RuleHairpin},
		{"2001:db8:9::7", ProtoUDP, 51820, RuleHairpin},
		{"192.168.1.7", ProtoUDP, 51820, RuleHairpin},
		{"64:ff9b::203.0.114.7", ProtoUDP, 4500, RuleHairpin},
		{"203.0.114.7", ProtoUDP, 51821, RuleLAN},
		{"203.0.114.7", ProtoUDP, 0, RuleLAN},
		{"203.0.114.7", ProtoTCP, 51820, RuleLAN},
		{"203.0.114.7", ProtoTCP, 443, RuleLAN},
		{"203.0.114.7", ProtoICMP, 51820, RuleLAN},
		{"64:ff9b::203.0.114.7", ProtoTCP, 4500, RuleLAN},
		{"192.168.77.9", ProtoUDP, 51820, RuleLAN},
		{"203.0.114.8", ProtoUDP, 51820, RuleInternet},
		{"203.0.113.9", ProtoUDP, 4500, RuleNoIncoming},
		{"100.64.0.2", ProtoUDP, 51820, RuleMesh},
	} {
		p := Packet{Src: addr("100.64.0.3"), Dst: addr(tt.dst), Proto: tt.proto, SrcPort: 7, DstPort: tt.port, ICMPType: 8}
		if p.Dst.Is6() {
			p.Src = addr("fd6d:6573:6800::3")
		}
		r := compile(t, m, h)
		if v := r.FromPeer(p); v.Rule != tt.rule || v.Pass != (tt.rule == RuleLAN || tt.rule == RuleInternet) || tt.rule == RuleHairpin && v.Answered() {
			t.Errorf("%v protocol %d port %d: %q, want %q; answered %v", tt.dst, tt.proto, tt.port, v.Rule, tt.rule, v.Answered())
		}
		// The rule is for packets out of the tunnel: the host itself may send to these addresses.
		p.Src = map[bool]netip.Addr{true: addr("2001:db8:1::9"), false: addr("203.0.113.9")}[p.Dst.Is6()]
		if v := r.FromHost(p); tt.rule == RuleHairpin && !v.Pass {
			t.Errorf("the host to %v port %d: %q", tt.dst, tt.port, v.Rule)
		}
	}

	// Diff names both peers when the router's port or one of its addresses changes.
	moved := h
	moved.OutsidePort = 4501
	if n := Diff(compile(t, m, h), compile(t, m, moved)); len(n) != 2 {
		t.Errorf("another outside port: Diff names %d peers, want 2", len(n))
	}
	moved.OutsidePort, moved.Outside = h.OutsidePort, h.Outside[:2] // 192.168.1.7 stays class lan
	if n := Diff(compile(t, m, moved), compile(t, m, h)); len(n) != 2 {
		t.Errorf("another outside address: Diff names %d peers, want 2", len(n))
	}
}

// TestTunnel checks that WireGuard's own packets pass outside the tunnel whatever the outer
// address of the peer is, unless an end of the packet is a peer's or the host's mesh address.
func TestTunnel(t *testing.T) {
	m := picture(7)
	m.ListenPort, m.Former = 51820, []netip.Addr{addr("100.70.0.9")}
	r := compile(t, m, pictureHost())
	own, c4 := addr("203.0.113.9"), addr("100.64.0.3")
	for _, outer := range []netip.Addr{addr("100.90.5.2"), addr("100.70.0.9"), addr("8.8.8.8")} {
		for _, p := range []sent{
			{"", Packet{Src: own, Dst: outer, SrcPort: 51820, DstPort: 7}},
			{"en0", Packet{Src: outer, Dst: own, SrcPort: 7, DstPort: 51820}},
		} {
			p.Proto = ProtoUDP
			if v := r.decide(p); v.Rule != RuleTunnel || !v.Pass {
				t.Errorf("%+v: %+v", p, v)
			}
		}
	}
	for _, tt := range []struct {
		p    sent
		rule Rule
	}{
		{sent{"", Packet{Src: own, Dst: c4, SrcPort: 51820, Proto: ProtoTCP}}, RuleForeignSource},
		{sent{"", Packet{Src: hostA4, Dst: c4, SrcPort: 51820, Proto: ProtoUDP}}, RuleWireGuard},
		{sent{"en0", Packet{Src: c4, Dst: own, DstPort: 51820, Proto: ProtoUDP}}, RuleSpoofed},
		{sent{"", Packet{Src: own, Dst: addr("100.90.5.2"), SrcPort: 7, DstPort: 51820, Proto: ProtoUDP}}, RuleUnassigned},
		{sent{"en0", Packet{Src: c4, Dst: addr("9.9.9.9"), DstPort: 51820, Proto: ProtoUDP}}, RuleSpoofed},
		{sent{"en0", Packet{Src: hostA4, Dst: own, DstPort: 51820, Proto: ProtoUDP}}, RuleSpoofed},
		{sent{"en0", Packet{Src: addr("8.8.8.8"), Dst: hostA4, DstPort: 51820, Proto: ProtoUDP}}, RuleToHost},
	} {
		if v := r.decide(tt.p); v.Rule != tt.rule {
			t.Errorf("%+v: %q, want %q", tt.p, v.Rule, tt.rule)
		}
	}
}

// TestReply checks that a reply passes only on the interface by which its sender is reached,
// and only while the opener of the flow may still send.
func TestReply(t *testing.T) {
	c4 := addr("100.64.0.3")
	for _, tt := range []struct {
		about  string
		have   mesh.Permissions
		by     Opener
		opened Packet
		in     string
		pass   bool
	}{
		{"internet answers by the uplink", mesh.Routing, ByPeer, Packet{Src: c4, Dst: addr("8.8.8.8"), Proto: ProtoUDP}, "en0", true},
		{"LAN forges the internet's answer", mesh.Routing, ByPeer, Packet{Src: c4, Dst: addr("8.8.8.8"), Proto: ProtoUDP}, "en5", false},
		{"a peer forges the internet's answer", mesh.Routing, ByPeer, Packet{Src: c4, Dst: addr("8.8.8.8"), Proto: ProtoUDP}, "utun7", false},
		{"routing was denied", mesh.LAN, ByPeer, Packet{Src: c4, Dst: addr("8.8.8.8"), Proto: ProtoUDP}, "en0", false},
		{"LAN answers", mesh.Routing | mesh.LAN, ByPeer, Packet{Src: c4, Dst: addr("192.168.77.9"), Proto: ProtoUDP}, "en5", true},
		{"another peer answers for the LAN", mesh.Routing | mesh.LAN, ByPeer, Packet{Src: c4, Dst: addr("192.168.77.9"), Proto: ProtoUDP}, "utun7", false},
		{"the host answers", mesh.Incoming, ByPeer, Packet{Src: c4, Dst: hostA4, Proto: ProtoUDP}, "", true},
		{"incoming was denied", mesh.Routing, ByPeer, Packet{Src: c4, Dst: hostA4, Proto: ProtoUDP}, "", false},
		{"a peer answers the host", 0, ByHost, Packet{Src: hostA4, Dst: c4, Proto: ProtoUDP}, "utun7", true},
		{"the LAN answers for a peer", 0, ByHost, Packet{Src: hostA4, Dst: c4, Proto: ProtoUDP}, "en5", false},
		{"an answer to a packet from peer to peer", 7, ByPeer, Packet{Src: c4, Dst: addr("100.64.0.2"), Proto: ProtoUDP}, "utun7", false},
	} {
		v := compile(t, picture(tt.have), pictureHost()).Reply(tt.by, tt.opened, tt.in)
		if v.Pass != tt.pass {
			t.Errorf("%s: got %+v, want pass %v", tt.about, v, tt.pass)
		}
	}
}

// TestIntoTunnel checks which packets may enter the tunnel without a flow: the host's own
// packets to peers, and packets to other destinations only while the host routes through a
// peer.
func TestIntoTunnel(t *testing.T) {
	m := picture(7)
	m.ListenPort = 51820
	closed := compile(t, m, pictureHost())
	m.ThroughPeer = true
	through := compile(t, m, pictureHost())
	hostA6 := addr("fd6d:6573:6800::1")
	for _, tt := range []struct {
		about          string
		p              Packet
		closed, routes Rule
	}{
		{"to a peer", Packet{Src: hostA4, Dst: addr("100.64.0.3"), Proto: ProtoTCP}, RuleHostToPeer, RuleHostToPeer},
		{"to the internet", Packet{Src: hostA4, Dst: addr("8.8.8.8"), Proto: ProtoTCP}, RuleNotThroughPeer, RuleThroughPeer},
		{"to the internet, IPv6", Packet{Src: hostA6, Dst: addr("2600::1"), Proto: ProtoUDP}, RuleNotThroughPeer, RuleThroughPeer},
		{"to a LAN", Packet{Src: hostA4, Dst: addr("10.1.2.3"), Proto: ProtoICMP, ICMPType: 8}, RuleNotThroughPeer, RuleThroughPeer},
		{"a redirect", Packet{Src: hostA4, Dst: addr("8.8.8.8"), Proto: ProtoICMP, ICMPType: 5}, RuleNotThroughPeer, RuleRedirect},
		{"another protocol", Packet{Src: hostA4, Dst: addr("8.8.8.8"), Proto: 47}, RuleNotThroughPeer, RuleProtocol},
		{"multicast", Packet{Src: hostA4, Dst: addr("224.0.0.251"), Proto: ProtoUDP}, RuleNotThroughPeer, RuleNotThroughPeer},
		{"to the host itself", Packet{Src: hostA4, Dst: addr("192.168.77.1"), Proto: ProtoUDP}, RuleNotThroughPeer, RuleNotThroughPeer},
		{"the host's other address", Packet{Src: addr("192.168.77.1"), Dst: addr("8.8.8.8"), Proto: ProtoUDP}, RuleToPeer, RuleToPeer},
		{"forwarded to the internet", Packet{Src: addr("192.168.77.9"), Dst: addr("8.8.8.8"), Proto: ProtoUDP}, RuleToPeer, RuleToPeer},
		{"forwarded to a peer", Packet{Src: addr("192.168.77.9"), Dst: addr("100.64.0.3"), Proto: ProtoUDP}, RuleForeignSource, RuleForeignSource},
		{"from peer to peer", Packet{Src: addr("100.64.0.2"), Dst: addr("100.64.0.3"), Proto: ProtoUDP}, RuleForeignSource, RuleForeignSource},
		{"to an unassigned address", Packet{Src: hostA4, Dst: addr("100.100.1.1"), Proto: ProtoUDP}, RuleUnassigned, RuleUnassigned},
		{"the tunnel itself", Packet{Src: hostA4, Dst: addr("8.8.8.8"), Proto: ProtoUDP, SrcPort: 51820}, RuleWireGuard, RuleWireGuard},
		{"the tunnel itself to a peer", Packet{Src: hostA4, Dst: addr("100.64.0.3"), Proto: ProtoUDP, SrcPort: 51820}, RuleWireGuard, RuleWireGuard},
	} {
		for r, want := range map[*Ruleset]Rule{closed: tt.closed, through: tt.routes} {
			v := r.IntoTunnel(tt.p)
			pass := want == RuleHostToPeer || want == RuleThroughPeer
			if v.Rule != want || v.Pass != pass || (v.Exit == ExitMesh) != pass {
				t.Errorf("%s, through a peer %v: %+v, %q; want %q", tt.about, r.mesh.ThroughPeer, v, v.Rule, want)
			}
			// The reply passes by the tunnel exactly while the packet itself does. A packet of
			// the other end whose source isn't a peer's passes only as a reply in a flow.
			if got := r.Reply(ByHost, tt.p, "utun7").Pass; got != pass {
				t.Errorf("%s, through a peer %v: the reply passes %v", tt.about, r.mesh.ThroughPeer, got)
			}
			if r.Reply(ByHost, tt.p, "en0").Pass {
				t.Errorf("%s, through a peer %v: the reply passes by the uplink", tt.about, r.mesh.ThroughPeer)
			}
			if v := r.FromPeer(Packet{Src: tt.p.Dst, Dst: tt.p.Src, Proto: tt.p.Proto, ICMPType: tt.p.ICMPType}); pass && want == RuleThroughPeer && v.Rule != RuleSpoofed {
				t.Errorf("%s, through a peer %v: the other end's packet without a flow: %+v, want it refused as spoofed", tt.about, r.mesh.ThroughPeer, v)
			}
		}
	}
	if n := Diff(through, closed); len(n) != 2 {
		t.Errorf("routing through a peer ends: Diff names %d peers, want 2", len(n))
	}
}

// TestNoPeersPacket asks each method of Ruleset about packets whose source is wrong for the
// origin that the method judges: none passes as a peer's, and none passes into the mesh.
func TestNoPeersPacket(t *testing.T) {
	h := pictureHost()
	h.FoundForwarding = Families{true, true}
	r := compile(t, picture(7), h)
	c4, lan := addr("100.64.0.3"), addr("192.168.77.9")
	for _, src := range []netip.Addr{hostA4, lan, addr("8.8.8.8"), addr("100.100.1.1"), {}} {
		for _, dst := range []netip.Addr{hostA4, addr("8.8.8.8"), lan, addr("100.64.0.2")} {
			if v := r.FromPeer(Packet{Src: src, Dst: dst, Proto: ProtoUDP}); v.Pass || v.Peer != -1 || v.Answered() {
				t.Errorf("from a peer, %v to %v: %+v", src, dst, v)
			}
			if v := r.MayOpen(0, Packet{Src: c4, Dst: dst, Proto: ProtoUDP}); v.Pass {
				t.Errorf("a flow to %v that neither end may open: %+v", dst, v)
			}
		}
	}
	for _, dst := range []netip.Addr{hostA4, addr("8.8.8.8"), lan, addr("100.64.0.2")} {
		if v := r.FromElsewhere(Packet{Src: c4, Dst: dst, Proto: ProtoUDP}); v.Pass {
			t.Errorf("a peer's source from elsewhere, to %v: %+v", dst, v)
		}
		if v := r.FromHost(Packet{Src: c4, Dst: dst, Proto: ProtoUDP}); v.Pass && v.Exit != ExitAny {
			t.Errorf("a peer's source from the host, to %v: %+v", dst, v)
		}
		if v := r.IntoTunnel(Packet{Src: c4, Dst: dst, Proto: ProtoUDP}); v.Pass {
			t.Errorf("a peer's source into the tunnel, to %v: %+v", dst, v)
		}
	}
}

// TestExpiry compiles at times around the ends of two grants: a grant ends exactly at Until,
// and Expires is the next end of any peer's grant.
func TestExpiry(t *testing.T) {
	m := picture(0)
	*m.Peers[0].Permissions.Of(mesh.Routing) = mesh.Grant{Allowed: true, Until: start.Add(2 * time.Hour)}
	*m.Peers[1].Permissions.Of(mesh.Incoming) = mesh.Grant{Allowed: true, Until: start.Add(time.Hour)}
	p := Packet{Src: addr("100.64.0.3"), Dst: addr("8.8.8.8"), Proto: ProtoUDP}
	for _, tt := range []struct {
		after time.Duration
		pass  bool
		next  time.Duration // 0: no permission ends any more
	}{
		{0, true, time.Hour},
		{time.Hour, true, 2 * time.Hour},
		{2*time.Hour - 1, true, 2 * time.Hour},
		{2 * time.Hour, false, 0},
	} {
		r, err := Compile(m, pictureHost(), start.Add(tt.after))
		if err != nil {
			t.Fatal(err)
		}
		if got := r.FromPeer(p).Pass; got != tt.pass {
			t.Errorf("after %v: pass %v", tt.after, got)
		}
		var want time.Time
		if tt.next != 0 {
			want = start.Add(tt.next)
		}
		if got := r.Expires(); !got.Equal(want) {
			t.Errorf("after %v: expires %v, want %v", tt.after, got, want)
		}
	}
}

// TestDefaultRoutes checks that routes that together cover an address family, or 2000::/3 of
// IPv6, count as a default route and not as routed networks.
func TestDefaultRoutes(t *testing.T) {
	for _, tt := range []struct{ routes, rest string }{
		{"0.0.0.0/0 10.9.0.0/16", "10.9.0.0/16"},
		{"0.0.0.0/1 128.0.0.0/1 198.18.0.0/16", "198.18.0.0/16"},
		{"0.0.0.0/2 64.0.0.0/2 128.0.0.0/1", ""},
		{"0.0.0.0/1", "0.0.0.0/1"},
		{"0.0.0.0/1 128.0.0.0/2", "0.0.0.0/1 128.0.0.0/2"},
		{"::/1 8000::/1 2001:db8::/32", "2001:db8::/32"},
		{"2000::/3 fd00::/8", "fd00::/8"},
		{"2000::/4 3000::/4", ""},
	} {
		h := Host{Interface: "utun7"}
		for _, r := range strings.Fields(tt.routes) {
			h.Routes = append(h.Routes, Route{prefix(r), "utun3"})
		}
		var got []string
		for _, p := range h.routed() {
			got = append(got, p.String())
		}
		if g := strings.Join(got, " "); g != tt.rest {
			t.Errorf("%s: routed %q, want %q", tt.routes, g, tt.rest)
		}
	}
}

// TestCompileRefuses compiles meshes and hosts with one wrong fact each: the error names it.
func TestCompileRefuses(t *testing.T) {
	for want, change := range map[string]func(*Mesh, *Host){
		"listed twice":               func(m *Mesh, _ *Host) { m.Peers[1].Name = "c" },
		"another peer has its key":   func(m *Mesh, _ *Host) { m.Peers[1].PublicKey = m.Peers[0].PublicKey },
		`taken by peer "c"`:          func(m *Mesh, _ *Host) { m.Peers[1].Addresses = m.Peers[0].Addresses },
		"taken by the host":          func(m *Mesh, _ *Host) { m.Peers[1].Addresses = mesh.Addresses(m.Addresses) },
		"address invalid IP is out":  func(m *Mesh, _ *Host) { m.Peers[1].Addresses = mesh.Addresses{} },
		"outside the mesh prefixes":  func(m *Mesh, _ *Host) { m.Peers[1].Addresses[0] = addr("10.0.0.1") },
		"is not valid":               func(m *Mesh, _ *Host) { m.Addresses[0] = addr("::ffff:1.2.3.4") },
		"want 1 to 15 bytes":         func(_ *Mesh, h *Host) { h.Interface = "" },
		`unexpected '"'`:             func(_ *Mesh, h *Host) { h.Uplink4 = `en0"` },
		"is listed twice":            func(_ *Mesh, h *Host) { h.Interfaces[1].Name = "en0" },
		"is the mesh interface":      func(_ *Mesh, h *Host) { h.Uplink6 = "utun7" },
		"resolver fe80::1%en0":       func(_ *Mesh, h *Host) { h.Resolvers = []netip.Addr{addr("fe80::1%en0")} },
		"source 2001:db8::1 is not":  func(_ *Mesh, h *Host) { h.Source4 = addr("2001:db8::1") },
		"router6 ::ffff:1.2.3.4 is":  func(_ *Mesh, h *Host) { h.Router6 = addr("::ffff:1.2.3.4") },
		"a removed peer's address":   func(m *Mesh, _ *Host) { m.Former = []netip.Addr{addr("::ffff:10.0.0.1")} },
		"route ::ffff:0.0.0.0/96 by": func(_ *Mesh, h *Host) { h.Routes[0].Prefix = prefix("::ffff:0:0/96") },
	} {
		m, h := picture(0), pictureHost()
		change(&m, &h)
		if _, err := Compile(m, h, start); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}

// TestOthers checks which parts of the mesh prefixes count as another owner's.
func TestOthers(t *testing.T) {
	for _, tt := range []struct {
		about  string
		change func(*Mesh, *Host)
		want   string
	}{
		{"no other owner", nil, ""},
		{"another VPN's routes", func(_ *Mesh, h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"utun4", prefixes("100.99.1.1/32")})
			h.Routes = append(h.Routes, Route{prefix("100.101.2.3/32"), "utun4"}, Route{prefix("100.100.100.100/32"), "utun4"})
		}, "100.100.100.100/32 100.101.2.3/32"},
		{"an attached network with a route inside", func(_ *Mesh, h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"utun4", prefixes("100.99.0.0/16")})
			h.Routes = append(h.Routes, Route{prefix("100.99.1.0/24"), "utun4"})
		}, "100.99.0.0/16"},
		{"routes of the mesh interface and of loopback", func(_ *Mesh, h *Host) {
			h.Routes = append(h.Routes, Route{prefix("100.64.0.0/10"), "utun7"}, Route{prefix("100.101.2.3/32"), "lo0"})
		}, ""},
		{"a route around the mesh prefix", func(_ *Mesh, h *Host) {
			h.Routes = append(h.Routes, Route{prefix("100.0.0.0/8"), "utun4"}, Route{prefix("100.101.2.3/32"), "utun4"})
		}, "100.64.0.0/10"},
		{"a default route in halves", func(_ *Mesh, h *Host) {
			h.Routes = append(h.Routes, Route{prefix("0.0.0.0/1"), "utun4"}, Route{prefix("128.0.0.0/1"), "utun4"},
				Route{prefix("::/1"), "utun4"}, Route{prefix("8000::/1"), "utun4"})
		}, ""},
		{"resolvers", func(_ *Mesh, h *Host) {
			h.Resolvers = []netip.Addr{addr("100.100.2.136"), addr("9.9.9.9"), addr("127.0.0.53"), addr("fd6d:6573:6800::53")}
		}, "100.100.2.136/32 fd6d:6573:6800::53/128"},
		{"a carrier's uplink", func(_ *Mesh, h *Host) {
			h.Interfaces[0].Addresses = prefixes("100.80.0.7/20")
			h.Resolvers = []netip.Addr{addr("100.100.2.136")}
		}, "100.64.0.0/10"},
		{"a carrier's uplink of one address", func(_ *Mesh, h *Host) {
			h.Interfaces[0].Addresses = prefixes("100.80.0.7/32")
		}, "100.64.0.0/10"},
		{"a carrier's source on a link without an address", func(_ *Mesh, h *Host) {
			h.Source4 = addr("100.80.0.7")
		}, "100.64.0.0/10"},
		{"a carrier's router, with a public address", func(_ *Mesh, h *Host) {
			h.Router4 = addr("100.80.0.1")
		}, "100.64.0.0/10"},
	} {
		m, h := picture(7), pictureHost()
		if tt.change != nil {
			tt.change(&m, &h)
		}
		var got []string
		for _, p := range compile(t, m, h).Sets().Others {
			got = append(got, p.String())
		}
		if g := strings.Join(got, " "); g != tt.want {
			t.Errorf("%s: %q, want %q", tt.about, g, tt.want)
		}
	}
}

// TestFormer checks that no packet leaves to a removed peer's address, even where the
// network around it has another owner, until a peer or the host has that address again.
func TestFormer(t *testing.T) {
	const gone = "100.70.0.9"
	for _, tt := range []struct {
		about  string
		change func(*Mesh, *Host)
		in     string
		rule   Rule
	}{
		{"from the host", nil, "", RuleFormer},
		{"from the LAN", nil, "en5", RuleFormer},
		{"inside a carrier's network", func(_ *Mesh, h *Host) {
			h.Interfaces[0].Addresses = prefixes("100.80.0.7/10")
		}, "", RuleFormer},
		{"with a route to it alone", func(_ *Mesh, h *Host) {
			h.Routes = append(h.Routes, Route{prefix(gone + "/32"), "utun4"})
		}, "", RuleFormer},
		{"assigned to a peer again", func(m *Mesh, _ *Host) { m.Peers[0].Addresses[0] = addr(gone) }, "", RuleHostToPeer},
		{"assigned to the host", func(m *Mesh, h *Host) { m.Addresses[0] = addr(gone) }, "lo0", RuleNotOurs},
		{"assigned to an interface", func(_ *Mesh, h *Host) {
			h.Interfaces = append(h.Interfaces, Interface{"utun4", prefixes(gone + "/32")})
		}, "", RuleNotOurs},
	} {
		m, h := picture(7), pictureHost()
		m.Former = []netip.Addr{addr(gone), addr("fd6d:6573:6800::9")}
		if tt.change != nil {
			tt.change(&m, &h)
		}
		r := compile(t, m, h)
		src := addr("192.168.77.9")
		if tt.in != "en5" {
			src = m.Addresses[0]
		}
		if v := r.decide(sent{tt.in, Packet{Src: src, Dst: addr(gone), Proto: ProtoUDP}}); v.Rule != tt.rule {
			t.Errorf("%s: %q, want %q", tt.about, v.Rule, tt.rule)
		}
		// To a peer the unassigned address next to it is in the mesh like any other.
		if v := r.FromPeer(Packet{Src: m.Peers[1].Addresses[0], Dst: addr("100.70.0.10"), Proto: ProtoUDP}); v.Rule != RuleMesh {
			t.Errorf("%s: from a peer to the address next to it: %q, want %q", tt.about, v.Rule, RuleMesh)
		}
	}
}

// TestDiff checks which peers Diff names after a change, and the permissions that each lost. A
// peer is named without a lost permission when the host's addresses or uplink changed.
func TestDiff(t *testing.T) {
	all := compile(t, picture(mesh.Incoming|mesh.Routing|mesh.LAN), pictureHost())
	names := func(ns []Narrowed) []string {
		var out []string
		for _, n := range ns {
			out = append(out, n.Name+" "+n.Lost.String())
		}
		return out
	}
	elsewhere := pictureHost()
	elsewhere.Uplink4 = "en5"
	renumbered, rerouted, others := pictureHost(), pictureHost(), pictureHost()
	renumbered.Source4, rerouted.Router4 = addr("203.0.113.10"), addr("203.0.113.1")
	others.Routes = append(others.Routes, Route{prefix("100.101.2.3/32"), "utun4"})
	others.Resolvers = []netip.Addr{addr("100.100.2.136")}
	for _, tt := range []struct {
		about     string
		old, next *Ruleset
		want      []string
	}{
		{"first", nil, all, nil},
		{"same", all, compile(t, picture(7), pictureHost()), nil},
		{"wider", compile(t, picture(mesh.Routing), pictureHost()), all, nil},
		{"narrower", all, compile(t, picture(mesh.Routing), pictureHost()), []string{"c incoming, lan"}},
		{"without routing, lan is lost as well", all, compile(t, picture(mesh.LAN), pictureHost()), []string{"c incoming, routing, lan"}},
		{"lan alone had no effect", compile(t, picture(mesh.LAN), pictureHost()), compile(t, picture(0), pictureHost()), nil},
		{"the host's addresses changed", all, compile(t, picture(7), renumbered), []string{"c none", "a none"}},
		{"another router", all, compile(t, picture(7), rerouted), nil},
		{"another owner in the mesh prefix", all, compile(t, picture(7), others), nil},
		{"uplink moved", all, compile(t, picture(7), elsewhere), []string{"c none", "a none"}},
	} {
		if d := cmp.Diff(tt.want, names(Diff(tt.old, tt.next)), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s: %s", tt.about, d)
		}
	}
	gone := picture(7)
	gone.Peers = gone.Peers[1:]
	got := Diff(all, compile(t, gone, pictureHost()))
	if len(got) != 1 || !got[0].Removed || got[0].Lost != 7 || !slices.Contains(got[0].Addresses[:], addr("100.64.0.3")) {
		t.Errorf("removed peer: %+v", got)
	}
}

// TestReadHost reads the facts of a host, and refuses input that isn't exactly one valid
// object of bounded size.
func TestReadHost(t *testing.T) {
	h, err := ReadHost(strings.NewReader(`{"interface":"utun7","uplink":"en0","forwarding":{"ipv4":true,"ipv6":true},
		"interfaces":[{"name":"en0","addresses":["203.0.113.1/24","2001:db8:1::1/64"]}],
		"routes":[{"prefix":"198.18.0.0/16","interface":"utun3"}],
		"resolvers":["100.100.2.136"],"source":"203.0.113.1","router6":"fe80::1"}`))
	if err != nil {
		t.Fatal(err)
	}
	want := Host{
		Interface: "utun7", Uplink4: "en0", Forwarding: Families{true, true},
		Interfaces: []Interface{{"en0", prefixes("203.0.113.1/24", "2001:db8:1::1/64")}},
		Routes:     []Route{{prefix("198.18.0.0/16"), "utun3"}},
		Resolvers:  []netip.Addr{addr("100.100.2.136")}, Source4: addr("203.0.113.1"), Router6: addr("fe80::1"),
	}
	if d := cmp.Diff(want, h, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); d != "" {
		t.Error(d)
	}
	for text, want := range map[string]string{
		`{"interface":"utun7"} {}`:         "something follows",
		`{"interface":"utun7","uplnk":""}`: "unknown field",
		`{"interface":7}`:                  "cannot unmarshal",
		`{}`:                               "mesh interface",
		strings.Repeat(" ", maxHostFacts) + `{"inter`: "more than",
	} {
		if _, err := ReadHost(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}

func FuzzReadHost(f *testing.F) {
	f.Add(`{"interface":"utun7","uplink":"en0","interfaces":[{"name":"en0","addresses":["203.0.113.1/24"]}],"routes":[{"prefix":"0.0.0.0/1","interface":"utun3"}]}`)
	f.Add(`{"interface":"utun7","routes":[{"prefix":"::/0","interface":"en0"},{"prefix":"2000::/4","interface":"a"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		h, err := ReadHost(strings.NewReader(text))
		if err != nil {
			return
		}
		// Facts that ReadHost accepts must compile.
		if _, err := Compile(picture(7), h, start); err != nil {
			t.Errorf("ReadHost accepts facts that don't compile: %v", err)
		}
	})
}

// TestTransitToMartians sends to addresses that are martians for peers only: a packet from
// the LAN is judged as transit like any other, and the host itself may send there.
func TestTransitToMartians(t *testing.T) {
	h := pictureHost()
	h.Outside = []netip.Addr{addr("203.0.114.7")}
	r := compile(t, picture(7), h)
	for _, dst := range strings.Fields("192.0.0.9 2002:cb00:7109::1 64:ff9b::203.0.113.9 64:ff9b::100.64.0.2 2001:0:1::1 100::1 fec0::1") {
		p := Packet{Src: addr("192.168.77.9"), Dst: addr(dst), Proto: ProtoTCP}
		if p.Dst.Is6() {
			p.Src = addr("2001:db8:77::9")
		}
		if v := r.FromElsewhere(p); v.Pass || v.Rule != RuleClosedTransit {
			t.Errorf("transit to %v: %+v", dst, v)
		}
		if v := r.FromHost(p); !v.Pass {
			t.Errorf("the host itself to %v: %+v", dst, v)
		}
	}
	if got := r.Class(addr("203.0.114.7")); got != OnLAN {
		t.Errorf("the router's outside address is of class %v, want %v", got, OnLAN)
	}
}

// TestRouterOf6To4 checks that a host with an address in the 6to4 prefix of its own IPv4
// address (RFC 3056) keeps its classes there: its address is self, and its network lan.
func TestRouterOf6To4(t *testing.T) {
	h := pictureHost()
	h.Interfaces[0].Addresses = append(h.Interfaces[0].Addresses, prefix("2002:cb00:7109:1::1/64"))
	r := compile(t, picture(7), h)
	for dst, want := range map[string]Class{
		"2002:cb00:7109:1::1": Self, "2002:cb00:7109:1::2": OnLAN, "2002:cb00:7109:2::2": OnLAN, "2002:c0a8:4d01::1": Martian,
	} {
		if got := r.Class(addr(dst)); got != want {
			t.Errorf("%v is %v, want %v", dst, got, want)
		}
	}
}
