package trial

// Packets that must never pass, sent all the time during another test.

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// shot is a packet that must never get past B, however often it is sent.
type shot struct {
	by     *netlab.Host
	link   string         // the packet is forged on this link
	packet []byte         // the IP packet to forge
	to     netip.AddrPort // instead of link and packet: the destination of B's own socket
	token  string
	reason string
	clear  []string // hosts that may see it: those before B, and the destination
}

// prober sends its shots again and again, bypassing the senders' own routes and filters,
// whatever happens to B meanwhile.
type prober struct {
	m     *Mesh
	ctx   context.Context // ends with the test
	own   *net.UDPConn    // B's own socket, as one of its programs has
	sent  atomic.Int64
	round atomic.Int64

	mu    sync.Mutex
	shots []shot
	clear bool   // whether B's own shots are sent, which a running helper blocks
	all   []shot // the current and earlier shots
}

// between is the prober's pause after a round.
const between = 3 * time.Millisecond

// startProber starts sending, until the test ends.
func startProber(t *testing.T, m *Mesh) *prober {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &prober{m: m, ctx: ctx}
	err := m.B.Do(func() (err error) {
		p.own, err = net.ListenUDP("udp", nil)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var run errgroup.Group
	t.Cleanup(func() {
		cancel()
		run.Wait()
		p.own.Close()
	})
	run.Go(func() error {
		for ctx.Err() == nil {
			p.fire()
		}
		return nil
	})
	return p
}

func (p *prober) fire() {
	p.mu.Lock()
	shots, clear := p.shots, p.clear
	p.mu.Unlock()
	for _, s := range shots {
		if s.by == p.m.B && !clear {
			continue
		}
		// An error reflects B's current state: its interface is missing, or the kernel
		// refuses. The test only counts packets that were sent and arrive.
		if s.by == p.m.B {
			_, _ = p.own.WriteToUDPAddrPort([]byte(s.token), s.to)
		} else {
			_ = s.by.Forge(s.link, s.packet)
		}
		p.sent.Add(1)
	}
	p.round.Add(1)
	time.Sleep(between)
}

// set replaces the shots.
func (p *prober) set(shots []shot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shots = slices.Clip(shots)
	p.all = append(p.all, shots...)
}

// fresh replaces the shots and forgets earlier leaks.
func (p *prober) fresh(shots []shot) {
	p.mu.Lock()
	p.all = nil
	p.mu.Unlock()
	p.set(shots)
}

// add adds shots.
func (p *prober) add(shots ...shot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shots = slices.Clip(append(slices.Clip(p.shots), shots...))
	p.all = append(p.all, shots...)
}

// guarded sets whether B is protected, by a running helper or one that was killed: then
// B's own packets to peers must not leave unencrypted either. It returns once no round
// with the old value is running.
func (p *prober) guarded(is bool) {
	p.mu.Lock()
	p.clear = is
	p.mu.Unlock()
	for end := p.round.Load() + 2; p.round.Load() < end && p.ctx.Err() == nil; {
		time.Sleep(time.Millisecond)
	}
}

// rounds waits until all shots were sent n more times.
func (p *prober) rounds(t *testing.T, n int64) {
	t.Helper()
	for end, until := p.round.Load()+n+1, time.Now().Add(generous); p.round.Load() < end; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the prober doesn't complete its rounds")
		}
	}
}

// leaks lists the shots that a host other than their destination received. The guard also
// checks what a peer sent or received; the rest depends on the packet filter alone, which
// another program can remove.
func (p *prober) leaks() (ofPeers, ofOthers []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.all {
		by, served := p.m.Lab.Saw(s.token)
		by = slices.DeleteFunc(by, func(name string) bool { return name == "B" || slices.Contains(s.clear, name) })
		if len(by) == 0 && !served {
			continue
		}
		leak := fmt.Sprintf("%s: sent by %s, received by %v, served=%t", s.reason, s.by.Name, by, served)
		if s.link == "wg0" || slices.ContainsFunc(by, func(name string) bool { return p.m.Peers[name] != nil }) {
			ofPeers = append(ofPeers, leak)
		} else {
			ofOthers = append(ofOthers, leak)
		}
	}
	return ofPeers, ofOthers
}

// mustHold fails the test if a shot leaked.
func (p *prober) mustHold(t *testing.T, when string) {
	t.Helper()
	ofPeers, ofOthers := p.leaks()
	if leaks := append(ofPeers, ofOthers...); len(leaks) > 0 {
		t.Fatalf("%s: %d leaks:\n%s", when, len(leaks), strings.Join(leaks, "\n"))
	}
}

// never returns the packets that must not pass whether or not C may route, where C may
// neither connect nor reach the LAN. transit adds the transit of other hosts.
func (p *prober) never(own netlab.Pair, transit bool) (shots []shot) {
	m, at := p.m, netlab.Addresses()
	unassigned := netlab.Pair{V4: netip.MustParseAddr("100.64.1.1"), V6: netip.MustParseAddr("fd6d:6573:6800::1:1")}
	a, c, d := m.Peers["A"].Addresses, m.Peers["C"].Addresses, m.Peers["D"].Addresses
	type aim struct {
		by     *netlab.Host
		link   string
		src    netlab.Pair
		to     []netlab.Pair
		reason string
	}
	aims := []aim{
		{m.C, "wg0", c, []netlab.Pair{a, d, own, at.BLAN, at.BUplink, at.BPublic, at.L, at.P, at.Behind, at.VPNPeer, at.Metadata, unassigned}, "C without permission"},
		{m.C, "wg0", a, []netlab.Pair{at.I, at.L, own}, "C as A"},
		{m.L, "eth0", at.L, []netlab.Pair{a, c, d, own, unassigned}, "L to the mesh"},
		{m.L, "eth0", c, []netlab.Pair{at.I, a, own}, "L as C"},
		{m.W, "b0", at.W, []netlab.Pair{a, c, own, unassigned}, "W to the mesh"},
		{m.W, "b0", c, []netlab.Pair{at.L, d, own}, "W as C"},
		{m.I, "eth0", at.I, []netlab.Pair{a, c, own}, "I to the mesh"},
	}
	if transit {
		aims = append(aims, aim{m.L, "eth0", at.L, []netlab.Pair{at.I}, "transit from L"}, aim{m.W, "b0", at.W, []netlab.Pair{at.L}, "transit from W"})
	}
	for _, a := range aims {
		for _, to := range a.to {
			more := p.aim(a.by, a.link, a.src, to, a.reason)
			for i := range more {
				// B's own answer to an accepted packet of C goes to C.
				if a.src == c && to == own && a.link != "wg0" {
					more[i].clear = append(slices.Clone(more[i].clear), "C")
				}
			}
			shots = append(shots, more...)
		}
	}
	for _, name := range []string{"A", "C", "D"} {
		for _, addr := range m.Peers[name].Addresses.List() {
			shots = append(shots, shot{by: m.B, to: netip.AddrPortFrom(addr, 4711), token: m.Lab.Token(),
				reason: "B to " + name + " in clear", clear: []string{name}})
		}
	}
	return shots
}

// aim returns shots at an address, in both families, by UDP and ping.
func (p *prober) aim(by *netlab.Host, link string, src, to netlab.Pair, reason string) (shots []shot) {
	for i, dst := range to.List() {
		for _, proto := range []netlab.Proto{netlab.UDP, netlab.ICMP} {
			// Each sender has its own port: an answer to one must not open a way for
			// another.
			port := 4700 + uint16(by.Name[0])
			f := forgery{by: by, link: link, proto: proto, src: netip.AddrPortFrom(src.List()[i], port),
				dst: netip.AddrPortFrom(dst, netlab.EchoPort), token: p.m.Lab.Token()}
			shots = append(shots, shot{by: by, link: link, packet: f.packet(), token: f.token,
				reason: fmt.Sprintf("%s, %s to %s by %s", reason, f.src.Addr(), dst, proto), clear: before[by.Name]})
		}
	}
	return shots
}
