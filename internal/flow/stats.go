package flow

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Stats counts one peer's packets since it was first in a ruleset.
type Stats struct {
	// Refused counts packets by class; index 0 those towards the peer that are in
	// no flow that passes.
	Refused [policy.NumClasses]uint64
	// RxBytes and TxBytes count the bytes from the peer and towards it, with the IP header, of
	// packets of the classes lan and internet that passed.
	RxBytes, TxBytes uint64
	// LastRouted is when the last of those packets passed; zero if none did.
	LastRouted time.Time
	// Flows and Cut are how many flows are remembered now: running ones, the
	// host's with the peer included, and cut ones.
	Flows, Cut int
	// Held is how many entries of the host's packet filter the flows take that the
	// peer opened, and Limit how many they may; see Options.States.
	Held, Limit int
	// Full counts packets that would have opened a flow and were refused because
	// the peer, or all peers together, had as many as they may, or because the
	// peer opened them too fast. They are counted in Refused as well.
	Full uint64
	// Example is one of the packets that were refused of the peer since the last Stats, or
	// before; its To is invalid if there was none.
	Example Refused
}

// Refused is where a refused packet was to go.
type Refused struct {
	To    netip.Addr
	Proto uint8
	Port  uint16 // of TCP and UDP, else 0; also 0 where it isn't in the packet
}

// sample keeps the first bytes of a refused packet. A peer may have millions refused, so
// another one is taken only after Stats asked for the last.
type sample struct {
	taken atomic.Bool

	mu   sync.Mutex
	head [header6 + 4]byte // addresses, and ports where no options precede them
	n    int
}

func (s *sample) take(b []byte) {
	if s.taken.Load() || !s.mu.TryLock() {
		return
	}
	s.n = copy(s.head[:], b)
	s.taken.Store(true)
	s.mu.Unlock()
}

// read returns the packet that was sampled, and lets the next one be sampled.
func (s *sample) read() (r Refused) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken.Store(false)
	b, ports := s.head[:s.n], header6
	switch {
	case len(b) >= header4 && b[0]>>4 == 4:
		r.To, r.Proto = netip.AddrFrom4([4]byte(b[16:20])), b[9]
		ports = int(b[0]&15) * 4
		if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return r // a later fragment has no ports
		}
	case len(b) >= header6 && b[0]>>4 == 6:
		r.To, r.Proto = netip.AddrFrom16([16]byte(b[24:40])), b[6]
	default:
		return r
	}
	if (r.Proto == policy.ProtoTCP || r.Proto == policy.ProtoUDP) && len(b) >= ports+4 {
		r.Port = binary.BigEndian.Uint16(b[ports+2:])
	}
	return r
}

// Stats returns the counts of the peer with an index in the view's ruleset. Flows that
// timed out are forgotten first, and their memory given back.
func (v *View) Stats(peer int) Stats {
	v.table.sweepThrough()
	return v.shares[peer].stats()
}

// sweepThrough forgets those of the flows through peers that timed out.
func (t *Table) sweepThrough() {
	if s, now := t.throughPeer, t.Now(); s.mu.TryLock() {
		if now-s.swept >= sweepEvery {
			s.sweepAll(now)
		}
		s.mu.Unlock()
	}
}

func (s *share) stats() Stats {
	out := Stats{
		RxBytes: s.rxBytes.Load(), TxBytes: s.txBytes.Load(),
		Full: s.full.Load(), Example: s.example.read(),
	}
	for class := range out.Refused {
		out.Refused[class] = s.refused[class].Load()
	}
	if last := s.routed.Load(); last != 0 {
		out.LastRouted = s.table.start.Add(time.Duration(last) * time.Millisecond)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweepAll(s.table.Now())
	out.Flows, out.Cut = s.byPeer.len+s.asked.len+s.talks.len, s.cut.len
	out.Held, out.Limit = s.held, s.limit
	return out
}

// Tally counts the packets of a batch in one direction. Counters are shared
// among cores, so it adds to them once per run of packets of one peer. The zero
// Tally is ready; Flush ends it.
type Tally struct {
	share *share
	bytes uint64
}

// Add counts a packet by the decision about it.
func (t *Tally) Add(v Decision, b []byte, d Direction, now Instant) {
	if v.share == nil {
		return
	}
	if v.Action != Pass {
		v.share.refused[v.Class].Add(1)
		if d == FromPeer {
			v.share.example.take(b)
		}
		return
	}
	if v.Class != policy.OnLAN && v.Class != policy.Internet {
		return
	}
	if v.share != t.share {
		t.Flush(d, now)
		t.share = v.share
	}
	t.bytes += uint64(len(b))
}

// Flush adds the counts to the peer's counters.
func (t *Tally) Flush(d Direction, now Instant) {
	if t.bytes == 0 {
		return
	}
	bytes := &t.share.rxBytes
	if d == ToPeer {
		bytes = &t.share.txBytes
	}
	bytes.Add(t.bytes)
	if t.share.routed.Load() != int64(now) {
		t.share.routed.Store(int64(now))
	}
	*t = Tally{}
}
