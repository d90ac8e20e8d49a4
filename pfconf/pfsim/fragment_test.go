package pfsim

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
)

// cut splits a UDP datagram, with so many bytes behind its IP header, into fragments of
// random lengths.
func cut(r *rand.Rand, src, dst string, id uint32, total int) []Packet {
	p := Packet{
		Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), Proto: pfconf.ProtoUDP, SrcPort: 7, DstPort: 9,
		Len: uint32(total - 8), Fragment: true, FragmentID: id,
	}
	var all []Packet
	for off := 0; off < total; off += int(p.FragmentLen) {
		p.FragmentOffset, p.FragmentLen = uint16(off), uint16(min(5+r.IntN(100), (total-off+7)/8)*8)
		if p.MoreFragments = off+int(p.FragmentLen) < total; !p.MoreFragments {
			p.FragmentLen = uint16(total - off)
		}
		all = append(all, p)
	}
	return all
}

// put sends fragments to the host and returns which of them passed, and the length of the
// last datagram that was reassembled.
func put(t *testing.T, m *PF, pieces []Packet) (passed []int, bytes int) {
	t.Helper()
	for i, p := range pieces {
		j := m.Receive(p, "en0")
		if j.Verdict != VerdictPass {
			continue
		}
		passed, bytes = append(passed, i), j.In.Reassembled
		if q := j.Packet(); q.Fragment || q.DstPort != 9 || int(q.Len) != bytes-8 {
			t.Fatalf("%s: left as %s", p, q)
		}
	}
	checkMachine(t, m)
	return passed, bytes
}

// TestReassembly reassembles datagrams of each family, from fragments in order and out of
// order.
func TestReassembly(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for id := range uint32(300) {
		m := machineHost(t, "scrub in on en0 all\npass in on en0 proto udp to port 9\nblock in on en0 proto udp to port ! = 9\n")
		total := 100 + r.IntN(5000)
		v4 := cut(r, "192.0.2.10", "203.0.113.5", id, total)
		v6 := cut(r, "2001:db8:2::10", "2001:db8::1", id, total)
		if len(v6) > 1 {
			if passed, bytes := put(t, m, v6); !slices.Equal(passed, []int{len(v6) - 1}) || bytes != total {
				t.Fatalf("IPv6 in order: %v of %d pieces passed, %d of %d bytes", passed, len(v6), bytes, total)
			}
			i := r.IntN(len(v6) - 1)
			v6[i], v6[i+1] = v6[i+1], v6[i]
			if passed, _ := put(t, m, v6); len(passed) > 0 {
				t.Fatalf("IPv6 out of order: %v passed", passed)
			}
			m.Advance(30 * time.Second)
		}
		r.Shuffle(len(v4), func(i, j int) { v4[i], v4[j] = v4[j], v4[i] })
		if len(v4) == 1 {
			continue
		}
		doubled := append([]Packet{v4[0]}, v4...) // sent twice
		if passed, bytes := put(t, m, doubled); !slices.Equal(passed, []int{len(v4)}) || bytes != total {
			t.Fatalf("IPv4: %v of %d pieces passed, %d of %d bytes", passed, len(doubled), bytes, total)
		}
		if len(m.fragments) != 0 {
			t.Fatalf("%d datagrams wait", len(m.fragments))
		}
	}
}

// TestReassemblyIsBounded sends a machine many first fragments.
func TestReassemblyIsBounded(t *testing.T) {
	m := machineHost(t, "set limit frags 20\nscrub in on en0 all\n")
	p := Packet{
		Src: netip.MustParseAddr("192.0.2.10"), Dst: netip.MustParseAddr("203.0.113.5"), Proto: pfconf.ProtoUDP,
		Fragment: true, FragmentLen: 64, MoreFragments: true,
	}
	for p.FragmentID = range uint32(1000) {
		if j := m.Receive(p, "en0"); j.Verdict != VerdictDrop {
			t.Fatalf("a piece is %s", j.Verdict)
		}
	}
	if m.pieces != 21 {
		t.Errorf("%d pieces wait", m.pieces)
	}
	checkMachine(t, m)
	m.Advance(29 * time.Second)
	if len(m.fragments) != 21 {
		t.Errorf("%d datagrams wait after 29 s", len(m.fragments))
	}
	m.Advance(time.Second)
	if len(m.fragments) != 0 || m.pieces != 0 {
		t.Errorf("%d datagrams wait after 30 s", len(m.fragments))
	}
}

// TestSourcesAreBounded checks set limit src-nodes, and the nodes that remain after a
// reload.
func TestSourcesAreBounded(t *testing.T) {
	const rules = "pass in on en0 proto udp keep state (source-track global, max-src-states 2)\n"
	m := machineHost(t, "set limit src-nodes 3\nanchor \"a\"\n")
	mustLoad(t, m, "a", rules)
	p := Packet{Dst: netip.MustParseAddr("192.0.2.10"), Proto: pfconf.ProtoUDP, DstPort: 9}
	passed := map[netip.Addr]int{}
	for round := range 3 {
		for i := range 6 {
			p.Src, p.SrcPort = netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), uint16(1000+round)
			if m.Receive(p, "en0").Verdict == VerdictPass {
				passed[p.Src]++
			}
		}
		mustLoad(t, m, "a", rules) // a global count continues
	}
	if len(passed) != 4 || m.SourceCount() != 4 {
		t.Errorf("%d sources passed, %d are tracked", len(passed), m.SourceCount())
	}
	for src, n := range passed {
		if n != 2 {
			t.Errorf("%d states of %s", n, src)
		}
	}
	checkMachine(t, m)
	m.FlushStates()
	if m.SourceCount() != 0 {
		t.Errorf("%d sources without states", m.SourceCount())
	}
}
