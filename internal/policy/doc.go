// Package policy decides which packets may pass. It is the reference for the whole
// product: every enforcer (the guard at the tunnel, nftables, pf) and every
// explanation is tested against it, packet by packet.
//
// It is a pure function. [Compile] takes the wanted mesh, facts observed about the
// host, and a time, and returns a [Ruleset]: immutable, safe for concurrent use, and
// fast to query. There is no I/O here, no clock and no state; a caller that tracks
// flows asks about the packet that opened the flow.
//
// # The model
//
// The host runs the helper. A peer is another device with a WireGuard key that
// the host knows. A permission lets one peer do one thing: [mesh.Incoming]
// (connect to the host itself), [mesh.Routing] (reach the internet through it) and
// [mesh.LAN] (reach the host's other networks; only together with Routing).
//
// A packet from a peer is put in a [Class] by its destination as the peer sent
// it; the first class that fits counts:
//
//	martian   never a valid destination: loopback, multicast, broadcast ...
//	self      an address of the host
//	mesh      the mesh prefixes and every peer's address: peers never reach
//	          each other through the host
//	lan       private and attached prefixes, and prefixes with a route other than
//	          the default route
//	internet  the rest, by the uplink only
//
// # The questions
//
// A packet that belongs to no flow may pass, and thereby open one. Which question is
// asked about it depends on where it comes from: [Ruleset.FromPeer] out of the tunnel,
// [Ruleset.FromHost] from the host itself, [Ruleset.FromElsewhere] by any other
// interface. [Ruleset.IntoTunnel] is for an enforcer at the tunnel, which sees where a
// packet goes and not where it comes from.
//
// A flow passes while its [Opener] may open it, never because it exists.
// [Ruleset.MayOpen] judges a flow, and an ICMP error that quotes a packet of it, by the
// packet that opened the flow; [Ruleset.Reply] judges a packet of the opposite
// direction as well by where it arrives.
//
// # Through a peer
//
// The host can route its own traffic to other networks through a peer
// ([Mesh].ThroughPeer). Then its packets to the classes lan and internet enter the
// tunnel, and what that peer sends with a foreign source passes as the reply to such a
// flow. While the host doesn't, both are refused.
//
// [Diff] names the peers for which a change took something away, so that the
// enforcers know whose running flows to cut.
package policy
