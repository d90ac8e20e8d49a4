package flowtest

import (
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// The addresses of the picture: the host B, its external peer C, its own peer
// A, a host L on its LAN and a host I on the internet.
var (
	HostB4 = netip.MustParseAddr("100.64.0.1")
	HostB6 = netip.MustParseAddr("fd6d:6573:6800::1")
	PeerC4 = netip.MustParseAddr("100.64.0.3")
	PeerC6 = netip.MustParseAddr("fd6d:6573:6800::3")
	PeerA4 = netip.MustParseAddr("100.64.0.2")
	PeerA6 = netip.MustParseAddr("fd6d:6573:6800::2")
	LAN4   = netip.MustParseAddr("192.168.77.20")
	LAN6   = netip.MustParseAddr("2001:db8:77::20")
	Net4   = netip.MustParseAddr("1.1.1.1")
	Net6   = netip.MustParseAddr("2606:4700::1111")
	HostL4 = netip.MustParseAddr("192.168.77.1") // B on its LAN
)

// PeerC and PeerA identify the peers of the picture.
var (
	PeerC = mesh.PublicKey{'C'}
	PeerA = mesh.PublicKey{'A'}
)

// Interface is the mesh interface of the picture.
const Interface = "utun7"

// Mesh returns the picture's mesh, in which C has the permissions c and A has
// incoming.
func Mesh(c mesh.Permissions) policy.Mesh {
	return policy.Mesh{
		Prefixes:  []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6},
		Addresses: []netip.Addr{HostB4, HostB6},
		Peers: []mesh.Peer{
			{PublicKey: PeerC, Name: "c", Addresses: mesh.Addresses{PeerC4, PeerC6}, Permissions: mesh.Granted(c)},
			{PublicKey: PeerA, Name: "a", Addresses: mesh.Addresses{PeerA4, PeerA6}, Permissions: mesh.Granted(mesh.Incoming)},
		},
	}
}

// Host returns the facts about B.
func Host() policy.Host {
	return policy.Host{
		Interface: Interface, Uplink4: "en0", Uplink6: "en0",
		Forwarding: policy.Families{IPv4: true, IPv6: true},
		Interfaces: []policy.Interface{
			{Name: "en0", Addresses: []netip.Prefix{netip.MustParsePrefix("203.0.113.9/24"), netip.MustParsePrefix("2001:db8:1::9/64")}},
			{Name: "en5", Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.77.1/24"), netip.MustParsePrefix("2001:db8:77::1/64")}},
		},
	}
}

// Compile returns the ruleset of a mesh on the picture's host.
func Compile(t testing.TB, m policy.Mesh) *policy.Ruleset {
	t.Helper()
	r, err := policy.Compile(m, Host(), time.Unix(1_700_000_000, 0))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Picture returns the ruleset of the picture in which C has the permissions c.
func Picture(t testing.TB, c mesh.Permissions) *policy.Ruleset {
	t.Helper()
	return Compile(t, Mesh(c))
}

// Large returns a ruleset with n peers, the first of which has all permissions
// and the addresses of C, on a host with some more prefixes attached or routed.
func Large(t testing.TB, n, prefixes int) *policy.Ruleset {
	t.Helper()
	m := Mesh(mesh.All)
	for i := len(m.Peers); i < n; i++ {
		a4 := netip.AddrFrom4([4]byte{100, 65, byte(i >> 8), byte(i)})
		a6 := PeerC6.As16()
		a6[8], a6[14], a6[15] = 1, byte(i>>8), byte(i)
		m.Peers = append(m.Peers, mesh.Peer{
			PublicKey: mesh.PublicKey{1, byte(i >> 8), byte(i)}, Name: a4.String(),
			Addresses: mesh.Addresses{a4, netip.AddrFrom16(a6)}, Permissions: mesh.Granted(mesh.Permissions(i & 7)),
		})
	}
	h := Host()
	for i := range prefixes {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0}), 24)
		h.Routes = append(h.Routes, policy.Route{Prefix: p, Interface: "utun3"})
	}
	r, err := policy.Compile(m, h, time.Unix(1_700_000_000, 0))
	if err != nil {
		t.Fatal(err)
	}
	return r
}
