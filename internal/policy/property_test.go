package policy

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// world is a random mesh on a random host. Their addresses are close to each other, so that
// classes overlap often.
type world struct {
	mesh Mesh
	host Host
}

func drawWorld(t *rapid.T) world {
	w := world{
		mesh: Mesh{
			Prefixes:  []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6},
			Addresses: []netip.Addr{hostA4, hostA6},
			Serves:    Services(rapid.IntRange(0, int(EveryService)).Draw(t, "serves")),

			ListenPort: rapid.SampledFrom([]uint16{0, 51820}).Draw(t, "listen port"),
		},
		host: Host{Interface: "utun7"},
	}
	for i := range rapid.IntRange(0, 6).Draw(t, "peers") {
		w.mesh.Peers = append(w.mesh.Peers, mesh.Peer{
			PublicKey: mesh.PublicKey{byte(i + 1)}, Name: fmt.Sprint("p", i),
			Addresses: mesh.Addresses{
				netip.AddrFrom4([4]byte{100, 64, 0, byte(2 + i)}),
				netip.MustParseAddr(fmt.Sprintf("fd6d:6573:6800::%x", 2+i)),
			},
			Permissions: mesh.Granted(mesh.Permissions(rapid.IntRange(0, int(mesh.All)).Draw(t, "permissions"))),
		})
	}
	family := func(label string) Families {
		return Families{rapid.Bool().Draw(t, label+"4"), rapid.Bool().Draw(t, label+"6")}
	}
	w.host.Forwarding, w.host.FoundForwarding = family("forwarding"), family("found")
	for i := range rapid.IntRange(0, 4).Draw(t, "interfaces") {
		iface := Interface{Name: fmt.Sprint("en", i)}
		for range rapid.IntRange(0, 3).Draw(t, "addresses") {
			a := drawAddr(t)
			if !a.Is4In6() {
				iface.Addresses = append(iface.Addresses, netip.PrefixFrom(a, rapid.IntRange(1, a.BitLen()).Draw(t, "bits")))
			}
		}
		w.host.Interfaces = append(w.host.Interfaces, iface)
	}
	for range rapid.IntRange(0, 4).Draw(t, "routes") {
		a := drawAddr(t)
		if !a.Is4In6() {
			p := netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(t, "bits")).Masked()
			w.host.Routes = append(w.host.Routes, Route{p, "utun3"})
		}
	}
	for range rapid.IntRange(0, 3).Draw(t, "resolvers") {
		if a := drawAddr(t); !a.Is4In6() {
			w.host.Resolvers = append(w.host.Resolvers, a)
		}
	}
	for range rapid.IntRange(0, 2).Draw(t, "outside") {
		if a := drawAddr(t); !a.Is4In6() {
			w.host.Outside = append(w.host.Outside, a)
		}
	}
	w.host.OutsidePort = rapid.SampledFrom([]uint16{0, 443}).Draw(t, "port outside")
	for range rapid.IntRange(0, 3).Draw(t, "former") {
		if a := drawAddr(t); mesh.IsPlain(a) {
			w.mesh.Former = append(w.mesh.Former, a)
		}
	}
	uplinks := []string{"", "en0", "en1"}
	w.host.Uplink4 = rapid.SampledFrom(uplinks).Draw(t, "uplink4")
	w.host.Uplink6 = rapid.SampledFrom(uplinks).Draw(t, "uplink6")
	return w
}

var places = prefixes("100.64.0.0/28", "100.64.0.0/10", "192.168.77.0/24", "10.0.0.0/8", "203.0.113.0/24",
	"169.254.0.0/16", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4", "0.0.0.0/0",
	"fd6d:6573:6800::/124", "fd6d:6573:6800::/48", "fc00::/7", "2001:db8:1::/64", "fe80::/10", "ff00::/8",
	"::ffff:0:0/96", "::/0", "64:ff9b::/96", "64:ff9b::192.168.77.0/120", "64:ff9b::100.64.0.0/124", "64:ff9b:1::/48",
	"2002::/16", "2002:c0a8:4d00::/40", "2002:6440::/44", "2001::/32", "::/96", "192.0.0.0/24", "198.18.0.0/15")

func drawAddr(t *rapid.T) netip.Addr {
	p := rapid.SampledFrom(places).Draw(t, "place")
	b := p.Addr().AsSlice()
	var noise [16]byte
	binary.LittleEndian.PutUint64(noise[:], rapid.Uint64().Draw(t, "low"))
	binary.LittleEndian.PutUint64(noise[8:], rapid.Uint64().Draw(t, "high"))
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= noise[bit/8] & (0x80 >> (bit % 8))
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (w world) drawPacket(t *rapid.T) sent {
	in := rapid.SampledFrom([]string{"utun7", "utun7", "utun7", "", "en0", "en1", "utun3", "lo0"}).Draw(t, "in")
	p := Packet{
		Src:     drawAddr(t),
		Dst:     drawAddr(t),
		Proto:   rapid.SampledFrom([]uint8{ProtoICMP, ProtoTCP, ProtoUDP, ProtoICMPv6, 47}).Draw(t, "proto"),
		SrcPort: rapid.SampledFrom([]uint16{40000, 51820}).Draw(t, "source port"),
		DstPort: rapid.SampledFrom([]uint16{53, 443, 51820}).Draw(t, "port"),
		// Echo, errors and redirects of both families.
		ICMPType:  rapid.SampledFrom([]uint8{8, 128, 3, 1, 2, 11, 12, 4, 5, 137}).Draw(t, "type"),
		Malformed: rapid.IntRange(0, 19).Draw(t, "malformed") == 0,
	}
	if n := len(w.host.Outside); n > 0 && rapid.IntRange(0, 4).Draw(t, "outside") == 0 {
		p.Dst = w.host.Outside[rapid.IntRange(0, n-1).Draw(t, "which")]
	}
	if n := len(w.mesh.Peers); n > 0 && rapid.IntRange(0, 9).Draw(t, "honest") > 0 {
		p.Src = w.mesh.Peers[rapid.IntRange(0, n-1).Draw(t, "peer")].Addresses[rapid.IntRange(0, 1).Draw(t, "family")]
	}
	return sent{in, p}
}

func mustCompile(t *rapid.T, w world) *Ruleset {
	r, err := Compile(w.mesh, w.host, start)
	if err != nil {
		t.Fatalf("compile: %v", err)
	}
	return r
}

// TestNoPeerReachesAPeer checks, for random worlds and packets, that only the host itself
// reaches a peer: a packet from a peer or another network never leaves by the mesh.
func TestNoPeerReachesAPeer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		r := mustCompile(t, w)
		for range 20 {
			p := w.drawPacket(t)
			v := r.decide(p)
			if p.In != "" && p.In != "lo0" && v.Pass && v.Exit == ExitMesh {
				t.Fatalf("%+v leaves by the mesh: %+v", p, v)
			}
			if _, ok := r.PeerByAddr(p.Dst); ok && v.Pass && v.Rule != RuleHostToPeer {
				t.Fatalf("%+v reaches a peer: %+v", p, v)
			}
		}
	})
}

// TestMeshAddressesStayIn compares the verdicts on packets that the host or another network
// sends to mesh addresses without peers with the sets: a former peer's or an unassigned
// address is refused, and the host reaches a part that has another owner.
func TestMeshAddressesStayIn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := mustCompile(t, drawWorld(t))
		s := r.Sets()
		in := func(set []netip.Prefix, a netip.Addr) bool {
			return slices.ContainsFunc(set, func(p netip.Prefix) bool { return p.Contains(a) })
		}
		for range 40 {
			p := sent{rapid.SampledFrom([]string{"", "en0", "utun3"}).Draw(t, "in"), Packet{Src: drawAddr(t), Dst: drawAddr(t), Proto: ProtoUDP, SrcPort: 7, DstPort: 7}}
			v := r.decide(p)
			if _, ok := r.PeerByAddr(p.Dst); ok || in(s.Self, p.Dst) || in(s.Martians, p.Dst) {
				continue
			}
			switch {
			case in(s.Former, p.Dst) && v.Pass:
				t.Fatalf("%+v reaches a former peer's address: %v", p, v.Rule)
			case in(s.Mesh, p.Dst) && !in(s.Others, p.Dst) && v.Pass:
				t.Fatalf("%+v reaches an unassigned mesh address: %v", p, v.Rule)
			case in(s.Others, p.Dst) && !in(s.Former, p.Dst) && p.In == "" && !v.Pass:
				t.Fatalf("%+v is refused, though the destination has another owner: %v", p, v.Rule)
			}
		}
	})
}

// TestClassIsFirstThatFits compares the class, which the ruleset finds in one lookup, with
// the first matching line of the table in docs/policy.md, found by a search.
func TestClassIsFirstThatFits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := mustCompile(t, drawWorld(t))
		s := r.Sets()
		for range 20 {
			dst := drawAddr(t)
			want := Internet
			for _, line := range []struct {
				class Class
				set   []netip.Prefix
			}{{OnLAN, s.LAN}, {InMesh, s.Mesh}, {InMesh, s.Former}, {InMesh, s.Peers}, {Self, s.Self}, {Martian, s.Martians}} {
				for _, p := range line.set {
					if p.Contains(dst) {
						want = line.class
					}
				}
			}
			if got := r.Class(dst); got != want {
				t.Fatalf("%v is %v, want %v", dst, got, want)
			}
			carrying(t, r, dst)
		}
	})
}

// TestRefusalsTellNothing compares two hosts that have the same mesh and different networks.
// A packet that both refuse is either answered by both or by neither, and a packet that one
// refuses and the other forwards to the internet isn't answered, so that a peer can't probe
// the host's networks.
func TestRefusalsTellNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		elsewhere := drawWorld(t)
		elsewhere.mesh = w.mesh
		elsewhere.host.Forwarding, elsewhere.host.FoundForwarding = w.host.Forwarding, w.host.FoundForwarding
		elsewhere.host.Uplink4, elsewhere.host.Uplink6 = w.host.Uplink4, w.host.Uplink6
		a, b := mustCompile(t, w), mustCompile(t, elsewhere)
		var edges []netip.Addr
		for _, s := range []Sets{a.Sets(), b.Sets()} {
			for _, set := range [][]netip.Prefix{s.Martians, s.Self, s.LAN, s.Mesh} {
				for _, p := range set {
					edges = append(edges, p.Addr(), p.Addr().Next(), p.Addr().Prev())
				}
			}
		}
		for _, dst := range edges {
			for _, p := range []Packet{
				{Proto: ProtoTCP, DstPort: 443}, {Proto: ProtoUDP, DstPort: 53}, {Proto: ProtoUDP, DstPort: 51820},
				{Proto: ProtoICMP, ICMPType: 8}, {Proto: ProtoICMP, ICMPType: 3}, {Proto: 47},
			} {
				p.Dst = dst
				for _, peer := range a.Peers() {
					if p.Src = peer.Addresses[0]; dst.Is6() {
						p.Src = peer.Addresses[1]
					}
					looksTheSame(t, peer.Permissions, p, a.FromPeer(p), b.FromPeer(p))
				}
			}
		}
	})
}

func looksTheSame(t *rapid.T, have mesh.Permissions, p Packet, a, b Verdict) {
	if a.Peer < 0 || b.Peer < 0 { // no peer has the address of an interface
		return
	}
	if a.Pass {
		a, b = b, a
	}
	switch {
	case a.Pass: // both pass it
	case b.Pass && b.Class != Internet: // the peer may reach the host or its networks, and so may know them
	case a.Rule == RuleWireGuard, b.Rule == RuleWireGuard: // only with incoming
	case a.Rule == RuleHairpin, b.Rule == RuleHairpin: // only with routing and lan
	case b.Pass && a.Answered(), !b.Pass && a.Answered() != b.Answered():
		t.Fatalf("%+v with %v: answered %v (%v), elsewhere passes %v, answered %v (%v)", p, have, a.Answered(), a.Rule, b.Pass, b.Answered(), b.Rule)
	}
}

// TestAnswers checks which refusals are answered and which are silent, by the permissions of
// the peer.
func TestAnswers(t *testing.T) {
	h := pictureHost()
	for _, tt := range []struct {
		have         mesh.Permissions
		told, silent string
	}{
		{0, "100.64.0.1 8.8.8.8 10.0.0.1 203.0.113.9 203.0.113.255 203.0.113.7 192.168.77.255 64:ff9b::203.0.113.9 2001:db8:1::9",
			"127.0.0.1 100.64.0.2 100.64.9.9 192.0.0.8 ::8.8.8.8 64:ff9b::100.64.0.2"},
		{mesh.Incoming, "8.8.8.8 10.0.0.1 203.0.113.255 203.0.113.7 192.168.77.255 64:ff9b::203.0.113.9", "127.0.0.1 100.64.0.2"},
		{mesh.Routing, "100.64.0.1 10.0.0.1 192.168.77.1 192.168.77.255 64:ff9b::10.0.0.1 fd00::1",
			"203.0.113.9 203.0.113.255 203.0.113.7 64:ff9b::203.0.113.9 64:ff9b::203.0.113.1 2001:db8:1::9 2001:db8:18::5 100.64.0.2"},
		{mesh.Routing | mesh.LAN, "100.64.0.1", "203.0.113.9 203.0.113.255 192.168.77.1 192.168.77.255 2001:db8:1::9"},
		{mesh.Routing | mesh.LAN | mesh.Incoming, "", "203.0.113.255 192.168.77.255 100.64.0.2 127.0.0.1"},
	} {
		r := compile(t, picture(tt.have), h)
		for told, list := range map[bool]string{true: tt.told, false: tt.silent} {
			for _, dst := range strings.Fields(list) {
				p := Packet{Src: addr("100.64.0.3"), Dst: addr(dst), Proto: ProtoTCP, DstPort: 443}
				if p.Dst.Is6() {
					p.Src = addr("fd6d:6573:6800::3")
				}
				if v := r.FromPeer(p); v.Pass || v.Answered() != told {
					t.Errorf("%v with %v: %+v", dst, tt.have, v)
				}
			}
		}
	}
}

// TestAtIsCompile checks that a ruleset's At judges like a ruleset compiled at that time.
func TestAtIsCompile(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		for i := range w.mesh.Peers {
			for _, one := range mesh.AllPermissions {
				if n := rapid.IntRange(0, 5).Draw(t, "ends"); n > 0 {
					w.mesh.Peers[i].Permissions.Of(one.Set).Until = start.Add(time.Duration(n) * time.Second)
				}
			}
		}
		left := mustCompile(t, w)
		for range 8 {
			now := start.Add(time.Duration(rapid.IntRange(0, 12).Draw(t, "now")) * time.Second / 2)
			want, err := Compile(w.mesh, w.host, now)
			if err != nil {
				t.Fatal(err)
			}
			got := left.At(now)
			for range 10 {
				p := w.drawPacket(t)
				if a, b := got.decide(p), want.decide(p); a != b {
					t.Fatalf("%+v: %+v, want %+v", p, a, b)
				}
			}
			if !got.Expires().Equal(want.Expires()) {
				t.Fatalf("expires at %v, want %v", got.Expires(), want.Expires())
			}
		}
	})
}

// carrying checks that an IPv6 address with an embedded IPv4 address (NAT64 or 6to4) isn't
// in a higher class than the embedded one.
func carrying(t *rapid.T, r *Ruleset, dst netip.Addr) {
	b := dst.As16()
	var inner netip.Addr
	switch {
	case prefix("64:ff9b::/96").Contains(dst):
		inner = netip.AddrFrom4([4]byte(b[12:]))
	case prefix("2002::/16").Contains(dst):
		inner = netip.AddrFrom4([4]byte(b[2:]))
	default:
		return
	}
	routes6To4 := slices.ContainsFunc(r.Sets().Self, func(p netip.Prefix) bool {
		return p.Addr().Is6() && prefix("2002::/16").Contains(p.Addr()) || prefix("64:ff9b::/96").Contains(p.Addr())
	})
	got, of := r.Class(dst), r.Class(inner)
	if got > of && !(of == Self && got == OnLAN && routes6To4) {
		t.Fatalf("%v is %v, but %v is %v", dst, got, inner, of)
	}
	if got == Self && !holds(r.Sets().Self, single(dst)) {
		t.Fatalf("%v is of class self, but isn't an address of the host", dst)
	}
}

// TestLANWithoutRoutingChangesNothing checks that lan alone, without routing, changes no
// verdict.
func TestLANWithoutRoutingChangesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		for i := range w.mesh.Peers {
			w.mesh.Peers[i].Permissions.Of(mesh.Routing).Allowed = false
			w.mesh.Peers[i].Permissions.Of(mesh.LAN).Allowed = false
		}
		without := mustCompile(t, w)
		for i := range w.mesh.Peers {
			w.mesh.Peers[i].Permissions.Of(mesh.LAN).Allowed = rapid.Bool().Draw(t, "lan")
		}
		with := mustCompile(t, w)
		for range 20 {
			p := w.drawPacket(t)
			if a, b := without.decide(p), with.decide(p); a != b {
				t.Fatalf("%+v: %+v without lan, %+v with", p, a, b)
			}
		}
	})
}

// TestNarrowing checks that removing a permission never lets more packets pass, and that
// Diff names the peer of each packet that no longer passes, whatever changed.
func TestNarrowing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		old := mustCompile(t, w)
		fewer := w
		fewer.mesh = w.mesh.clone()
		for i := range fewer.mesh.Peers {
			keep := mesh.Permissions(rapid.IntRange(0, int(mesh.All)).Draw(t, "keep"))
			fewer.mesh.Peers[i].Permissions = mesh.Granted(w.mesh.Peers[i].Permissions.At(start) & keep)
		}
		next := mustCompile(t, fewer)
		diffNames(t, w, old, next, true)

		other := drawWorld(t)
		diffNames(t, w, old, mustCompile(t, other), false)
	})
}

func diffNames(t *rapid.T, w world, old, next *Ruleset, onlyNarrower bool) {
	narrowed := map[mesh.PublicKey]bool{}
	for _, n := range Diff(old, next) {
		narrowed[n.PublicKey] = true
	}
	for range 20 {
		p := w.drawPacket(t)
		was, is := old.decide(p), next.decide(p)
		if onlyNarrower && is.Pass && !was.Pass {
			t.Fatalf("%+v: passes with fewer permissions: %+v, before: %+v", p, is, was)
		}
		if was.Pass && !is.Pass && was.Peer >= 0 && !narrowed[old.Peers()[was.Peer].PublicKey] {
			t.Fatalf("%+v: no longer passes (%v), but Diff doesn't name %s", p, is.Rule, old.Peers()[was.Peer].Name)
		}
	}
}

// large is a mesh of n peers on a host with the given number of routes.
func large(n, routes int) (Mesh, Host) {
	m, h := picture(7), pictureHost()
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range n {
		var id mesh.PublicKey
		binary.BigEndian.PutUint32(id[1:], uint32(i+1))
		m.Peers = append(m.Peers, mesh.Peer{
			PublicKey: id, Name: fmt.Sprint("peer", i), Permissions: mesh.Granted(mesh.Permissions(i % 8)),
			Addresses: mesh.Addresses{
				netip.AddrFrom4([4]byte{100, 65, byte(i >> 8), byte(i)}),
				netip.MustParseAddr(fmt.Sprintf("fd6d:6573:6800::1:%x", i)),
			},
		})
	}
	for range routes {
		a := netip.AddrFrom4([4]byte{byte(1 + rnd.IntN(200)), byte(rnd.Uint32()), byte(rnd.Uint32()), 0})
		h.Routes = append(h.Routes, Route{netip.PrefixFrom(a, 24), "utun3"})
	}
	return m, h
}

func BenchmarkCompile(b *testing.B) {
	for _, n := range []int{60, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			m, h := large(n, 1000)
			for b.Loop() {
				if _, err := Compile(m, h, time.Time{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkFromPeer(b *testing.B) {
	r := compile(b, func() Mesh { m, _ := large(10_000, 0); return m }(), func() Host { _, h := large(0, 1000); return h }())
	for name, p := range map[string]Packet{
		"v4": {Src: addr("100.65.0.7"), Dst: addr("8.8.8.8"), Proto: ProtoTCP},
		"v6": {Src: addr("fd6d:6573:6800::1:7"), Dst: addr("2600::1"), Proto: ProtoTCP},
	} {
		if !r.FromPeer(p).Pass {
			b.Fatalf("%+v doesn't pass", p)
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r.FromPeer(p)
			}
		})
	}
}

// TestAllocatesNothing checks that no verdict allocates, as the guard asks for one per packet.
func TestAllocatesNothing(t *testing.T) {
	r := compile(t, picture(7), pictureHost())
	p := Packet{Src: addr("100.64.0.3"), Dst: addr("8.8.8.8"), Proto: ProtoTCP}
	if n := testing.AllocsPerRun(100, func() {
		r.FromPeer(p)
		r.FromHost(p)
		r.FromElsewhere(p)
		r.IntoTunnel(p)
		r.Reply(ByPeer, p, "en0")
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// everyField calls do once for each field of the mesh, of its first peer and of the host,
// with copies in which that field alone is changed. It finds the fields by reflection, so
// that a new field is covered as well.
func everyField(m Mesh, h Host, do func(name string, m Mesh, h Host)) {
	change := func(v reflect.Value) {
		switch v.Interface().(type) {
		case string:
			v.SetString(v.String() + "x")
		case bool:
			v.SetBool(!v.Bool())
		case uint16:
			v.SetUint(v.Uint() + 1)
		case Families:
			v.Set(reflect.ValueOf(Families{IPv4: !v.Interface().(Families).IPv4}))
		case Services:
			v.SetUint(uint64(EveryService) - v.Uint())
		case mesh.Kind:
			v.SetString(string(mesh.External))
		case mesh.Addresses:
			v.Set(reflect.ValueOf(mesh.Addresses{addr("100.64.9.9"), addr("fd6d:6573:6800::9:9")}))
		case mesh.PublicKey:
			v.Set(reflect.ValueOf(mesh.PublicKey{'X'}))
		case mesh.Grants:
			v.Set(reflect.ValueOf(mesh.Granted(mesh.All)))
		case netip.Addr:
			v.Set(reflect.ValueOf(addr("203.0.113.77")))
		case []netip.Addr:
			v.Set(reflect.ValueOf([]netip.Addr{addr("100.64.9.9"), addr("fd6d:6573:6800::9:9")}))
		case []string:
			v.Set(reflect.ValueOf(append(v.Interface().([]string), "en5")))
		case []netip.Prefix:
			v.Set(reflect.ValueOf(append([]netip.Prefix{prefix("100.64.0.0/9"), prefix("172.30.0.0/16")}, v.Interface().([]netip.Prefix)...)))
		case []mesh.Peer:
			v.Set(reflect.ValueOf(v.Interface().([]mesh.Peer)[1:]))
		case []Interface:
			v.Set(reflect.ValueOf(v.Interface().([]Interface)[:2]))
		case []Route:
			v.Set(reflect.ValueOf(v.Interface().([]Route)[1:]))
		default:
			panic(fmt.Sprintf("a field of type %v", v.Type()))
		}
	}
	for i := range reflect.TypeFor[Mesh]().NumField() {
		other := m.clone()
		change(reflect.ValueOf(&other).Elem().Field(i))
		do("mesh."+reflect.TypeFor[Mesh]().Field(i).Name, other, h)
	}
	for i := range reflect.TypeFor[mesh.Peer]().NumField() {
		other := m.clone()
		change(reflect.ValueOf(&other.Peers[0]).Elem().Field(i))
		do("peer."+reflect.TypeFor[mesh.Peer]().Field(i).Name, other, h)
	}
	for i := range reflect.TypeFor[Host]().NumField() {
		other := h
		change(reflect.ValueOf(&other).Elem().Field(i))
		do("host."+reflect.TypeFor[Host]().Field(i).Name, m, other)
	}
}

// TestRecompileIsCompile recompiles after a change of each field, at several times. The
// result equals that of Compile, the former ruleset doesn't change, and both share a ground
// exactly where only fields changed on which the ground doesn't depend.
func TestRecompileIsCompile(t *testing.T) {
	start := time.Unix(1_000_000, 0)
	m, h := picture(mesh.Routing|mesh.LAN), pictureHost()
	m.Peers[0].Permissions.Of(mesh.Routing).Until = start.Add(time.Hour)
	m.Peers[1].Permissions.Of(mesh.Incoming).Until = start.Add(2 * time.Hour)
	m.Former = []netip.Addr{addr("100.64.7.7")}
	same := func(name string, got, want *Ruleset) {
		t.Helper()
		if !reflect.DeepEqual(got.mesh, want.mesh) || !reflect.DeepEqual(got.host, want.host) ||
			!reflect.DeepEqual(got.peers, want.peers) || !got.expires.Equal(want.expires) || !reflect.DeepEqual(got.sets, want.sets) {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
		for _, p := range want.peers {
			for _, a := range p.Addresses {
				i, ok := got.PeerByAddr(a)
				j, ok2 := want.PeerByAddr(a)
				if i != j || ok != ok2 {
					t.Errorf("%s: %v is of peer %d, want %d", name, a, i, j)
				}
			}
		}
	}
	// The fields of a peer that the ground doesn't depend on: its grants, and those that the
	// policy doesn't read.
	apart := []string{"peer.Permissions", "peer.Kind", "peer.Endpoint", "peer.Keepalive", "peer.Tunnel"}
	shared := 0
	for _, at := range []time.Duration{0, time.Hour, 3 * time.Hour} {
		now := start.Add(at)
		everyField(m, h, func(name string, m2 Mesh, h2 Host) {
			r, err := Compile(m, h, start)
			if err != nil {
				t.Fatal(err)
			}
			want, wantErr := Compile(m2, h2, now)
			got, err := r.Recompile(m2, h2, now)
			if wantErr != nil || err != nil {
				if wantErr == nil || err == nil || err.Error() != wantErr.Error() {
					t.Errorf("%s: %v, want %v", name, err, wantErr)
				}
				return
			}
			same(fmt.Sprintf("%s changed, %v later", name, at), got, want)
			if got.ground == r.ground {
				shared++
				if !slices.Contains(apart, name) {
					t.Errorf("%s changed, but the ground is shared", name)
				}
			}
			again, err := Compile(m, h, start)
			if err != nil {
				t.Fatal(err)
			}
			same(name+": the former ruleset", r, again)
		})
	}
	if want := 3 * len(apart); shared != want {
		t.Errorf("the ground was shared %d times, want %d", shared, want)
	}

	r, err := Compile(m, h, start)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.Recompile(m.clone(), pictureHost(), start.Add(time.Minute)); err != nil || got != r {
		t.Errorf("Recompile without a change returns another ruleset, error %v", err)
	}
	got, err := r.Recompile(m, h, start.Add(time.Hour))
	want, _ := Compile(m, h, start.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	same("time alone", got, want)
	if got, err := (*Ruleset)(nil).Recompile(m, h, start); err != nil {
		t.Error(err)
	} else {
		same("Recompile of a nil ruleset", got, r)
	}
}
