package flow

import (
	"time"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// phase is the state of a flow as far as its timeout depends on it.
//
// It follows the state that the host's packet filter may have for the flow, rather than what
// the packets claim. A peer can send a FIN or a reset that the filter ignores because of a
// wrong sequence number. The other end can send answers that the filter sees but the guard
// doesn't, because their hop limit ends between the two. So a flow counts as half open only
// while its opener has sent nothing but SYNs, and as closed only after a FIN or a reset
// towards the peer, which has passed the filter.
//
// One case remains: packets that refresh the filter's state and never reach the guard. An
// outside host that keeps sending them keeps a state alive that the guard has forgotten. Only
// a limit in the filter itself helps against that.
type phase uint8

const (
	opened      phase = iota // the opener has sent, by UDP once, by TCP only SYNs
	repeated                 // the opener has sent more than that, and had no answer
	answered                 // as opened, and the other end has sent
	established              // as repeated, and the other end has sent
	closing                  // TCP: a FIN or a reset was sent to the peer
)

// unanswered reports whether flows in this phase are evicted before the host's other flows
// when memory is short.
func (p phase) unanswered() bool { return p == opened || p == repeated || p == closing }

// firstPhase returns the phase after the packet that opens a flow here. A TCP packet other
// than a SYN may belong to a connection that the filter already knows.
func firstPhase(proto, flags uint8) phase {
	switch {
	case proto != policy.ProtoTCP || flags&(tcpSYN|tcpACK) == tcpSYN:
		return opened
	case flags&tcpFIN != 0:
		return closing
	}
	return repeated
}

// reborn is the time in milliseconds after which the filter may have dropped the state of a
// closed connection, so that a packet of the peer opens a new one. conntrack keeps a reset
// connection for 10 s (nf_conntrack_tcp_timeout_close), pf for TCPClosed.
const reborn Instant = 10_000

// next returns the phase after a packet in direction d. late says that the flow was closed
// more than reborn ago.
func (p phase) next(proto uint8, d, opener Direction, flags uint8, late bool) phase {
	if proto == policy.ProtoTCP {
		return p.nextTCP(d, opener, flags, late)
	}
	return p.nextPacket(d == opener)
}

// nextTCP is next for TCP.
func (p phase) nextTCP(d, opener Direction, flags uint8, late bool) phase {
	syn := d == opener && flags&(tcpSYN|tcpACK) == tcpSYN
	switch {
	case d == ToPeer && flags&tcpFIN != 0, d == ToPeer && flags&tcpRST != 0 && p != opened && p != answered:
		return closing
	case flags&tcpRST != 0:
		return p
	// After closing, the rest of a half-closed connection and the start of a new one look
	// alike. A SYN, or a packet later than reborn, counts as a new one.
	case p == closing && syn:
		return opened
	case p == closing && d == opener && late && flags&tcpFIN == 0:
		return repeated
	case p == closing || syn:
		return p
	}
	return p.nextPacket(d == opener)
}

// nextPacket returns the phase after a packet whose flags don't matter.
func (p phase) nextPacket(fromOpener bool) phase {
	switch {
	case fromOpener && p == opened:
		return repeated
	case fromOpener && p == answered, !fromOpener && p == repeated:
		return established
	case !fromOpener && p == opened:
		return answered
	}
	return p
}

// purge is how much longer the guard keeps a flow than the packet filter's timeout: pf removes
// expired states only every 10 s (PFTM_INTERVAL in xnu bsd/net/pfvar.h), and counts in whole
// seconds. The rest is margin.
const purge = 15 * time.Second

// timeout returns how long a flow is kept after its last packet: the longest timeout that the
// filter may apply in this phase, plus purge.
func (p phase) timeout(proto uint8) time.Duration {
	switch proto {
	case policy.ProtoTCP:
		return p.timeoutTCP() + purge
	case policy.ProtoUDP:
		if p == opened || p == answered {
			return max(UDPFirst, UDPSingle) + purge
		}
		return UDPMultiple + purge
	}
	return max(ICMPFirst, ICMPError) + purge
}

// timeoutTCP returns the longest timeout of the filter for TCP in this phase.
func (p phase) timeoutTCP() time.Duration {
	switch p {
	case opened, answered:
		return max(TCPFirst, TCPOpening)
	case closing:
		return max(TCPClosing, TCPFinWait, TCPClosed)
	}
	return TCPEstablished
}
