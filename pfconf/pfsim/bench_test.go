package pfsim

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
)

// meshAnchor returns a ruleset as the helper loads it for n peers: filter rules with
// tables, translation, both families.
func meshAnchor(n int) string {
	var peers, routing, lan strings.Builder
	for i := range n {
		v4, v6 := meshPeer(i), meshPeer6(i)
		fmt.Fprintf(&peers, " %s %s", v4, v6)
		if i%2 == 0 {
			fmt.Fprintf(&routing, " %s %s", v4, v6)
		}
		if i%3 == 0 {
			fmt.Fprintf(&lan, " %s %s", v4, v6)
		}
	}
	return "table <peers> persist {" + peers.String() + " }\n" +
		"table <routing> persist {" + routing.String() + " }\n" +
		"table <lan> persist {" + lan.String() + " }\n" + `
table <lans> const { 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16, fc00::/7, fe80::/10 }
table <host> const { self }
nat on en0 inet from 100.64.0.0/10 to any -> (en0)
nat on en0 inet6 from fd6d:6573:6800::/48 to any -> (en0)
block drop in quick on ! utun7 from { 100.64.0.0/10, fd6d:6573:6800::/48 } to any
block drop in quick on utun7 from ! <peers> to any
block drop in quick on utun7 from any to { 224.0.0.0/4, 127.0.0.0/8, ff00::/8 }
block return in quick on utun7 from any to <host>
block drop in quick on utun7 from any to { 100.64.0.0/10, fd6d:6573:6800::/48 }
pass in quick on utun7 from <lan> to <lans> keep state (if-bound)
block return in quick on utun7 from any to <lans>
pass in quick on utun7 from <routing> to any keep state (if-bound)
block return in quick on utun7 all
pass out quick on utun7 from <host> to any keep state (if-bound)
block drop out quick on utun7 all
block drop out quick on en0 from { 100.64.0.0/10, fd6d:6573:6800::/48 } to any
`
}

func meshPeer(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{100, 64 + byte(i>>16), byte(i >> 8), byte(i)})
}

func meshPeer6(i int) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, 0x6d, 0x65, 0x73, 0x68, 0, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)})
}

// meshHost returns a Mac with the stock main ruleset and a mesh's anchor.
func meshHost(tb testing.TB, peers int) *PF {
	tb.Helper()
	m := NewPF(Options{StateLimit: 100000})
	for name, addrs := range map[string][]string{
		"lo0":   {"127.0.0.1/8", "::1/128"},
		"en0":   {"192.168.7.20/24", "2001:db8:7::20/64"},
		"utun7": {"100.64.255.1/32", "fd6d:6573:6800::ffff/128"},
	} {
		i := pfconf.Interface{Name: name}
		for _, a := range addrs {
			i.Addresses = append(i.Addresses, netip.MustParsePrefix(a))
		}
		m.AddInterface(i)
	}
	mustLoad(tb, m, "", stockMain)
	mustLoad(tb, m, "com.apple/org.example.mesh", meshAnchor(peers))
	if err := m.Enable(); err != nil {
		tb.Fatal(err)
	}
	return m
}

// mustLoad loads a text into an anchor, "" being the main ruleset.
func mustLoad(tb testing.TB, m *PF, anchor, text string) {
	tb.Helper()
	rs, err := pfconf.Parse(text)
	if err != nil {
		tb.Fatal(err)
	}
	if anchor == "" {
		err = m.LoadMain(rs)
	} else {
		err = m.LoadAnchor(anchor, rs)
	}
	if err != nil {
		tb.Fatal(err)
	}
}

func meshPacket(src, dst netip.Addr) Packet {
	return Packet{Src: src, Dst: dst, Proto: pfconf.ProtoUDP, SrcPort: 5353, DstPort: 443, Len: 100}
}

var (
	internet  = netip.MustParseAddr("198.51.100.7")
	internet6 = netip.MustParseAddr("2001:db8:ffff::7")
)

// BenchmarkEvaluate judges one packet at one hook with a mesh of 10,000 peers.
func BenchmarkEvaluate(b *testing.B) {
	m := meshHost(b, 10000)
	for _, c := range []struct {
		name string
		p    Packet
	}{
		{"refused", meshPacket(meshPeer(9001), internet)},
		{"refused6", meshPacket(meshPeer6(9001), internet6)},
		{"stranger", meshPacket(netip.MustParseAddr("100.99.0.1"), internet)},
		{"state", meshPacket(meshPeer(9000), internet)},
		{"state6", meshPacket(meshPeer6(9000), internet6)},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				m.Receive(c.p, "utun7")
			}
		})
	}
}

// BenchmarkForward judges a packet of a translated flow at both hooks.
func BenchmarkForward(b *testing.B) {
	m := meshHost(b, 10000)
	p := meshPacket(meshPeer(9000), internet)
	if j := m.Forward(p, "utun7", "en0"); j.Verdict != VerdictPass || j.Out.Packet.Src == p.Src {
		b.Fatalf("not translated: %+v", j)
	}
	b.ReportAllocs()
	for b.Loop() {
		m.Forward(p, "utun7", "en0")
	}
}

// BenchmarkNewFlow makes the two states of a translated flow and lets them expire.
func BenchmarkNewFlow(b *testing.B) {
	m := meshHost(b, 10000)
	p := meshPacket(meshPeer(9000), internet)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		p.SrcPort = uint16(i%4000 + 1000)
		m.Forward(p, "utun7", "en0")
		if i%4000 == 3999 {
			m.Advance(time.Hour)
		}
	}
}

// BenchmarkLoad loads the anchor of a mesh of 10,000 peers from its text.
func BenchmarkLoad(b *testing.B) {
	m := meshHost(b, 1)
	rs, err := pfconf.Parse(meshAnchor(10000))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := m.LoadAnchor("com.apple/org.example.mesh", rs); err != nil {
			b.Fatal(err)
		}
	}
}
