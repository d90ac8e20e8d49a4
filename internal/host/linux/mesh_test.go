package linux

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// The peers and the host in the tests' mesh.
var (
	own4, own6 = netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd6d:6573:6800::1")
	ann4, ann6 = netip.MustParseAddr("100.64.0.10"), netip.MustParseAddr("fd6d:6573:6800::10")
	bob4, bob6 = netip.MustParseAddr("100.64.0.11"), netip.MustParseAddr("fd6d:6573:6800::11")
)

// testMTU is the mesh interface's, as wg-quick chooses it.
const testMTU = 1420

const all = policy.Incoming | policy.Routing | policy.LAN

func meshPrefixes() []netip.Prefix {
	return []netip.Prefix{policy.DefaultPrefix4, policy.DefaultPrefix6}
}

// grants gives two peers permissions.
type grants struct{ ann, bob policy.Permissions }

func allowed(p policy.Permissions) policy.Grants {
	return policy.Grants{
		Incoming: policy.Grant{Allowed: p.Has(policy.Incoming)},
		Routing:  policy.Grant{Allowed: p.Has(policy.Routing)},
		LAN:      policy.Grant{Allowed: p.Has(policy.LAN)},
	}
}

func mesh(g grants) policy.Mesh {
	return policy.Mesh{
		Prefixes: meshPrefixes(), Addresses: []netip.Addr{own4, own6},
		Peers: []policy.Peer{
			{ID: policy.PeerID{1}, Name: "ann", Addresses: []netip.Addr{ann4, ann6}, Grants: allowed(g.ann)},
			{ID: policy.PeerID{2}, Name: "bob", Addresses: []netip.Addr{bob4, bob6}, Grants: allowed(g.bob)},
		},
	}
}

// crowd is a mesh of n peers that may all route.
func crowd(n int) policy.Mesh {
	m := mesh(grants{})
	m.Peers = nil
	a4, a6 := netip.MustParseAddr("100.65.0.0"), netip.MustParseAddr("fd6d:6573:6800:1::")
	for i := range n {
		a4, a6 = a4.Next(), a6.Next()
		m.Peers = append(m.Peers, policy.Peer{
			ID: policy.PeerID{byte(i), byte(i >> 8), byte(i >> 16), 1}, Name: a4.String(),
			Addresses: []netip.Addr{a4, a6}, Grants: allowed(policy.Routing),
		})
	}
	return m
}
