package linux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
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

// TestFlowsOfAPeerAreBounded opens more flows of ann than the kernel allows a peer,
// through the host and to it. No more are created, bob and the host still open theirs,
// and ann's first flow continues.
func TestFlowsOfAPeerAreBounded(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.p.maxFlows = 640
	w.enforce(meshOf(grants{ann: all, bob: all}))
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
	// Deleted flows make room again.
	w.forget()
	n++
	if !came(netlab.UDPPacket(netip.AddrPortFrom(ann4, 3001), netip.AddrPortFrom(a.I.V4, 5000), word(n))) {
		t.Error("ann's flows are gone, but she opens none")
	}
	// Flows between the same ports differ by their destinations.
	w.forget()
	for i := range 2000 {
		to := netip.AddrFrom4([4]byte{8, 8, byte(i >> 8), byte(i)})
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 123), netip.AddrPortFrom(to, 123), []byte("flood")))
	}
	if have := len(w.conntrackOf(ann4)); have < 500 || have > 640 {
		t.Errorf("ann has %d flows between the same ports, want about 640", have)
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

// TestFlowsEndWhenTheGuardForgetsThem checks how long the kernel keeps ann's flows.
func TestFlowsEndWhenTheGuardForgetsThem(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all}))
	if err := w.pic.I.Serve(); err != nil {
		t.Fatal(err)
	}
	for i, ann := range []netip.Addr{ann4, ann6} {
		far, me := netip.AddrPortFrom(netlab.Addresses().I.List()[i], netlab.EchoPort), netip.AddrPortFrom(ann, 4000)
		// A connection, and a SYN without an answer.
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

// TestKernelThatCantBound enforces on a kernel without counting and timeouts.
func TestKernelThatCantBound(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.p.unbounded.Store(true)
	r := w.enforce(meshOf(grants{ann: all}))
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

// lacking is a socket for nftables whose kernel lacks the modules that bound flows:
// requests for them are changed to name a module that no kernel has. If errno is set,
// refusals have that number instead.
type lacking struct {
	*mdlayher.Conn
	counting, timeouts bool
	all                bool // also lacks verdicts, so no table can be loaded
	errno              unix.Errno
	refused            *int
}

func (l lacking) Send(m mdlayher.Message) error {
	return l.SendMessages([]mdlayher.Message{m})
}

func (l lacking) SendMessages(ms []mdlayher.Message) error {
	out := make([]mdlayher.Message, len(ms))
	for i, m := range ms {
		m.Data = bytes.Clone(m.Data)
		if l.counting {
			m.Data = bytes.ReplaceAll(m.Data, []byte("connlimit\x00"), []byte("conncount\x00"))
		}
		if l.all {
			m.Data = bytes.ReplaceAll(m.Data, []byte("immediate\x00"), []byte("immediatf\x00"))
		}
		if l.timeouts && m.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWOBJ {
			attr := binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, 8), unix.NFTA_OBJ_TYPE)
			kind := func(n byte) []byte { return append(bytes.Clone(attr), 0, 0, 0, n) }
			m.Data = bytes.ReplaceAll(m.Data, kind(objectCtTimeout), kind(200))
		}
		out[i] = m
	}
	_, err := l.Conn.SendMessages(out)
	return err
}

func (l lacking) Receive() ([]mdlayher.Message, error) {
	ms, err := l.Conn.Receive()
	if errors.Is(err, unix.ENOENT) {
		*l.refused++
		if l.errno != 0 {
			err = os.NewSyscallError("receive", l.errno)
		}
	}
	return ms, err
}

func (l lacking) ReceiveIter() iter.Seq2[mdlayher.Message, error] { return eachOf(l.Receive) }

// eachOf iterates over the messages that receive returns.
func eachOf(receive func() ([]mdlayher.Message, error)) iter.Seq2[mdlayher.Message, error] {
	return func(yield func(mdlayher.Message, error) bool) {
		ms, err := receive()
		if err != nil {
			yield(mdlayher.Message{}, err)
			return
		}
		for _, m := range ms {
			if !yield(m, nil) {
				return
			}
		}
	}
}

// TestKernelRefusesToBound has the kernel refuse to count flows, to set timeouts, or
// both: the helper enforces the rest, reports it, and doesn't try again each time. Any
// other refusal closes.
func TestKernelRefusesToBound(t *testing.T) {
	for _, c := range []struct {
		name               string
		counting, timeouts bool
		all                bool
		errno              unix.Errno
		closes             bool
	}{
		{"counting", true, false, false, 0, false},
		{"timeouts", false, true, false, 0, false},
		{"both", true, true, false, 0, false},
		{"not supported", true, true, false, unix.EOPNOTSUPP, false},
		{"no memory", true, true, false, unix.ENOMEM, true},
		{"more than that", true, true, true, 0, true},
	} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, late %t", c.name, late), func(t *testing.T) {
				w := newWorld(t)
				var err error
				w.do(func() error {
					w.p, err = New(Options{StateDir: w.state, Step: w.step, ResolverFiles: []string{w.resolvers()}})
					return err
				})
				refused := 0
				lack := func() {
					l := lacking{w.p.filter.change.wire, c.counting, c.timeouts, c.all, c.errno, &refused}
					w.p.filter.change.wire = mdlayher.NewConn(l, 0)
				}
				if !late {
					lack()
				}
				w.do(func() error {
					w.dev, err = w.p.Open(context.Background(), host.Interface{
						Name: meshName, MTU: testMTU, Addresses: []netip.Addr{own4, own6}, Prefixes: meshPrefixes(),
					})
					return nil
				})
				if c.closes && !late {
					if err == nil || refused == 0 || w.p.unbounded.Load() {
						t.Errorf("opened, %d refused: %v", refused, err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				go w.read(w.dev)
				defer w.close()
				if late {
					lack()
				}
				var r *policy.Ruleset
				w.do(func() error {
					r, err = w.round(meshOf(grants{ann: all}))
					return nil
				})
				if c.closes {
					if err == nil || w.p.unbounded.Load() {
						t.Errorf("enforced, %d refused: %v", refused, err)
					}
					return
				}
				if err != nil || refused == 0 {
					t.Fatalf("%d refused: %v", refused, err)
				}
				report := w.inspect(r)
				if len(report.Drift) > 0 || len(report.Problems) != 1 || !strings.Contains(report.Problems[0].Message, "can't count") {
					t.Errorf("%+v", report)
				}
				_, text, err := w.p.Renderer()(r)
				if err != nil || strings.Contains(text, "ct count") || strings.Contains(text, "ct timeout") {
					t.Errorf("printed are rules that aren't loaded: %v\n%s", err, text)
				}
				w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 4000), netip.AddrPortFrom(netlab.Addresses().I.V4, 5000), word(1)))
				w.settle([][]byte{word(1)})
				if got := w.arrivals(word(1)); len(got) != 1 {
					t.Errorf("ann's packet came out at %v", got)
				}
				before := refused
				r = w.enforce(meshOf(grants{ann: all, bob: mesh.Incoming}))
				if drift := w.inspect(r).Drift; len(drift) > 0 || refused != before {
					t.Errorf("at the next change: drift %v, refused %d times more", drift, refused-before)
				}
			})
		}
	}
}

// TestCutOfManyFlows cuts ann, who has many flows through the host and to it: the
// translated ones are deleted from conntrack, the others closed, quickly and with little
// memory. bob's stay.
func TestCutOfManyFlows(t *testing.T) {
	const each = 5000
	w := newWorld(t)
	w.open()
	defer w.close()
	w.p.maxFlows = 4 * each
	wide := w.enforce(meshOf(grants{ann: all, bob: all}))
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
	closed := w.enforce(meshOf(grants{bob: all}))
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

// TestFlowsRecoverAfterAFlush starts flows of ann and bob while our table is gone and
// another program's keeps conntrack running: they leave with mesh addresses. When the
// table is back, the same flows are translated.
func TestFlowsRecoverAfterAFlush(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	r := w.enforce(meshOf(grants{ann: all, bob: all}))
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
			{PublicKey: mesh.PublicKey{1}, Addresses: []netip.Addr{ann4, ann6}}, {PublicKey: mesh.PublicKey{2}, Addresses: []netip.Addr{bob4, bob6}},
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

// spread opens the given number of flows to the internet for each peer.
func (w *world) spread(of map[netip.Addr]int) {
	w.t.Helper()
	for peer, count := range of {
		far := netlab.Addresses().I.V4
		if peer.Is6() {
			far = netlab.Addresses().I.V6
		}
		for i := range count {
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(peer, uint16(4000+i)), netip.AddrPortFrom(far, 5000), nil))
		}
	}
}

// holding parses the peers' shares, in percent, from the message about a full table.
func holding(message string) map[string]int {
	out := map[string]int{}
	for _, m := range regexp.MustCompile(`(\w+) (\d+) %`).FindAllStringSubmatch(message, -1) {
		out[m[1]], _ = strconv.Atoi(m[2])
	}
	return out
}

// TestHoldersAreNamed opens flows of peers and checks that those with the most are named
// once the table is full.
func TestHoldersAreNamed(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	m := meshOf(grants{ann: all, bob: all})
	cyd, dan := netip.MustParseAddr("100.64.0.12"), netip.MustParseAddr("100.64.0.13")
	for i, a := range []netip.Addr{cyd, dan} {
		m.Peers = append(m.Peers, mesh.Peer{
			PublicKey: mesh.PublicKey{byte(3 + i)}, Name: []string{"cyd", "dan"}[i], Addresses: mesh.Addresses{a, netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x6d, 2: 0x65, 3: 0x73, 4: 0x68, 15: byte(0x12 + i)})}, Permissions: mesh.Granted(all),
		})
	}
	r := w.enforce(m)
	name := func() string {
		full := []host.Problem{{Message: "full"}}
		w.do(func() error { w.p.others.nameHolders(t.Context(), full, r); return nil })
		return full[0].Message
	}
	w.spread(map[netip.Addr]int{ann4: 80, bob6: 60, cyd: 40, dan: 20})
	first := name()
	got := holding(first)
	// The host itself may have a flow or two.
	for peer, want := range map[string]int{"ann": 40, "bob": 30, "cyd": 20} {
		if got[peer] < want-1 || got[peer] > want {
			t.Errorf("%s has %d %% of the flows, want %d: %q", peer, got[peer], want, first)
		}
	}
	if !strings.HasPrefix(first, "full; of peers: ann ") || len(got) != maxHolders {
		t.Errorf("named are %q", first)
	}
	w.forget()
	for range countEvery - 1 {
		if got := name(); got != first {
			t.Errorf("counted anew at the next look: %q", got)
		}
	}
	if got := name(); got != "full; almost none are of peers" {
		t.Errorf("not counted anew: %q", got)
	}

	// After the table was no longer full, the flows are counted again. A peer with less
	// than a hundredth isn't named.
	w.do(func() error { w.p.others.nameHolders(t.Context(), nil, r); return nil })
	w.spread(map[netip.Addr]int{ann6: 300, bob4: 2})
	if got := holding(name()); got["ann"] < 95 || len(got) != 1 {
		t.Errorf("ann has nearly all flows, bob two, named are %v", got)
	}
}

// TestFullTableIsReported makes the table full, not full any more, and unreadable: none of
// these makes Inspect report drift.
func TestFullTableIsReported(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	set := w.pretend(map[string]string{flowMax: "1000", flowCount: "10"})
	r := w.enforce(meshOf(grants{ann: all, bob: all}))
	w.spread(map[netip.Addr]int{ann4: 30})
	for _, c := range []struct{ count, want string }{
		{"10", ""},
		{"950", "holds 950 of at most 1000"},
		{"10", ""},
		{"1000", "holds 1000 of at most 1000"},
		{"many", "fill of conntrack"},
	} {
		set(flowCount, c.count)
		if drift := w.inspect(r).Drift; len(drift) > 0 {
			t.Errorf("%s flows: drift %v", c.count, drift)
		}
		found, err := w.p.Others(t.Context(), r, nil)
		if unreadable := c.count == "many"; unreadable || err != nil {
			if !unreadable || err == nil || !strings.Contains(err.Error(), c.want) || len(found) > 0 {
				t.Errorf("%s flows: %v, %v, want %q", c.count, found, err, c.want)
			}
			continue
		}
		if c.want == "" {
			if len(found) > 0 {
				t.Errorf("%s flows: %v", c.count, found)
			}
			continue
		}
		if len(found) != 1 || !strings.Contains(found[0].Message, c.want) || found[0].Hint == "" {
			t.Errorf("%s flows: %v, want %q", c.count, found, c.want)
			continue
		}
		if got := holding(found[0].Message); got["ann"] < 90 {
			t.Errorf("%s flows: %q", c.count, found[0].Message)
		}
	}
}

// pretend makes the backend read some sysctls from files and the others from the kernel.
// It returns a function that changes one.
func (g *rig) pretend(values map[string]string) (set func(name, value string)) {
	g.t.Helper()
	dir := g.t.TempDir()
	for _, family := range []string{"ipv4", "ipv6", "bridge", "core"} {
		if err := os.Symlink(filepath.Join(sysctlRoot, family), filepath.Join(dir, family)); err != nil {
			g.t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "netfilter"), 0o700); err != nil {
		g.t.Fatal(err)
	}
	set = func(name, value string) {
		g.t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value+"\n"), 0o600); err != nil {
			g.t.Fatal(err)
		}
	}
	for name, v := range values {
		set(name, v)
	}
	g.p.forward.sys, g.p.others.sys = sysctls{dir}, sysctls{dir}
	return set
}

func TestBoundOfFlows(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "netfilter"), 0o700); err != nil {
		t.Fatal(err)
	}
	p := &Backend{forward: &forwarding{sys: sysctls{dir}}}
	for states, want := range map[int]uint32{262144: maxFlowsPerPeer, 16384: 2048, 8: 1, 1: 1} {
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
				g.p.unbounded.Store(!counted)
				g.p.maxFlows = 1 << 20
				g.enforce(meshOf(grants{ann: all}))
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

// fill creates conntrack entries of UDP flows from src to dst, as packets would. It
// returns their number: n, or as many as leave room for others'.
func (g *rig) fill(n int, src, dst netip.Addr) int {
	g.t.Helper()
	n = min(n, g.p.Limits().States*3/4)
	g.do(func() error {
		c, err := openConntrack()
		if err != nil {
			return err
		}
		defer c.close()
		for i := range n {
			sport, dport := uint16(1024+i%60000), uint16(5000+i/60000)
			data := []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}
			if src.Is6() {
				data[0] = unix.AF_INET6
			}
			data = appendAttr(data, unix.NLA_F_NESTED|nl.CTA_TUPLE_ORIG, tupleAttrs(src, dst, sport, dport))
			data = appendAttr(data, unix.NLA_F_NESTED|nl.CTA_TUPLE_REPLY, tupleAttrs(dst, src, dport, sport))
			data = appendAttr(data, nl.CTA_TIMEOUT, binary.BigEndian.AppendUint32(nil, 300))
			if len(c.out)+unix.SizeofNlMsghdr+len(data) > deleteBatch {
				if err := c.flush(); err != nil {
					return err
				}
			}
			c.out = appendMessage(c.out, unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_EXCL, data)
		}
		return c.flush()
	})
	return n
}

// tupleAttrs returns the attributes of one direction of a UDP flow.
func tupleAttrs(src, dst netip.Addr, sport, dport uint16) []byte {
	from, to := uint16(nl.CTA_IP_V4_SRC), uint16(nl.CTA_IP_V4_DST)
	if src.Is6() {
		from, to = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	out := appendAttr(nil, unix.NLA_F_NESTED|nl.CTA_TUPLE_IP,
		appendAttr(appendAttr(nil, from, src.AsSlice()), to, dst.AsSlice()))
	proto := appendAttr(nil, nl.CTA_PROTO_NUM, []byte{unix.IPPROTO_UDP})
	proto = appendAttr(proto, nl.CTA_PROTO_SRC_PORT, binary.BigEndian.AppendUint16(nil, sport))
	proto = appendAttr(proto, nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, dport))
	return appendAttr(out, unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, proto)
}

// memory returns the process's resident memory, and its peak since the last reset, in
// bytes (VmRSS and VmHWM in proc_pid_status(5)).
func memory(t *testing.T) (now, peak int64) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		n, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			now = n << 10
		case "VmHWM:":
			peak = n << 10
		}
	}
	if now == 0 || peak == 0 {
		t.Fatalf("no memory in\n%s", text)
	}
	return now, peak
}

// TestCutInFlatMemory cuts a peer that filled most of conntrack with flows to the host
// and through it, alone and together with many other peers: the process needs the memory
// of a few batches, however many flows there are.
func TestCutInFlatMemory(t *testing.T) {
	const many, most = 187825, 48 << 20
	a := netlab.Addresses()
	w := newWorld(t)
	w.open()
	defer w.close()
	wide := w.enforce(meshOf(grants{ann: all, bob: all}))
	closed := w.enforce(meshOf(grants{bob: all}))
	for _, c := range []struct {
		name     string
		src, dst netip.Addr
		others   int // other peers that are cut at the same time
	}{
		{"to the host, IPv4", ann4, own4, 0}, {"to the host, IPv6", ann6, own6, 0},
		{"through it, IPv6", ann6, a.I.V6, 0}, {"to the host, IPv4, with others", ann4, own4, maxFilteredDumps},
	} {
		t.Run(c.name, func(t *testing.T) {
			narrowed := policy.Diff(wide, closed)
			for i := range c.others {
				narrowed = append(narrowed, policy.Narrowed{Addresses: []netip.Addr{netip.AddrFrom4([4]byte{100, 64, 9, byte(i)})}})
			}
			w.forget()
			w.do(func() error { w.p.filter.loaded = nil; return w.p.filter.remove() })
			w.do(func() error { return w.p.Enforce(context.Background(), closed) })
			n := w.fill(many, c.src, c.dst)
			debug.FreeOSMemory()
			if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0o200); err != nil {
				t.Skip("the peak of the memory can't be forgotten:", err)
			}
			before, _ := memory(t)
			start := time.Now()
			w.cut(closed, narrowed)
			took := time.Since(start)
			_, peak := memory(t)
			t.Logf("%d flows were cut in %v; the process grew from %d MB to %d MB", n, took, before>>20, peak>>20)
			if peak-before > most {
				t.Errorf("the process grew by %d MB", (peak-before)>>20)
			}
			left := len(w.conntrackOf(c.src))
			if want := map[bool]int{true: n}[c.dst == own4 || c.dst == own6]; left != want {
				t.Errorf("%d flows are left, want %d", left, want)
			}
		})
	}
}

// BenchmarkCut cuts a peer with flows to the host, which are closed one by one, and
// through it, which are deleted.
func BenchmarkCut(b *testing.B) {
	a := netlab.Addresses()
	for _, n := range []int{0, 10000, 187825} {
		for _, c := range []struct {
			name     string
			src, dst netip.Addr
		}{
			{"to-host-IPv4", ann4, own4}, {"to-host-IPv6", ann6, own6},
			{"through-host-IPv4", ann4, a.I.V4}, {"through-host-IPv6", ann6, a.I.V6},
			{"of-another-IPv4", bob4, own4}, {"of-another-IPv6", bob6, own6},
		} {
			b.Run(fmt.Sprintf("%s/flows=%d", c.name, n), func(b *testing.B) {
				g := newRig(b)
				g.open()
				defer g.close()
				wide := g.enforce(meshOf(grants{ann: all, bob: all}))
				closed := g.enforce(meshOf(grants{bob: all}))
				narrowed := policy.Diff(wide, closed)
				for b.Loop() {
					b.StopTimer()
					g.forget()
					g.do(func() error { g.p.filter.loaded = nil; return g.p.Enforce(context.Background(), closed) })
					g.fill(n, c.src, c.dst)
					b.StartTimer()
					g.do(func() error { return g.p.Cut(context.Background(), closed, narrowed) })
				}
			})
		}
	}
}

func TestReassembly(t *testing.T) {
	const v4, v6, ct6 = "ipv4/ipfrag_high_thresh", "ipv6/ip6frag_high_thresh", "netfilter/nf_conntrack_frag6_high_thresh"
	for name, c := range map[string]struct {
		values map[string]string
		want   int
	}{
		"default":      {map[string]string{v4: "4194304", v6: "4194304"}, 4 << 20},
		"less for one": {map[string]string{v4: "4194304", v6: "262144"}, 262144},
		"conntrack":    {map[string]string{v4: "4194304", v6: "4194304", ct6: "262144"}, 262144},
		"no IPv6":      {map[string]string{v4: "4194304"}, 4 << 20},
		"none":         {map[string]string{v4: "0", v6: "4194304"}, 1},
		"no number":    {map[string]string{v4: "much", v6: "4194304"}, 0},
		"unknown":      {nil, 0},
	} {
		dir := t.TempDir()
		for file, v := range c.values {
			if err := errors.Join(os.MkdirAll(filepath.Join(dir, filepath.Dir(file)), 0o700), os.WriteFile(filepath.Join(dir, file), []byte(v+"\n"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		p := &Backend{forward: &forwarding{sys: sysctls{dir}}}
		if got := p.Limits().Reassembly; got != c.want {
			t.Errorf("%s: %d bytes, want %d", name, got, c.want)
		}
	}
}

// TestFamiliesShareAQuarter opens ann's flows of both families to a server whose answers
// expire at the host, so neither ann nor the guard sees them: ann's conntrack entries
// stay within a quarter of the maximum, and don't grow when the server keeps all entries
// alive.
func TestFamiliesShareAQuarter(t *testing.T) {
	const states = 4096
	w := newWorld(t)
	w.open()
	defer w.close()
	w.pretend(map[string]string{flowMax: strconv.Itoa(states)})
	w.enforce(meshOf(grants{ann: all}))
	if most := w.p.Limits().PerPeer; most != states/4 {
		t.Fatalf("a peer may have %d entries, want %d", most, states/4)
	}
	const seenReply = 1 << 1 // IPS_SEEN_REPLY
	for round := range 2 {
		have, kept := 0, 0
		for i, ann := range []netip.Addr{ann4, ann6} {
			far := netip.AddrPortFrom(netlab.Addresses().I.List()[i], 5000)
			for port := range 2000 {
				w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann, uint16(1000+2000*round+port)), far, []byte("open")))
			}
			for _, e := range w.conntrackOf(ann) {
				w.send(netlab.Uplink, withTTL(netlab.UDPPacket(far, netip.AddrPortFrom(e.reply.dst, e.reply.dport), word(77)), 1))
			}
			w.settle(nil)
			for _, e := range w.conntrackOf(ann) {
				have++
				if e.status&seenReply != 0 {
					kept++
				}
			}
		}
		t.Logf("round %d: ann has %d entries of a quarter of %d, %d of them kept by the server", round, have, states/4, kept)
		if have > states/4 || have < states/4*9/10 {
			t.Errorf("round %d: ann has %d entries, want nearly %d", round, have, states/4)
		}
		if kept < have/2 {
			t.Errorf("round %d: the server keeps %d entries of %d, which proves little", round, kept, have)
		}
	}
	for _, c := range w.arrivals(word(77)) {
		if c.where == "mesh" {
			t.Fatal("an answer reached ann, so that the guard would see it")
		}
	}
}
