package linux

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// The peers and the host in the tests' mesh.
var (
	own4, own6 = netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd6d:6573:6800::1")
	ann4, ann6 = netip.MustParseAddr("100.64.0.10"), netip.MustParseAddr("fd6d:6573:6800::10")
	bob4, bob6 = netip.MustParseAddr("100.64.0.11"), netip.MustParseAddr("fd6d:6573:6800::11")
)

// testMTU is the mesh interface's MTU, the one that wg-quick chooses.
const testMTU = 1420

const all = mesh.Incoming | mesh.Routing | mesh.LAN

func meshPrefixes() []netip.Prefix {
	return []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6}
}

// grants are the permissions of the two peers.
type grants struct{ ann, bob mesh.Permissions }

func meshOf(g grants) policy.Mesh {
	return policy.Mesh{
		Prefixes: meshPrefixes(), Addresses: []netip.Addr{own4, own6},
		Peers: []mesh.Peer{
			{PublicKey: mesh.PublicKey{1}, Name: "ann", Addresses: mesh.Addresses{ann4, ann6}, Permissions: mesh.Granted(g.ann)},
			{PublicKey: mesh.PublicKey{2}, Name: "bob", Addresses: mesh.Addresses{bob4, bob6}, Permissions: mesh.Granted(g.bob)},
		},
	}
}

// crowd returns a mesh of n peers with routing.
func crowd(n int) policy.Mesh {
	m := meshOf(grants{})
	m.Peers = nil
	a4, a6 := netip.MustParseAddr("100.65.0.0"), netip.MustParseAddr("fd6d:6573:6800:1::")
	for i := range n {
		a4, a6 = a4.Next(), a6.Next()
		m.Peers = append(m.Peers, mesh.Peer{
			PublicKey: mesh.PublicKey{byte(i), byte(i >> 8), byte(i >> 16), 1}, Name: a4.String(),
			Addresses: mesh.Addresses{a4, a6}, Permissions: mesh.Granted(mesh.Routing),
		})
	}
	return m
}
