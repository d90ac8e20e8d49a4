package flow

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// kernelPieces reassembles datagrams as Linux does (inet_frag_queue_insert and
// inet_frag_create in net/ipv4/inet_fragment.c, ip_frag_queue in
// net/ipv4/ip_fragment.c, nf_ct_frag6_queue in net/ipv6/netfilter/nf_conntrack_reasm.c),
// but without a bound on memory.
type kernelPieces struct {
	queues map[string]*kernelQueue
	passed int // IPv4 fragments received from the source
}

type kernelQueue struct {
	begun  time.Time
	runs   []span
	held   int
	total  int
	last   bool
	passed int
	v6     bool
}

// receive takes a fragment that passed the guard.
func (k *kernelPieces) receive(b []byte, now time.Time) {
	k.expire(now)
	var p packet
	if p.parse(b); p.odd { // the kernel may drop it for its header, as for a wrong checksum
		return
	}
	name := string(b[12:20]) + string(b[4:6]) + string(b[9:10])
	if p.v6 {
		name = string(b[8:40]) + string(b[44:48])
	}
	q := k.queues[name]
	if q == nil {
		q = &kernelQueue{begun: now, v6: p.v6}
		k.queues[name] = q
	}
	if !p.v6 {
		k.passed++
		if len(q.runs) > 0 && k.passed-q.passed > 64 {
			*q = kernelQueue{begun: now}
		}
		q.passed = k.passed
	}
	switch {
	case p.last && (p.end < q.total || q.last && p.end != q.total), !p.last && p.end > q.total && q.last:
		delete(k.queues, name)
		return
	}
	q.total = max(q.total, p.end)
	q.last = q.last || p.last
	part := partOf(&p)
	for _, run := range q.runs {
		switch {
		case run.from <= part.from && part.to <= run.to:
			return // a duplicate
		case run.from < part.to && part.from < run.to:
			delete(k.queues, name)
			return
		}
	}
	q.runs = append(q.runs, part)
	slices.SortFunc(q.runs, func(a, b span) int { return int(a.from) - int(b.from) })
	for i := 0; i+1 < len(q.runs); {
		if q.runs[i].to == q.runs[i+1].from {
			q.runs[i].to = q.runs[i+1].to
			q.runs = slices.Delete(q.runs, i+1, i+2)
			continue
		}
		i++
	}
	q.held += memoryOf(len(b))
	if q.last && q.runs[0] == (span{0, uint16(q.total)}) {
		delete(k.queues, name)
	}
}

func (k *kernelPieces) expire(now time.Time) {
	for name, q := range k.queues {
		timeout := 30 * time.Second
		if q.v6 {
			timeout = 60 * time.Second
		}
		if now.Sub(q.begun) >= timeout {
			delete(k.queues, name)
		}
	}
}

func (k *kernelPieces) held() (bytes int) {
	for _, q := range k.queues {
		bytes += q.held
	}
	return bytes
}

// playPieces has C send the fragments that script encodes, four bytes each, and checks after
// each one that the kernel doesn't keep more bytes than the guard counts. It returns how many
// fragments passed.
func playPieces(t testing.TB, script []byte) (passed int) {
	l := newLab(t, 7, Options{})
	kernel := &kernelPieces{queues: map[string]*kernelQueue{}}
	wholes := [2][]byte{
		flowtest.Datagram(at(flowtest.PeerC4, 5), at(flowtest.HostB4, 7), 65000),
		flowtest.Datagram(at(flowtest.PeerC6, 5), at(flowtest.HostB6, 7), 65000),
	}
	for len(script) >= 4 {
		id, place, what, step := script[0], script[1], script[2], script[3]
		script = script[4:]
		whole := wholes[what&1]
		header := len(whole) - 65008
		// Fragments of eight sizes at sixteen offsets, most of which fit together.
		size := []int{8, 8, 16, 24, 64, 1400, 8000, 32000}[place>>5]
		offset := int(place&15) * size / 8 * 8
		if place&16 != 0 {
			offset = int(place&15) * 8
		}
		offset = min(offset, 64000)
		size = min(size, 65000-offset)
		p := flowtest.Fragment(whole, uint32(id%80), offset, what&6 != 6, whole[header+offset:header+offset+size])
		if what&0xf1 == 0xf0 {
			p[10] ^= 1
		}
		if step >= 250 {
			l.later(time.Duration(step-249) * 3 * time.Second)
		} else {
			l.later(time.Duration(step) * time.Millisecond)
		}
		if l.judge(p, FromPeer).Action == Pass {
			passed++
			kernel.receive(p, l.clock)
		}
		kernel.expire(l.clock)
		s := l.view.shares[0]
		if got := kernel.held(); got > s.pieces.held || got > (defaultReassembly/4) {
			t.Fatalf("the kernel keeps %d bytes of %d datagrams, the guard counts %d bytes of %d", got, len(kernel.queues), s.pieces.held, len(s.pieces.open))
		}
		if n := l.table.inPieces.Load(); n != int64(s.pieces.held) || len(s.pieces.open) > maxFragments {
			t.Fatalf("%d bytes in total, %d of the only peer; %d datagrams open", n, s.pieces.held, len(s.pieces.open))
		}
	}
	l.later(2 * time.Minute)
	if l.judge(udp4Piece(9999), FromPeer); l.view.shares[0].pieces.held > memoryOf(100) || len(l.view.shares[0].pieces.open) > 1 {
		t.Fatalf("%d bytes are still counted", l.view.shares[0].pieces.held)
	}
	return passed
}

// udp4Piece is the first fragment of a small datagram of C.
func udp4Piece(id uint32) []byte { return flowtest.Fragments(udp4, id, 16)[0] }

// TestGuardHoldsWhatTheKernelHolds plays random fragments: the guard counts at least the
// bytes that the kernel keeps.
func TestGuardHoldsWhatTheKernelHolds(t *testing.T) {
	passed := 0
	for seed := range uint64(100) {
		random := rand.New(rand.NewPCG(seed, 4))
		script := make([]byte, 4*600)
		ids, steps := 1+random.IntN(80), []int{1, 10, 256}[random.IntN(3)]
		for i := range script {
			script[i] = byte(random.Uint32())
			switch i % 4 {
			case 0:
				script[i] = byte(random.IntN(ids))
			case 1: // mostly fragments of equal size
				if seed%3 > 0 {
					script[i] = byte(seed%8)<<5 | byte(random.IntN(4))
				}
			case 3:
				script[i] = byte(random.IntN(steps))
			}
		}
		passed += playPieces(t, script)
	}
	if passed < 3000 {
		t.Errorf("only %d fragments passed, want at least 3000 to show something", passed)
	}
}

// FuzzFragments looks for fragments of which the kernel keeps more than the guard counts.
func FuzzFragments(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 1, 1, 0, 0, 1, 2, 6, 0, 1, 0, 0, 0})
	f.Add([]byte{1, 0xa0, 1, 0, 1, 0xa2, 7, 0, 1, 0xa1, 1, 255})
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 8000 {
			t.Skip("the script is longer than the lifetime of an incomplete datagram")
		}
		playPieces(t, script)
	})
}

// TestForgottenParts sends a datagram with other fragments between its own. After 64 of them
// Linux has dropped the first fragment, so the rest of the datagram is refused.
func TestForgottenParts(t *testing.T) {
	for _, others := range []int{63, 64} {
		l := newLab(t, 7, Options{})
		cut := func(id uint32) [][]byte { return flowtest.Fragments(udp4, id, 16) }
		l.from(true, cut(0)[0])
		for id := range uint32(others / 2) {
			l.from(true, cut(id + 1)[:2]...)
		}
		if others%2 > 0 {
			l.from(true, cut(100)[0])
		}
		l.from(others == 63, cut(0)[1])
	}
}

// TestForgottenPartsAreCounted completes large datagrams just after Linux has dropped their
// first fragments for the number of others since: the kernel keeps the rest, and the guard
// counts it.
func TestForgottenPartsAreCounted(t *testing.T) {
	l := newLab(t, 7, Options{})
	k := kernelPieces{queues: map[string]*kernelQueue{}}
	large := flowtest.Datagram(at(flowtest.PeerC4, 5), at(flowtest.HostB4, 7), 60000)
	passed, id := 0, uint32(0)
	send := func(list ...[]byte) {
		for _, p := range list {
			if l.judge(p, FromPeer).Action == Pass {
				passed++
				k.receive(p, l.clock)
			}
		}
	}
	for range 40 {
		parts := flowtest.Fragments(large, 50000+id, 1400)
		send(parts[0])
		for range 32 { // 64 fragments of datagrams that are completed
			id++
			send(flowtest.Fragments(udp4, id, 16)...)
		}
		send(parts[1:]...)
	}
	counted := l.view.shares[0].pieces.held
	if held := k.held(); passed == 0 || held > counted || held > (defaultReassembly/4) {
		t.Errorf("after %d fragments the kernel keeps %d bytes, the guard counts %d", passed, held, counted)
	}
}

// TestFragmentsBounded begins datagrams and doesn't complete them: 64 are accepted, and no
// more until the first ones have timed out. Unfragmented packets of the peer, and fragments
// of another peer, pass meanwhile.
func TestFragmentsBounded(t *testing.T) {
	for _, p := range [][]byte{udp4, udp6} {
		l := newLab(t, 7, Options{})
		cut := func(id uint32) [][]byte { return flowtest.Fragments(p, id, 16) }
		for id := range uint32(maxFragments) {
			l.from(true, cut(id)[0])
		}
		l.from(false, cut(1000)[0], cut(1000)[1], cut(1001)[0])
		if got := l.view.Stats(0).Full; got != 2 {
			t.Errorf("%d packets counted as over the bound, want 2", got)
		}
		l.from(true, p)
		other := flowtest.Datagram(at(flowtest.PeerA4, 5), at(flowtest.HostB4, 6), 100)
		for i := range uint32(3) {
			l.from(true, flowtest.Fragments(other, i, 40)...)
		}
		// A completed datagram makes room for another; one that still lacks a fragment doesn't.
		l.from(true, cut(maxFragments - 1)[1:]...)
		l.from(true, cut(1000)[0])
		l.from(false, cut(1001)[0])
		l.later(time.Duration(lateFragment+1) * time.Millisecond)
		l.from(false, cut(1)[1], cut(1001)[0])
		l.later(time.Duration(fragmentHold-lateFragment) * time.Millisecond)
		l.from(true, cut(1001)[0])
	}
}

// TestFragmentMemory checks the bounds on the bytes of incomplete datagrams: a quarter of
// the kernel's reassembly memory for one peer, and three quarters for all.
func TestFragmentMemory(t *testing.T) {
	for kernel, o := range map[int]Options{defaultReassembly: {}, 1 << 20: {Reassembly: 1 << 20}} {
		fragmentMemory(t, o, kernel/4, kernel*3/4)
	}
}

func fragmentMemory(t *testing.T, o Options, one, all int) {
	m := flowtest.Mesh(7)
	peers := []netip.Addr{flowtest.PeerC4}
	for i := range byte(4) {
		a := netip.AddrFrom4([4]byte{100, 64, 1, i})
		peers = append(peers, a)
		m.Peers = append(m.Peers, mesh.Peer{PublicKey: mesh.PublicKey{1, i}, Name: a.String(), Addresses: mesh.Addresses{a, netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x6d, 2: 0x65, 3: 0x73, 4: 0x68, 14: 1, 15: i})}, Permissions: mesh.Granted(7)})
	}
	l := newLab(t, 7, o)
	l.set(flowtest.Compile(t, m))
	flood := func(src netip.Addr, ids uint32) (bytes int) {
		p := flowtest.Datagram(at(src, 5), at(flowtest.HostB4, 7), 60000)
		for id := range ids {
			for _, piece := range flowtest.Fragments(p, id, 1400)[:42] { // without the last fragment
				if l.judge(piece, FromPeer).Action == Pass {
					bytes += memoryOf(len(piece))
				}
			}
		}
		return bytes
	}
	sum := 0
	for i, src := range peers {
		got := flood(src, 40)
		// A peer may take half of what is left, so that it leaves as much for the next one.
		most := min(one, (all-sum)/2)
		if got > most+memoryOf(1400) || got < most*9/10 {
			t.Errorf("peer %d has %d bytes, want nearly %d", i, got, most)
		}
		sum += got
	}
	if sum > all {
		t.Errorf("all peers have %d bytes, want at most %d", sum, all)
	}
	// A peer that is silent now, or was removed, keeps its bytes for a minute only.
	l.later(time.Duration(fragmentHold+1) * time.Millisecond)
	for _, src := range peers[3:] {
		if got := flood(src, 40); got < one*9/10 {
			t.Errorf("a minute later a peer gets only %d bytes", got)
		}
	}
	l.allow(7)
	l.later(time.Duration(fragmentHold+1) * time.Millisecond)
	if got := flood(flowtest.PeerC4, 40); got < one*9/10 {
		t.Errorf("another minute later a peer gets only %d bytes", got)
	}
	if got := l.table.inPieces.Load(); got > int64(all) {
		t.Errorf("%d bytes are counted, want at most %d", got, all)
	}
}

// TestOddFragments sends fragments that the kernel may drop for their IP header. They are
// refused, and don't count as a fragment that arrived.
func TestOddFragments(t *testing.T) {
	l := newLab(t, 7, Options{})
	whole := func(p []byte, id uint32) [][]byte { return flowtest.Fragments(p, id, 40) }
	v4 := flowtest.Datagram(at(flowtest.PeerC4, 5), at(flowtest.HostB4, 7), 100)
	v6 := flowtest.Datagram(at(flowtest.PeerC6, 5), at(flowtest.HostB6, 7), 100)
	wrong := whole(v4, 1)
	wrong[1][10] ^= 1
	l.from(true, wrong[0])
	l.from(false, wrong[1])
	l.from(true, wrong[2])
	wrong[1][10] ^= 1
	l.from(true, wrong[1])
	// A hop-by-hop header with an option of unknown type 0x40, whose upper bits have the host
	// discard the packet (RFC 8200, section 4.2).
	for _, n := range []int{0, 1} {
		pieces := whole(v6, 1)
		p := pieces[n]
		odd := append(slices.Clone(p[:40]), 44, 0, 0x40, 4, 0, 0, 0, 0)
		odd = append(odd, p[40:]...)
		odd[6] = 0
		odd[4], odd[5] = byte((len(odd)-40)>>8), byte(len(odd)-40)
		l.from(false, odd)
		l.from(true, pieces[0])
		l.from(true, pieces[1:]...)
	}
}
