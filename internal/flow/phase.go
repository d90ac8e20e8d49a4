package flow

import (
	"time"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// phase is how far a flow has come, as far as its timeout depends on it.
type phase uint8

const (
	opened        phase = iota // only the opener has sent, once
	repeated                   // only the opener has sent, more than once
	answering                  // TCP: the other end has answered
	established                // both ends have sent; TCP: and the opener again
	closingOpener              // TCP: the opener has sent its FIN
	closingOther               // TCP: the other end has
	finished                   // TCP: both have
	reset                      // TCP: one of them has sent a reset
)

// halfOpen reports whether a flow in this phase is the first to go when memory
// is short: nobody answered it, or it has ended.
func (p phase) halfOpen() bool {
	return p != established && p != closingOpener && p != closingOther
}

// next returns the phase after a packet of the opener (or of the other end).
func (p phase) next(proto uint8, fromOpener bool, flags uint8) phase {
	if proto == policy.ProtoTCP {
		return p.nextTCP(fromOpener, flags)
	}
	switch {
	case !fromOpener:
		return established
	case p == opened:
		return repeated
	}
	return p
}

func (p phase) nextTCP(fromOpener bool, flags uint8) phase {
	switch {
	case flags&tcpRST != 0:
		return reset
	// The opener begins anew from the same port.
	case fromOpener && flags&(tcpSYN|tcpACK) == tcpSYN && p >= closingOpener:
		return opened
	case flags&tcpFIN != 0 && p < finished:
		return p.nextFIN(fromOpener)
	case p <= repeated && !fromOpener:
		return answering
	case p == answering && fromOpener:
		return established
	}
	return p
}

func (p phase) nextFIN(fromOpener bool) phase {
	switch {
	case p == closingOther && fromOpener, p == closingOpener && !fromOpener:
		return finished
	case fromOpener:
		return closingOpener
	}
	return closingOther
}

// Timeouts of pf.conf(5), as macOS's kernel has them by default.
var (
	timeoutsTCP = [...]time.Duration{
		opened:        120 * time.Second, // tcp.first
		repeated:      120 * time.Second,
		answering:     30 * time.Second, // tcp.opening
		established:   86400 * time.Second,
		closingOpener: 900 * time.Second, // tcp.closing
		closingOther:  900 * time.Second,
		finished:      45 * time.Second, // tcp.finwait
		reset:         90 * time.Second, // tcp.closed
	}
	timeoutsICMP  = [...]time.Duration{20 * time.Second, 20 * time.Second, 10 * time.Second, 10 * time.Second}
	timeoutsOther = [...]time.Duration{60 * time.Second, 30 * time.Second, 60 * time.Second, 60 * time.Second}
)

// timeout returns after how long without a packet a flow is forgotten.
func (p phase) timeout(proto uint8) time.Duration {
	switch proto {
	case policy.ProtoTCP:
		return timeoutsTCP[p]
	case policy.ProtoICMP, policy.ProtoICMPv6:
		return timeoutsICMP[p]
	}
	return timeoutsOther[p]
}
