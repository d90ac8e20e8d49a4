package flow

import (
	"sync/atomic"
	"time"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// entry is one flow in memory. Its atomic fields are read without the share's
// mutex by View.fast; everything is written under it, last excepted.
type entry struct {
	// version is odd while the key changes. An entry is used again for another
	// flow, and a reader without the mutex must not take one for the other.
	version atomic.Uint32
	key     [5]atomic.Uint64
	state   atomic.Uint64 // see state
	last    atomic.Int64  // Instant of the last packet

	share  *share  // never changes
	closed Instant // when the filter let a FIN or a reset pass; 0 if never
	listed Instant
	list   *list
	prev   *entry
	next   *entry
}

// Instant is a time on a Table's clock, in milliseconds.
type Instant int64

// state is the state of a flow, in one word that is read and written atomically:
//
//	bits  0-31  generation of the View that last let it pass
//	bits 32-48  timeout in seconds
//	bits 49-52  phase
//	bits 53-55  class of the destination as the opener sees it
//	bit  56     the host opened it
//	bit  57     cut
//	bit  58     it passes, by the view of that generation
//	bit  59     a plain packet from the far end changes nothing
//	bit  60     a plain packet from the near end changes nothing
type state uint64

const (
	stateByHost state = 1 << (56 + iota)
	stateCut
	statePasses
	statePlainFar
	statePlainNear
)

func (s state) generation() uint32  { return uint32(s) }
func (s state) timeout() Instant    { return Instant(s>>32&0x1ffff) * 1000 }
func (s state) phase() phase        { return phase(s >> 49 & 15) }
func (s state) class() policy.Class { return policy.Class(s >> 53 & 7) }
func (s state) is(flag state) bool  { return s&flag != 0 }
func (s state) opener() Direction {
	if s.is(stateByHost) {
		return ToPeer
	}
	return FromPeer
}

// passing returns the state of a flow in phase p that opener opened and that
// passes by the view of a generation. Its timeout is at least that of before:
// the filter's idea of the flow may lag behind.
func passing(generation uint32, opener Direction, p phase, class policy.Class, proto uint8, before Instant) state {
	timeout := max(before, Instant(p.timeout(proto)/time.Millisecond))
	s := state(generation) | state(timeout/1000)<<32 | state(p)<<49 | state(class)<<53 | statePasses
	if opener == ToPeer {
		s |= stateByHost
	}
	if p.next(proto, FromPeer, opener, tcpACK, true) == p {
		s |= statePlainFar
	}
	if p.next(proto, ToPeer, opener, tcpACK, true) == p {
		s |= statePlainNear
	}
	return s
}

// cut returns the state of the flow after it was cut.
func (s state) cut() state {
	return s&^(statePasses|statePlainFar|statePlainNear) | stateCut
}

func (e *entry) load() state   { return state(e.state.Load()) }
func (e *entry) store(s state) { e.state.Store(uint64(s)) }

// rename makes e the entry of the flow k.
func (e *entry) rename(k key) {
	e.version.Add(1)
	for i, word := range k.words() {
		// A store costs more than a load, and flows have much in common.
		if e.key[i].Load() != word {
			e.key[i].Store(word)
		}
	}
	e.version.Add(1)
}

func (k key) words() [5]uint64 { return [5]uint64{k.farHi, k.farLo, k.nearHi, k.nearLo, k.ports} }

// name returns the key of e. The share's mutex is held.
func (e *entry) name() key {
	return key{e.key[0].Load(), e.key[1].Load(), e.key[2].Load(), e.key[3].Load(), e.key[4].Load()}
}

// lookup returns e's state if e is the entry of the flow k. It may be called
// without the share's mutex.
func (e *entry) lookup(k *key) (state, bool) {
	v := e.version.Load()
	if v&1 != 0 || e.key[4].Load() != k.ports || e.key[1].Load() != k.farLo || e.key[3].Load() != k.nearLo ||
		e.key[0].Load() != k.farHi || e.key[2].Load() != k.nearHi {
		return 0, false
	}
	s := e.load()
	return s, e.version.Load() == v
}

// expired reports whether a flow with state s was silent for its timeout.
func (e *entry) expired(s state, now Instant) bool {
	return now-Instant(e.last.Load()) > s.timeout()
}

// touch records a packet at the time now. Written only when it differs, so that
// cores that share a flow don't fight for its cache line.
func (e *entry) touch(now Instant) {
	if e.last.Load() != int64(now) {
		e.last.Store(int64(now))
	}
}

// list is a doubly linked list of entries, the newest in front.
type list struct {
	front, back *entry
	len         int
}

func (l *list) push(e *entry, now Instant) {
	e.list, e.listed, e.prev, e.next = l, now, nil, l.front
	if l.front != nil {
		l.front.prev = e
	} else {
		l.back = e
	}
	l.front = e
	l.len++
}

func (e *entry) unlist() {
	l := e.list
	if l == nil {
		return
	}
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		l.front = e.next
	}
	if e.next != nil {
		e.next.prev = e.prev
	} else {
		l.back = e.prev
	}
	e.list, e.prev, e.next = nil, nil, nil
	l.len--
}

// oldest returns the entry that was silent for longest, or nearly: entries that
// had packets since they were listed go back to the front, some at a time.
func (l *list) oldest() *entry {
	const chances = 16
	for range chances {
		e := l.back
		if e == nil || Instant(e.last.Load()) <= e.listed {
			return e
		}
		last := Instant(e.last.Load())
		e.unlist()
		l.push(e, last)
	}
	return l.back
}
