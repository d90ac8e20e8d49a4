package pfsim

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
)

// fuzzHosts are few so that packets answer each other: IPv4, then IPv6.
var fuzzHosts = [2][]string{
	{"192.0.2.10", "100.64.0.5", "100.64.0.6", "198.51.100.1", "10.1.1.9", "255.255.255.255", "0.0.0.0"},
	{"2001:db8:2::10", "fd6d::5", "2001:db8::1", "fe80::1", "::"},
}

var fuzzInterfaces = []string{"en0", "utun7", "en1", "en0", "utun7", "en1", "lo0", "en9"}

// A byteReader reads numbers from fuzzed bytes, and zeros after their end.
type byteReader struct{ b []byte }

func (r *byteReader) byte() byte {
	if len(r.b) == 0 {
		return 0
	}
	c := r.b[0]
	r.b = r.b[1:]
	return c
}

func (r *byteReader) pick(n int) int { return int(r.byte()) % n }

func (r *byteReader) uint16() uint16 { return uint16(r.byte())<<8 | uint16(r.byte()) }

func (r *byteReader) host(family int) netip.Addr {
	return netip.MustParseAddr(fuzzHosts[family][r.pick(len(fuzzHosts[family]))])
}

// any returns a host of either family.
func (r *byteReader) any() netip.Addr { return r.host(r.pick(2)) }

// packet draws a packet, or an error about the one before. Ports and numbers are few for
// the same reason as hosts. Some packets have addresses of no family.
func (r *byteReader) packet(last Packet) Packet {
	mix := r.byte()
	from, to := int(mix&1), int(mix&1)
	if mix > 250 {
		to = 1 - from
	}
	p := Packet{
		Src: r.host(from), Dst: r.host(to),
		Proto:   []pfconf.Proto{pfconf.ProtoTCP, pfconf.ProtoUDP, pfconf.ProtoICMP, pfconf.ProtoICMPv6, protoESP, protoGRE, 0, 255}[r.pick(8)],
		SrcPort: uint16(r.pick(4)) * 250, DstPort: uint16(r.pick(4)) * 250,
		Flags: pfconf.TCPFlags(r.byte()), Seq: uint32(r.pick(3)) * 1000, Ack: uint32(r.pick(3)) * 1000,
		Window: r.uint16(), Scale: r.byte(), Len: uint32(r.byte()),
		ICMPType: uint8(r.pick(16)), ICMPCode: uint8(r.pick(4)), ICMPID: uint16(r.pick(3)), SPI: uint32(r.pick(3)),
	}
	odd := r.byte()
	p.HasScale, p.Options, p.Fragment, p.DontFragment = odd&1 != 0, odd&14 == 14, odd&0x70 == 0x70, odd&0x80 != 0
	if p.Fragment {
		at := r.byte()
		p.FragmentID, p.FragmentOffset = uint32(at&1), uint16(at>>1&7)*24
		p.FragmentLen, p.MoreFragments = uint16(r.pick(4))*24, at&0x30 != 0
		p.DontFragment = at&0xc0 == 0
		if odd := r.byte(); odd < 20 {
			p.FragmentLen += uint16(odd)
		}
	}
	if p.Proto == pfconf.ProtoICMP || p.Proto == pfconf.ProtoICMPv6 {
		p.Quoted = &Quoted{
			Src: last.Src, Dst: last.Dst, Proto: last.Proto, SrcPort: last.SrcPort, DstPort: last.DstPort,
			Seq: last.Seq + uint32(r.byte()), ICMPID: last.ICMPID, Later: odd == 0,
		}
		p.Dst = last.Src
	}
	return p
}

// runFuzzed runs the operations that the bytes encode on a machine.
func runFuzzed(t testing.TB, m *PF, r *byteReader) {
	var last Packet
	for steps := 0; len(r.b) > 0 && steps < 200; steps++ {
		in, out := fuzzInterfaces[r.pick(len(fuzzInterfaces))], fuzzInterfaces[r.pick(len(fuzzInterfaces))]
		switch r.pick(40) {
		case 0:
			m.Advance(time.Duration(r.byte()) * time.Second)
		case 1:
			m.KillStates(netip.PrefixFrom(r.any(), r.pick(140)), netip.Prefix{})
		case 2:
			_, _ = m.AddToTable("a", "t", []pfconf.Address{{Kind: pfconf.AddrPrefix, Prefix: netip.PrefixFrom(r.any(), r.pick(140)), Not: r.byte()&1 == 0}})
		case 3:
			_, _ = m.DeleteFromTable("a", "t", []pfconf.Address{{Kind: pfconf.AddrPrefix, Prefix: netip.PrefixFrom(r.any(), r.pick(140))}})
		case 4:
			_ = m.AddAddress(in, netip.PrefixFrom(r.any(), r.pick(140)))
		case 5:
			_ = m.DeleteAddress(in, r.any())
		case 6:
			m.FlushRules("a")
		case 7:
			m.FlushNat("")
		case 8, 9, 10, 11, 12, 13, 14, 15, 16:
			in, out = out, in
			last = back(last)
			last.Flags = pfconf.TCPFlags(r.byte())
			last = checkJudgement(t, last, m.Forward(last, in, out))
		default:
			last = r.packet(last)
			last = checkJudgement(t, last, m.Forward(last, in, out))
		}
	}
}

// checkJudgement checks that a judgement's fields agree, and returns the packet as it
// left.
func checkJudgement(t testing.TB, p Packet, j Judgement) Packet {
	h := &j.In
	if j.Out.Seen {
		h = &j.Out
	}
	if h.Verdict != j.Verdict || h.Pass() != (j.Verdict == VerdictPass) || j.Out.Seen != j.In.Pass() {
		t.Fatalf("%s: the judgement contradicts itself: %+v", p, j)
	}
	for _, h := range []*Hook{&j.In, &j.Out} {
		if h.Seen && (h.Rule != nil) != (h.Decider == DecidedByRule) {
			t.Fatalf("%s: decided by %d with rule %v", p, h.Decider, h.Rule)
		}
	}
	if j.Verdict != VerdictPass {
		return p
	}
	if q := j.Packet(); q.Src.Is4() == p.Src.Is4() && q.Dst.Is4() == p.Dst.Is4() && q.Proto == p.Proto {
		return q
	}
	t.Fatalf("%s left as %s", p, j.Packet())
	return p
}

// checkMachine checks the invariants of a machine.
func checkMachine(t testing.TB, m *PF) {
	n, used := 0, map[*crule]int{}
	for s := m.states.first; s != nil; s = s.next {
		n++
		if m.states.inside[s.key.inside()] != s.key {
			t.Fatalf("state %s can't be found from inside", m.describe(s))
		}
		for _, r := range []*crule{s.rule, s.nat, s.anchor} {
			if r != nil {
				used[r]++
			}
		}
	}
	if n != m.states.n || n > m.limits.states+1 || n != len(m.States()) {
		t.Fatalf("%d states in the list, %d counted, limit %d", n, m.states.n, m.limits.states)
	}
	checkSources(t, m)
	pieces := 0
	for key, d := range m.fragments {
		if pieces += len(d.pieces); d.key != key || len(d.pieces) == 0 {
			t.Fatalf("datagram %+v under %+v", d, key)
		}
	}
	if pieces != m.pieces || pieces > m.limits.fragments+1 {
		t.Fatalf("%d pieces wait, %d counted, limit %d", pieces, m.pieces, m.limits.fragments)
	}
	for r, n := range used {
		if r.states != n {
			t.Fatalf("rule %v has %d states, counts %d", r.rule, n, r.states)
		}
	}
	for _, side := range []map[lookupKey]*stateKey{m.states.inside, m.states.outside} {
		for k, sk := range side {
			if len(sk.states) == 0 {
				t.Fatalf("key %+v has no state", k)
			}
		}
	}
	for k, tb := range m.tables {
		if tb.flags&tableSetFlags == 0 || tb.key != k || tb.rules < 0 || tb.anchors < 0 {
			t.Fatalf("table %+v: flags %x, %d rules, %d anchors", k, tb.flags, tb.rules, tb.anchors)
		}
	}
}

// checkSources compares the counts of source nodes with the states.
func checkSources(t testing.TB, m *PF) {
	states, conns := map[*sourceNode]int{}, map[*sourceNode]int{}
	for s := m.states.first; s != nil; s = s.next {
		if s.source == nil {
			continue
		}
		if states[s.source]++; s.established {
			conns[s.source]++
		}
	}
	for key, n := range m.sources {
		if n.key != key || n.states != states[n] || n.conn != conns[n] || n.states == 0 && !n.idle {
			t.Fatalf("source %+v: %d states, counts %+v", key, states[n], n)
		}
		delete(states, n)
	}
	if len(states) > 0 || len(m.sources) > m.limits.sources+1 {
		t.Fatalf("%d states are of forgotten sources; %d sources, limit %d", len(states), len(m.sources), m.limits.sources)
	}
}

// checkEmptied removes everything from a machine and checks that nothing is left.
func checkEmptied(t testing.TB, m *PF) {
	m.FlushStates()
	for _, a := range []string{"", "a", "a/b"} {
		m.FlushAll(a)
	}
	m.Advance(time.Hour)
	checkMachine(t, m)
	if len(m.sources)+len(m.fragments)+m.pieces != 0 {
		t.Fatalf("an emptied machine has %d sources and %d datagrams", len(m.sources), len(m.fragments))
	}
	if len(m.states.inside)+len(m.states.outside)+len(m.states.bindings) != 0 || m.states.looseUDP != 0 {
		t.Fatalf("an emptied machine has %d keys inside, %d outside, %d bindings", len(m.states.inside), len(m.states.outside), len(m.states.bindings))
	}
	if m.fallback.states != 0 {
		t.Fatalf("the default rule counts %d states", m.fallback.states)
	}
}

var fuzzRulesets = []struct{ main, anchor string }{
	{stockMain, ""},
	{"anchor \"a\"\nblock all\n", "anchor \"/a\"\nanchor \"b/*\"\npass quick proto tcp\n"},
	{"scrub-anchor \"a\"\nnat-anchor \"a\"\nrdr-anchor \"a\"\nbinat-anchor \"a\"\nanchor \"a\"\n", `table <t> { 10.0.0.0/8 !10.1.1.0/24 fd6d::/32 }
scrub in all fragment crop
nat on en0 inet from 100.64.0.0/10 to any -> { (en0), 203.0.113.0/30 }
nat on en0 inet6 from any to any -> (en0)
binat on en1 inet from 100.64.0.6 to any -> 10.1.1.77
rdr on en0 inet proto { tcp udp } from any to any port 250 -> { 100.64.0.5, 100.64.0.6 } port 500
block in from <t> to any
pass out keep state (if-bound)
pass in proto tcp to port 250:750 modulate state (max 3) tag A
pass in inet6 proto icmp6 all
block return in proto udp from any to ! <t> tagged A
`},
	{"set state-policy if-bound\nset limit states 20\nset timeout { udp.first 1, adaptive.start 2, adaptive.end 30 }\ntable <t> { 203.0.113.0/29 !203.0.113.4 }\nnat on en0 inet from any to any -> <t>\npass all allow-opts\n", "table <t> persist\n"},
	{"set limit states 20\nnat on { en0 en1 utun7 } inet proto tcp from any to any -> 192.0.2.10 port 1000:1002\nnat on en0 from any to any -> (en0)\nnat on en0 inet from any to any -> 192.0.2.10\nrdr inet proto { tcp, udp } from any to any port 250 -> 10.1.1.9 port 500:*\npass all\n", ""},
	{`set limit { src-nodes 3, frags 9 }
set timeout { src.track 5, frag 7 }
table <bad> persist
scrub on en0 no-df
scrub in on utun7
pass all flags any keep state (source-track global, max-src-states 3)
pass proto tcp to port 250 flags any keep state (max-src-conn 2, max-src-conn-rate 3/9, overload <bad> flush global)
pass proto udp to port 250 keep state (source-track rule, max-src-nodes 2, max-src-states 2, src.track 9)
block return log from <bad>
anchor "a"
`, "pass out quick proto tcp flags any keep state (max-src-conn 1, overload <worse> flush)\n"},
}

// FuzzMachine loads two texts and runs the operations that the bytes encode. Nothing may
// panic, hang or break an invariant of the machine.
func FuzzMachine(f *testing.F) {
	for i, r := range fuzzRulesets {
		f.Add(r.main, r.anchor, fuzzBytes(uint64(i), 400))
	}
	f.Fuzz(func(t *testing.T, main, anchor string, data []byte) {
		if len(main)+len(anchor) > 4096 {
			t.Skip("longer texts only make the parser slower")
		}
		runTexts(t, main, anchor, data)
	})
}

func runTexts(t testing.TB, main, anchor string, data []byte) {
	m := machineHost(t, "")
	r := packetRun{m: m}
	_ = r.load("a", anchor)
	_ = r.load("a/b", anchor)
	_ = r.load("", main)
	half := len(data) / 2
	runFuzzed(t, m, &byteReader{data[:half]})
	checkMachine(t, m)
	_ = r.load("a", main)
	runFuzzed(t, m, &byteReader{data[half:]})
	checkMachine(t, m)
	checkEmptied(t, m)
}

func fuzzBytes(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 99))
	b := make([]byte, n+8)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b[:n]
}

// TestMachineHoldsTogether sends many random packets through rulesets of every kind, and
// checks the machine's invariants.
func TestMachineHoldsTogether(t *testing.T) {
	for i, r := range fuzzRulesets {
		m := machineHost(t, r.main)
		mustLoad(t, m, "a", r.anchor)
		for seed := range uint64(40) {
			runTexts(t, r.main, r.anchor, fuzzBytes(seed<<8|uint64(i), 4000))
		}
	}
}
