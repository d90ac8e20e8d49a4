package mactrial

// The source ports of peers' translated packets, and the host's own sockets.

import (
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// udp returns a datagram with the given ports.
func (g *rig) udp(in string, src, dst netip.Addr, sport, dport uint16) host.Packet {
	return host.Packet{In: in, Packet: policy.Packet{Src: src, Dst: dst, Proto: policy.ProtoUDP, SrcPort: sport, DstPort: dport}}
}

// TestPeersPortsAreNotTheHosts has C, which may route, send to A's outer address from
// every port that could be the Mac's own: WireGuard's, those of listening programs, and a
// thousand others. Each packet leaves with a port that no socket of the Mac has or may
// get, so A's packets to the Mac's own ports arrive at the Mac.
func TestPeersPortsAreNotTheHosts(t *testing.T) {
	g := newRig(t)
	own := []uint16{51820, 41641, 5353, 22000, 60123}
	for _, port := range own {
		g.mac.Kernel.BindUDP(port)
		g.mac.Kernel.BindTCP(port)
	}
	g.start()
	g.add("C", "external")
	g.permit("C", everything)
	used := map[uint16]bool{}
	packets := 0
	for family := range 2 {
		for _, outside := range []netip.Addr{server[family], printer[family]} {
			for _, proto := range protos[:2] {
				if proto != netlab.TCP && proto != netlab.UDP {
					t.Fatalf("%v has no ports", proto)
				}
				for n := range uint16(280) {
					port := 1024 + n*200
					if int(n) < len(own) {
						port = own[n]
					}
					p := g.opening(g.device().name, g.peers["C"][family], outside, proto)
					p.SrcPort, p.DstPort = port, 51820
					a := g.open(alone, p)
					packets++
					if a.o.Fate != simmac.Forwarded {
						t.Fatalf("%+v: %v (%s)", p, a.o.Fate, a.o.Why)
					}
					if at := a.o.Packet.SrcPort; at < 1024 || at >= 49152 || at == 41641 || at == 5353 || at == 22000 {
						t.Fatalf("%+v left with port %d, which is or may become the Mac's own", p, at)
					} else {
						used[at] = true
					}
				}
				for _, port := range own {
					in := uplink
					if outside == printer[family] {
						in = lan
					}
					p := g.opening(in, outside, map[string][]netip.Addr{uplink: both("203.0.113.1", "2001:db8:1::1"), lan: both("192.168.77.1", "2001:db8:5::1")}[in][family], proto)
					p.SrcPort, p.DstPort = 51820, port
					if a := g.open(alone, p); a.at != "host" {
						t.Errorf("%+v got to %q: the peer has taken the Mac's port", p, a.at)
					}
				}
			}
		}
	}
	if len(used) < packets/4 {
		t.Errorf("%d packets left with %d ports: they aren't drawn at random", packets, len(used))
	}
	t.Logf("%d flows left with %d ports, none of the Mac's", packets, len(used))
}

// TestPort500 has a peer use UDP port 500, as Wi-Fi calling does. pf doesn't translate
// that port while no socket of the Mac has it. As soon as one has, packets to the port
// belong to the Mac.
func TestPort500(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	g.add("D", "own")
	g.permit("C", mesh.Routing)
	g.permit("D", mesh.Routing)
	var running, others []flow
	for family := range 2 {
		p := g.udp(g.device().name, g.peers["C"][family], server[family], 500, 4500)
		f := flow{"C's IKE", alone, p, g.open(alone, p)}
		if f.first.at != uplink || f.first.o.Packet.SrcPort != 500 {
			t.Fatalf("port 500 left as %+v by %q (%s)", f.first.o.Packet, f.first.at, f.first.o.Why)
		}
		if got := g.ends(f, 2); got != 4 {
			t.Fatalf("%d of 4 packets arrived", got)
		}
		running = append(running, f)
		others = append(others, g.run(alone, "D", server[family], netlab.UDP, family))
	}
	g.mac.Kernel.BindUDP(500)
	repairs := g.d.Status().Repairs
	g.wait("the helper has seen the socket", func() bool {
		s := g.d.Status()
		return s.Repairs > repairs && s.State == api.Enforcing
	})
	for _, f := range others {
		if got := g.ends(f, 2); got != 4 {
			t.Errorf("%d of 4 packets of %s arrived", got, f.name)
		}
	}
	for family, f := range running {
		if a := g.send(alone, f.opened, 0, false); a.at != "" {
			t.Errorf("C's packet from port 500 got to %q", a.at)
		}
		if a := g.answer(alone, f.first, 0); a.at != "host" {
			t.Errorf("the packet to the Mac's port 500 got to %q (%s)", a.at, a.o.Why)
		}
		if a := g.open(alone, g.udp(g.device().name, g.peers["C"][family], server[family], 501, 4500)); a.at != uplink {
			t.Errorf("the packet to another port got to %q (%s)", a.at, a.o.Why)
		}
	}
}
