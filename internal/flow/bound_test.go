package flow

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// pfHost is the host of the test picture with a simulated pf that keeps states as the
// anchor does. Peer C has every permission, and a server on the internet cooperates with it.
type pfHost struct {
	*lab
	machine *pfsim.PF
	random  *rand.Rand
	ends    []*end
}

// end is one flow of C and the state of both its ends.
type end struct {
	proto    uint8
	other    netip.Addr
	port     uint16
	seq      [2]uint32 // next sequence number of C, and of the other end
	gateway  netip.AddrPort
	received int
	sent     time.Time // when C last sent
}

func newPFHost(t testing.TB, seed uint64, o Options) *pfHost {
	h := &pfHost{lab: newLab(t, 7, o), random: rand.New(rand.NewPCG(seed, 1))}
	h.machine = pfsim.NewPF(pfsim.Options{Rand: rand.New(rand.NewPCG(seed, 2)), StateLimit: 1 << 20})
	for name, address := range map[string]string{"utun7": "100.64.0.1/32", "en0": "203.0.113.9/24"} {
		h.machine.AddInterface(pfconf.Interface{Name: name, Addresses: []netip.Prefix{netip.MustParsePrefix(address)}})
	}
	options := "if-bound"
	for _, timeout := range Timeouts() {
		options += fmt.Sprintf(", %s %d", timeout.Name, timeout.Idle/time.Second)
	}
	keep := " flags any keep state (" + options + ")\n"
	rules, err := pfconf.Parse("nat on en0 inet from 100.64.0.3 to any -> 203.0.113.9\n" +
		"block drop quick on en0 inet from 100.64.0.3 to any\n" +
		"pass in quick on utun7 inet from 100.64.0.3 to any" + keep +
		"pass out quick on utun7 inet from 100.64.0.1 to any" + keep +
		"block drop out quick on utun7 all\nblock drop in quick on en0 all\n" +
		"pass out quick on en0 all" + keep)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.machine.LoadMain(rules); err != nil {
		t.Fatal(err)
	}
	if err := h.machine.Enable(); err != nil {
		t.Fatal(err)
	}
	return h
}

// wait advances the clocks of the flow table and of pf.
func (h *pfHost) wait(d time.Duration) {
	h.later(d)
	h.machine.Advance(d)
}

// pick returns a random one of values.
func pick[T any](r *rand.Rand, values ...T) T { return values[r.IntN(len(values))] }

// segment returns a packet with the TCP header fields that one end sends next: mostly
// correct ones, and sometimes ones that pf may refuse.
func (h *pfHost) segment(e *end, fromPeer bool) pfsim.Packet {
	from, to := 0, 1
	if !fromPeer {
		from, to = 1, 0
	}
	p := pfsim.Packet{Proto: pfconf.Proto(e.proto), Window: 65535}
	if e.proto != flowtest.TCP {
		return p
	}
	p.Flags = pick(h.random, pfconf.FlagSYN, pfconf.FlagSYN|pfconf.FlagACK, pfconf.FlagACK, pfconf.FlagACK, pfconf.FlagACK,
		pfconf.FlagFIN|pfconf.FlagACK, pfconf.FlagRST, pfconf.FlagRST|pfconf.FlagACK, pfconf.TCPFlags(0), pfconf.FlagFIN, pfconf.FlagSYN|pfconf.FlagFIN)
	if !fromPeer && p.Flags&(pfconf.FlagSYN|pfconf.FlagACK) == pfconf.FlagSYN {
		p.Flags |= pfconf.FlagACK
	}
	p.Seq, p.Ack = e.seq[from], e.seq[to]
	if p.Flags&pfconf.FlagACK == 0 {
		p.Ack = 0
	}
	if h.random.IntN(5) == 0 {
		p.Seq += pick[uint32](h.random, 1, ^uint32(0), 2000, 100_000, 1<<30, 1<<31)
	}
	if h.random.IntN(9) == 0 {
		p.Ack += pick[uint32](h.random, 1, ^uint32(0), 2000, 60_000, 1<<30)
	}
	if h.random.IntN(9) == 0 {
		p.Window = 0
	}
	if p.Flags&(pfconf.FlagSYN|pfconf.FlagFIN) != 0 && h.random.IntN(2) == 0 {
		e.seq[from] = p.Seq + 1
	}
	return p
}

// wire returns a packet of the flow as the guard sees it, in wire format.
func (e *end) wire(p pfsim.Packet, fromPeer bool) []byte {
	src, dst := at(flowtest.PeerC4, e.port), at(e.other, 443)
	if !fromPeer {
		src, dst = dst, src
	}
	switch e.proto {
	case flowtest.TCP:
		return flowtest.TCPSegment(src, dst, uint8(p.Flags), 0)
	case flowtest.UDP:
		return flowtest.Datagram(src, dst, 0)
	}
	return flowtest.Echo(src.Addr(), dst.Addr(), e.port, !fromPeer, 0)
}

// send has C send a packet.
func (h *pfHost) send(e *end) {
	p := h.segment(e, true)
	if h.judge(e.wire(p, true), FromPeer).Action != Pass {
		return
	}
	e.sent = h.clock
	p.Src, p.Dst, p.SrcPort, p.DstPort = flowtest.PeerC4, e.other, e.port, 443
	if e.proto == flowtest.ICMP {
		p.ICMPType, p.ICMPID, p.SrcPort, p.DstPort = 8, e.port, 0, 0
	}
	if e.other == flowtest.HostB4 {
		h.machine.Receive(p, "utun7")
		return
	}
	j := h.machine.Forward(p, "utun7", "en0")
	if j.Verdict != pfsim.VerdictPass {
		return
	}
	out := j.Packet()
	e.gateway = netip.AddrPortFrom(out.Src, out.SrcPort)
	if e.proto == flowtest.ICMP {
		e.gateway = netip.AddrPortFrom(out.Src, out.ICMPID)
	}
}

// answer has the other end send a packet. A packet from the internet may expire between the
// two interfaces, as its sender chooses the hop limit. The test does that only right after C
// sent, and never with a FIN or a SYN: by packets that don't reach the guard the server could
// keep pf's state at the uplink alive, or have pf recreate it, which the guard can't see;
// see phase.
func (h *pfHost) answer(e *end) {
	p := h.segment(e, false)
	p.Src, p.SrcPort = e.other, 443
	if e.other == flowtest.HostB4 {
		p.Dst, p.DstPort = flowtest.PeerC4, e.port
		if e.proto == flowtest.ICMP {
			p.ICMPID, p.SrcPort, p.DstPort = e.port, 0, 0
		}
		if h.machine.Send(p, "utun7").Verdict == pfsim.VerdictPass {
			h.arrive(e, p)
		}
		return
	}
	if !e.gateway.IsValid() {
		return
	}
	p.Dst, p.DstPort = e.gateway.Addr(), e.gateway.Port()
	if e.proto == flowtest.ICMP {
		p.ICMPID, p.SrcPort, p.DstPort = e.gateway.Port(), 0, 0
	}
	just := e.sent.Equal(h.clock)
	if !just && !slices.ContainsFunc(h.machine.States(), func(s pfsim.State) bool { return s.Interface == "utun7" && s.Ext.Port() == e.port }) {
		return // the packet wouldn't get past en0
	}
	if just && h.random.IntN(3) == 0 && p.Flags&pfconf.FlagFIN == 0 {
		h.machine.Receive(p, "en0")
		return
	}
	if h.machine.Forward(p, "en0", "utun7").Verdict == pfsim.VerdictPass {
		h.arrive(e, p)
	}
}

func (h *pfHost) arrive(e *end, p pfsim.Packet) {
	e.received++
	h.judge(e.wire(p, false), ToPeer)
}

// TestGuardHoldsWhatPFHolds has a hostile peer and a hostile server, which know all sequence
// numbers, try to make pf hold more states than the guard counts: by segments that pf doesn't
// accept, answers that expire between pf and the guard, connections opened again, and
// pauses of any length. pf removes an expired state up to 10 s late, so the count of pf is
// compared with the flows that the guard still has 10 s later.
func TestGuardHoldsWhatPFHolds(t *testing.T) {
	runs, steps := 300, 400
	if testing.Short() {
		runs = 60
	}
	most, received := 0, 0
	for seed := range uint64(runs) {
		h := newPFHost(t, seed, Options{States: 10_000, PerForwarded: 2})
		for port := range uint16(3) {
			for _, other := range []netip.Addr{flowtest.Net4, flowtest.HostB4} {
				for _, proto := range []uint8{flowtest.TCP, flowtest.TCP, flowtest.UDP, flowtest.ICMP} {
					h.ends = append(h.ends, &end{proto: proto, other: other, port: 1000 + port + uint16(len(h.ends)), seq: [2]uint32{1000, 5000}})
				}
			}
		}
		h.ends = h.ends[:1+h.random.IntN(len(h.ends))]
		var trace []string
		for range steps {
			e := pick(h.random, h.ends...)
			switch n := h.random.IntN(20); {
			case n < 10:
				h.send(e)
			case n < 17:
				h.answer(e)
			case n < 18:
				h.wait(time.Duration(h.random.IntN(15000)) * time.Millisecond)
			default:
				h.wait(pick[time.Duration](h.random, 1, 9, 11, 29, 31, 44, 46, 59, 61, 89, 239, 241, 299, 301, 7000, 7441) * time.Second)
			}
			held, states := h.held(10*time.Second), h.states()
			if most = max(most, states); states > held {
				for _, s := range h.machine.States() {
					trace = append(trace, s.String())
				}
				for _, e := range h.view.shares[0].flows {
					trace = append(trace, fmt.Sprintf("%+v phase %d, timeout %v", e.name().tuple(FromPeer), e.load().phase(), e.load().timeout()))
				}
				t.Fatalf("seed %d: pf holds %d states, the guard counts %d:\n%s", seed, states, held, strings.Join(trace, "\n"))
			}
		}
		for _, e := range h.ends {
			received += e.received
		}
	}
	t.Logf("at most %d states at once; %d answers received", most, received)
	if most == 0 || received == 0 {
		t.Error("pf held no state or no answer arrived, so the test shows nothing")
	}
}

// states returns how many states pf holds that C's packets created. States of flows that the
// host opened don't count: the host determines their number, and an answer of C creates a
// state only where pf has forgotten that of the request.
func (h *pfHost) states() (n int) {
	byHost := make(map[uint16]bool)
	for k, e := range h.view.shares[0].flows {
		byHost[k.tuple(FromPeer).fromPort] = e.load().is(stateByHost)
	}
	for _, s := range h.machine.States() {
		peer := s.Ext
		if s.Interface == "en0" {
			peer = s.Lan
		} else if s.Direction == pfconf.Out {
			continue
		}
		if !byHost[peer.Port()] {
			n++
		}
	}
	return n
}

// held returns the number of states that the guard counts for those flows of C that haven't
// expired at the given time from now.
func (h *pfHost) held(after time.Duration) (n int) {
	now := h.table.Now() + Instant(after/time.Millisecond)
	for _, e := range h.view.shares[0].flows {
		if !e.expired(e.load(), now) {
			n += h.view.shares[0].cost(e.load())
		}
	}
	return n
}
