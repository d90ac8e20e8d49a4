package flow

import (
	"sync"
	"sync/atomic"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// share is one peer's part of the memory, with its counters.
type share struct {
	table *Table
	id    policy.PeerID

	mu       sync.Mutex
	limit    int // of running flows, and again of cut ones
	flows    map[key]*entry
	halfOpen list
	live     list
	cut      list
	free     *entry // linked by next
	pieces   fragments
	answers  bucket

	refused   [policy.NumClasses]atomic.Uint64
	rxPackets atomic.Uint64
	rxBytes   atomic.Uint64
	txPackets atomic.Uint64
	txBytes   atomic.Uint64
	routed    atomic.Int64 // Instant of the last routed packet, or 0
}

func newShare(t *Table, id policy.PeerID) *share {
	return &share{table: t, id: id, flows: make(map[key]*entry)}
}

// find returns the flow k unless it was silent for its timeout.
func (s *share) find(k key, now Instant) *entry {
	e := s.flows[k]
	if e != nil && e.expired(e.load(), now) {
		s.drop(e)
		return nil
	}
	return e
}

// drop forgets a flow.
func (s *share) drop(e *entry) {
	k := e.name()
	delete(s.flows, k)
	s.table.forget(k, e)
	e.unlist()
	e.store(0)
	e.next, s.free = s.free, e
}

// add makes an entry for a flow that isn't there, at the cost of an older one
// where the share is full.
func (s *share) add(k key, now Instant) *entry {
	s.expire(now)
	if s.halfOpen.len+s.live.len >= s.limit {
		s.evict()
	}
	e := s.free
	if e == nil {
		e = &entry{share: s}
	} else {
		s.free, e.next = e.next, nil
	}
	e.rename(k)
	s.flows[k] = e
	s.halfOpen.push(e, now)
	return e
}

// expire forgets some flows that timed out, so that memory follows use.
func (s *share) expire(now Instant) {
	for _, l := range []*list{&s.halfOpen, &s.live, &s.cut} {
		for range 2 {
			if e := l.oldest(); e != nil && e.expired(e.load(), now) {
				s.drop(e)
			}
		}
	}
}

// evict forgets one running flow: of those that nobody answered while there are
// any, however many come, so that they can't push out the answered ones.
func (s *share) evict() {
	if e := s.halfOpen.oldest(); e != nil {
		s.drop(e)
		return
	}
	s.drop(s.live.oldest())
}

// set stores the state of e and moves e to the list that it belongs in.
func (s *share) set(e *entry, st state, now Instant) {
	e.store(st)
	to := &s.live
	switch {
	case st.is(stateCut):
		to = &s.cut
	case st.phase().halfOpen():
		to = &s.halfOpen
	}
	if e.list == to {
		return
	}
	e.unlist()
	to.push(e, now)
	if s.cut.len > s.limit {
		s.drop(s.cut.oldest())
	}
}

// bucket is a token bucket: answerBurst at once, answerRate a second.
type bucket struct {
	tokens int64 // thousandths
	last   Instant
}

const (
	answerRate  = 10
	answerBurst = 20
)

// take reports whether there is a token, and takes it. The bucket starts full.
func (b *bucket) take(now Instant) bool {
	if b.last == 0 {
		b.tokens = answerBurst * 1000
	}
	b.tokens = min(answerBurst*1000, b.tokens+int64(now-b.last)*answerRate)
	b.last = now
	if b.tokens < 1000 {
		return false
	}
	b.tokens -= 1000
	return true
}

// fragments remembers the first fragments that passed, in a ring.
type fragments struct {
	ring []fragment
	next int
}

// fragment is what the later fragments of a datagram are judged by.
type fragment struct {
	from, to         address
	id               uint32
	proto            uint8
	v6               bool
	fromPort, toPort uint16
	end              int // of the first fragment, in bytes
	expires          Instant
}

const (
	// maxFragments is how many datagrams in pieces are remembered per peer.
	maxFragments = 64
	// fragmentTimeout is how long, as pf's for fragments (pf.conf(5), frag).
	fragmentTimeout Instant = 30_000
)

// remember notes a first fragment that passed.
func (f *fragments) remember(p *packet, now Instant) {
	piece := fragment{p.from, p.to, p.id, p.proto, p.v6, p.fromPort, p.toPort, p.end, now + fragmentTimeout}
	if i := f.find(p, now); i >= 0 {
		f.ring[i] = piece
		return
	}
	if len(f.ring) < maxFragments {
		f.ring = append(f.ring, piece)
		return
	}
	f.ring[f.next] = piece
	f.next = (f.next + 1) % maxFragments
}

// find returns the index of the first fragment of p's datagram, or -1. In IPv6
// the protocol isn't part of a datagram's name (RFC 8200 section 4.5).
func (f *fragments) find(p *packet, now Instant) int {
	for i := range f.ring {
		g := &f.ring[i]
		if g.id == p.id && g.from == p.from && g.to == p.to && g.v6 == p.v6 && (p.v6 || g.proto == p.proto) && now < g.expires {
			return i
		}
	}
	return -1
}

// complete gives a later fragment the ports of its first one. It reports false
// where there is none, or where p reaches into its bytes.
func (f *fragments) complete(p *packet, now Instant) bool {
	i := f.find(p, now)
	if i < 0 || p.offset < f.ring[i].end {
		return false
	}
	p.proto, p.fromPort, p.toPort = f.ring[i].proto, f.ring[i].fromPort, f.ring[i].toPort
	return true
}
