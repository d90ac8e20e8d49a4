package flow

import (
	"time"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// phase is how far a flow has come, as far as its timeout depends on it.
//
// It follows what the host's packet filter may believe of the flow, not what the
// packets say. A peer can send a FIN or a reset that the filter doesn't accept,
// because its sequence number is wrong, and the other end can send answers that
// the filter sees and the guard doesn't, because their hop limit ends between the
// two. So a flow is taken for half open only while its opener has sent nothing
// but SYNs, and for closed only by a FIN or a reset towards the peer: that one
// went through the filter.
//
// What the guard can't know is a packet that refreshes a state and never arrives:
// an end outside that goes on sending such ones keeps alive what the guard has
// forgotten. Only a bound in the filter itself holds those.
type phase uint8

const (
	opened      phase = iota // the opener has sent, by UDP once, by TCP only SYNs
	repeated                 // the opener has sent more than that, and had no answer
	answered                 // as opened, and the other end has sent
	established              // as repeated, and the other end has sent
	closing                  // TCP: a FIN or a reset went to the peer
)

// unanswered reports whether a flow in this phase is the first of the host's to
// go when memory is short.
func (p phase) unanswered() bool { return p == opened || p == repeated || p == closing }

// firstPhase returns the phase after the packet that opens a flow. Where it isn't
// the first packet of a connection, the filter may know the connection from
// before.
func firstPhase(proto, flags uint8) phase {
	switch {
	case proto != policy.ProtoTCP || flags&(tcpSYN|tcpACK) == tcpSYN:
		return opened
	case flags&tcpFIN != 0:
		return closing
	}
	return repeated
}

// reborn is after how long the filter may have forgotten a closed connection, so
// that another packet of the peer makes it a new one: conntrack keeps a reset one
// for 10 s (nf_conntrack_tcp_timeout_close), pf for TCPClosed.
const reborn Instant = 10_000

// next returns the phase after a packet in direction d. late tells that the flow
// was closed more than reborn ago.
func (p phase) next(proto uint8, d, opener Direction, flags uint8, late bool) phase {
	if proto == policy.ProtoTCP {
		return p.nextTCP(d, opener, flags, late)
	}
	return p.nextPacket(d == opener)
}

func (p phase) nextTCP(d, opener Direction, flags uint8, late bool) phase {
	syn := d == opener && flags&(tcpSYN|tcpACK) == tcpSYN
	switch {
	case d == ToPeer && flags&tcpFIN != 0, d == ToPeer && flags&tcpRST != 0 && p != opened && p != answered:
		return closing
	case flags&tcpRST != 0:
		return p
	// The end of a connection that was left half closed is hard to tell from the
	// beginning of another one.
	case p == closing && syn:
		return opened
	case p == closing && d == opener && late && flags&tcpFIN == 0:
		return repeated
	case p == closing || syn:
		return p
	}
	return p.nextPacket(d == opener)
}

// nextPacket returns the phase after a packet that has no say of its own.
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

// purge is how much longer the guard remembers a flow than the packet filter: pf
// takes expired states away every 10 s (PFTM_INTERVAL in xnu bsd/net/pfvar.h) and
// counts in whole seconds.
const purge = 15 * time.Second

// timeout returns after how long without a packet a flow is forgotten: the longest
// that the filter may have for a flow in this phase, and purge.
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

func (p phase) timeoutTCP() time.Duration {
	switch p {
	case opened, answered:
		return max(TCPFirst, TCPOpening)
	case closing:
		return max(TCPClosing, TCPFinWait, TCPClosed)
	}
	return TCPEstablished
}
