// Package flow remembers which end opened a flow. It judges packets at the tunnel by the
// policy and by the flow that they belong to, in bounded memory.
//
// The policy decides whether a packet may open a flow. Whether a packet opens one, or
// belongs to a flow that was opened before, takes memory to tell; that memory is a
// Table. A View is a Table together with one compiled ruleset, and View.Judge answers
// the whole question: may this packet pass?
//
//	table := flow.New(flow.Options{})
//	view := table.Use(ruleset)
//	decision := view.Judge(packet, flow.FromPeer, table.Now())
//
// A change of the policy makes a new View of the same Table. Once no packet is judged
// by the old View any more, CutRefused cuts the flows that the new one refuses:
//
//	next := table.Use(changed)
//	// ... judge by next, and wait for the last Judge of view to return
//	next.CutRefused(view)
//
// # What counts as a flow
//
// Two addresses, a protocol and its ports (TCP or UDP), or the identifier of an
// ICMP query; other protocols have no flows. A flow has an opener: the peer, or
// the host. It passes, in both directions, when its opener may open it now; so a
// change of the policy takes effect with the first packet that the new View judges,
// and no search through the memory is needed for that. An ICMP error passes when
// the packet that it quotes is of a flow that passes.
//
// A cut flow is one that passed until the policy changed. It stays in memory for its
// timeout, so that the other end's next packet doesn't open it in the opposite
// direction, and it runs again once its opener may open it again and sends.
//
// # Bounds
//
// The host's packet filter keeps state for each flow that passes, and its capacity is
// shared by all peers, the host and everything else on it. The filter can't limit one
// peer with all its addresses, nor all peers together, so the flows are counted here.
// One peer may take a quarter of the filter's capacity, all peers together three
// quarters; one flow more is refused, in silence, until another has timed out. No
// running flow is forgotten to make room, since the filter would keep it. Flows that
// the host opens to a peer aren't counted, so that no peer can keep the host from
// opening them; the memory for them is bounded, and the oldest unanswered flow is
// forgotten first. Cut flows have a bound of their own.
//
// A peer also opens at most openingBurst flows at once and openingRate a second.
// Every packet of a peer belongs to a flow, except ICMP errors about one: an answer, a
// reset or an ICMP type that opens nothing is refused where there is no flow.
//
// Timeouts are those that the packet filter is configured with (see Timeouts), plus a
// margin, so that the filter forgets a flow before the guard does.
//
// # Fragments
//
// The first fragment of a datagram has the ports and is judged like a whole
// packet; it must hold the whole transport header. A later one is judged by the
// ports of the first that passed before it. It is refused when there was none,
// and when it reaches into the bytes of the first (RFC 1858, RFC 3128, RFC 5722).
// So a datagram whose first fragment is overtaken on the way is lost, in IPv4 and
// IPv6: no fragment is queued to wait for a first one that may be refused. The others
// may arrive in any order.
//
// The host's kernel keeps a peer's fragments until their datagram is complete, in memory
// shared by the whole host. So a peer may have 64 datagrams and 1 MB incomplete there,
// all peers together 3 MB; beyond that no first fragment passes until a datagram is
// complete or given up. The count must match the kernel's: a fragment that is a
// duplicate, overlaps another, arrives late or after too many others, or has a header
// for which a kernel may drop it, is refused (see reassembly).
package flow
