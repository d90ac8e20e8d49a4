package flow

import (
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
)

// TestTimeouts checks each phase against pf.conf(5): the flow is there at the end
// of its timeout and gone after it. A stray answer tells, since it changes
// nothing when refused.
func TestTimeouts(t *testing.T) {
	const syn, ack, fin, rst = flowtest.SYN, flowtest.ACK, flowtest.FIN | flowtest.ACK, flowtest.RST
	const o, a = 0x100, 0x200 // who sends: the opener, the other end
	for _, tt := range []struct {
		about   string
		flow    int // index of the conversation
		steps   []int
		timeout time.Duration
	}{
		{"tcp.first", 0, []int{o | syn}, 120 * time.Second},
		{"tcp.first again", 0, []int{o | syn, o | syn}, 120 * time.Second},
		{"tcp.opening", 0, []int{o | syn, a | syn | ack}, 30 * time.Second},
		{"tcp.established", 0, []int{o | syn, a | syn | ack, o | ack, a | ack}, 24 * time.Hour},
		{"tcp.closing", 0, []int{o | syn, a | syn | ack, o | ack, a | fin, o | ack}, 15 * time.Minute},
		{"tcp.finwait", 0, []int{o | syn, a | syn | ack, o | ack, o | fin, a | fin, o | ack}, 45 * time.Second},
		{"tcp.finwait the other way", 0, []int{o | syn, a | syn | ack, o | ack, a | fin, o | fin}, 45 * time.Second},
		{"tcp.closed", 0, []int{o | syn, a | rst}, 90 * time.Second},
		{"tcp again after its end", 0, []int{o | syn, a | syn | ack, o | ack, o | fin, a | fin, o | syn}, 120 * time.Second},
		{"udp.first", 1, []int{o}, time.Minute},
		{"udp.single", 1, []int{o, o, o}, 30 * time.Second},
		{"udp.multiple", 1, []int{o, o, a, o}, time.Minute},
		{"icmp.first", 2, []int{o, o}, 20 * time.Second},
		{"icmp.error", 2, []int{o, a}, 10 * time.Second},
	} {
		for _, late := range []bool{false, true} {
			l := newLab(t, routing, Options{})
			c := conversations(flowtest.PeerC4, flowtest.Net4)[tt.flow]
			for _, step := range tt.steps {
				if step&o != 0 {
					l.from(true, c.ask(uint8(step)))
				} else {
					l.to(true, c.answer(uint8(step)))
				}
				l.later(time.Second)
			}
			l.later(tt.timeout - time.Second)
			if late {
				l.later(time.Millisecond)
			}
			if pass := l.judge(c.answer(ack), ToPeer).Action == Pass; pass == late {
				t.Errorf("%s: late %v, the answer passes %v", tt.about, late, pass)
			}
		}
	}
}

// flood has a peer open n flows that nobody answers.
func (l *lab) flood(peer netip.Addr, n int) {
	l.t.Helper()
	for i := range n {
		p := flowtest.TCPSegment(at(peer, uint16(i)), at(netip.AddrFrom4([4]byte{9, 9, byte(i >> 16), byte(i >> 24)}), uint16(i>>8)), flowtest.SYN, 0)
		if l.judge(p, FromPeer).Action != Pass {
			l.t.Fatal("a packet of the flood is refused")
		}
	}
}

// TestFlood lets C open 200,000 flows that nobody answers, while it has running
// ones of each kind, and so has A. None of them is lost, and memory is bounded.
func TestFlood(t *testing.T) {
	const limit = 1000
	l := newLab(t, 7, Options{PerPeer: limit})
	mesh := flowtest.Mesh(7)
	mesh.Peers[1].Grants = flowtest.Grants(7)
	l.set(flowtest.Compile(t, mesh))
	var running []conversation
	for _, peer := range []netip.Addr{flowtest.PeerC4, flowtest.PeerA4} {
		for i := range 100 {
			net := netip.AddrFrom4([4]byte{8, 8, 8, byte(i)})
			running = append(running, conversations(peer, net)[:2]...)
		}
	}
	for _, c := range running {
		l.from(true, c.ask(flowtest.SYN))
		l.to(true, c.answer(flowtest.SYN|flowtest.ACK))
		l.from(true, c.ask(flowtest.ACK))
	}
	l.flood(flowtest.PeerC4, 200_000)
	lost := 0
	for _, c := range running {
		if l.judge(c.answer(flowtest.ACK), ToPeer).Action != Pass {
			lost++
		}
	}
	c, a := l.view.Stats(0), l.view.Stats(1)
	t.Logf("200000 half-open flows: %d of %d running ones lost, %d and %d flows remembered", lost, len(running), c.Flows, a.Flows)
	if lost != 0 || c.Flows > limit || a.Flows != 200 {
		t.Errorf("lost %d, flows %d and %d", lost, c.Flows, a.Flows)
	}
}

// TestFloodDoesNotRevive denies C what it used, and lets it flood what it may
// still do: the cut flow isn't pushed out of memory.
func TestFloodDoesNotRevive(t *testing.T) {
	l := newLab(t, incoming|routing, Options{PerPeer: 100})
	c := conversations(flowtest.PeerC4, flowtest.HostB4)[0]
	l.from(true, c.ask(flowtest.SYN))
	l.to(true, c.answer(flowtest.SYN|flowtest.ACK))
	l.from(true, c.ask(flowtest.ACK))
	l.allow(routing)
	l.flood(flowtest.PeerC4, 10_000)
	l.to(false, c.answer(flowtest.ACK))
	l.from(false, c.ask(flowtest.ACK))
	if s := l.view.Stats(0); s.Cut != 1 || s.Flows != 100 {
		t.Errorf("%d cut and %d running flows, want 1 and 100", s.Cut, s.Flows)
	}
}

// TestCutBounded cuts more flows than a share holds, again and again.
func TestCutBounded(t *testing.T) {
	l := newLab(t, routing, Options{PerPeer: 50})
	for round := range 20 {
		for i := range 50 {
			l.from(true, flowtest.Datagram(at(flowtest.PeerC4, uint16(round*50+i)), at(flowtest.Net4, 1), 0))
		}
		l.allow(0)
		l.allow(routing)
	}
	s := l.view.shares[0]
	if s.cut.len != 50 || len(s.flows) != s.cut.len+s.live.len+s.halfOpen.len {
		t.Errorf("%d cut, %d live, %d half open, %d in all", s.cut.len, s.live.len, s.halfOpen.len, len(s.flows))
	}
}

// TestFewerPerPeer adds peers, which makes the shares smaller.
func TestFewerPerPeer(t *testing.T) {
	l := newLab(t, 7, Options{})
	for _, tt := range []struct{ peers, want int }{{1, 4096}, {256, 4096}, {1024, 1024}, {10_000, 512}} {
		if got := l.table.limit(tt.peers); got != tt.want {
			t.Errorf("%d peers: %d flows each, want %d", tt.peers, got, tt.want)
		}
	}
	l.flood(flowtest.PeerC4, 5000)
	if got := l.view.Stats(0).Flows; got != 4096 {
		t.Errorf("%d flows, want 4096", got)
	}
	l.set(flowtest.Large(t, 2000, 0))
	if got := l.view.Stats(0).Flows; got != 524 {
		t.Errorf("%d flows with 2000 peers, want 524", got)
	}
}

// TestMemoryFollowsUse opens flows in waves: what timed out makes room.
func TestMemoryFollowsUse(t *testing.T) {
	l := newLab(t, routing, Options{})
	l.flood(flowtest.PeerC4, 1000)
	l.later(time.Hour)
	l.flood(flowtest.PeerC4, 600)
	if got := l.view.Stats(0).Flows; got != 600 {
		t.Errorf("%d flows remembered, want the last 600", got)
	}
}

// TestConcurrent judges from many goroutines while the policy changes. Run with
// -race it shows that the path without a lock is sound; the verdicts are checked
// too: what is judged by a view after the change is judged by that view.
func TestConcurrent(t *testing.T) {
	l := newLab(t, routing, Options{PerPeer: 16})
	open, closed := flowtest.Picture(t, routing), flowtest.Picture(t, 0)
	var views sync.Map
	views.Store("view", l.view)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := g; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				v, _ := views.Load("view")
				view := v.(*View)
				may := view.rules == open || view.rules != closed
				port := uint16(i % 40)
				ask := flowtest.Datagram(at(flowtest.PeerC4, port), at(flowtest.Net4, 1), 0)
				answer := flowtest.Datagram(at(flowtest.Net4, 1), at(flowtest.PeerC4, port), 0)
				if got := view.Judge(ask, FromPeer, l.table.Now()).Action == Pass; got != may {
					t.Errorf("asked: passes %v, want %v", got, may)
					return
				}
				if got := view.Judge(answer, ToPeer, l.table.Now()).Action == Pass; got && !may {
					t.Error("an answer passes that may not")
					return
				}
			}
		}()
	}
	for i := range 200 {
		r := open
		if i%2 == 0 {
			r = closed
		}
		old, _ := views.Load("view")
		next := l.table.Use(r)
		views.Store("view", next)
		next.Settle(old.(*View))
	}
	close(stop)
	wg.Wait()
	s := l.view.shares[0]
	if n := s.cut.len + s.live.len + s.halfOpen.len; n != len(s.flows) || n > 32 {
		t.Errorf("%d flows in lists, %d in the map, at most 32 allowed", n, len(s.flows))
	}
}

// TestJudgeAllocatesNothing holds for every kind of packet, once memory has its
// size.
func TestJudgeAllocatesNothing(t *testing.T) {
	l := newLab(t, routing, Options{PerPeer: 4})
	all := seeds()
	all = append(all, flowtest.TCPSegment(at(flowtest.PeerC4, 1), at(flowtest.PeerA4, 2), flowtest.SYN, 0))
	for i := range uint16(20) { // more than the share holds, so that some open and push out
		all = append(all, flowtest.Datagram(at(flowtest.PeerC4, i), at(flowtest.Net4, 443), 0))
	}
	now := l.table.Now()
	if n := testing.AllocsPerRun(200, func() {
		for _, p := range all {
			l.view.Judge(p, FromPeer, now)
			l.view.Judge(p, ToPeer, now)
		}
	}); n != 0 {
		t.Errorf("%v allocations for %d packets", n, 2*len(all))
	}
}
