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
	// Former are the addresses of peers that were removed, or got others, less than a day
	// ago; they may be outside the present prefixes. The host's packets to them are dropped
	// instead of leaving in clear. An address that a peer or the host has now doesn't count.
	Former []netip.Addr
	// ListenPort is the UDP port of the host's WireGuard, or 0 if it isn't known. No peer may
	// reach it through the tunnel, as the tunnel would carry itself. Outside the tunnel,
	// packets from and to it are never refused.
	ListenPort uint16
	// ThroughPeer says that the host routes its own traffic to other networks through a peer.
	// Without it, packets that the host sends into the tunnel must be for a peer, and those
	// that come out of it must have a peer's source.
	ThroughPeer bool
	// Serves are the services that the helper serves on the host's mesh addresses, which are
	// open to peers that have what a service needs.
	Serves Services
}
