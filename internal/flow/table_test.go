package flow

import (
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// flood has a peer send packets for n new flows that get no answer, and returns how many
// flows opened. It checks that each of the others is refused as one too many.
func (l *lab) flood(peer netip.Addr, n int) (opened int) {
	l.t.Helper()
	for range n {
		i := l.flooded
		l.flooded++
		p := flowtest.TCPSegment(at(peer, uint16(i)), at(netip.AddrFrom4([4]byte{9, 9, byte(i >> 16), byte(i >> 24)}), uint16(i>>8)), flowtest.SYN, 0)
		switch v := l.judge(p, FromPeer); {
		case v.Action == Pass:
			opened++
		case v.Action != Drop || v.Rule != policy.RuleFull || v.Class != policy.Internet:
			l.t.Fatalf("a packet of the flood: %+v", v)
		}
	}
	return opened
}

// fill has a peer open flows until its share is full, and returns how many it opened.
func (l *lab) fill(peer netip.Addr) (opened int) {
	l.t.Helper()
	for range 10 {
		opened += l.flood(peer, openingBurst)
		l.later(openingBurst / openingRate * time.Second / 10)
	}
	return opened
}

// TestFlood has C try to open 200,000 flows that get no answer, while C and A have running
// flows of each kind. No running flow is lost, A and the host can open new ones all the time,
// and the number of C's flows is bounded.
func TestFlood(t *testing.T) {
	const limit = 1000
	l := newLab(t, 7, Options{PerPeer: limit})
	m := flowtest.Mesh(7)
	m.Peers[1].Permissions = mesh.Granted(7)
	l.set(flowtest.Compile(t, m))
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
	opened := 0
	for i := range uint16(200) {
		opened += l.flood(flowtest.PeerC4, 1000)
		l.from(true, flowtest.Datagram(at(flowtest.PeerA4, 7000+i), at(flowtest.Net4, 53), 0))
		l.to(true, flowtest.Datagram(at(flowtest.HostB4, 7000+i), at(flowtest.PeerC4, 53), 0))
		l.from(true, flowtest.Datagram(at(flowtest.PeerC4, 53), at(flowtest.HostB4, 7000+i), 0))
		l.later(100 * time.Millisecond)
	}
	lost := 0
	for _, c := range running {
		if l.judge(c.answer(flowtest.ACK), ToPeer).Action != Pass || l.judge(c.ask(flowtest.ACK), FromPeer).Action != Pass {
			lost++
		}
	}
	c, a := l.view.Stats(0), l.view.Stats(1)
	t.Logf("200000 half-open flows: %d opened, %d of %d running flows lost; C %+v; A %+v", opened, lost, len(running), c, a)
	if lost != 0 || c.Held != limit || c.Flows != limit+200 || a.Held != 400 {
		t.Errorf("lost %d, C holds %d, A %d", lost, c.Held, a.Held)
	}
	if c.Full != uint64(200_000-opened) || a.Full != 0 {
		t.Errorf("%d of C's packets and %d of A's are counted as over the bound, want %d and 0", c.Full, a.Full, 200_000-opened)
	}
	// Half-open flows time out soon and make room; the running ones stay.
	l.later(TCPFirst + purge + time.Second)
	if got := l.flood(flowtest.PeerC4, 2000); got < limit-200 {
		t.Errorf("only %d flows opened after the others timed out", got)
	}
}

// TestMemoryOfAFloodIsGivenBack has the host and a peer open flows: at most a twentieth of
// their memory is left once they have timed out, though no packet arrived since.
func TestMemoryOfAFloodIsGivenBack(t *testing.T) {
	const flows = 50_000
	l := newLab(t, routing, Options{PerPeer: flows})
	l.through(routing)
	heap := func() int {
		l.view.Stats(0) // the helper calls it every few seconds
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	for name, open := range map[string]func(i int){
		"towards the peer": func(i int) {
			l.to(true, flowtest.Datagram(at(flowtest.HostB4, uint16(i)), at(flowtest.PeerC4, uint16(i>>16)), 0))
		},
		"through the peer": func(i int) {
			l.to(true, flowtest.Datagram(at(flowtest.HostB4, uint16(i)), at(flowtest.Net4, uint16(i>>16)), 0))
		},
		"from the peer": func(i int) {
			if i%openingRate == 0 {
				l.later(time.Second)
			}
			l.from(true, flowtest.Datagram(at(flowtest.PeerC4, uint16(i)), at(flowtest.Net4, uint16(i>>16)), 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			before := heap()
			for i := range flows {
				open(i)
			}
			full := heap() - before
			l.later(24 * time.Hour)
			left := heap() - before
			t.Logf("%d bytes while the flows ran, %d after their timeout", full, left)
			if full < 100*flows/2 || left > full/20 {
				t.Errorf("%d of %d bytes are still in use", left, full)
			}
			open(0) // new flows can be opened again
		})
	}
	runtime.KeepAlive(l)
}

// TestOpeningRate has C open flows as fast as it can: openingBurst open at once, and
// openingRate in each second.
func TestOpeningRate(t *testing.T) {
	l := newLab(t, routing, Options{States: 1 << 20, PerPeer: 1 << 20})
	if got := l.flood(flowtest.PeerC4, 3000); got != openingBurst {
		t.Errorf("%d flows at once, want %d", got, openingBurst)
	}
	for second := range 5 {
		l.later(time.Second)
		n := 0
		for i := range uint16(1000) {
			p := flowtest.Datagram(at(flowtest.PeerC4, i), at(netip.AddrFrom4([4]byte{8, 8, 8, byte(second)}), 53), 0)
			if l.judge(p, FromPeer).Action == Pass {
				n++
			}
		}
		if n != openingRate {
			t.Errorf("%d flows in a second, want %d", n, openingRate)
		}
	}
	// A packet of a running flow passes, and doesn't count towards the rate.
	l.from(true, flowtest.Datagram(at(flowtest.PeerC4, 1), at(netip.AddrFrom4([4]byte{8, 8, 8, 0}), 53), 0))
	if s := l.view.Stats(0); s.Full != 2000+5*800 {
		t.Errorf("%d packets counted as over the bound, want %d", s.Full, 2000+5*800)
	}
}

// TestShares checks the shares of the packet filter's states: one peer gets a quarter at
// most, all peers together three quarters, and the host isn't bounded.
func TestShares(t *testing.T) {
	for _, tt := range []struct {
		about             string
		o                 Options
		each, third, last int // flows of the first and second peer, of the third, of the fourth
	}{
		{"pf", Options{States: 10_000, PerForwarded: 2}, 1250, 625, 313},
		{"conntrack", Options{States: 8192}, 2048, 1024, 512},
		{"large conntrack", Options{States: 1 << 20}, 4096, 4096, 4096},
		{"memory", Options{}, 4096, 4096, 4096},
		{"uneven", Options{States: 1001, PerForwarded: 2}, 125, 63, 31},
	} {
		t.Run(tt.about, func(t *testing.T) {
			l := newLab(t, 7, tt.o)
			m := flowtest.Mesh(7)
			m.Peers[1].Permissions = mesh.Granted(7)
			peers := []netip.Addr{flowtest.PeerC4, flowtest.PeerA4}
			for i := range byte(2) {
				a4, a6 := netip.AddrFrom4([4]byte{100, 64, 0, 10 + i}), flowtest.PeerC6.As16()
				a6[15] = 10 + i
				m.Peers = append(m.Peers, mesh.Peer{PublicKey: mesh.PublicKey{i + 1}, Name: a4.String(), Addresses: mesh.Addresses{a4, netip.AddrFrom16(a6)}, Permissions: mesh.Granted(7)})
				peers = append(peers, a4)
			}
			l.set(flowtest.Compile(t, m))
			for i, want := range []int{tt.each, tt.each, tt.third, tt.last} {
				// The connections are established, so that they stay while the others open.
				got := 0
				for n := range 5000 {
					p := func(flags uint8) []byte {
						return flowtest.TCPSegment(at(peers[i], uint16(n)), at(flowtest.Net4, 443), flags, 0)
					}
					if n%openingRate == 0 {
						l.later(time.Second)
					}
					if l.judge(p(flowtest.SYN), FromPeer).Action == Pass {
						got++
						l.from(true, p(flowtest.ACK))
					}
				}
				if got != want {
					t.Errorf("peer %d has %d flows, want %d", i, got, want)
				}
				// A flow to the host itself takes one state only, so one may still fit.
				s := l.view.Stats(i)
				if s.Held != got*max(1, tt.o.PerForwarded) || s.Held > s.Limit {
					t.Errorf("peer %d holds %d of %d for %d flows", i, s.Held, s.Limit, got)
				}
			}
			host := conversations(flowtest.HostB4, flowtest.PeerC4)
			for _, c := range host {
				l.to(true, c.ask(flowtest.SYN))
				l.from(true, c.answer(flowtest.SYN|flowtest.ACK))
			}
			// The fourth peer's share is full until its flows end.
			fourth := flowtest.Datagram(at(peers[3], 1), at(flowtest.Net4, 443), 0)
			l.from(false, fourth)
			l.later(TCPEstablished + purge + time.Second)
			l.from(true, fourth)
		})
	}
}

// TestCutMakesRoom removes the permission for the flows that fill C's share: cut flows don't
// count, so C has room for flows that it may still open. Once the permission is granted
// again, the cut flows open as new ones.
func TestCutMakesRoom(t *testing.T) {
	l := newLab(t, incoming|routing, Options{States: 400})
	if got := l.fill(flowtest.PeerC4); got != 100 {
		t.Fatalf("%d flows, want 100", got)
	}
	self := flowtest.Datagram(at(flowtest.PeerC4, 1), at(flowtest.HostB4, 2), 0)
	l.from(false, self)
	l.allow(incoming)
	l.from(true, self)
	if s := l.view.Stats(0); s.Held != 1 || s.Cut != 100 {
		t.Errorf("%+v, want 1 held and 100 cut", s)
	}
	l.allow(incoming | routing)
	l.later(5 * time.Second)
	if got := l.flood(flowtest.PeerC4, 1000); got != 99 {
		t.Errorf("%d flows opened again, want 99", got)
	}
	l.later(24 * time.Hour)
	l.allow(routing)
	if s := l.view.Stats(0); s.Held != 0 || l.table.held.Load() != 0 {
		t.Errorf("%d states of C and %d in total are counted after all flows ended, want none", s.Held, l.table.held.Load())
	}
}

// TestClosedMakesRoom closes C's connections. A FIN or a reset that has passed the packet
// filter makes room soon. One that only C sent doesn't, as the filter may have refused it.
func TestClosedMakesRoom(t *testing.T) {
	const syn, ack, fin, rst = flowtest.SYN, flowtest.ACK, flowtest.FIN | flowtest.ACK, flowtest.RST
	for _, tt := range []struct {
		about string
		close func(l *lab, c conversation)
		soon  bool
	}{
		{"by the server", func(l *lab, c conversation) { l.to(true, c.answer(fin)); l.from(true, c.ask(ack), c.ask(fin)) }, true},
		{"by C and the server", func(l *lab, c conversation) {
			l.from(true, c.ask(fin))
			l.to(true, c.answer(fin))
			l.from(true, c.ask(ack))
		}, true},
		{"reset by the server", func(l *lab, c conversation) { l.to(true, c.answer(rst)) }, true},
		{"reset by C", func(l *lab, c conversation) { l.from(true, c.ask(rst)) }, false},
		{"by C alone", func(l *lab, c conversation) { l.from(true, c.ask(fin), c.ask(rst)) }, false},
	} {
		l := newLab(t, routing, Options{States: 4})
		c := conversations(flowtest.PeerC4, flowtest.Net4)[0]
		l.from(true, c.ask(syn))
		l.to(true, c.answer(syn|ack))
		l.from(true, c.ask(ack))
		tt.close(l, c)
		other := conversations(flowtest.PeerC4, netip.MustParseAddr("9.9.9.9"))[0]
		l.from(false, other.ask(syn))
		l.later(TCPClosing + purge + time.Second)
		if got := l.judge(other.ask(syn), FromPeer).Action == Pass; got != tt.soon {
			t.Errorf("closed %s: room soon %v, want %v", tt.about, got, tt.soon)
		}
		if !tt.soon {
			l.later(TCPEstablished)
			l.from(true, other.ask(syn))
		}
	}
}

// TestFloodDoesNotRevive cuts a flow of C, and has C flood the host with flows that it may
// still open: they don't evict the cut flow.
func TestFloodDoesNotRevive(t *testing.T) {
	l := newLab(t, incoming|routing, Options{PerPeer: 100})
	c := conversations(flowtest.PeerC4, flowtest.HostB4)[0]
	l.from(true, c.ask(flowtest.SYN))
	l.to(true, c.answer(flowtest.SYN|flowtest.ACK))
	l.from(true, c.ask(flowtest.ACK))
	l.allow(routing)
	l.fill(flowtest.PeerC4)
	l.to(false, c.answer(flowtest.ACK))
	l.from(false, c.ask(flowtest.ACK))
	if s := l.view.Stats(0); s.Cut != 1 || s.Flows != 100 {
		t.Errorf("%d cut and %d running flows, want 1 and 100", s.Cut, s.Flows)
	}
}

// TestCutBounded cuts as many flows as a share holds, again and again: the share remembers
// no more cut flows than that.
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
	if s.cut.len != 50 || len(s.flows) != s.cut.len+s.byPeer.len {
		t.Errorf("%d cut, %d running, %d in all", s.cut.len, s.byPeer.len, len(s.flows))
	}
}

// TestHostBounded has the host open more flows to C than fit into the table. None is refused;
// the oldest flows without an answer are evicted first.
func TestHostBounded(t *testing.T) {
	l := newLab(t, 0, Options{PerPeer: 50})
	open := func(port uint16) []byte {
		return flowtest.Datagram(at(flowtest.HostB4, port), at(flowtest.PeerC4, 1), 0)
	}
	answer := func(port uint16) []byte {
		return flowtest.Datagram(at(flowtest.PeerC4, 1), at(flowtest.HostB4, port), 0)
	}
	for port := range uint16(40) {
		l.to(true, open(port))
		l.from(true, answer(port))
	}
	for port := range uint16(200) {
		l.to(true, open(1000+port))
	}
	for port := range uint16(40) {
		l.from(true, answer(port))
	}
	l.from(true, answer(1199))
	l.from(false, answer(1000))
	for port := range uint16(200) {
		l.to(true, open(2000+port))
		l.from(true, answer(2000+port))
	}
	if s := l.view.Stats(0); s.Flows != 50 || s.Held != 0 {
		t.Errorf("%d flows, %d held, want 50 and 0", s.Flows, s.Held)
	}
}

// TestFewerPerPeer adds peers, which makes the shares smaller: running flows go on, and no
// flow opens until enough of them have ended.
func TestFewerPerPeer(t *testing.T) {
	l := newLab(t, 7, Options{})
	for _, tt := range []struct{ peers, want int }{{1, 4096}, {256, 4096}, {1024, 1024}, {10_000, 512}} {
		if got := l.table.memory(tt.peers); got != tt.want {
			t.Errorf("%d peers: %d flows each, want %d", tt.peers, got, tt.want)
		}
	}
	for i := range 4096 {
		l.later(5 * time.Millisecond)
		l.from(true, flowtest.TCPSegment(at(flowtest.PeerC4, uint16(i)), at(flowtest.Net4, 1), flowtest.ACK, 0))
	}
	l.set(flowtest.Large(t, 2000, 0))
	if s := l.view.Stats(0); s.Flows != 4096 || s.Limit != 524 {
		t.Errorf("%d flows of %d with 2000 peers, want 4096 of 524", s.Flows, s.Limit)
	}
	l.later(time.Second)
	l.from(true, flowtest.TCPSegment(at(flowtest.PeerC4, 0), at(flowtest.Net4, 1), flowtest.ACK, 0))
	l.from(false, flowtest.TCPSegment(at(flowtest.PeerC4, 5000), at(flowtest.Net4, 1), flowtest.ACK, 0))
}

// TestMemoryFollowsUse opens flows in two waves: flows that timed out leave the table.
func TestMemoryFollowsUse(t *testing.T) {
	l := newLab(t, routing, Options{})
	l.flood(flowtest.PeerC4, 1000)
	l.later(time.Hour)
	l.flood(flowtest.PeerC4, 600)
	if got := l.view.Stats(0).Flows; got != 600 {
		t.Errorf("%d flows in the table, want the last 600", got)
	}
}

// TestConcurrent judges from several goroutines while the policy changes. With -race it
// checks the path without a lock. Each verdict must follow the ruleset of the view that
// judged.
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
				// A flow beyond the share or the opening rate is refused all the same.
				if v := view.Judge(ask, FromPeer, l.table.Now()); (v.Action == Pass) != may && (!may || v.Rule != policy.RuleFull) {
					t.Errorf("request: %+v, want pass %v", v, may)
					return
				}
				if got := view.Judge(answer, ToPeer, l.table.Now()).Action == Pass; got && !may {
					t.Error("an answer passes that the view must refuse")
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
		next.CutRefused(old.(*View))
	}
	close(stop)
	wg.Wait()
	s := l.view.shares[0]
	if n := s.cut.len + s.byPeer.len + s.asked.len + s.talks.len; n != len(s.flows) || n > 32 {
		t.Errorf("%d flows in lists, %d in the map, at most 32 allowed", n, len(s.flows))
	}
}

// TestJudgeAllocatesNothing judges every kind of packet: once the maps have grown to their
// size, nothing is allocated.
func TestJudgeAllocatesNothing(t *testing.T) {
	l := newLab(t, routing, Options{PerPeer: 4})
	all := seeds()
	all = append(all, flowtest.TCPSegment(at(flowtest.PeerC4, 1), at(flowtest.PeerA4, 2), flowtest.SYN, 0))
	for i := range uint16(20) { // more than the share holds, so that some are refused as too many
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

// TestEachKindIsBounded floods the host with new flows of each kind: half-open connections,
// datagrams, echoes, first fragments, segments from the middle of a connection. The flows
// that a peer opens at once, opens in a second and has at a time are bounded, and another
// peer isn't affected.
func TestEachKindIsBounded(t *testing.T) {
	const limit = 2000
	spread := func(net netip.Addr, i int) netip.Addr { // over many addresses, as identifiers and ports would run out
		b := net.AsSlice()
		b[len(b)-1], b[len(b)-2] = byte(i), byte(i>>8)
		a, _ := netip.AddrFromSlice(b)
		return a
	}
	for name, one := range map[string]func(src, net netip.Addr, i int) []byte{
		"half-open": func(src, net netip.Addr, i int) []byte {
			return flowtest.TCPSegment(at(src, 9), at(spread(net, i), 443), flowtest.SYN, 0)
		},
		"middle of a connection": func(src, net netip.Addr, i int) []byte {
			return flowtest.TCPSegment(at(src, 9), at(spread(net, i), 443), flowtest.ACK, 8)
		},
		"datagrams": func(src, net netip.Addr, i int) []byte {
			return flowtest.Datagram(at(src, 9), at(spread(net, i), 443), 8)
		},
		"echoes, by identifier": func(src, net netip.Addr, i int) []byte { return flowtest.Echo(src, net, uint16(i), false, 8) },
		"echoes, by code": func(src, net netip.Addr, i int) []byte {
			query := uint8(8)
			if src.Is6() {
				query = 128
			}
			return flowtest.ICMPMessage(src, spread(net, i>>8), query, uint8(i), nil)
		},
		"echoes, by address": func(src, net netip.Addr, i int) []byte { return flowtest.Echo(src, spread(net, i), 9, false, 8) },
		"fragments": func(src, net netip.Addr, i int) []byte {
			return flowtest.Fragments(flowtest.Datagram(at(src, 9), at(spread(net, i), 443), 80), uint32(i), 40)[0]
		},
	} {
		for _, ends := range [][2]netip.Addr{{flowtest.PeerC4, flowtest.Net4}, {flowtest.PeerC6, flowtest.Net6}} {
			l := newLab(t, 7, Options{States: 4 * limit, PerPeer: 1 << 20})
			sent := 0
			flood := func(n int) (passed int) {
				for range n {
					if l.judge(one(ends[0], ends[1], sent), FromPeer).Action == Pass {
						passed++
					}
					sent++
				}
				return passed
			}
			burst, rate := openingBurst, openingRate
			if name == "fragments" {
				burst, rate = maxFragments, 0
			}
			if got := flood(3000); got != burst {
				t.Errorf("%s, %v: %d at once, want %d", name, ends[0], got, burst)
			}
			for range 20 {
				l.later(time.Second)
				if got := flood(300); got > rate {
					t.Errorf("%s, %v: %d in a second, want %d at most", name, ends[0], got, rate)
				}
				l.from(true, flowtest.Datagram(at(flowtest.PeerA4, uint16(sent)), at(flowtest.HostB4, 7), 8))
			}
			if s := l.view.Stats(0); s.Held > limit || name != "fragments" && s.Held < limit || int(s.Full) < sent-limit {
				t.Errorf("%s, %v: %d states held, limit %d; %d of %d packets refused", name, ends[0], s.Held, limit, s.Full, sent)
			}
		}
	}
}

// TestErrorsOpenNothing floods the host with ICMP errors and answers. An error about a flow
// passes without taking more room; errors and answers without a flow are refused.
func TestErrorsOpenNothing(t *testing.T) {
	for _, ends := range [][2]netip.Addr{{flowtest.PeerC4, flowtest.HostB4}, {flowtest.PeerC6, flowtest.HostB6}} {
		l := newLab(t, 7, Options{})
		kind := uint8(3)
		if ends[0].Is6() {
			kind = 1
		}
		answer := flowtest.Datagram(at(ends[1], 7), at(ends[0], 9), 8)
		l.from(true, flowtest.Datagram(at(ends[0], 9), at(ends[1], 7), 8))
		l.to(true, answer)
		before := l.view.Stats(0)
		for i := range uint16(2000) {
			l.from(true, flowtest.ICMPMessage(ends[0], ends[1], kind, 1, answer))
			l.from(false, flowtest.ICMPMessage(ends[0], ends[1], kind, 1, flowtest.Datagram(at(ends[1], 100+i), at(ends[0], 9), 8)),
				flowtest.Echo(ends[0], ends[1], i, true, 8))
		}
		if after := l.view.Stats(0); after.Held != before.Held || after.Flows != before.Flows || after.Full != 0 {
			t.Errorf("%v: %+v, before %+v", ends[0], after, before)
		}
		if got := l.view.shares[0].openings.tokens / 1000; got != openingBurst-1 {
			t.Errorf("%v: %d openings left, want %d", ends[0], got, openingBurst-1)
		}
	}
}
