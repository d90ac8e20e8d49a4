package flow

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// share is one peer's part of the memory, with its counters.
type share struct {
	table *Table
	id    mesh.PublicKey

	mu       sync.Mutex
	limit    int // of held
	held     int // entries of the host's packet filter that the peer's flows take
	memory   int // flows of the host, and again cut ones
	flows    map[key]*entry
	most     int  // of flows since the map was made; see shrink
	byPeer   list // running flows that the peer opened
	asked    list // those that the host opened and that weren't answered
	talks    list // the others that the host opened
	cut      list
	free     *entry     // linked by next
	spare    int        // how many those are
	pieces   reassembly // fragments from the peer
	sent     fragments  // and towards it
	answers  bucket
	openings bucket
	swept    Instant

	refused [policy.NumClasses]atomic.Uint64
	example sample
	full    atomic.Uint64 // packets that would have opened one flow too many
	rxBytes atomic.Uint64
	txBytes atomic.Uint64
	routed  atomic.Int64 // Instant of the last routed packet, or 0
}

func newShare(t *Table, id mesh.PublicKey) *share {
	return &share{
		table: t, id: id, flows: make(map[key]*entry),
		answers:  bucket{rate: answerRate, burst: answerBurst},
		openings: bucket{rate: openingRate, burst: openingBurst},
	}
}

// A peer opens at most openingBurst flows at once and openingRate a second. A
// browser that restores a hundred pages opens several hundred, with their DNS
// lookups, and the heaviest page about 200, over some seconds. A flood of more
// costs the host a translated port, a state and often an answer each, even where
// the flows are as short as the bound on those that live at once allows.
const (
	openingRate  = 200
	openingBurst = 1000
)

// admit reports whether the peer may open a flow of a class now, and if so takes
// a token of its openings. It refuses where the peer, or all peers together,
// have as many flows as they may, until one has timed out: a flow that was
// forgotten earlier would stay in the host's packet filter, and the bound wouldn't
// hold there. And it refuses where the peer opens flows too fast. The share's mutex
// is held.
func (s *share) admit(class policy.Class, now Instant) bool {
	cost := s.table.cost(class)
	if s.held+cost > s.limit {
		s.sweepAgain(now)
	}
	if s.held+cost > s.limit {
		return false
	}
	if !s.table.hasRoom(s.held, cost) {
		s.sweepAgain(now)
		s.table.sweep(now)
	}
	return s.table.hasRoom(s.held, cost) && s.openings.take(now)
}

// sweepEvery is how often a share is searched for flows that timed out when there
// is no room: seldom enough that a flood costs less than a hundredth of a core.
const sweepEvery Instant = 100

func (s *share) sweepAgain(now Instant) {
	if now-s.swept >= sweepEvery {
		s.sweep(now)
	}
}

// sweep forgets those of the peer's flows that timed out, which makes room.
func (s *share) sweep(now Instant) {
	s.swept = now
	s.sweepList(&s.byPeer, now)
}

// sweepAll forgets every flow that timed out, so that a share gives back the memory of a
// past flood also while its peer is silent.
func (s *share) sweepAll(now Instant) {
	s.sweep(now)
	for _, l := range []*list{&s.asked, &s.talks, &s.cut} {
		s.sweepList(l, now)
	}
}

func (s *share) sweepList(l *list, now Instant) {
	for e, next := l.front, (*entry)(nil); e != nil; e = next {
		next = e.next
		if e.expired(e.load(), now) {
			s.drop(e)
		}
	}
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
	s.store(e, 0)
	if s.spare < maxSpare {
		e.next, s.free = s.free, e
		s.spare++
	}
	s.shrink()
}

const (
	// maxSpare is how many entries a share keeps for its next flows: enough for lookups
	// and other short ones that come and go. The others are the garbage collector's.
	maxSpare = 64
	// minMap is the number of flows up to which a share's map isn't worth making anew.
	minMap = 256
)

// shrink makes the map of flows anew when three quarters of its largest number of flows
// are gone, for a Go map frees no memory when entries are deleted. Its cost is amortized
// over the deletions.
func (s *share) shrink() {
	if s.most < minMap || len(s.flows) >= s.most/4 {
		return
	}
	flows := make(map[key]*entry, len(s.flows))
	maps.Copy(flows, s.flows)
	s.flows, s.most = flows, len(flows)
}

// add makes an entry for a flow that isn't in memory and that opener may open. It has
// no state yet, so set is to follow.
func (s *share) add(k key, opener Direction, now Instant) *entry {
	s.expire(now)
	if opener == ToPeer && s.asked.len+s.talks.len >= s.memory {
		s.evict()
	}
	e := s.free
	if e == nil {
		e = &entry{share: s}
	} else {
		s.free, e.next = e.next, nil
		s.spare--
	}
	e.rename(k)
	s.flows[k] = e
	s.most = max(s.most, len(s.flows))
	return e
}

// expire forgets some flows that timed out, so that memory follows use.
func (s *share) expire(now Instant) {
	for _, l := range []*list{&s.byPeer, &s.asked, &s.talks, &s.cut} {
		for range 2 {
			if e := l.oldest(); e != nil && e.expired(e.load(), now) {
				s.drop(e)
			}
		}
	}
}

// evict forgets one flow of the host: of those that weren't answered while there
// are any. The host has no bound in its own packet filter, and its next packet
// makes the flow known again.
func (s *share) evict() {
	e := s.asked.oldest()
	if e == nil {
		e = s.talks.oldest()
	}
	s.drop(e)
}

// set stores the state of e and moves e to the list that it belongs in.
func (s *share) set(e *entry, st state, now Instant) {
	s.store(e, st)
	to := &s.byPeer
	switch {
	case st.is(stateCut):
		to = &s.cut
	case st.is(stateByHost) && st.phase().unanswered():
		to = &s.asked
	case st.is(stateByHost):
		to = &s.talks
	}
	if e.list == to {
		return
	}
	e.unlist()
	to.push(e, now)
	if s.cut.len > s.memory {
		s.drop(s.cut.oldest())
	}
}

// store stores the state of e and counts the entries that the flow takes in the host's
// packet filter: none where the host opened it, for no peer can keep the host from
// opening flows, and none where it was cut, for then its states are deleted.
func (s *share) store(e *entry, st state) {
	more := s.cost(st) - s.cost(e.load())
	e.store(st)
	if more != 0 {
		s.held += more
		s.table.held.Add(int64(more))
	}
}

func (s *share) cost(st state) int {
	if !st.is(statePasses) || st.is(stateByHost) {
		return 0
	}
	return s.table.cost(st.class())
}

// bucket is a token bucket: burst at once, rate a second. It starts full.
type bucket struct {
	rate, burst int64
	tokens      int64 // thousandths
	last        Instant
}

// An answer to a refused packet costs a packet, so a peer gets answerBurst at once
// and answerRate a second.
const (
	answerRate  = 10
	answerBurst = 20
)

// take reports whether there is a token, and takes it.
func (b *bucket) take(now Instant) bool {
	if b.last == 0 {
		b.tokens = b.burst * 1000
	}
	// Two batches may be judged at once, the later one first.
	if now > b.last {
		b.tokens = min(b.burst*1000, b.tokens+int64(now-b.last)*b.rate)
		b.last = now
	}
	if b.tokens < 1000 {
		return false
	}
	b.tokens -= 1000
	return true
}
