package flow

import (
	"cmp"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Options configure New.
type Options struct {
	// Now is the clock by which flows time out, time.Now unless set.
	Now func() time.Time // optional
	// PerPeer bounds the memory for one peer: the flows that it may have opened,
	// those that the host has opened to it, and the cut ones, each as many. Unless
	// set it is chosen by the number of peers, from 4096 down to 512.
	PerPeer int // optional
	// States is how many entries the host's packet filter holds: 10,000 states for
	// pf (PFSTATE_HIWAT in xnu bsd/net/pfvar.h), nf_conntrack_max for conntrack.
	// The flows that one peer opened may take a quarter, those of all peers
	// together three quarters. With 0 memory alone is bounded.
	States int // optional
	// PerForwarded is how many entries a flow takes that is forwarded, of the
	// classes lan and internet: 2 for pf, which has a state on each interface, 1
	// for conntrack. Any other flow takes one.
	PerForwarded int // optional: 1
	// Reassembly is the memory, in bytes, in which the host's kernel reassembles
	// datagrams of each family, its own included. One peer may have a quarter of it
	// incomplete in both families, all peers together three quarters.
	Reassembly int // optional: 4 MiB, which is Linux's default
}

// Table is the memory of flows. It is used through Views.
type Table struct {
	start   time.Time            // when the clock began
	passed  func() time.Duration // since start
	perPeer int
	states  int
	forward int // entries of a forwarded flow
	pieces  int // bytes; see Options.Reassembly

	held   atomic.Int64             // entries of all peers' flows
	all    atomic.Pointer[[]*share] // the peers' shares, for sweep
	swept  atomic.Int64             // Instant of the last sweep
	cursor atomic.Uint64            // where the next one begins in all

	inPieces    atomic.Int64 // bytes of all peers' fragments; see reassembly
	sweptPieces atomic.Int64 // Instant of the last look for old ones

	cache [cacheSize]atomic.Pointer[entry]
	seed  uint64

	mu          sync.Mutex // serialises Use
	generation  uint32
	shares      map[mesh.PublicKey]*share
	throughPeer *share // flows that the host opened through a peer, to elsewhere
}

const (
	// cacheSize is the number of flows that View.fast finds at once, a power of 2.
	cacheSize = 1 << cacheBits
	cacheBits = 16
)

// New returns an empty Table.
func New(o Options) *Table {
	t := &Table{
		perPeer: o.PerPeer,
		states:  o.States,
		forward: max(1, o.PerForwarded),
		pieces:  cmp.Or(o.Reassembly, defaultReassembly),
		seed:    rand.Uint64() | 1,
		shares:  make(map[mesh.PublicKey]*share),
	}
	t.startClock(o.Now)
	t.throughPeer = newShare(t, mesh.PublicKey{})
	return t
}

// startClock lets the clock begin a day ago, so that an Instant of zero is before
// every timeout.
func (t *Table) startClock(now func() time.Time) {
	const before = -24 * time.Hour
	if now == nil {
		// time.Since reads the monotonic clock alone; time.Now reads two clocks.
		t.start = time.Now().Add(before)
		t.passed = func() time.Duration { return time.Since(t.start) }
		return
	}
	t.start = now().Add(before)
	t.passed = func() time.Duration { return now().Sub(t.start) }
}

// Now returns the time on the Table's clock.
func (t *Table) Now() Instant { return Instant(t.passed() / time.Millisecond) }

// The share of one peer: as large as a busy device needs, smaller where many
// peers would add up to more than about 200 MB, but never too small for a
// browser. An entry takes about 200 bytes.
const (
	maxPerPeer = 4096
	minPerPeer = 512
	sumOfFlows = 1 << 20
)

// memory returns how many flows of a kind one of n peers may have in memory.
func (t *Table) memory(n int) int {
	if t.perPeer > 0 {
		return t.perPeer
	}
	return max(minPerPeer, min(maxPerPeer, sumOfFlows/max(n, 1)))
}

// limit returns how many entries of the packet filter the flows of a peer may
// take that may have so many in memory.
func (t *Table) limit(memory int) int {
	if t.states == 0 {
		return memory * t.forward
	}
	return min(memory*t.forward, t.states/4)
}

// cost returns how many entries of the packet filter a flow of a class takes.
func (t *Table) cost(class policy.Class) int {
	if class == policy.OnLAN || class == policy.Internet {
		return t.forward
	}
	return 1
}

// hasRoom reports whether a peer that has so many entries may take so many more: all
// together have three quarters at most, and none has more than is left of them. So however
// many peers take what they can, half of what the others left is there for the next one. As
// many judge at once as there are cores, so a few more may come to be held.
func (t *Table) hasRoom(have, more int) bool {
	return t.states == 0 || int64(have+more) <= int64(t.states)*3/4-t.held.Load()
}

// sweepPart is about how many flows one sweep looks at.
const sweepPart = 4096

// sweep forgets flows that timed out, of some of the peers, others each time. The
// caller holds a share's mutex, so the shares that are busy are left out.
func (t *Table) sweep(now Instant) {
	last := t.swept.Load()
	if int64(now)-last < int64(sweepEvery) || !t.swept.CompareAndSwap(last, int64(now)) {
		return
	}
	all := *t.all.Load()
	seen := 0
	for n := 0; n < len(all) && seen < sweepPart; n++ {
		s := all[t.cursor.Add(1)%uint64(len(all))]
		seen++
		if s.mu.TryLock() {
			seen += s.byPeer.len
			s.sweep(now)
			s.mu.Unlock()
		}
	}
}

// listShares makes the list of shares for sweep. t.mu is held.
func (t *Table) listShares() {
	all := slices.Collect(maps.Values(t.shares))
	t.all.Store(&all)
}

// slot returns the place of a flow in the cache.
func (t *Table) slot(k *key) *atomic.Pointer[entry] {
	h := (k.farLo ^ k.ports<<7 ^ k.nearLo<<23 ^ k.nearLo>>41 ^ k.farHi*3 ^ k.nearHi*5) * t.seed
	h ^= h >> 29
	return &t.cache[h*0x9e3779b97f4a7c15>>(64-cacheBits)]
}

// forget takes e, which is k's entry, out of the cache.
func (t *Table) forget(k key, e *entry) {
	if slot := t.slot(&k); slot.Load() == e {
		slot.CompareAndSwap(e, nil)
	}
}

// Use returns the View of r. It may be called while an older View is in use; call
// CutRefused when the older one isn't any more.
func (t *Table) Use(r *policy.Ruleset) *View {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.generation++
	v := &View{
		table: t, rules: r, generation: t.generation,
		shares: make([]*share, len(r.Peers())),
	}
	memory := t.memory(len(v.shares))
	for i, p := range r.Peers() {
		s, ok := t.shares[p.PublicKey]
		if !ok {
			s = newShare(t, p.PublicKey)
			t.shares[p.PublicKey] = s
		}
		s.resize(memory)
		v.shares[i] = s
	}
	t.throughPeer.resize(memory)
	t.listShares()
	return v
}

// resize sets the bounds of a share. A peer that has more flows than it may now
// opens none until enough have ended.
func (s *share) resize(memory int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.memory, s.limit = memory, s.table.limit(memory)
	for s.asked.len+s.talks.len > memory {
		s.evict()
	}
	for s.cut.len > memory {
		s.drop(s.cut.oldest())
	}
}

// CutRefused cuts the flows that passed by old (nil at first) and that v refuses. It
// is called when no packet is judged by old any more.
func (v *View) CutRefused(old *View) {
	if old == nil {
		return
	}
	now := v.table.Now()
	for _, n := range policy.Diff(old.rules, v.rules) {
		v.table.mu.Lock()
		s := v.table.shares[n.PublicKey]
		v.table.mu.Unlock()
		if s != nil {
			v.cutFlows(s, n.Removed, now)
		}
	}
	v.table.prune(v, now)
}

// cutFlows cuts those flows of a share that v refuses, or all.
func (v *View) cutFlows(s *share, all bool, now Instant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range []*list{&s.byPeer, &s.asked, &s.talks} {
		for e, next := l.front, (*entry)(nil); e != nil; e = next {
			next = e.next
			st := e.load()
			if all || !v.mayOpen(e.name(), st.opener()).Pass {
				s.set(e, st.cut(), now)
			}
		}
	}
}

// prune forgets the shares of peers that are gone, once their cut flows have
// timed out.
func (t *Table) prune(v *View, now Instant) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.shares) == len(v.shares) {
		return
	}
	current := make(map[mesh.PublicKey]bool, len(v.shares))
	for _, s := range v.shares {
		current[s.id] = true
	}
	for id, s := range t.shares {
		if !current[id] && s.idle(now) {
			delete(t.shares, id)
		}
	}
	t.listShares()
}

// idle forgets the flows that timed out and reports whether none is left.
func (s *share) idle(now Instant) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweepAll(now)
	s.expireFragments(now)
	return len(s.flows) == 0 && len(s.pieces.open) == 0
}
