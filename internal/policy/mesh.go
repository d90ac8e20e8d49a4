package policy

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Mesh is the wanted state as far as it matters for what may pass.
type Mesh struct {
	// Prefixes are the mesh prefixes of both families.
	Prefixes []netip.Prefix
	// Addresses are the host's own mesh addresses.
	Addresses []netip.Addr
	Peers     []mesh.Peer
	// Former are mesh addresses of peers that were removed less than a day ago, or got
	// others, also with other mesh prefixes than now: what the host still sends there is
	// kept in. Where a peer, or the host
	// itself, has such an address again, that counts.
	Former []netip.Addr
	// ListenPort is the UDP port of the host's WireGuard, or 0 where it isn't
	// known: no peer reaches it through the tunnel, or the tunnel would carry
	// itself; outside of the tunnel what it sends and gets is never refused.
	ListenPort uint16
	// ThroughPeer says that the host routes its own traffic to other networks through a
	// peer. Without it nothing is open for that: what the host sends into the tunnel is
	// for a peer, and what comes out of it has a peer's source.
	ThroughPeer bool
	// DNS says that the helper serves DNS on the host's mesh addresses, so that
	// port 53 there is open with routing alone.
	DNS bool
}
