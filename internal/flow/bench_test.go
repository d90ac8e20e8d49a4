package flow

import (
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// BenchmarkJudge judges single packets with 10,000 peers and 1,000 routed prefixes.
func BenchmarkJudge(b *testing.B) {
	table := New(Options{})
	view := table.Use(flowtest.Large(b, 10_000, 1000))
	now := table.Now()
	for _, family := range []struct {
		name      string
		peer, net netip.Addr
	}{{"IPv4", flowtest.PeerC4, flowtest.Net4}, {"IPv6", flowtest.PeerC6, flowtest.Net6}} {
		b.Run(family.name+"/repeated", func(b *testing.B) {
			p := flowtest.TCPSegment(at(family.peer, 40000), at(family.net, 443), flowtest.ACK, 1200)
			loop(b, view, now, func(int) []byte { return p })
		})
		// As many flows as a browser opens; with 10,000 peers a share has room for 512.
		b.Run(family.name+"/400 flows", func(b *testing.B) {
			var ps [400][]byte
			for i := range ps {
				ps[i] = flowtest.TCPSegment(at(family.peer, uint16(i)), at(family.net, 443), flowtest.ACK, 100)
			}
			loop(b, view, now, func(i int) []byte { return ps[i%len(ps)] })
		})
		// One flow of each of 5,000 peers that may route.
		b.Run(family.name+"/5000 peers", func(b *testing.B) {
			ps := crowd(view, family.peer.Is6())
			loop(b, view, now, func(i int) []byte { return ps[i%len(ps)] })
		})
		b.Run(family.name+"/answers", func(b *testing.B) {
			p := flowtest.TCPSegment(at(family.peer, 40000), at(family.net, 443), flowtest.ACK, 100)
			q := flowtest.TCPSegment(at(family.net, 443), at(family.peer, 40000), flowtest.ACK, 100)
			view.Judge(p, FromPeer, now)
			view.Judge(q, ToPeer, now)
			view.Judge(p, FromPeer, now)
			b.ReportAllocs()
			for b.Loop() {
				if view.Judge(q, ToPeer, now).Action != Pass {
					b.Fatal("refused")
				}
			}
		})
		// Each packet opens a flow while another times out. The clock advances 100 ms per
		// packet, so that the peer has several hundred flows at a time.
		b.Run(family.name+"/opening", func(b *testing.B) {
			ps := openers(family.peer, family.net)
			at := now
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				at += 100
				if view.Judge(ps[i%len(ps)], FromPeer, at).Action != Pass {
					b.Fatal("refused")
				}
			}
			now = at + Instant(2*TCPEstablished/time.Millisecond)
		})
		// After the burst each packet would open a flow beyond the bound and is refused.
		b.Run(family.name+"/too many", func(b *testing.B) {
			ps := openers(family.peer, family.net)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				view.Judge(ps[i%len(ps)], FromPeer, now)
			}
			now += Instant(2 * TCPEstablished / time.Millisecond)
		})
		b.Run(family.name+"/refused", func(b *testing.B) {
			dst := flowtest.PeerA4
			if family.peer.Is6() {
				dst = flowtest.PeerA6
			}
			p := flowtest.TCPSegment(at(family.peer, 40000), at(dst, 443), flowtest.SYN, 0)
			b.ReportAllocs()
			for b.Loop() {
				if view.Judge(p, FromPeer, now).Action == Pass {
					b.Fatal("passed")
				}
			}
		})
	}
}

// crowd returns a packet to the internet from each peer that may route.
func crowd(view *View, v6 bool) (ps [][]byte) {
	for i, p := range view.Ruleset().Peers() {
		if !p.Permissions.Has(mesh.Routing) {
			continue
		}
		src, dst := p.Addresses[0], flowtest.Net4
		if v6 {
			src, dst = p.Addresses[1], flowtest.Net6
		}
		ps = append(ps, flowtest.Datagram(at(src, uint16(i)), at(dst, 443), 100))
	}
	return ps
}

// openers returns 50,000 packets that each open a flow.
func openers(peer, net netip.Addr) [][]byte {
	ps := make([][]byte, 50_000)
	for i := range ps {
		ps[i] = flowtest.TCPSegment(at(peer, uint16(i)), at(net, 443), flowtest.SYN, 0)
	}
	return ps
}

func loop(b *testing.B, view *View, now Instant, packet func(i int) []byte) {
	for i := range 50_000 { // the maps have grown to their size before the measurement
		view.Judge(packet(i), FromPeer, now)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if view.Judge(packet(i), FromPeer, now).Action != Pass {
			b.Fatal("refused")
		}
		i++
	}
}

// BenchmarkUse puts a ruleset with 10,000 peers in force, and cuts the flows that it refuses.
func BenchmarkUse(b *testing.B) {
	table := New(Options{})
	r := flowtest.Large(b, 10_000, 1000)
	old := table.Use(r)
	b.Run("use", func(b *testing.B) {
		for b.Loop() {
			table.Use(r)
		}
	})
	b.Run("settle", func(b *testing.B) {
		for b.Loop() {
			old.CutRefused(old)
		}
	})
}
