package linux

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

func TestFairShare(t *testing.T) {
	for _, c := range []struct {
		held             []uint64
		room, most, want uint64
	}{
		{nil, 100, 25, 25},
		{[]uint64{0, 0}, 100, 25, 25},
		{[]uint64{1000}, 75, 25, 25},
		{[]uint64{30, 30, 30, 30}, 75, 25, 18},
		{[]uint64{5, 30, 30, 30, 30}, 75, 25, 17},
		{[]uint64{5, 6, 7, 30}, 75, 25, 25},
		{[]uint64{10, 10, 10}, 3, 25, 1},
		{[]uint64{1, 1, 1}, 0, 25, 0},
	} {
		got := fairShare(c.held, c.room, c.most)
		if got != c.want {
			t.Errorf("fairShare(%v, %d, %d) = %d, want %d", c.held, c.room, c.most, got, c.want)
		}
		all := uint64(0)
		for _, n := range c.held {
			all += min(n, got)
		}
		if all > c.room {
			t.Errorf("fairShare(%v, %d, %d) = %d, which are %d together", c.held, c.room, c.most, got, all)
		}
	}
}

// TestExcessInterval checks how long a host whose own flows exceed a quarter of
// conntrack waits between two full readings, and that peers' flows don't delay the next
// one.
func TestExcessInterval(t *testing.T) {
	for _, c := range []struct {
		had, have uint64
		want      time.Duration
	}{
		{0, 300, excessInterval}, {300, 300, excessMaxInterval}, {300, 361, excessMaxInterval}, {300, 200, excessMaxInterval}, {300, 362, excessInterval},
	} {
		e := excess{countAtRest: c.had}
		if e.due(c.want-1, c.have, 1000) || !e.due(c.want, c.have, 1000) {
			t.Errorf("had %d, has %d: not due after exactly %v", c.had, c.have, c.want)
		}
	}
	const states = 1024
	w := newWorld(t)
	w.open()
	defer w.close()
	w.pretend(map[string]string{flowMax: strconv.Itoa(states), flowCount: "300"})
	r := w.enforce(meshOf(grants{ann: all}))
	w.others(r)
	if w.p.others.excess.countAtRest != 300 {
		t.Errorf("after a check that found nothing, countAtRest is %d", w.p.others.excess.countAtRest)
	}
	w.fill(300, ann4, netlab.Addresses().I.V4)
	w.p.others.excess = excess{looked: time.Now().Add(-excessInterval), countAtRest: 200}
	w.others(r)
	if w.p.others.excess.countAtRest != 0 || len(w.conntrackOf(ann4)) > states/peerShare {
		t.Errorf("after a check that found something, countAtRest is %d and %d entries are left", w.p.others.excess.countAtRest, len(w.conntrackOf(ann4)))
	}
}

// TestExcessEnds opens and resets connections of ann, which the kernel doesn't count. The
// excess is ended; a flow of bob's and a flow of ann's to the host are not.
func TestExcessEnds(t *testing.T) {
	const states, share = 2048, 2048 / peerShare
	w := newWorld(t)
	w.open()
	defer w.close()
	set := w.pretend(map[string]string{flowMax: strconv.Itoa(states), flowCount: "0"})
	r := w.enforce(meshOf(grants{ann: all, bob: all}))
	count := func() int {
		n := len(w.conntrackOf(netip.Addr{}))
		set(flowCount, strconv.Itoa(n))
		return n
	}
	far := netlab.Addresses().I
	own := netlab.UDPPacket(netip.AddrPortFrom(ann4, 999), netip.AddrPortFrom(own4, 5000), []byte("own"))
	w.inject(own)
	w.inject(netlab.UDPPacket(netip.AddrPortFrom(bob4, 999), netip.AddrPortFrom(far.V4, 5000), []byte("bob")))
	if err := w.pic.I.Serve(); err != nil {
		t.Fatal(err)
	}
	in := func(state uint8) (n int) {
		for _, e := range w.conntrackOf(ann4) {
			if e.orig.proto == unix.IPPROTO_TCP && e.state == state {
				n++
			}
		}
		return n
	}
	const synReceived, batches, batch = 2, 16, 50
	for n := range batches {
		to := netip.AddrPortFrom(far.V4, netlab.EchoPort)
		for i := range batch {
			w.inject(netlab.TCPPacket(netip.AddrPortFrom(ann4, uint16(2000+n*batch+i)), to, netlab.SYN, 100, 0, nil))
		}
		for deadline := time.Now().Add(time.Second); in(synReceived) < batch && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		}
		for i := range batch {
			w.inject(netlab.TCPPacket(netip.AddrPortFrom(ann4, uint16(2000+n*batch+i)), to, netlab.RST, 101, 0, nil))
		}
	}
	if n := in(stateClose); n < share+50 {
		t.Fatalf("%d connections ended, too few to prove anything", n)
	}
	// Open connections are kept first.
	w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 998), netip.AddrPortFrom(far.V4, 5000), []byte("open")))
	count()
	found := w.others(r)
	if len(found) != 1 || !strings.Contains(found[0].Message, "share of "+strconv.Itoa(share)+",") {
		t.Errorf("problems %+v", found)
	}
	have := map[uint16]bool{}
	for _, e := range w.conntrackOf(ann4) {
		have[e.orig.sport] = true
	}
	if n := len(have) - 1; n > share || n < share*9/10 {
		t.Errorf("ann has %d entries through the host, want nearly %d", n, share)
	}
	if !have[999] || !have[998] {
		t.Errorf("ann's open flows: to the host %v, through it %v", have[999], have[998])
	}
	if len(w.conntrackOf(bob4)) != 1 {
		t.Error("bob's flow ended")
	}
	// The problem is shown for a while, and then no longer.
	set(flowCount, "0")
	if n := len(w.others(r)); n != 1 {
		t.Errorf("%d problems at the next look", n)
	}
	w.p.others.excess.looked = time.Now().Add(-excessShownFor - time.Second)
	if got := w.others(r); len(got) != 0 {
		t.Errorf("problems a minute later: %+v", got)
	}
}

// TestExcessOfBothFamilies gives two peers nearly a quarter each in each family.
func TestExcessOfBothFamilies(t *testing.T) {
	const states = 2048
	w := newWorld(t)
	w.open()
	defer w.close()
	set := w.pretend(map[string]string{flowMax: strconv.Itoa(states), flowCount: "0"})
	r := w.enforce(meshOf(grants{ann: all, bob: all}))
	far := netlab.Addresses().I
	each := map[netip.Addr]int{ann4: 500, ann6: 500, bob4: 500, bob6: 500}
	for src, n := range each {
		dst := far.V4
		if src.Is6() {
			dst = far.V6
		}
		w.fill(n, src, dst)
	}
	set(flowCount, "2000")
	w.others(r)
	all := 0
	for src := range each {
		all += len(w.conntrackOf(src))
	}
	if all != 2*states/peerShare {
		t.Errorf("two peers have %d entries, want %d", all, 2*states/peerShare)
	}
}
