package guard

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// patience bounds every wait for something that takes milliseconds.
const patience = 30 * time.Second

// offset is where a packet starts in a buffer, as WireGuard has it.
const offset = 16

// fakeTUN is a kernel's tunnel device: what it is to read is queued, what was
// written is kept. Like the real one it takes no empty packets, and a read
// deadline interrupts a blocked Read.
type fakeTUN struct {
	t testing.TB

	mu       sync.Mutex
	changed  *sync.Cond
	queue    [][]byte
	written  [][]byte
	deadline time.Time
	closed   bool
	deaf     bool // has no deadlines
}

var _ tun.Device = (*fakeTUN)(nil)

func newFakeTUN(t testing.TB) *fakeTUN {
	f := &fakeTUN{t: t}
	f.changed = sync.NewCond(&f.mu)
	return f
}

func (f *fakeTUN) SetReadDeadline(at time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.deaf {
		return os.ErrNoDeadline
	}
	f.deadline = at
	f.changed.Broadcast()
	return nil
}

func (f *fakeTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		switch {
		case f.closed:
			return 0, os.ErrClosed
		case !f.deadline.IsZero():
			return 0, os.ErrDeadlineExceeded
		case len(f.queue) > 0:
			n := min(len(bufs), len(f.queue))
			for i, p := range f.queue[:n] {
				sizes[i] = copy(bufs[i][offset:], p)
			}
			f.queue = f.queue[n:]
			return n, nil
		}
		f.changed.Wait()
	}
}

func (f *fakeTUN) Write(bufs [][]byte, offset int) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range bufs {
		// wireguard-go's device for macOS looks at this byte without a check.
		if len(b) <= offset {
			f.t.Errorf("a packet of %d bytes reaches the device", len(b)-offset)
			continue
		}
		f.written = append(f.written, bytes.Clone(b[offset:]))
	}
	return len(bufs), nil
}

func (f *fakeTUN) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.changed.Broadcast()
	return nil
}

func (f *fakeTUN) File() *os.File           { return nil }
func (f *fakeTUN) MTU() (int, error)        { return 1420, nil }
func (f *fakeTUN) Name() (string, error)    { return flowtest.Interface, nil }
func (f *fakeTUN) Events() <-chan tun.Event { return nil }
func (f *fakeTUN) BatchSize() int           { return 128 }

// feed queues packets for Read.
func (f *fakeTUN) feed(packets ...[]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.queue = append(f.queue, packets...)
	f.changed.Broadcast()
}

// take returns what was written since the last take.
func (f *fakeTUN) take() [][]byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	written := f.written
	f.written = nil
	return written
}

// write gives packets to the guard as WireGuard does and returns what the inner
// device got.
func write(t testing.TB, g *Device, inner *fakeTUN, packets ...[]byte) [][]byte {
	t.Helper()
	bufs := make([][]byte, len(packets))
	for i, p := range packets {
		bufs[i] = append(make([]byte, offset), p...)
	}
	if n, err := g.Write(bufs, offset); err != nil || n != len(packets) {
		t.Fatalf("Write gives %d, %v", n, err)
	}
	return inner.take()
}

// read lets the guard read one batch and returns the packets that WireGuard
// would send.
func read(t testing.TB, g *Device) [][]byte {
	t.Helper()
	bufs, sizes := make([][]byte, 128), make([]int, 128)
	for i := range bufs {
		bufs[i] = make([]byte, 2048)
	}
	type result struct {
		n   int
		err error
	}
	done := make(chan result, 1)
	go func() {
		n, err := g.Read(bufs, sizes, offset)
		done <- result{n, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			t.Fatal(r.err)
		}
		var out [][]byte
		for i := range r.n {
			if sizes[i] > 0 {
				out = append(out, bytes.Clone(bufs[i][offset:offset+sizes[i]]))
			}
		}
		return out
	case <-time.After(patience):
		t.Fatal("Read doesn't return")
		return nil
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

var (
	ask    = flowtest.Datagram(at(flowtest.PeerC4, 1000), at(flowtest.Net4, 53), 20)
	answer = flowtest.Datagram(at(flowtest.Net4, 53), at(flowtest.PeerC4, 1000), 20)
	hello  = flowtest.Datagram(at(flowtest.HostB4, 1), at(flowtest.PeerC4, 2), 20)
	toPeer = flowtest.Datagram(at(flowtest.PeerC4, 1), at(flowtest.PeerA4, 2), 20)
)

func equal(t *testing.T, what string, got [][]byte, want ...[]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: %d packets, want %d", what, len(got), len(want))
		return
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Errorf("%s: packet %d is %x, want %x", what, i, got[i], want[i])
		}
	}
}

func TestClosedUntilSet(t *testing.T) {
	inner := newFakeTUN(t)
	g := New(inner, Options{})
	inner.feed(hello)
	equal(t, "read before Set", read(t, g))
	equal(t, "written before Set", write(t, g, inner, ask))
	g.Set(flowtest.Picture(t, mesh.Routing))
	inner.feed(hello, answer)
	equal(t, "read", read(t, g), hello)
	equal(t, "written", write(t, g, inner, toPeer, ask, ask, nil, ask[:9], toPeer), ask, ask)
	inner.feed(answer, hello, answer)
	equal(t, "read answers", read(t, g), answer, hello, answer)
	g.Set(nil)
	inner.feed(hello, answer)
	equal(t, "read when closed", read(t, g))
	equal(t, "written when closed", write(t, g, inner, ask))
	if got := g.Stats(); len(got) != 0 {
		t.Errorf("statistics while closed: %v", got)
	}
	g.Set(flowtest.Picture(t, 0))
	inner.feed(answer)
	equal(t, "read after closed and denied", read(t, g))
}

// TestTurnsRound has the host send to its own mesh addresses, with a tunnel device
// that gets them, in batches with other packets: they go back into the device and
// nowhere else, open, closed and before the first ruleset.
func TestTurnsRound(t *testing.T) {
	self4 := flowtest.Datagram(at(flowtest.HostB4, 1), at(flowtest.HostB4, 2), 20)
	self6 := flowtest.TCPSegment(at(flowtest.HostB6, 1), at(flowtest.HostB6, 2), flowtest.SYN, 0)
	echo := flowtest.Echo(flowtest.HostB4, flowtest.HostB4, 3, false, 1380)
	pieces := flowtest.Fragments(echo, 9, 800)
	inner := newFakeTUN(t)
	g := New(inner, Options{Own: []netip.Addr{flowtest.HostB4, flowtest.HostB6}})
	round := func(what string, others ...[]byte) {
		t.Helper()
		inner.feed(self4, hello, self6, pieces[0], answer, pieces[1])
		equal(t, what+", to WireGuard", read(t, g), others...)
		equal(t, what+", back", inner.take(), self4, self6, pieces[0], pieces[1])
	}
	round("before a ruleset")
	g.Set(flowtest.Picture(t, mesh.Routing))
	round("open", hello)
	before := g.Stats()[flowtest.PeerC]
	inner.feed(self4, self6)
	read(t, g)
	inner.take()
	if got := g.Stats()[flowtest.PeerC]; got != before {
		t.Errorf("counted as C's: %+v, before %+v", got, before)
	}
	g.Set(nil)
	round("closed")

	// What isn't whole, from or to another, or of two families.
	wrong := [][]byte{
		{}, self4[:1], self4[:19], self4[:27], append(bytes.Clone(self4), 0), self6[:39], self6[:50], append(bytes.Clone(self6), 0),
		flowtest.Datagram(at(flowtest.HostB4, 1), at(flowtest.PeerC4, 2), 0),
		flowtest.Datagram(at(flowtest.PeerC4, 1), at(flowtest.HostB4, 2), 0),
		flowtest.Datagram(at(flowtest.HostL4, 1), at(flowtest.HostB4, 2), 0),
		flowtest.Datagram(at(flowtest.HostB6, 1), at(flowtest.PeerC6, 2), 0),
	}
	short := bytes.Clone(self4)
	short[0] = 0x44
	for _, open := range []bool{false, true} {
		if g.Set(nil); open {
			g.Set(flowtest.Picture(t, 7))
		}
		for _, p := range append(wrong, short) {
			inner.feed(p)
			read(t, g)
			equal(t, "turned round", inner.take())
		}
	}
}

// TestTurnsOwnAddressOnly gives the guard its addresses by a ruleset alone; another
// mesh's address isn't turned any more once the ruleset says so.
func TestTurnsOwnAddressOnly(t *testing.T) {
	self := flowtest.Datagram(at(flowtest.HostB4, 1), at(flowtest.HostB4, 2), 20)
	inner := newFakeTUN(t)
	g := New(inner, Options{})
	inner.feed(self)
	equal(t, "read without addresses", read(t, g))
	equal(t, "turned round without addresses", inner.take())
	g.Set(flowtest.Picture(t, 0))
	inner.feed(self)
	equal(t, "read", read(t, g))
	equal(t, "turned round", inner.take(), self)
	moved := flowtest.Mesh(0)
	moved.Addresses = []netip.Addr{netip.MustParseAddr("100.64.0.77"), flowtest.HostB6}
	g.Set(flowtest.Compile(t, moved))
	inner.feed(self)
	equal(t, "turned round of another address", inner.take())
}

// TestForgedOwnSource has C send packets with the host's own address as source: they
// aren't turned round, nor let in.
func TestForgedOwnSource(t *testing.T) {
	inner := newFakeTUN(t)
	g := New(inner, Options{Own: []netip.Addr{flowtest.HostB4, flowtest.HostB6}})
	forged := [][]byte{
		flowtest.Datagram(at(flowtest.HostB4, 1), at(flowtest.HostB4, 2), 20),
		flowtest.Datagram(at(flowtest.HostB6, 1), at(flowtest.HostB6, 2), 20),
		flowtest.Datagram(at(flowtest.HostB4, 1), at(flowtest.Net4, 2), 20),
	}
	for _, c := range []*policy.Ruleset{nil, flowtest.Picture(t, 0), flowtest.Picture(t, 7)} {
		g.Set(c)
		equal(t, "written", write(t, g, inner, forged...))
	}
}

// TestTurningBesideWriting turns packets round while a peer's are written and the
// policy changes: nothing waits for anything.
func TestTurningBesideWriting(t *testing.T) {
	self := flowtest.Datagram(at(flowtest.HostB4, 1), at(flowtest.HostB4, 2), 20)
	inner := newFakeTUN(t)
	g := New(inner, Options{Own: []netip.Addr{flowtest.HostB4}})
	rulesets := []*policy.Ruleset{flowtest.Picture(t, 7), nil} // neither answers C
	const rounds = 500
	var all sync.WaitGroup
	all.Go(func() {
		for i := range rounds {
			g.Set(rulesets[i%len(rulesets)])
		}
	})
	all.Go(func() {
		for range rounds {
			if _, err := g.Write([][]byte{append(make([]byte, offset), ask...)}, offset); err != nil {
				t.Error(err)
			}
		}
	})
	for range rounds {
		inner.feed(self, self)
		if got := read(t, g); len(got) != 0 {
			t.Errorf("%x goes to WireGuard", got)
		}
	}
	all.Wait()
	turned := 0
	for _, p := range inner.take() {
		if bytes.Equal(p, self) {
			turned++
		}
	}
	if turned != 2*rounds {
		t.Errorf("%d packets turned round, want %d", turned, 2*rounds)
	}
}

// TestReadAllocatesNothing holds for whole batches, with packets that are turned
// round among them.
func TestReadAllocatesNothing(t *testing.T) {
	g := New(nullTUN{}, Options{})
	g.Set(flowtest.Picture(t, mesh.Routing))
	packets := [][]byte{hello, flowtest.Datagram(at(flowtest.HostB4, 1), at(flowtest.HostB4, 2), 20), answer}
	bufs, sizes := make([][]byte, 128), make([]int, 128)
	for i := range bufs {
		bufs[i] = append(make([]byte, offset), packets[i%len(packets)]...)
	}
	if n := testing.AllocsPerRun(100, func() {
		for i := range sizes {
			sizes[i] = len(bufs[i]) - offset
		}
		g.turned = g.judgeRead(bufs, sizes, offset, g.turned[:0])
		g.turnRound(offset)
	}); n != 0 {
		t.Errorf("%v allocations for a batch", n)
	}
}

// TestBounds fills C's share as the guard of a Mac has it.
func TestBounds(t *testing.T) {
	inner := newFakeTUN(t)
	g := New(inner, Options{States: 400, PerForwarded: 2})
	g.Set(flowtest.Picture(t, 7))
	passed := 0
	for i := range uint16(200) {
		passed += len(write(t, g, inner, flowtest.Datagram(at(flowtest.PeerC4, i), at(flowtest.Net4, 53), 20)))
	}
	s := g.Stats()[flowtest.PeerC]
	if passed != 50 || s.Held != 100 || s.Limit != 100 || s.Full != 150 || s.Refused[policy.Internet] != 150 {
		t.Errorf("%d passed; %+v", passed, s)
	}
	// It isn't answered, for a flood must not cost more.
	inner.feed(hello)
	equal(t, "read", read(t, g), hello)
}

// TestSetAgain puts the same ruleset in force again, and one that was closed.
func TestSetAgain(t *testing.T) {
	inner := newFakeTUN(t)
	g := New(inner, Options{})
	r := flowtest.Picture(t, mesh.Routing)
	g.Set(r)
	before := g.view.Load()
	if g.Set(r); g.view.Load() != before {
		t.Error("the same ruleset is put in force anew, and every verdict forgotten")
	}
	equal(t, "written", write(t, g, inner, ask), ask)
	g.Set(nil)
	g.Set(r)
	inner.feed(answer)
	equal(t, "read after it was closed for a while", read(t, g), answer)
}

// TestConfine confines the guard while a flow runs: what needs the packet filter waits,
// in both directions, the rest passes, and afterwards the far end goes on by itself, for
// the flow wasn't cut.
func TestConfine(t *testing.T) {
	inner := newFakeTUN(t)
	g := New(inner, Options{})
	g.Set(flowtest.Picture(t, mesh.Routing|mesh.Incoming))
	toHost := flowtest.Datagram(at(flowtest.PeerC4, 7), at(flowtest.HostB4, 8), 20)
	equal(t, "written", write(t, g, inner, ask, toHost), ask, toHost)
	inner.feed(answer)
	equal(t, "read", read(t, g), answer)
	g.Confine(true)
	equal(t, "written while confined", write(t, g, inner, ask, toHost), toHost)
	inner.feed(answer, hello)
	equal(t, "read while confined", read(t, g), hello)
	g.Confine(false)
	inner.feed(answer)
	equal(t, "read afterwards", read(t, g), answer)
	if s := g.Stats()[flowtest.PeerC]; s.Cut != 0 || s.Refused[policy.Internet] != 2 {
		t.Errorf("%d flows cut, %v refused", s.Cut, s.Refused)
	}
}

// TestCountsAndAnswers refuses some packets of C. What comes back is an ICMP
// error that quotes the packet and has right checksums.
func TestCountsAndAnswers(t *testing.T) {
	for _, tt := range []struct {
		peer, net, host netip.Addr
		size            int
	}{
		{flowtest.PeerC4, flowtest.Net4, flowtest.HostB4, 20},
		{flowtest.PeerC6, flowtest.Net6, flowtest.HostB6, 21},
		{flowtest.PeerC4, flowtest.Net4, flowtest.HostB4, 1391},
		{flowtest.PeerC6, flowtest.Net6, flowtest.HostB6, 1300},
	} {
		inner := newFakeTUN(t)
		g := New(inner, Options{})
		g.Set(flowtest.Picture(t, 0))
		refused := flowtest.Datagram(at(tt.peer, 9), at(tt.net, 53), tt.size)
		equal(t, "written", write(t, g, inner, refused))
		got := read(t, g)
		if len(got) != 1 {
			t.Fatalf("%d answers, want 1", len(got))
		}
		checkAnswer(t, got[0], tt.host, tt.peer, refused)
		if n := g.Stats()[flowtest.PeerC].Refused[policy.Internet]; n != 1 {
			t.Errorf("%d packets counted, want 1", n)
		}
	}
}

func checkAnswer(t *testing.T, p []byte, from, to netip.Addr, about []byte) {
	t.Helper()
	header, limit, code := 20, 576, []byte{3, 13}
	src, dst := netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
	if from.Is6() {
		header, limit, code = 40, 1280, []byte{1, 1}
		src, dst = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
	} else if flowtest.Checksum(p[:20]) != 0 {
		t.Errorf("wrong header checksum in %x", p[:20])
	}
	if src != from || dst != to || !bytes.Equal(p[header:header+2], code) {
		t.Errorf("%v to %v, type and code %v; want %v to %v, %v", src, dst, p[header:header+2], from, to, code)
	}
	if flowtest.TransportChecksum(p) != 0 {
		t.Errorf("wrong ICMP checksum in %x", p)
	}
	quoted := p[header+8:]
	if want := min(len(about), limit-header-8); len(quoted) != want || !bytes.HasPrefix(about, quoted) {
		t.Errorf("%d bytes quoted, want the first %d", len(quoted), want)
	}
}

// TestAnswerInterruptsRead has Read block before the packet is refused.
func TestAnswerInterruptsRead(t *testing.T) {
	inner := newFakeTUN(t)
	g := New(inner, Options{})
	g.Set(flowtest.Picture(t, 0))
	for range 100 {
		// Nothing is to be read, so Read blocks, now or after it was interrupted.
		got := make(chan [][]byte, 1)
		go func() { got <- read(t, g) }()
		g.answer(g.view.Load(), ask)
		select {
		case p := <-got:
			if len(p) != 1 {
				t.Fatalf("%d packets", len(p))
			}
		case <-time.After(patience):
			t.Fatal("the answer waits")
		}
	}
	inner.feed(hello)
	equal(t, "read afterwards", read(t, g), hello)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Read([][]byte{make([]byte, 2048)}, []int{0}, offset); err != os.ErrClosed {
		t.Errorf("Read of a closed device: %v", err)
	}
}

// TestAnswersWithoutDeadlines leaves answers for the next packet.
func TestAnswersWithoutDeadlines(t *testing.T) {
	inner := newFakeTUN(t)
	inner.deaf = true
	g := New(inner, Options{})
	g.Set(flowtest.Picture(t, 0))
	for range queuedAnswers + 10 {
		g.answer(g.view.Load(), ask)
	}
	if got := read(t, g); len(got) != queuedAnswers {
		t.Errorf("%d answers, want %d", len(got), queuedAnswers)
	}
	inner.feed(hello)
	equal(t, "read", read(t, g), hello)
}

// TestSetIsABarrier denies and allows while packets are written. Right after a
// denial has returned nothing of the peer gets through.
func TestSetIsABarrier(t *testing.T) {
	inner := newFakeTUN(t)
	g := New(inner, Options{})
	open, closed := flowtest.Picture(t, mesh.Routing), flowtest.Picture(t, 0)
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 3 {
		writers.Add(1)
		go func() {
			defer writers.Done()
			p := flowtest.Datagram(at(flowtest.PeerC4, uint16(w)), at(flowtest.Net4, 53), 20)
			for {
				select {
				case <-stop:
					return
				default:
				}
				bufs := [][]byte{append(make([]byte, offset), p...), append(make([]byte, offset), p...)}
				if _, err := g.Write(bufs, offset); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	passed := 0
	for range 300 {
		g.Set(open)
		time.Sleep(50 * time.Microsecond)
		g.Set(closed)
		passed += len(inner.take())
		time.Sleep(50 * time.Microsecond)
		if leaked := len(inner.take()); leaked != 0 {
			t.Errorf("%d packets after the denial", leaked)
		}
	}
	close(stop)
	writers.Wait()
	if passed == 0 {
		t.Error("nothing passed while it was allowed, so the test shows nothing")
	}
}

// TestToggleLosesNothing changes C's permissions while the host talks with C and
// another peer talks with the host. No packet is lost of what stays permitted.
func TestToggleLosesNothing(t *testing.T) {
	g := New(newFakeTUN(t), Options{})
	rulesets := []*policy.Ruleset{flowtest.Picture(t, 7), flowtest.Picture(t, 0), flowtest.Picture(t, mesh.Routing)}
	g.Set(rulesets[0])
	flows := [][2][]byte{ // towards a peer, and back
		{hello, flowtest.Datagram(at(flowtest.PeerC4, 2), at(flowtest.HostB4, 1), 20)},
		{flowtest.Datagram(at(flowtest.HostB6, 1), at(flowtest.PeerC6, 2), 20), flowtest.Datagram(at(flowtest.PeerC6, 2), at(flowtest.HostB6, 1), 20)},
		{flowtest.Echo(flowtest.HostB4, flowtest.PeerC4, 5, false, 8), flowtest.Echo(flowtest.PeerC4, flowtest.HostB4, 5, true, 8)},
		{flowtest.TCPSegment(at(flowtest.HostB4, 22), at(flowtest.PeerA4, 9), flowtest.ACK, 8), flowtest.TCPSegment(at(flowtest.PeerA4, 9), at(flowtest.HostB4, 22), flowtest.ACK, 8)},
	}
	stop := make(chan struct{})
	var talkers sync.WaitGroup
	var passed atomic.Int64
	for _, f := range flows {
		talkers.Add(1)
		go func() {
			defer talkers.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				bufs, sizes := [][]byte{append(make([]byte, offset), f[0]...)}, []int{len(f[0])}
				g.judgeRead(bufs, sizes, offset, nil)
				back := g.judgeWrite(g.view.Load(), [][]byte{append(make([]byte, offset), f[1]...)}, offset)
				if sizes[0] == 0 || len(back) != 1 {
					t.Errorf("lost: towards %v, back %v: %x", sizes[0] == 0, len(back) != 1, f[0])
					return
				}
				passed.Add(1)
			}
		}()
	}
	for i := range 300 {
		g.Set(rulesets[i%len(rulesets)])
		time.Sleep(20 * time.Microsecond)
	}
	close(stop)
	talkers.Wait()
	if passed.Load() == 0 {
		t.Error("nothing passed, so the test shows nothing")
	}
}

// TestTruthTable judges a packet of C under every set of permissions to every kind
// of destination, and what comes back, with nothing but the guard: the verdicts
// are the policy's.
func TestTruthTable(t *testing.T) {
	destinations := strings.Fields("100.64.0.1 192.168.77.1 203.0.113.9 192.168.77.20 203.0.113.1 1.1.1.1 100.64.0.2 100.64.9.9 " +
		"10.1.2.3 169.254.169.254 127.0.0.1 192.168.77.255 224.0.0.251 255.255.255.255 0.0.0.0 240.0.0.1 " +
		"fd6d:6573:6800::1 2001:db8:77::1 2001:db8:77::20 2001:db8:1::1 2606:4700::1111 fd6d:6573:6800::2 fd6d:6573:6800::99 " +
		"fd00::1 fe80::1 ff02::1 ::1 ::")
	judged := 0
	for c := range mesh.Permissions(8) {
		r := flowtest.Picture(t, c)
		for _, text := range destinations {
			dst := netip.MustParseAddr(text)
			src, icmp := flowtest.PeerC4, uint8(flowtest.ICMP)
			if dst.Is6() {
				src, icmp = flowtest.PeerC6, flowtest.ICMPv6
			}
			for proto, packets := range map[uint8][2][]byte{
				flowtest.TCP: {flowtest.TCPSegment(at(src, 9), at(dst, 53), flowtest.SYN, 0), flowtest.TCPSegment(at(dst, 53), at(src, 9), flowtest.SYN|flowtest.ACK, 0)},
				flowtest.UDP: {flowtest.Datagram(at(src, 9), at(dst, 53), 8), flowtest.Datagram(at(dst, 53), at(src, 9), 8)},
				icmp:         {flowtest.Echo(src, dst, 9, false, 8), flowtest.Echo(dst, src, 9, true, 8)},
			} {
				inner := newFakeTUN(t)
				inner.deaf = true // answers wait behind the packet that is fed below
				g := New(inner, Options{})
				g.Set(r)
				want := r.FromPeer(policy.Packet{Src: src, Dst: dst, Proto: proto, SrcPort: 9, DstPort: 53}).Pass
				if got := len(write(t, g, inner, packets[0])) == 1; got != want {
					t.Errorf("%v, protocol %d to %v: passes %v, want %v", c, proto, dst, got, want)
				}
				g.answers = answers{}
				inner.feed(packets[1])
				back := want || dst == flowtest.HostB4 || dst == flowtest.HostB6
				if got := len(read(t, g)) == 1; got != back {
					t.Errorf("%v, protocol %d back from %v: passes %v, want %v", c, proto, dst, got, back)
				}
				judged += 2
			}
		}
	}
	t.Logf("%d packets judged", judged)
}

// TestMutated writes 1,000,000 random and mutated packets of a peer with all
// permissions: what gets through is what the policy lets pass, judged by reading
// the packet again with nothing but its first bytes.
func TestMutated(t *testing.T) {
	n := 1_000_000
	if testing.Short() {
		n = 50_000
	}
	random := rand.New(rand.NewPCG(1, 2))
	inner := newFakeTUN(t)
	g := New(inner, Options{PerPeer: 1024})
	r := flowtest.Picture(t, 7)
	g.Set(r)
	seeds := seedPackets()
	passed := 0
	for range n {
		for _, p := range write(t, g, inner, flowtest.Mutate(random, seeds[random.IntN(len(seeds))])) {
			passed++
			checkPassed(t, r, p)
		}
	}
	if passed == 0 || passed == n {
		t.Errorf("%d of %d passed", passed, n)
	}
	if s := g.Stats()[flowtest.PeerC]; s.Flows > 1024 || s.Cut > 1024 {
		t.Errorf("%d flows and %d cut ones, want at most 1024 each", s.Flows, s.Cut)
	}
	t.Logf("%d packets, %d passed", n, passed)
}

// checkPassed judges a packet that passed by what must be true of it, whatever
// is behind the addresses: its length, its source and the class of its
// destination.
func checkPassed(t *testing.T, r *policy.Ruleset, p []byte) {
	t.Helper()
	// Which protocol it is stands behind the headers; addresses are judged here.
	in := policy.Packet{Proto: policy.ProtoUDP}
	switch {
	case len(p) >= 20 && p[0]>>4 == 4 && int(p[2])<<8|int(p[3]) == len(p):
		in.Src, in.Dst = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
	case len(p) >= 40 && p[0]>>4 == 6 && int(p[4])<<8|int(p[5]) == len(p)-40:
		in.Src, in.Dst = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
	default:
		t.Fatalf("malformed packet passed: %x", p)
	}
	if v := r.FromPeer(in); !v.Pass {
		t.Fatalf("%x passed, the policy says %+v", p, v)
	}
}

// seedPackets returns one packet of each kind that a peer sends.
func seedPackets() [][]byte {
	var seeds [][]byte
	for _, ends := range [][2]netip.Addr{
		{flowtest.PeerC4, flowtest.Net4}, {flowtest.PeerC4, flowtest.LAN4}, {flowtest.PeerC4, flowtest.HostB4}, {flowtest.PeerC4, flowtest.PeerA4},
		{flowtest.PeerC6, flowtest.Net6}, {flowtest.PeerC6, flowtest.LAN6}, {flowtest.PeerC6, flowtest.HostB6}, {flowtest.PeerC6, flowtest.PeerA6},
	} {
		src, dst := ends[0], ends[1]
		tcp := flowtest.TCPSegment(at(src, 1), at(dst, 443), flowtest.SYN, 40)
		errorType := uint8(3)
		if src.Is6() {
			errorType = 1
		}
		seeds = append(seeds, tcp,
			flowtest.Datagram(at(src, 5), at(dst, 53), 30),
			flowtest.Echo(src, dst, 3, false, 30),
			flowtest.Echo(src, dst, 3, true, 30),
			flowtest.ICMPMessage(src, dst, errorType, 0, flowtest.TCPSegment(at(dst, 443), at(src, 1), flowtest.ACK, 0)),
			flowtest.IP(src, dst, 47, make([]byte, 24)))
		seeds = append(seeds, flowtest.Fragments(flowtest.Datagram(at(src, 5), at(dst, 53), 100), 77, 48)...)
	}
	// IPv4 options and IPv6 extension headers of every kind.
	options := flowtest.IP(flowtest.PeerC4, flowtest.Net4, 17, append([]byte{7, 7, 4, 0, 0, 0, 0, 1}, ask[20:]...))
	options[0] = 0x47
	seeds = append(seeds, options)
	for _, header := range []byte{0, 43, 44, 51, 60, 135} {
		p := flowtest.IP(flowtest.PeerC6, flowtest.Net6, header, append([]byte{17, 0, 1, 0, 0, 0, 0, 0}, ask[20:]...))
		seeds = append(seeds, p)
	}
	return seeds
}

// FuzzWrite writes any bytes as a packet of a peer, refused ones included, and
// reads the answers.
func FuzzWrite(f *testing.F) {
	for _, p := range seedPackets() {
		f.Add(p, true)
		f.Add(p, false)
	}
	open, closed := flowtest.Picture(f, 7), flowtest.Picture(f, 0)
	f.Fuzz(func(t *testing.T, p []byte, allowed bool) {
		inner := newFakeTUN(t)
		g := New(inner, Options{PerPeer: 2})
		if g.Set(open); !allowed {
			g.Set(closed)
		}
		for _, passed := range write(t, g, inner, p) {
			if !allowed {
				t.Errorf("%x passes", passed)
			}
			checkPassed(t, open, passed)
		}
		inner.feed(p)
		for _, out := range read(t, g) {
			if got, ok := sourceOf(out); !ok || got != flowtest.HostB4 && got != flowtest.HostB6 {
				t.Errorf("%x goes to a peer", out)
			}
		}
	})
}

// sourceOf returns the source of a packet that is long enough to have one.
func sourceOf(p []byte) (netip.Addr, bool) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(p[12:])), true
	case len(p) >= 40 && p[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(p[8:])), true
	}
	return netip.Addr{}, false
}

// BenchmarkGuard writes batches through the guard to a device that does nothing.
func BenchmarkGuard(b *testing.B) {
	for _, batch := range []int{1, 128} {
		g := New(nullTUN{}, Options{})
		g.Set(flowtest.Large(b, 10_000, 1000))
		bufs := make([][]byte, batch)
		packet := append(make([]byte, offset), flowtest.Datagram(at(flowtest.PeerC4, 1), at(flowtest.Net4, 443), 1200)...)
		b.Run(map[int]string{1: "write/batch=1", 128: "write/batch=128"}[batch], func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for i := range bufs {
					bufs[i] = packet
				}
				if _, err := g.Write(bufs, offset); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/packet")
		})
	}
}

// nullTUN takes everything.
type nullTUN struct{ tun.Device }

func (nullTUN) File() *os.File                          { return nil }
func (nullTUN) Write(bufs [][]byte, _ int) (int, error) { return len(bufs), nil }
