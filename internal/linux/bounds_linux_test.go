package linux

import (
	"context"
	"encoding/binary"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/netlab"
	"github.com/meshhelper/meshhelper/internal/platform"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// conntrackOf lists the flows that an address opened.
func (g *rig) conntrackOf(src netip.Addr) (out []flowEntry) {
	g.t.Helper()
	family := byte(2)
	if src.Is6() {
		family = 10
	}
	g.do(func() error {
		return g.p.flows.each(context.Background(), family, src, func(e *flowEntry) error {
			out = append(out, *e)
			return nil
		})
	})
	return out
}

// TestFlowsOfAPeerAreBounded has ann open more flows than the kernel lets a peer
// have, through the host and to it: no more come to be, bob and the host open theirs,
// and a flow that ann has goes on.
func TestFlowsOfAPeerAreBounded(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.p.maxFlows = 640
	w.enforce(mesh(grants{ann: all, bob: all}))
	a := netlab.Addresses()
	n := 0
	came := func(p []byte) bool {
		w.inject(p)
		w.settle(nil)
		deadline := time.Now().Add(2 * time.Second)
		for len(w.arrivals(word(n))) == 0 && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
		return len(w.arrivals(word(n))) > 0
	}
	for i, ann := range []netip.Addr{ann4, ann6} {
		bob, far, own := []netip.Addr{bob4, bob6}[i], a.I.List()[i], []netip.Addr{own4, own6}[i]
		n++
		first := netip.AddrPortFrom(ann, 999)
		if !came(netlab.UDPPacket(first, netip.AddrPortFrom(far, 5000), word(n))) {
			t.Fatal("ann's first flow didn't come out")
		}
		for port := range 2000 {
			to := far
			if port%2 == 1 {
				to = own
			}
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann, uint16(1000+port)), netip.AddrPortFrom(to, 5000), []byte("flood")))
		}
		// The parts fill unevenly.
		if have := len(w.conntrackOf(ann)); have < 500 || have > 640 {
			t.Errorf("ann has %d flows, want about 640", have)
		}
		n++
		if came(netlab.UDPPacket(netip.AddrPortFrom(ann, 3000), netip.AddrPortFrom(far, 5000), word(n))) {
			t.Error("one flow more came out")
		}
		n++
		if !came(netlab.UDPPacket(first, netip.AddrPortFrom(far, 5000), word(n))) {
			t.Error("ann's first flow ended")
		}
		n++
		if !came(netlab.UDPPacket(netip.AddrPortFrom(bob, 3000), netip.AddrPortFrom(far, 5000), word(n))) {
			t.Error("bob opens no flow")
		}
	}
	// What was forgotten makes room again.
	w.forget()
	n++
	if !came(netlab.UDPPacket(netip.AddrPortFrom(ann4, 3001), netip.AddrPortFrom(a.I.V4, 5000), word(n))) {
		t.Error("ann's flows are gone, but she opens none")
	}
}

// synAck waits for a server's answer to a SYN and returns its sequence number.
func (g *rig) synAck(from netip.AddrPort) (seq uint32, ok bool) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		g.mu.Lock()
		for _, b := range g.out {
			p, good := netlab.ParsePacket(b)
			if good && p.Src == from.Addr() && p.SrcPort == from.Port() && p.Flags == netlab.SYN|netlab.ACK {
				header := 20
				if p.Src.Is6() {
					header = 40
				}
				seq, ok = binary.BigEndian.Uint32(b[header+4:]), true
			}
		}
		g.mu.Unlock()
		if ok {
			break
		}
	}
	return seq, ok
}

// TestFlowsEndWhenTheGuardForgetsThem looks at how long the kernel keeps flows of ann's.
func TestFlowsEndWhenTheGuardForgetsThem(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(mesh(grants{ann: all}))
	if err := w.pic.I.Serve(); err != nil {
		t.Fatal(err)
	}
	for i, ann := range []netip.Addr{ann4, ann6} {
		far, me := netip.AddrPortFrom(netlab.Addresses().I.List()[i], netlab.EchoPort), netip.AddrPortFrom(ann, 4000)
		// A connection, and a SYN that stays alone.
		w.inject(netlab.TCPPacket(me, far, netlab.SYN, 100, 0, nil))
		seq, ok := w.synAck(far)
		if !ok {
			t.Fatalf("%v doesn't answer", far)
		}
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			w.inject(netlab.TCPPacket(me, far, netlab.ACK, 101, seq+1, nil))
			flows := w.conntrackOf(ann)
			if len(flows) == 1 && flows[0].timeout > 1000 {
				if flows[0].timeout > 7440 {
					t.Errorf("a connection of %v is kept for %d s", ann, flows[0].timeout)
				}
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%v has no connection: %+v", ann, flows)
			}
		}
		w.inject(netlab.TCPPacket(netip.AddrPortFrom(ann, 4001), far, netlab.SYN, 100, 0, nil))
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann, 4002), far, []byte("x")))
		for _, e := range w.conntrackOf(ann) {
			if most := map[uint16]uint32{4001: 30, 4002: 60}[e.orig.sport]; most > 0 && e.timeout > most {
				t.Errorf("a flow of %v from port %d is kept for %d s, want %d", ann, e.orig.sport, e.timeout, most)
			}
		}
	}
}

// TestKernelThatCantBound enforces on a kernel that lacks counting and timeouts.
func TestKernelThatCantBound(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.p.unbounded = true
	r := w.enforce(mesh(grants{ann: all}))
	report := w.inspect(r)
	if len(report.Drift) > 0 || len(report.Problems) != 1 || !strings.Contains(report.Problems[0].Message, "can't count") {
		t.Errorf("%+v", report)
	}
	w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 4000), netip.AddrPortFrom(netlab.Addresses().I.V4, 5000), word(1)))
	w.settle([][]byte{word(1)})
	if got := w.arrivals(word(1)); len(got) != 1 {
		t.Errorf("ann's packet came out at %v", got)
	}
}

// TestCutOfManyFlows cuts ann, who has many flows through the host and to it: the
// translated ones are gone from conntrack, the others closed, soon and in little
// memory. bob's stay.
func TestCutOfManyFlows(t *testing.T) {
	const each = 20000
	w := newWorld(t)
	w.open()
	defer w.close()
	w.p.maxFlows = 4 * each
	wide := w.enforce(mesh(grants{ann: all, bob: all}))
	a := netlab.Addresses()
	for i := range each {
		from := netip.AddrPortFrom(ann4, uint16(10000+i))
		w.inject(netlab.UDPPacket(from, netip.AddrPortFrom(a.I.V4, 5000), []byte("flood")))
		w.inject(netlab.UDPPacket(from, netip.AddrPortFrom(own4, 5000), []byte("flood")))
	}
	w.inject(netlab.UDPPacket(netip.AddrPortFrom(bob4, 5000), netip.AddrPortFrom(a.I.V4, 5000), []byte("bob's")))
	if have := len(w.conntrackOf(ann4)); have < 2*each {
		t.Fatalf("ann has %d flows, want %d", have, 2*each)
	}
	closed := w.enforce(mesh(grants{bob: all}))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	start := time.Now()
	w.cut(closed, policy.Diff(wide, closed))
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	grown := int64(after.Sys) - int64(before.Sys)
	t.Logf("%d flows were cut in %v; %d MB were allocated, and the process grew by %d MB", 2*each, took,
		(after.TotalAlloc-before.TotalAlloc)>>20, grown>>20)
	if grown > 64<<20 {
		t.Errorf("the process grew by %d MB", grown>>20)
	}
	left := w.conntrackOf(ann4)
	for _, e := range left {
		if e.translated() {
			t.Fatalf("a translated flow outlived its permission: %+v", e)
		}
	}
	if len(left) != each || len(w.elements("cut4")) != each {
		t.Errorf("%d flows to the host are remembered, %d closed; want %d", len(left), len(w.elements("cut4")), each)
	}
	if len(w.conntrackOf(bob4)) != 1 {
		t.Error("bob's flow is gone")
	}
}

// TestFlowsRecoverAfterAFlush has ann and bob begin flows while our table is gone and
// another program's keeps conntrack at work: they leave with mesh addresses. When
// the table is back, the same flows are translated.
func TestFlowsRecoverAfterAFlush(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	r := w.enforce(mesh(grants{ann: all, bob: all}))
	if err := w.pic.B.TrackFlows(); err != nil {
		t.Fatal(err)
	}
	n := 0
	for round := range 5 {
		if err := w.pic.B.DeleteTable(tableName); err != nil {
			t.Fatal(err)
		}
		var flows [][2]netip.AddrPort
		for i, peers := range [][]netip.Addr{{ann4, bob4}, {ann6, bob6}} {
			for _, peer := range peers {
				f := [2]netip.AddrPort{netip.AddrPortFrom(peer, uint16(7000+round)), netip.AddrPortFrom(netlab.Addresses().I.List()[i], 5000)}
				flows = append(flows, f)
				n++
				w.inject(netlab.UDPPacket(f[0], f[1], word(n)))
				w.settle([][]byte{word(n)})
				if got := w.arrivals(word(n)); len(got) != 1 || got[0].packet.Src != f[0].Addr() {
					t.Fatalf("without our table, a peer's packet came out at %v, so nothing is proved", got)
				}
			}
		}
		w.do(func() error { return w.p.Enforce(context.Background(), r) })
		w.cut(r, []policy.Narrowed{
			{ID: policy.PeerID{1}, Addresses: []netip.Addr{ann4, ann6}}, {ID: policy.PeerID{2}, Addresses: []netip.Addr{bob4, bob6}},
		})
		for _, f := range flows {
			n++
			w.inject(netlab.UDPPacket(f[0], f[1], word(n)))
			w.settle([][]byte{word(n)})
			got := w.arrivals(word(n))
			if len(got) != 1 || got[0].packet.Src == f[0].Addr() || !w.p.ports.now.has(got[0].packet.SrcPort) {
				t.Errorf("round %d: the flow from %v to %v came out at %v", round, f[0], f[1], got)
			}
		}
	}
}

// TestHoldersAreNamed has ann and bob open flows, and names them once the table is
// said to be full.
func TestHoldersAreNamed(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	r := w.enforce(mesh(grants{ann: all, bob: all}))
	for i := range 100 {
		peer := ann4
		if i >= 75 {
			peer = bob4
		}
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(peer, uint16(4000+i)), netip.AddrPortFrom(netlab.Addresses().I.V4, 5000), nil))
	}
	name := func() string {
		full := []platform.Problem{{Message: "full"}}
		w.do(func() error { w.p.nameHolders(full, r); return nil })
		return full[0].Message
	}
	if got := name(); got != "full; of peers: ann 75 %, bob 25 %" && got != "full; of peers: ann 74 %, bob 24 %" {
		t.Errorf("%q", got)
	}
	w.forget()
	before := name()
	for range holdersEvery - 2 {
		if got := name(); got != before {
			t.Errorf("counted anew at the next look: %q", got)
		}
	}
	if got := name(); got != "full; next to none are of peers" {
		t.Errorf("not counted anew: %q", got)
	}
}

func TestBoundOfFlows(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "netfilter"), 0o700); err != nil {
		t.Fatal(err)
	}
	p := &Platform{forward: &forwarding{sys: sysctls{dir}}}
	for states, want := range map[int]uint32{262144: maxFlowsPerPeer, 16384: 4096, 4: 1, 1: 1} {
		if err := os.WriteFile(filepath.Join(dir, "netfilter", "nf_conntrack_max"), []byte(strconv.Itoa(states)), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := p.flowsPerPeer(); got != want {
			t.Errorf("of %d entries a peer may have %d, want %d", states, got, want)
		}
	}
}

// BenchmarkNewFlows opens flows of a peer that has many, with and without counting.
func BenchmarkNewFlows(b *testing.B) {
	for _, have := range []int{0, 4000, 8000} {
		for _, counted := range []bool{false, true} {
			b.Run(strconv.Itoa(have)+"/counted="+strconv.FormatBool(counted), func(b *testing.B) {
				g := newRig(b)
				g.open()
				defer g.close()
				g.p.unbounded, g.p.maxFlows = !counted, 1<<20
				g.enforce(mesh(grants{ann: all}))
				to := netip.AddrPortFrom(netlab.Addresses().I.V4, 5000)
				for i := range have {
					g.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, uint16(1+i)), to, nil))
				}
				i := 0
				for b.Loop() {
					i++
					g.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, uint16(20000+i%40000)), to, nil))
				}
			})
		}
	}
}
