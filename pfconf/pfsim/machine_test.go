package pfsim

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/internal/vectors"
)

// machineHost returns an enabled machine with an uplink en0, a LAN en1 and a tunnel
// utun7, and a main ruleset.
func machineHost(t testing.TB, main string) *PF {
	t.Helper()
	m := NewPF(Options{})
	for _, i := range []struct{ name, v4, v6 string }{
		{"lo0", "127.0.0.1/8", "::1/128"},
		{"en0", "192.0.2.10/24", "2001:db8:2::10/64"},
		{"en1", "10.1.1.1/24", "fd00:1::1/64"},
		{"utun7", "100.64.0.1/10", "fd6d::1/48"},
	} {
		m.AddInterface(pfconf.Interface{Name: i.name, Addresses: []netip.Prefix{netip.MustParsePrefix(i.v4), netip.MustParsePrefix(i.v6)}})
	}
	mustLoad(t, m, "", main)
	if err := m.Enable(); err != nil {
		t.Fatal(err)
	}
	return m
}

// udp, tcp and plain return packets with addresses given as text.
func udp(src string, sport uint16, dst string, dport uint16) Packet {
	return Packet{Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), Proto: pfconf.ProtoUDP, SrcPort: sport, DstPort: dport, Len: 8}
}

func tcp(src string, sport uint16, dst string, dport uint16, f pfconf.TCPFlags, seq, ack uint32) Packet {
	p := udp(src, sport, dst, dport)
	p.Proto, p.Flags, p.Seq, p.Ack, p.Window, p.Len = pfconf.ProtoTCP, f, seq, ack, 65535, 0
	return p
}

func plain(proto pfconf.Proto, src, dst string) Packet {
	p := udp(src, 0, dst, 0)
	p.Proto, p.Len = proto, 0
	return p
}

// back returns the answer to a packet that left the host.
func back(p Packet) Packet {
	p.Src, p.Dst, p.SrcPort, p.DstPort, p.Tag = p.Dst, p.Src, p.DstPort, p.SrcPort, ""
	return p
}

// wantVerdict checks one verdict.
func wantVerdict(t *testing.T, what string, j Judgement, want Verdict, use StateUse) {
	t.Helper()
	h := &j.In
	if j.Out.Seen {
		h = &j.Out
	}
	if j.Verdict != want || h.State != use {
		t.Errorf("%s: %s, state %s, want %s, state %s", what, j.Verdict, h.State, want, use)
	}
}

func TestNewMachineIsOff(t *testing.T) {
	m := NewPF(Options{})
	p := udp("192.0.2.1", 1, "192.0.2.2", 2)
	if j := m.Receive(p, "en0"); j.Verdict != VerdictPass || j.In.Decider != DecidedBySkip {
		t.Errorf("off: %+v", j)
	}
	if err := m.Disable(); !errors.Is(err, ErrDisabled) {
		t.Errorf("disable: %v", err)
	}
	if err := m.Enable(); err != nil || !m.Enabled() {
		t.Errorf("enable: %v", err)
	}
	if err := m.Enable(); !errors.Is(err, ErrEnabled) {
		t.Errorf("enable twice: %v", err)
	}
	if j := m.Receive(p, "en0"); j.Verdict != VerdictDrop || j.In.Decider != DecidedByForm {
		t.Errorf("unknown interface: %+v", j)
	}
	if err := m.Disable(); err != nil || m.Enabled() {
		t.Errorf("disable: %v", err)
	}
}

// TestMalformed checks that packets that no IP header can describe are dropped unjudged.
func TestMalformed(t *testing.T) {
	m := machineHost(t, "pass all\n")
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, p := range []Packet{
		{},
		{Src: v4, Dst: v6, Proto: pfconf.ProtoUDP, SrcPort: 1, DstPort: 2},
		{Src: netip.AddrFrom16(v4.As16()), Dst: v6, Proto: pfconf.ProtoUDP, SrcPort: 1, DstPort: 2},
		{Src: v4, Dst: v4, Proto: pfconf.ProtoUDP, DstPort: 2},
		{Src: v4, Dst: v4, Proto: pfconf.ProtoTCP, SrcPort: 2},
	} {
		if j := m.Receive(p, "en0"); j.Verdict != VerdictDrop || j.In.Decider != DecidedByForm {
			t.Errorf("%+v: %+v", p, j)
		}
	}
}

func TestInterfacesComeAndGo(t *testing.T) {
	m := machineHost(t, "set skip on utun7\nblock all label \"r\"\npass in on en1 from any to (en1) no state\n")
	if got := m.Skipped(); !slices.Equal(got, []string{"utun7"}) {
		t.Errorf("skipped: %v", got)
	}
	p := udp("10.1.1.9", 1, "10.1.1.1", 2)
	if j := m.Receive(p, "en1"); j.Verdict != VerdictPass {
		t.Errorf("to (en1): %s", j.Verdict)
	}
	if err := m.RemoveInterface("en1"); err != nil {
		t.Fatal(err)
	}
	if j := m.Receive(p, "en1"); j.Verdict != VerdictDrop {
		t.Errorf("on an interface that is gone: %s", j.Verdict)
	}
	for _, err := range []error{m.RemoveInterface("en1"), m.AddAddress("en1", netip.MustParsePrefix("10.9.9.9/8")), m.DeleteAddress("en1", netip.MustParseAddr("10.9.9.9"))} {
		if !errors.Is(err, ErrNoInterface) {
			t.Errorf("got %v, want ErrNoInterface", err)
		}
	}
	m.AddInterface(pfconf.Interface{Name: "en1", Addresses: []netip.Prefix{netip.MustParsePrefix("10.2.2.2/24")}})
	if j := m.Receive(p, "en1"); j.Verdict != VerdictDrop {
		t.Errorf("to an old address: %s", j.Verdict)
	}
	p.Dst = netip.MustParseAddr("10.2.2.2")
	if j := m.Receive(p, "en1"); j.Verdict != VerdictPass {
		t.Errorf("to the new address: %s", j.Verdict)
	}
	if got := len(m.Interfaces()); got != 4 {
		t.Errorf("%d interfaces", got)
	}
}

// TestDynamicAddresses checks which addresses (if) with its modifiers stands for.
func TestDynamicAddresses(t *testing.T) {
	for _, c := range []struct {
		address string
		in, out []string
	}{
		{"(en1)", []string{"10.1.1.1", "10.1.1.2", "fd00:1::1"}, []string{"10.1.1.9", "fe80::1"}},
		{"(en1:0)", []string{"10.1.1.1", "fd00:1::1"}, []string{"10.1.1.2"}},
		{"(en1:network)", []string{"10.1.1.9", "fd00:1::9"}, []string{"10.1.2.9", "fe80::1"}},
		{"(en1:broadcast)", []string{"10.1.1.255"}, []string{"10.1.1.1", "fd00:1::1"}},
		{"(en1:peer)", nil, []string{"10.1.1.1", "fd00:1::1"}},
		{"(utun7:broadcast)", nil, []string{"100.127.255.255"}},
		{"(en1)/16", []string{"10.1.200.9", "fd00:2::1"}, []string{"10.2.1.1"}},
		{"(self)", nil, []string{"10.1.1.1", "192.0.2.10"}},
		{"(en9)", nil, []string{"10.1.1.1"}},
	} {
		m := machineHost(t, "block all\npass in on en0 from any to "+c.address+" no state\n")
		for _, a := range []string{"10.1.1.2/24", "fe80::1/64"} {
			if err := m.AddAddress("en1", netip.MustParsePrefix(a)); err != nil {
				t.Fatal(err)
			}
		}
		for want, addrs := range map[Verdict][]string{VerdictPass: c.in, VerdictDrop: c.out} {
			for _, a := range addrs {
				src := "198.51.100.1"
				if strings.Contains(a, ":") {
					src = "2001:db8::1"
				}
				if j := m.Receive(udp(src, 1, a, 2), "en0"); j.Verdict != want {
					t.Errorf("%s: %s is %s", c.address, a, j.Verdict)
				}
			}
		}
	}
}

func TestAddressRange(t *testing.T) {
	m := machineHost(t, "block in from 10.0.0.5 - 10.0.0.9 to any\n")
	for a, want := range map[string]Verdict{"10.0.0.4": VerdictPass, "10.0.0.5": VerdictDrop, "10.0.0.9": VerdictDrop, "10.0.0.10": VerdictPass} {
		if j := m.Receive(udp(a, 1, "10.1.1.1", 2), "en1"); j.Verdict != want {
			t.Errorf("%s: %s", a, j.Verdict)
		}
	}
}

// TestConnectionReuse checks that a SYN with the ports of a connection that was reset
// makes a new state.
func TestConnectionReuse(t *testing.T) {
	m := machineHost(t, "block all\npass in on en0 proto tcp to port 22\n")
	syn := tcp("198.51.100.1", 4000, "192.0.2.10", 22, pfconf.FlagSYN, 1000, 0)
	wantVerdict(t, "syn", m.Receive(syn, "en0"), VerdictPass, StateCreated)
	wantVerdict(t, "answer", m.Send(tcp("192.0.2.10", 22, "198.51.100.1", 4000, pfconf.FlagSYN|pfconf.FlagACK, 5000, 1001), "en0"), VerdictPass, StateMatched)
	wantVerdict(t, "reset", m.Receive(tcp("198.51.100.1", 4000, "192.0.2.10", 22, pfconf.FlagRST, 1001, 0), "en0"), VerdictPass, StateMatched)
	syn.Seq = 900000
	wantVerdict(t, "syn again", m.Receive(syn, "en0"), VerdictPass, StateCreated)
	if m.StateCount() != 1 {
		t.Errorf("%d states", m.StateCount())
	}
}

// TestHandshakeMismatch checks that an answer that doesn't fit the SYN is reset, and that
// the right one still passes.
func TestHandshakeMismatch(t *testing.T) {
	m := machineHost(t, "pass all\n")
	wantVerdict(t, "syn", m.Receive(tcp("198.51.100.1", 4000, "192.0.2.10", 22, pfconf.FlagSYN, 1000, 0), "en0"), VerdictPass, StateCreated)
	answer := tcp("192.0.2.10", 22, "198.51.100.1", 4000, pfconf.FlagSYN|pfconf.FlagACK, 5000, 1001)
	wantVerdict(t, "answer", m.Send(answer, "en0"), VerdictPass, StateMatched)
	stray := answer
	stray.Seq, stray.Ack, stray.Len = 900000000, 800000000, 1
	j := m.Send(stray, "en0")
	if j.Verdict == VerdictPass || j.Out.Decider != DecidedByProtocol {
		t.Errorf("stray answer: %s by %d", j.Verdict, j.Out.Decider)
	}
}

// TestWindowScale checks that the window is known if both ends scale, and that the kernel
// otherwise assumes the largest.
func TestWindowScale(t *testing.T) {
	for _, c := range []struct {
		name           string
		client, server bool
		far            Verdict
	}{
		{"both", true, true, VerdictDrop},
		{"client only", true, false, VerdictPass},
		{"neither", false, false, VerdictPass},
	} {
		m := machineHost(t, "pass all\n")
		syn := tcp("198.51.100.1", 4000, "192.0.2.10", 22, pfconf.FlagSYN, 1000, 0)
		syn.HasScale, syn.Scale = c.client, 7
		m.Receive(syn, "en0")
		answer := tcp("192.0.2.10", 22, "198.51.100.1", 4000, pfconf.FlagSYN|pfconf.FlagACK, 5000, 1001)
		answer.HasScale, answer.Scale = c.server, 7
		m.Send(answer, "en0")
		m.Receive(tcp("198.51.100.1", 4000, "192.0.2.10", 22, pfconf.FlagACK, 1001, 5001), "en0")
		ack := tcp("192.0.2.10", 22, "198.51.100.1", 4000, pfconf.FlagACK, 5001, 1001)
		m.Send(ack, "en0")
		near := tcp("198.51.100.1", 4000, "192.0.2.10", 22, pfconf.FlagACK, 1001+7000000, 5001)
		near.Len = 100
		wantVerdict(t, c.name+": in the scaled window", m.Receive(near, "en0"), VerdictPass, StateMatched)
		far := near
		far.Seq += 20000000
		if j := m.Receive(far, "en0"); j.Verdict != c.far {
			t.Errorf("%s: %s, want %s", c.name, j.Verdict, c.far)
		}
	}
}

// TestModulation checks that the far end consistently sees other sequence numbers than
// the opener uses.
func TestModulation(t *testing.T) {
	m := machineHost(t, "pass all modulate state\n")
	j := m.Send(tcp("192.0.2.10", 4000, "198.51.100.1", 80, pfconf.FlagSYN, 1000, 0), "en0")
	shift := j.Out.Packet.Seq - 1000
	if shift == 0 {
		t.Fatal("sequence number isn't modulated")
	}
	j = m.Receive(tcp("198.51.100.1", 80, "192.0.2.10", 4000, pfconf.FlagSYN|pfconf.FlagACK, 5000, 1001+shift), "en0")
	if j.Verdict != VerdictPass || j.In.Packet.Ack != 1001 {
		t.Fatalf("answer: %s, ack %d", j.Verdict, j.In.Packet.Ack)
	}
	other := j.In.Packet.Seq - 5000
	j = m.Send(tcp("192.0.2.10", 4000, "198.51.100.1", 80, pfconf.FlagACK, 1001, 5001+other), "en0")
	if p := j.Out.Packet; j.Verdict != VerdictPass || p.Seq != 1001+shift || p.Ack != 5001 {
		t.Errorf("third segment: %s, seq %d, ack %d", j.Verdict, p.Seq-shift, p.Ack)
	}
}

// TestGRE checks that a protocol without ports has one flow for each pair of addresses: a
// second inner host can't be translated to the same destination.
func TestGRE(t *testing.T) {
	m := machineHost(t, "nat on en0 inet from 100.64.0.0/10 to any -> (en0)\n")
	first := m.Forward(plain(protoGRE, "100.64.0.5", "198.51.100.1"), "utun7", "en0")
	if got := first.Out.Packet.Src.String(); got != "192.0.2.10" {
		t.Errorf("source %s", got)
	}
	second := m.Forward(plain(protoGRE, "100.64.0.6", "198.51.100.1"), "utun7", "en0")
	if got := second.Out.Packet.Src.String(); got != "100.64.0.6" || second.Out.State != StateUnused {
		t.Errorf("second source %s, state %s", got, second.Out.State)
	}
	j := m.Forward(back(first.Out.Packet), "en0", "utun7")
	if got := j.In.Packet.Dst.String(); got != "100.64.0.5" || j.In.State != StateMatched {
		t.Errorf("answer to %s, state %s", got, j.In.State)
	}
}

// TestESP checks that the SPI of answers is learned from the first one.
func TestESP(t *testing.T) {
	m := machineHost(t, "nat on en0 inet from 100.64.0.0/10 to any -> (en0)\nblock in on en0 all\n")
	p := plain(protoESP, "100.64.0.5", "198.51.100.1")
	p.SPI = 7
	sent := m.Forward(p, "utun7", "en0").Out.Packet
	answer := back(sent)
	answer.SPI = 9
	j := m.Forward(answer, "en0", "utun7")
	if j.In.State != StateMatched || j.In.Packet.Dst != p.Src {
		t.Errorf("answer: %s, to %s", j.In.State, j.In.Packet.Dst)
	}
	answer.SPI = 10
	wantVerdict(t, "another SPI", m.Receive(answer, "en0"), VerdictDrop, StateUnused)
	other := p
	other.Src, other.SPI = netip.MustParseAddr("100.64.0.6"), 11
	wantVerdict(t, "another host", m.Forward(other, "utun7", "en0"), VerdictPass, StateCreated)
	third := other
	third.Src, third.SPI = netip.MustParseAddr("100.64.0.7"), 12
	wantVerdict(t, "a third host while the second waits", m.Forward(third, "utun7", "en0"), VerdictDrop, StateUnused)
	m.Receive(back(sent), "en0")
	inbound := plain(protoESP, "198.51.100.9", "192.0.2.10")
	inbound.SPI = 3
	m = machineHost(t, "pass in on en0\nblock out\n")
	wantVerdict(t, "inbound", m.Receive(inbound, "en0"), VerdictPass, StateCreated)
	reply := back(inbound)
	reply.SPI = 4
	wantVerdict(t, "its answer", m.Send(reply, "en0"), VerdictPass, StateMatched)
	wantVerdict(t, "the next answer", m.Send(reply, "en0"), VerdictPass, StateMatched)
}

// TestEndpointIndependence checks that extfilter widens the hosts that may answer.
func TestEndpointIndependence(t *testing.T) {
	for _, c := range []struct {
		option               string
		otherPort, otherHost StateUse
	}{
		{"", StateUnused, StateUnused},
		{"apd", StateUnused, StateUnused},
		{"ad", StateMatched, StateUnused},
		{"ei", StateMatched, StateMatched},
	} {
		m := machineHost(t, "")
		rs := &pfconf.Ruleset{Statements: []pfconf.Statement{&pfconf.Rule{
			Action: pfconf.Nat, Interfaces: []pfconf.InterfaceMatch{{Name: "en0"}}, Family: pfconf.Inet,
			From: pfconf.Endpoint{Addrs: []pfconf.Address{{Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("100.64.0.0/10")}}},
			Pool: &pfconf.Pool{Addrs: []pfconf.Address{{Kind: pfconf.AddrDynamic, Name: "en0"}}, PoolOptions: pfconf.PoolOptions{ExtFilter: c.option, ExtMap: c.option}},
		}}}
		if err := m.LoadMain(rs); err != nil {
			t.Fatal(err)
		}
		sent := m.Forward(udp("100.64.0.5", 5000, "198.51.100.1", 53), "utun7", "en0").Out.Packet
		wantVerdict(t, c.option+": answer", m.Receive(back(sent), "en0"), VerdictPass, StateMatched)
		p := back(sent)
		p.SrcPort = 54
		wantVerdict(t, c.option+": other port", m.Receive(p, "en0"), VerdictPass, c.otherPort)
		p.Src = netip.MustParseAddr("198.51.100.2")
		wantVerdict(t, c.option+": other host", m.Receive(p, "en0"), VerdictPass, c.otherHost)
		m.FlushStates()
		if m.states.looseUDP != 0 || len(m.states.bindings) != 0 {
			t.Errorf("%s: left over: %d loose keys, %d bindings", c.option, m.states.looseUDP, len(m.states.bindings))
		}
	}
}

// TestPools checks the addresses that a pool returns.
func TestPools(t *testing.T) {
	for _, c := range []struct {
		text string
		want []string // the set of addresses; in order where round-robin
		ring bool
	}{
		{"-> { 203.0.113.1, 203.0.113.2, 203.0.113.3 }", []string{"203.0.113.2", "203.0.113.3", "203.0.113.1", "203.0.113.2"}, true},
		{"-> 203.0.113.4/30 round-robin", []string{"203.0.113.4", "203.0.113.5", "203.0.113.6", "203.0.113.7", "203.0.113.4"}, true},
		{"-> 203.0.113.4/31 random", []string{"203.0.113.4", "203.0.113.5"}, false},
		{"-> 203.0.113.4/31 source-hash", []string{"203.0.113.4", "203.0.113.5"}, false},
		{"-> 203.0.113.0/24 bitmask", []string{"203.0.113.5"}, true},
		{"-> <pool>", []string{"203.0.113.16", "203.0.113.17", "203.0.113.18", "203.0.113.19", "203.0.113.9", "203.0.113.16"}, true},
		{"-> <empty>", []string{"100.64.0.5"}, true},
	} {
		m := machineHost(t, "table <pool> { 203.0.113.9, 203.0.113.16/30 }\ntable <empty> persist\n"+
			"nat on en0 inet from 100.64.0.0/10 to any "+c.text+"\n")
		var got []string
		for port := range uint16(12) {
			p := udp("100.64.0.5", 1000+port, "198.51.100.1", 53)
			got = append(got, m.Send(p, "en0").Out.Packet.Src.String())
		}
		if c.ring && !slices.Equal(got[:len(c.want)], c.want) {
			t.Errorf("%s: %v, want %v", c.text, got, c.want)
		}
		for _, a := range got {
			if !slices.Contains(c.want, a) {
				t.Errorf("%s: %s isn't of the pool", c.text, a)
			}
		}
	}
}

// TestTablePoolHoles checks that negated entries of a pool's table are left out.
func TestTablePoolHoles(t *testing.T) {
	m := machineHost(t, "table <pool> { 203.0.113.16/29, !203.0.113.18/31 }\nnat on en0 inet from 100.64.0.0/10 to any -> <pool>\n")
	seen := map[string]int{}
	for port := range uint16(18) {
		seen[m.Send(udp("100.64.0.5", 1000+port, "198.51.100.1", 53), "en0").Out.Packet.Src.String()]++
	}
	if len(seen) != 6 || seen["203.0.113.18"]+seen["203.0.113.19"] > 0 {
		t.Errorf("addresses: %v", seen)
	}
}

// TestPorts checks that nat chooses ports from its range, none twice for the same
// destination, and doesn't translate when there are none left.
func TestPorts(t *testing.T) {
	m := machineHost(t, "nat on en0 inet proto tcp from 100.64.0.0/10 to any -> (en0) port 2000:2003\n")
	used := map[uint16]bool{}
	for i := range 4 {
		p := m.Send(tcp("100.64.0.5", uint16(1000+i), "198.51.100.1", 80, pfconf.FlagSYN, 1, 0), "en0").Out.Packet
		if p.SrcPort < 2000 || p.SrcPort > 2003 || used[p.SrcPort] {
			t.Errorf("port %d, used %v", p.SrcPort, used)
		}
		used[p.SrcPort] = true
	}
	full := m.Send(tcp("100.64.0.5", 1004, "198.51.100.1", 80, pfconf.FlagSYN, 1, 0), "en0")
	if full.Out.Packet.SrcPort != 1004 || full.Out.State != StateUnused {
		t.Errorf("with no port left: %s, state %s", full.Out.Packet, full.Out.State)
	}
	same := m.Send(tcp("100.64.0.5", 1000, "198.51.100.9", 80, pfconf.FlagSYN, 1, 0), "en0")
	if !used[same.Out.Packet.SrcPort] || same.Out.State != StateCreated {
		t.Errorf("to another host: %s", same.Out.Packet)
	}
	m = machineHost(t, "nat on en0 inet from 100.64.0.0/10 to any -> (en0)\n")
	for port := range uint16(2000) {
		j := m.Send(udp("100.64.0.5", 1+port, "198.51.100.1", 53), "en0")
		// Source port 500 is left alone.
		if p := j.Out.Packet.SrcPort; j.Verdict != VerdictPass || p < natPortLo && p != ikePort {
			t.Fatalf("flow %d: %s, port %d", port, j.Verdict, p)
		}
	}
}

// TestUDPPortsRunOut checks that, as the kernel doesn't notice that UDP ports are in use,
// it drops packets whose states collide.
func TestUDPPortsRunOut(t *testing.T) {
	m := machineHost(t, "nat on en0 inet from 100.64.0.0/10 to any -> (en0) port 2000:2003\n")
	for port := range uint16(4) {
		wantVerdict(t, "with ports left", m.Send(udp("100.64.0.5", 1000+port, "198.51.100.1", 53), "en0"), VerdictPass, StateCreated)
	}
	wantVerdict(t, "without", m.Send(udp("100.64.0.5", 1004, "198.51.100.1", 53), "en0"), VerdictDrop, StateUnused)
	wantVerdict(t, "to another host", m.Send(udp("100.64.0.5", 1004, "198.51.100.2", 53), "en0"), VerdictPass, StateCreated)
}

// TestICMPErrorOutbound checks that an error that the inner host sends about a flow to it
// is translated on its way out, with the packet that it quotes.
func TestICMPErrorOutbound(t *testing.T) {
	m := machineHost(t, "rdr on en0 inet proto udp from any to 192.0.2.10 port 53 -> 100.64.0.5\n")
	in := m.Forward(udp("198.51.100.1", 4000, "192.0.2.10", 53), "en0", "utun7").Out.Packet
	e := plain(pfconf.ProtoICMP, "100.64.0.5", "198.51.100.1")
	e.ICMPType, e.ICMPCode = 3, 3
	e.Quoted = &Quoted{Src: in.Src, Dst: in.Dst, Proto: pfconf.ProtoUDP, SrcPort: in.SrcPort, DstPort: in.DstPort}
	before := *e.Quoted
	j := m.Forward(e, "utun7", "en0")
	out := j.Out.Packet
	if j.Out.State != StateMatched || out.Src.String() != "192.0.2.10" || out.Quoted.Dst.String() != "192.0.2.10" || out.Quoted.DstPort != 53 {
		t.Errorf("%s: %+v quoting %+v", j.Out.State, out, out.Quoted)
	}
	if j.Out.Translation == nil || j.Out.Translation.Action != pfconf.Rdr || j.Out.TranslationAnchor != "" {
		t.Errorf("translated by %v in %q", j.Out.Translation, j.Out.TranslationAnchor)
	}
	if *e.Quoted != before {
		t.Error("the caller's packet was changed")
	}
	e.Quoted = nil
	wantVerdict(t, "without a quote", m.Forward(e, "utun7", "en0"), VerdictPass, StateUnused)
	e.Quoted = &Quoted{Proto: pfconf.ProtoUDP}
	wantVerdict(t, "quoting nothing", m.Forward(e, "utun7", "en0"), VerdictPass, StateUnused)
}

func TestScrub(t *testing.T) {
	m := machineHost(t, "scrub in on en0 all\nno scrub in on en1 all\nscrub in on en1 all\npass all no state\n")
	for f, want := range map[pfconf.TCPFlags]Verdict{
		pfconf.FlagSYN: VerdictPass, pfconf.FlagSYN | pfconf.FlagRST: VerdictDrop, 0: VerdictDrop, pfconf.FlagFIN | pfconf.FlagSYN | pfconf.FlagPSH: VerdictDrop,
		pfconf.FlagFIN | pfconf.FlagSYN: VerdictPass, pfconf.FlagACK | pfconf.FlagPSH: VerdictPass, pfconf.FlagFIN: VerdictDrop,
	} {
		p := tcp("198.51.100.1", 4000, "192.0.2.10", 22, f, 1, 1)
		if j := m.Receive(p, "en0"); j.Verdict != want {
			t.Errorf("flags %s: %s, want %s", f, j.Verdict, want)
		}
		if j := m.Receive(p, "en1"); j.Verdict != VerdictPass {
			t.Errorf("flags %s without scrub: %s", f, j.Verdict)
		}
	}
	p := udp("198.51.100.1", 4000, "192.0.2.10", 22)
	p.Fragment = true
	wantVerdict(t, "fragment", m.Receive(p, "en0"), VerdictDrop, StateUnused)
	wantVerdict(t, "fragment without scrub", m.Receive(p, "en1"), VerdictPass, StateUnused)
}

// TestOwners checks that rules for a socket's owner match only if they require none,
// since no packet here belongs to a socket.
func TestOwners(t *testing.T) {
	for text, want := range map[string]Verdict{
		"user root": VerdictPass, "user != root": VerdictDrop, "user unknown": VerdictDrop, "user > 500": VerdictPass,
	} {
		m := machineHost(t, "block in proto tcp all "+text+"\n")
		if j := m.Receive(tcp("198.51.100.1", 4000, "192.0.2.10", 22, pfconf.FlagSYN, 1, 0), "en0"); j.Verdict != want {
			t.Errorf("%s: %s, want %s", text, j.Verdict, want)
		}
	}
}

// TestProbability checks that a rule with a probability matches about that often.
func TestProbability(t *testing.T) {
	m := machineHost(t, "block in all probability 25%\n")
	dropped := 0
	for range 2000 {
		if m.Receive(udp("198.51.100.1", 1, "192.0.2.10", 2), "en0").Verdict == VerdictDrop {
			dropped++
		}
	}
	if dropped < 400 || dropped > 600 {
		t.Errorf("%d of 2000 dropped", dropped)
	}
}

// TestAnchorLoops checks that evaluation ends even if anchors call each other for ever: it
// drops the packet, and doesn't affect the next one.
func TestAnchorLoops(t *testing.T) {
	m := machineHost(t, "anchor \"a\"\nblock in proto udp all\n")
	mustLoad(t, m, "a", "anchor \"/a\"\nanchor \"/a\"\npass all\n")
	if j := m.Receive(udp("198.51.100.1", 1, "192.0.2.10", 2), "en0"); j.Verdict != VerdictDrop || j.In.Decider != DecidedByForm {
		t.Errorf("endless rules: %+v", j)
	}
	mustLoad(t, m, "a", "anchor \"/a\"\npass quick proto udp to port 9\n")
	wantVerdict(t, "one loop", m.Receive(udp("198.51.100.1", 1, "192.0.2.10", 9), "en0"), VerdictPass, StateCreated)
	wantVerdict(t, "one loop", m.Receive(udp("198.51.100.1", 1, "192.0.2.10", 2), "en0"), VerdictDrop, StateUnused)
}

// TestAnchorNames checks relative, absolute and parent names, and that an anchor that was
// only called is removed with the call.
func TestAnchorNames(t *testing.T) {
	m := machineHost(t, "anchor \"a\"\n")
	mustLoad(t, m, "a", "anchor \"b\"\nanchor \"/c\"\nanchor \"b/*\"\n")
	mustLoad(t, m, "a/b", "block in proto udp to port 1\nanchor \"../d\"\n")
	mustLoad(t, m, "a/b/x", "block in proto udp to port 2\n")
	mustLoad(t, m, "a/d", "block in proto udp to port 3\n")
	mustLoad(t, m, "c", "block in proto udp to port 4\n")
	for port, want := range map[uint16]Verdict{1: VerdictDrop, 2: VerdictDrop, 3: VerdictDrop, 4: VerdictDrop, 5: VerdictPass} {
		if j := m.Receive(udp("198.51.100.1", 1, "192.0.2.10", port), "en0"); j.Verdict != want {
			t.Errorf("port %d: %s by %q", port, j.Verdict, j.In.Anchor)
		}
	}
	mustLoad(t, m, "", "anchor \"only/called\"\n")
	if got := m.Anchors(""); !slices.Equal(got, []string{"a", "c", "only"}) {
		t.Errorf("anchors %v", got)
	}
	mustLoad(t, m, "", "")
	if got := m.Anchors(""); !slices.Equal(got, []string{"a", "c"}) {
		t.Errorf("anchors afterwards %v", got)
	}
	if got := m.Anchors("nowhere"); got != nil {
		t.Errorf("anchors of nothing: %v", got)
	}
}

// TestFailedLoad checks that a load that fails changes nothing and leaves neither an
// anchor nor a reference to a table.
func TestFailedLoad(t *testing.T) {
	m := machineHost(t, "block all label \"old\"\n")
	for _, text := range []string{
		"pass from <t> to any\npass from any to nosuchname\n",
		"anchor \"x\"\npass from <t> to any\nanchor \"../y\"\n",
	} {
		rs, err := pfconf.Parse(text)
		if err == nil {
			err = m.LoadMain(rs)
		}
		if err == nil {
			t.Errorf("%q was loaded", text)
		}
	}
	if j := m.Receive(udp("198.51.100.1", 1, "192.0.2.10", 2), "en0"); j.In.Rule == nil || j.In.Rule.Label != "old" {
		t.Errorf("decided by %+v", j.In.Rule)
	}
	if len(m.tables) != 0 || len(m.Anchors("")) != 0 {
		t.Errorf("left over: %d tables, anchors %v", len(m.tables), m.Anchors(""))
	}
	for _, path := range []string{"", "_x", "a/_x", "a//b", strings.Repeat("x", 64)} {
		if err := m.LoadAnchor(path, &pfconf.Ruleset{}); err == nil {
			t.Errorf("anchor %q was loaded", path)
		}
	}
}

func TestTables(t *testing.T) {
	m := machineHost(t, "table <fixed> const { 10.0.0.1 }\nblock in from <fixed> to any\nblock in from <later> to any\n")
	entry := []pfconf.Address{{Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("10.9.0.0/16")}}
	refuse := []pfconf.Address{{Kind: pfconf.AddrAny}}
	for what, err := range map[string]error{
		"add":     second(m.AddToTable("", "fixed", entry)),
		"delete":  second(m.DeleteFromTable("", "fixed", entry)),
		"replace": m.ReplaceTable("", "fixed", entry),
		"flush":   second(m.FlushTable("", "fixed")),
	} {
		if !errors.Is(err, ErrConstTable) {
			t.Errorf("%s of a const table: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"delete":        second(m.DeleteFromTable("", "none", entry)),
		"test":          second(m.TestTable("", "none", internet)),
		"show":          second(m.Table("", "none")),
		"flush":         second(m.FlushTable("", "none")),
		"of the anchor": second(m.FlushTable("a", "fixed")),
	} {
		if !errors.Is(err, ErrNoTable) {
			t.Errorf("%s of no table: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"add any":     second(m.AddToTable("", "later", refuse)),
		"delete any":  second(m.DeleteFromTable("", "later", refuse)),
		"replace any": m.ReplaceTable("", "later", refuse),
		"long name":   second(m.AddToTable("", strings.Repeat("x", 32), entry)),
		"bad anchor":  second(m.AddToTable("_a", "later", entry)),
	} {
		if err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if n, err := m.AddToTable("", "later", entry); n != 1 || err != nil {
		t.Errorf("add: %d, %v", n, err)
	}
	if in, err := m.TestTable("", "later", netip.MustParseAddr("10.9.1.1")); !in || err != nil {
		t.Errorf("test: %t, %v", in, err)
	}
	wantVerdict(t, "in the table", m.Receive(udp("10.9.1.1", 1, "10.1.1.1", 2), "en1"), VerdictDrop, StateUnused)
	if got := m.Tables(""); !slices.Equal(got, []string{"fixed", "later"}) {
		t.Errorf("tables %v", got)
	}
	if n := m.FlushTables(""); n != 2 {
		t.Errorf("%d tables flushed", n)
	}
	wantVerdict(t, "without tables", m.Receive(udp("10.9.1.1", 1, "10.1.1.1", 2), "en1"), VerdictPass, StateUnused)
}

func second[T any](_ T, err error) error { return err }

func TestTableLimit(t *testing.T) {
	var text strings.Builder
	for i := range maxTables {
		fmt.Fprintf(&text, "table <t%d> persist\n", i)
	}
	m := machineHost(t, text.String())
	mustLoad(t, m, "", text.String())
	rs, err := pfconf.Parse("table <more> persist\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.LoadMain(rs); !errors.Is(err, ErrLimit) {
		t.Errorf("one table more: %v", err)
	}
	if _, err := m.AddToTable("", "more", nil); !errors.Is(err, ErrLimit) {
		t.Errorf("add to one table more: %v", err)
	}
}

// TestTableOutlivesItsRules checks that a table that isn't persistent stays as long as a
// state of a rule that used it.
func TestTableOutlivesItsRules(t *testing.T) {
	m := machineHost(t, "table <t> { 198.51.100.1 }\npass in from <t> to any\n")
	wantVerdict(t, "packet", m.Receive(udp("198.51.100.1", 1, "192.0.2.10", 2), "en0"), VerdictPass, StateCreated)
	mustLoad(t, m, "", "pass all\n")
	if got := m.Tables(""); !slices.Equal(got, []string{"t"}) {
		t.Errorf("tables while the state lives: %v", got)
	}
	if left := m.Advance(time.Hour); left != 0 {
		t.Errorf("%d states left", left)
	}
	if got := m.Tables(""); len(got) != 0 {
		t.Errorf("tables afterwards: %v", got)
	}
}

func TestStateLimit(t *testing.T) {
	m := machineHost(t, "set limit states 50\npass all\n")
	if start := m.timeouts[adaptiveStart]; start != 30 {
		t.Errorf("timeouts shrink from %d states on", start)
	}
	for port := range uint16(100) {
		m.Receive(udp("198.51.100.1", 1000+port, "192.0.2.10", 2), "en0")
	}
	// The kernel's pool refuses when it holds more than the limit.
	if m.StateCount() != 51 {
		t.Errorf("%d states", m.StateCount())
	}
	wantVerdict(t, "one more", m.Receive(udp("198.51.100.1", 9, "192.0.2.10", 2), "en0"), VerdictDrop, StateUnused)
	m.FlushAll("")
	if m.StateCount() != 0 {
		t.Errorf("%d states after flushing all", m.StateCount())
	}
	mustLoad(t, m, "", "pass all\n")
	if m.limits.states != DefaultStateLimit || m.timeouts != defaultTimeouts {
		t.Errorf("limit %d, timeouts %v after a load without", m.limits.states, m.timeouts)
	}
}

// TestSecondsAdd checks that times shorter than a second add up.
func TestSecondsAdd(t *testing.T) {
	m := machineHost(t, "pass all\n")
	m.Receive(udp("198.51.100.1", 1, "192.0.2.10", 2), "en0")
	for i := range 239 {
		if left := m.Advance(250 * time.Millisecond); left != 1 {
			t.Fatalf("gone after %d quarters of a second", i+1)
		}
	}
	if left := m.Advance(250 * time.Millisecond); left != 0 {
		t.Error("still there after a minute")
	}
	if left := m.Advance(-time.Hour); left != 0 || m.seconds() != 60 {
		t.Errorf("time ran backwards to %d", m.seconds())
	}
}

// TestAdaptiveTimeouts checks that timeouts shrink when there are many states.
func TestAdaptiveTimeouts(t *testing.T) {
	m := machineHost(t, "set timeout { adaptive.start 10, adaptive.end 110 }\npass all\n")
	for port := range uint16(60) {
		m.Receive(udp("198.51.100.1", 1000+port, "192.0.2.10", 2), "en0")
	}
	if left := m.Advance(29 * time.Second); left != 60 {
		t.Errorf("%d states after 29 s", left)
	}
	if left := m.Advance(time.Second); left >= 60 {
		t.Errorf("%d states after 30 s", left)
	}
	if left := m.Advance(time.Minute); left != 0 {
		t.Errorf("%d states after 90 s", left)
	}
}

// TestTimeoutNames checks that the machine knows each timeout that can be written.
func TestTimeoutNames(t *testing.T) {
	for _, name := range pfconf.TimeoutNames() {
		if _, ok := timeoutKinds[name]; !ok {
			t.Errorf("no kind for the timeout %s", name)
		}
	}
}

func TestOptimization(t *testing.T) {
	m := machineHost(t, "set optimization aggressive\npass all\n")
	m.Receive(tcp("198.51.100.1", 4000, "192.0.2.10", 22, pfconf.FlagSYN, 1000, 0), "en0")
	if s := m.States()[0]; s.Expires != 30*time.Second {
		t.Errorf("first packet lives %s", s.Expires)
	}
}

func TestStates(t *testing.T) {
	m := machineHost(t, "nat on en0 inet from 100.64.0.0/10 to any -> 192.0.2.10 static-port\n"+
		"pass in on utun7 keep state (if-bound) label \"in\"\n")
	m.Forward(tcp("100.64.0.5", 4000, "198.51.100.1", 80, pfconf.FlagSYN, 1, 0), "utun7", "en0")
	m.Forward(udp("fd6d::5", 4000, "2001:db8::1", 53), "utun7", "en0")
	m.Advance(5 * time.Second)
	var got []string
	for _, s := range m.States() {
		got = append(got, s.String())
		if s.Age != 5*time.Second || s.Expires <= 0 {
			t.Errorf("%s: age %s, expires in %s", s, s.Age, s.Expires)
		}
	}
	want := []string{
		"utun7 tcp 198.51.100.1:80 <- 100.64.0.5:4000       CLOSED:SYN_SENT",
		"ALL tcp 100.64.0.5:4000 -> 192.0.2.10:4000 -> 198.51.100.1:80       SYN_SENT:CLOSED",
		"utun7 udp 2001:db8::1[53] <- fd6d::5[4000]       NO_TRAFFIC:SINGLE",
	}
	if !slices.Equal(got, want) {
		t.Errorf("states:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if s := m.States()[1]; s.Translation == nil || s.Rule != nil || !s.Loaded {
		t.Errorf("translated state: %+v", s)
	}
	mustLoad(t, m, "", "pass all\n")
	if s := m.States()[0]; s.Loaded || s.Rule.Label != "in" {
		t.Errorf("state of a removed rule: %+v", s)
	}
}

// TestForeignTag checks that a tag that no rule names stays on the packet and matches no
// rule.
func TestForeignTag(t *testing.T) {
	m := machineHost(t, "block all\npass in ! tagged KNOWN no state\n")
	p := udp("198.51.100.1", 1, "192.0.2.10", 2)
	p.Tag = "ELSE"
	if j := m.Receive(p, "en0"); j.Verdict != VerdictPass || j.In.Packet.Tag != "ELSE" {
		t.Errorf("%s, tag %q", j.Verdict, j.In.Packet.Tag)
	}
	p.Tag = "KNOWN"
	wantVerdict(t, "the known tag", m.Receive(p, "en0"), VerdictDrop, StateUnused)
}

// TestFragmentTags checks that rules set no tag on a fragment, not even for later rules.
func TestFragmentTags(t *testing.T) {
	m := machineHost(t, "pass in all no state tag A\nblock in all tagged A\npass out all no state tag B\n")
	p := udp("198.51.100.1", 1, "192.0.2.10", 2)
	wantVerdict(t, "whole", m.Receive(p, "en0"), VerdictDrop, StateUnused)
	p.Fragment = true
	j := m.Receive(p, "en0")
	if wantVerdict(t, "fragment", j, VerdictPass, StateUnused); j.In.Packet.Tag != "" {
		t.Errorf("a fragment is tagged %q", j.In.Packet.Tag)
	}
}

// TestSnapshotReadsBack checks that a Snapshot shows what pf showed for the parse vectors.
func TestSnapshotReadsBack(t *testing.T) {
	n := 0
	for _, f := range vectors.Files(t, "testdata") {
		vectors.Each(t, f, func(s *vectors.Scenario) {
			if s.Text != nil && checkSnapshot(t, s) {
				n++
			}
		})
	}
	if n == 0 {
		t.Error("no parse vectors")
	}
	if _, err := NewPF(Options{}).Snapshot("none"); !errors.Is(err, ErrNoAnchor) {
		t.Errorf("snapshot of nothing: %v", err)
	}
}

// checkSnapshot loads a parse scenario into a machine, compares its snapshot, and reports
// whether the scenario loads.
func checkSnapshot(t *testing.T, s *vectors.Scenario) bool {
	var want vectors.ParseWant
	if err := json.Unmarshal(s.Want, &want); err != nil {
		t.Fatal(err)
	}
	r := packetRun{m: NewPF(Options{})}
	for _, i := range hostInterfaces(s) {
		r.m.AddInterface(i)
	}
	if err := r.load(s.Anchor, *s.Text); err != nil {
		if want.RC == 0 {
			t.Errorf("%s: %v", s.Name, err)
		}
		return false
	}
	l, err := r.m.Snapshot(s.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	if got := l.ShowRules(); !slices.Equal(got, want.Canonical.Rules) {
		t.Errorf("%s: rules %q, want %q", s.Name, got, want.Canonical.Rules)
	}
	if got := l.ShowNat(); !slices.Equal(got, want.Canonical.Nat) {
		t.Errorf("%s: nat %q, want %q", s.Name, got, want.Canonical.Nat)
	}
	tables := map[string][]string{}
	for _, tb := range l.Tables {
		tables[tb.Name] = tb.Entries()
	}
	for name, entries := range want.Canonical.Tables {
		if !slices.Equal(tables[name], entries) {
			t.Errorf("%s: table %s: %q, want %q", s.Name, name, tables[name], entries)
		}
	}
	return true
}

// TestSteadyPathAllocatesNothing judges packets by rules, by states and at both hooks.
func TestSteadyPathAllocatesNothing(t *testing.T) {
	m := meshHost(t, 100)
	flow := meshPacket(meshPeer(60), internet)
	if j := m.Forward(flow, "utun7", "en0"); j.Verdict != VerdictPass || j.Out.State != StateCreated {
		t.Fatalf("flow: %+v", j)
	}
	for name, f := range map[string]func(){
		"refused":   func() { m.Receive(meshPacket(meshPeer(61), internet), "utun7") },
		"stranger":  func() { m.Receive(meshPacket(netip.MustParseAddr("100.99.0.1"), internet), "utun7") },
		"forwarded": func() { m.Forward(flow, "utun7", "en0") },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// TestRandComesFromOutside checks that the same source of randomness gives the same
// ports.
func TestRandComesFromOutside(t *testing.T) {
	port := func(seed uint64) uint16 {
		m := NewPF(Options{Rand: rand.New(rand.NewPCG(seed, 0))})
		m.AddInterface(pfconf.Interface{Name: "en0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.10/24")}})
		mustLoad(t, m, "", "nat on en0 inet from any to any -> (en0)\n")
		_ = m.Enable()
		return m.Send(udp("100.64.0.5", 1, "198.51.100.1", 2), "en0").Out.Packet.SrcPort
	}
	first, again := port(1), port(1)
	if first != again || port(1) == port(2) && port(1) == port(3) {
		t.Error("ports don't follow the source of randomness")
	}
}
