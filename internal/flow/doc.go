// Package flow knows which end opened a flow. It judges packets at the tunnel by the
// policy and by the flow that they belong to, in bounded memory.
//
// The policy says what a packet may that opens a flow. Whether a packet is one,
// or belongs to a flow that was opened before, only memory can tell; that memory is
// a Table. A View is a Table together with one compiled ruleset, and View.Judge is
// the whole question: may this packet pass?
//
//	table := flow.New(flow.Options{})
//	view := table.Use(ruleset)
//	verdict := view.Judge(packet, flow.FromPeer, table.Now())
//
// A change of the policy makes a new View of the same Table. Once no packet is
// judged by the old one any more, Settle cuts the flows that the new one refuses:
//
//	next := table.Use(changed)
//	// ... judge by next, and wait for the last Judge of view to return
//	next.Settle(view)
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
// Settle cuts a flow that the policy came to refuse: it stays in memory for its
// timeout, so that the other end's next packet doesn't open it the other way
// round, and it is a running flow again when its opener may open it again and
// sends.
//
// # Bounds
//
// The host's packet filter keeps state of what passes, and what it can hold is
// shared by all peers, the host and everything else on it. The filter has no bound
// for one peer with all its addresses, nor for all peers together, so the flows are
// counted here. One peer may take a quarter of what the filter holds, all peers
// together three quarters; a flow more is refused, in silence, until another has
// timed out. No running flow is forgotten to make room, since the filter would keep
// it. What the host opens towards a peer isn't counted, so that no peer can keep the
// host from doing so; the memory for it is bounded, and the oldest unanswered flow
// is forgotten first. Cut flows are bounded apart.
//
// A peer also opens at most openingBurst flows at once and openingRate a second.
// And every packet of a peer belongs to a flow, but for ICMP errors about one: an
// answer, a reset or an ICMP type that opens nothing is refused where there is no
// flow.
//
// Timeouts are those that the packet filter is told (see Timeouts), and a little
// more, so that it has forgotten a flow when the guard does.
//
// # Fragments
//
// The first fragment of a datagram has the ports and is judged like a whole
// packet; it must hold the whole transport header. A later one is judged by the
// ports of the first that passed before it. It is refused when there was none,
// and when it reaches into the bytes of the first (RFC 1858, RFC 3128, RFC 5722).
// So a datagram whose pieces overtake its first one on the way is lost, in IPv4
// and IPv6: nothing is kept back to wait for a first fragment that may be refused.
// The others may come in any order.
//
// What a peer sends in fragments the host's kernel keeps until it is whole, in memory
// that is one for the whole host. So of a peer 64 datagrams and 1 MB may be unfinished
// there, of all peers 3 MB, and until one is whole or given up no first fragment
// passes. What is counted must be what the kernel has: a fragment that comes twice,
// overlaps another, comes late or behind too many others, or whose header a kernel may
// drop it for, is refused (see reassembly).
package flow
