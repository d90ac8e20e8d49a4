// Package flow knows who opened what. It judges packets at the tunnel by the
// policy and by the flow that they belong to, in bounded memory.
//
// The policy says what a packet may that opens a flow. Whether a packet is one,
// or runs in a flow that somebody opened before, only memory can tell; that
// memory is a Table. A View is a Table together with one compiled ruleset, and
// View.Judge is the whole question: may this packet pass?
//
//	table := flow.New(flow.Options{})
//	view := table.Use(ruleset, nil)      // nil: there was no ruleset before
//	verdict := view.Judge(packet, flow.FromPeer, table.Now())
//
// # What counts as a flow
//
// Two addresses, a protocol and its ports (TCP, UDP, UDP-Lite, SCTP, DCCP), or
// the identifier of an ICMP query. A flow has an opener: the peer, or the host.
// It passes, in both directions, when its opener may open it now; so a change of
// the policy needs no search through the memory to take effect. An ICMP error
// passes when the packet that it quotes is of a flow that passes.
//
// A flow that the policy came to refuse is cut: it stays in memory for its
// timeout, so that the other end's next packet doesn't open it the other way
// round, and lives again when its opener may open it again and sends.
//
// # Bounds
//
// Each peer has its own share of the memory, so a flood by one can't push out
// another's flows. Within a share, flows that nobody has answered go first, so a
// flood of half-open flows doesn't push out the peer's own running ones. Cut
// flows have a share of their own and aren't pushed out by new flows at all.
//
// Timeouts are those of macOS's packet filter (pf.conf(5), set timeout), so that
// the guard and the packet filter forget alike.
//
// # Fragments
//
// The first fragment of a datagram has the ports and is judged like a whole
// packet; it must hold the whole transport header. A later one is judged by the
// ports of the first that passed before it. It is refused when there was none,
// and when it reaches into the bytes of the first (RFC 1858, RFC 3128, RFC 5722).
package flow
