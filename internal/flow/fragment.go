package flow

import (
	"math/bits"
	"slices"
)

// fragments remembers the first fragments that passed towards a peer, in a ring.
type fragments struct {
	ring []fragment
	next int
}

// fragment is the first fragment of a datagram, by which the later ones are judged.
type fragment struct {
	from, to         address
	id               uint32
	proto            uint8
	v6               bool
	fromPort, toPort uint16
	end              int     // of the first fragment, in bytes
	expires          Instant // in a ring
}

func fragmentOf(p *packet) fragment {
	return fragment{
		from: p.from, to: p.to, id: p.id, proto: p.proto, v6: p.v6,
		fromPort: p.fromPort, toPort: p.toPort, end: p.end,
	}
}

// is reports whether another fragment is of the same datagram. In IPv6 the protocol
// isn't part of a datagram's name (RFC 8200 section 4.5).
func (f *fragment) is(p *packet) bool {
	return f.id == p.id && f.from == p.from && f.to == p.to && f.v6 == p.v6 && (p.v6 || f.proto == p.proto)
}

// complete gives a later fragment the ports of the first one. It reports false where
// it reaches into the bytes of that.
func (f *fragment) complete(p *packet) bool {
	if p.offset < f.end {
		return false
	}
	p.proto, p.fromPort, p.toPort = f.proto, f.fromPort, f.toPort
	return true
}

const (
	// maxFragments is how many datagrams in pieces are remembered per peer.
	maxFragments = 64
	// fragmentTimeout is how long, as pf's for fragments (pf.conf(5), frag).
	fragmentTimeout Instant = 30_000
)

// remember records a first fragment that passed.
func (f *fragments) remember(p *packet, now Instant) {
	piece := fragmentOf(p)
	piece.expires = now + fragmentTimeout
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

// find returns the index of the first fragment of p's datagram, or -1.
func (f *fragments) find(p *packet, now Instant) int {
	for i := range f.ring {
		if f.ring[i].is(p) && now < f.ring[i].expires {
			return i
		}
	}
	return -1
}

// complete gives a later fragment the ports of its first one. It reports false
// where there is none, or where p reaches into its bytes.
func (f *fragments) complete(p *packet, now Instant) bool {
	i := f.find(p, now)
	return i >= 0 && f.ring[i].complete(p)
}

// reassembly follows how the host's kernel reassembles a peer's fragments, so that a
// peer never has more there than its share. The kernel's memory for that is shared by
// the whole host: 4 MB in Linux for each family (ipfrag_high_thresh in
// ip-sysctl, net/ipv4/inet_fragment.c), and at that limit no more datagrams are
// reassembled, whichever host sent them.
//
// The kernel must hold no more than is counted here. So a fragment doesn't pass that
// could make the kernel forget a part counted as arrived: one that overlaps another or
// is a duplicate, that it might drop for its header (packet.odd), that arrives late, or
// after so many others of the peer that the kernel starts the datagram anew
// (maxDistance).
type reassembly struct {
	open   []datagram // the oldest first
	held   int        // bytes
	passed int        // fragments, ever
}

// datagram is one that isn't whole yet.
type datagram struct {
	fragment
	began  Instant
	held   int // bytes of the kernel's memory, at most
	total  int // its length; 0 while the last part hasn't come
	passed int // reassembly.passed after its latest fragment
	count  int // of parts
	parts  [maxSpans + 1]span
}

// span is a part of a datagram, in bytes from its beginning.
type span struct{ from, to uint16 }

const (
	// maxSpans bounds what is remembered of one datagram: parts may overtake each
	// other, and not so many at once.
	maxSpans = 16
	// lateFragment is after how long no part of a datagram passes any more, before
	// Linux gives one up (IP_FRAG_TIME, 30 s, in include/net/ip.h; 60 s for IPv6). It
	// begins anew at most once more, so after fragmentHold it has nothing of it left.
	lateFragment Instant = 29_000
	fragmentHold Instant = 61_000
	// maxDistance is how many fragments of one source may come after one of a datagram,
	// the next one of it included, before Linux forgets what it has of it
	// (ipfrag_max_dist, ip_frag_too_far in net/ipv4/ip_fragment.c: the distance counts
	// the fragment that arrives). So at most 63 others may come between two.
	maxDistance = 64
	// defaultReassembly is how much memory Linux has for it unless a sysctl says else
	// (ipfrag_high_thresh in net/ipv4/ip_fragment.c; for IPv6 ip6frag_high_thresh and, for
	// what conntrack looks at, nf_conntrack_frag6_high_thresh likewise).
	defaultReassembly = 4 << 20
)

// memoryOf returns how many bytes of a kernel's memory a packet takes at most: a
// buffer with room in front and the kernel's notes behind, of a power of two
// (SKB_TRUESIZE in include/linux/skbuff.h), and the rest of the notes.
func memoryOf(size int) int { return 1<<bits.Len(uint(size+512-1)) + 512 }

// find returns the datagram that a fragment belongs to, or nil.
func (r *reassembly) find(p *packet) *datagram {
	for i := range r.open {
		if r.open[i].is(p) {
			return &r.open[i]
		}
	}
	return nil
}

// complete gives a later fragment the ports of its first one. It reports false where
// there is none, or where p reaches into its bytes.
func (r *reassembly) complete(p *packet) bool {
	d := r.find(p)
	return d != nil && d.fragment.complete(p)
}

// fits reports whether a later fragment is a part of the datagram that is missing.
func (d *datagram) fits(p *packet, passed int, now Instant) bool {
	if now-d.began > lateFragment || passed-d.passed >= maxDistance {
		return false
	}
	have, part := d.have(), partOf(p)
	if d.total > 0 && (p.last || p.end > d.total) || p.last && have[len(have)-1].to > part.from {
		return false
	}
	at := d.gap(part)
	before := at > 0 && have[at-1].to >= part.from
	behind := at < len(have) && have[at].from <= part.to
	if before && have[at-1].to > part.from || behind && have[at].from < part.to {
		return false // they overlap
	}
	return before || behind || len(have) < maxSpans
}

// have are the parts that passed: apart from each other, in order.
func (d *datagram) have() []span { return d.parts[:d.count] }

// partOf returns the part of its datagram that a fragment holds. No datagram is longer
// than 65,535 bytes.
func partOf(p *packet) span { return span{uint16(p.offset), uint16(p.end)} }

// gap returns how many parts begin before another.
func (d *datagram) gap(part span) int {
	at := 0
	for at < d.count && d.parts[at].from < part.from {
		at++
	}
	return at
}

// add records a part that fits, and reports whether the datagram is complete.
func (d *datagram) add(p *packet) bool {
	part := partOf(p)
	at := d.gap(part)
	have := slices.Insert(d.have(), at, part) // there is room
	for _, i := range [...]int{at, at - 1} {  // first behind, so that at stays what it is
		if i >= 0 && i+1 < len(have) && have[i].to == have[i+1].from {
			have[i].to = have[i+1].to
			have = slices.Delete(have, i+1, i+2)
		}
	}
	d.count = len(have)
	if p.last {
		d.total = p.end
	}
	return d.total > 0 && len(have) == 1 && have[0] == span{0, uint16(d.total)}
}

// admitFragment reports whether a fragment of the peer may pass, and if not why. The
// share's mutex is held.
func (s *share) admitFragment(p *packet, now Instant) (malformed, full bool) {
	s.expireFragments(now)
	r := &s.pieces
	d := r.find(p)
	switch {
	case p.odd, p.fragment == first && d != nil, p.fragment == later && (d == nil || !d.fits(p, r.passed, now)):
		return true, false
	case p.fragment == first && len(r.open) >= maxFragments:
		return false, true
	}
	more := memoryOf(p.size)
	if r.held+more > s.table.pieces/4 {
		return false, true
	}
	if !s.hasMemory(more) {
		s.table.sweepFragments(now)
	}
	return false, !s.hasMemory(more)
}

// hasMemory reports whether the peer may take so many bytes more: no more than what is
// left, so that something is left for the next one, as hasRoom does it.
func (s *share) hasMemory(more int) bool {
	return int64(s.pieces.held+more) <= int64(s.table.pieces)*3/4-s.table.inPieces.Load()
}

// noteFragment records a fragment of the peer that was admitted and passes.
func (s *share) noteFragment(p *packet, now Instant) {
	r := &s.pieces
	r.passed++
	if p.fragment == first {
		r.open = append(r.open, datagram{fragment: fragmentOf(p), began: now})
	}
	d := r.find(p)
	whole := d.add(p)
	d.passed = r.passed
	more := memoryOf(p.size)
	d.held += more
	s.hold(more)
	if whole {
		s.hold(-d.held)
		r.open = slices.DeleteFunc(r.open, func(o datagram) bool { return o.is(p) })
	}
}

func (s *share) hold(bytes int) {
	s.pieces.held += bytes
	s.table.inPieces.Add(int64(bytes))
}

// expireFragments forgets the datagrams that the kernel has forgotten, too.
func (s *share) expireFragments(now Instant) {
	r := &s.pieces
	n := 0
	for n < len(r.open) && now-r.open[n].began > fragmentHold {
		s.hold(-r.open[n].held)
		n++
	}
	if n > 0 {
		r.open = slices.Delete(r.open, 0, n)
	}
}

// sweepFragments has every peer's old fragments forgotten, also those of peers that
// send none any more. The caller holds a share's mutex, so the shares that are busy
// are left out.
func (t *Table) sweepFragments(now Instant) {
	last := t.sweptPieces.Load()
	if int64(now)-last < int64(sweepEvery) || !t.sweptPieces.CompareAndSwap(last, int64(now)) {
		return
	}
	for _, s := range append(slices.Clone(*t.all.Load()), t.throughPeer) {
		if s.mu.TryLock() {
			s.expireFragments(now)
			s.mu.Unlock()
		}
	}
}
