package trial

// Packets that no peer may send: to martians, and with another device's address.

import (
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// martians are invalid destinations of all kinds, and valid ones that look like them.
var martians = []string{
	"0.0.0.0", "0.1.2.3", "127.0.0.1", "127.1.2.3", "224.0.0.1", "224.0.0.251", "239.255.255.250",
	"240.0.0.1", "255.255.255.255",
	"192.168.77.255", "192.168.77.0", "203.0.113.63", "203.0.113.191", // broadcast and network addresses of attached networks
	"::", "::1", "fe80::1", "ff02::1", "ff02::2", "ff05::1:3", "::ffff:192.0.2.130", "::ffff:192.168.77.2",
}

// TestMartiansFromAPeer has C, which has every permission, send from its own address to
// destinations that no peer may send to.
func TestMartiansFromAPeer(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", everything)
	mustReachL := func() {
		t.Helper()
		if !m.reaches(t, m.C, netlab.Addresses().L.V4, true) {
			t.Fatal("C doesn't reach L")
		}
	}
	mustReachL() // no packet may be lost for want of a session
	var forgeries []forgery
	for _, s := range martians {
		dst := netip.MustParseAddr(s)
		src := m.Peers["C"].Addresses.V4
		if dst.Is6() {
			src = m.Peers["C"].Addresses.V6
		}
		for _, proto := range protos {
			forgeries = append(forgeries, forgery{by: m.C, link: "wg0", proto: proto,
				src: netip.AddrPortFrom(src, 4711), dst: netip.AddrPortFrom(dst, netlab.EchoPort),
				token: m.Lab.Token(), reason: "a martian"})
		}
	}
	send(t, m, forgeries)
	mustReachL()
}

// TestPeerForgesPeer has C send out of its tunnel with A's address, with the host's, and
// with addresses of the LAN and the internet. WireGuard itself drops them, so B's
// interface never sees them.
func TestPeerForgesPeer(t *testing.T) {
	m := newMesh(t)
	for name := range m.Peers {
		permit(t, m, name, everything)
	}
	at, own := netlab.Addresses(), status(t, m).Address()
	var tokens []string
	for _, from := range []netlab.Pair{m.Peers["A"].Addresses, own, at.L, at.I} {
		for _, to := range []netlab.Pair{own, at.L, at.I, m.Peers["D"].Addresses} {
			for i, dst := range to.List() {
				token := m.Lab.Token()
				tokens = append(tokens, token)
				packet := netlab.UDPPacket(netip.AddrPortFrom(from.List()[i], 4711),
					netip.AddrPortFrom(dst, netlab.EchoPort), []byte(token))
				if err := m.C.Forge("wg0", packet); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	// The tunnel keeps the order, so a packet that C sends now follows all of them.
	if !m.reaches(t, m.C, at.L.V4, true) {
		t.Fatal("C doesn't reach L")
	}
	for _, token := range tokens {
		if by, served := m.Lab.Saw(token); len(by) > 0 || served {
			t.Errorf("a packet with another device's address came out of C's tunnel: seen by %v, served=%t", by, served)
		}
	}
}

// TestMappingServesOneFlow sends to the port that a flow of C's is translated to on B's
// uplink address: from the flow's remote host with another port, and from another host.
// Neither packet is the exact reverse of the flow.
func TestMappingServesOneFlow(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing)
	at := netlab.Addresses()
	for i, addr := range at.I.List() {
		seen, err := m.I.Watch(func(p netlab.Packet) bool { return !p.Out && p.Is(netlab.UDP) && p.Dst == addr })
		if err != nil {
			t.Fatal(err)
		}
		f, err := m.Lab.Flow(netlab.FlowOptions{From: m.C, To: m.I, Addr: addr, Proto: netlab.UDP})
		if err != nil {
			t.Fatal(err)
		}
		if err := f.WaitBothWays(5, generous); err != nil {
			t.Fatal(err)
		}
		packets, err := seen.Packets()
		if err != nil || len(packets) == 0 {
			t.Fatalf("I saw %d packets of the flow: %v", len(packets), err)
		}
		mapping := netip.AddrPortFrom(packets[0].Src, packets[0].SrcPort)
		w := at.W.List()[i]
		var forgeries []forgery
		for _, src := range []netip.AddrPort{
			netip.AddrPortFrom(addr, f.Target().Port()+1), netip.AddrPortFrom(w, f.Target().Port()), netip.AddrPortFrom(w, 53),
		} {
			forgeries = append(forgeries, forgery{by: m.W, link: "b0", proto: netlab.UDP, src: src, dst: mapping,
				token: m.Lab.Token(), reason: "into C's mapping"})
		}
		send(t, m, forgeries)
		if err := f.WaitBothWays(5, generous); err != nil {
			t.Error("after the forgeries:", err)
		}
	}
}

// TestAnotherWayToAPeer gives B a second path to A and D, by its LAN. C doesn't reach
// them by it, and no packet for them leaves unencrypted, not even B's own.
func TestAnotherWayToAPeer(t *testing.T) {
	m := newMesh(t)
	for name := range m.Peers {
		permit(t, m, name, everything)
	}
	at := netlab.Addresses()
	for _, name := range []string{"A", "D"} {
		for i, addr := range m.Peers[name].Addresses.List() {
			to := netip.PrefixFrom(addr, addr.BitLen())
			if err := m.B.Detour(netlab.Route{To: to, Via: at.L.List()[i]}); err != nil {
				t.Fatal(err)
			}
		}
	}
	var probes []netlab.Probe
	for _, from := range []*netlab.Host{m.B, m.C, m.I, m.P} {
		for _, name := range []string{"A", "D"} {
			for _, addr := range m.Peers[name].Addresses.List() {
				for _, proto := range protos {
					probes = append(probes, netlab.Probe{From: from, To: addr, Proto: proto, Wait: netlab.RefuseWait})
				}
			}
		}
	}
	results := m.Lab.Probe(t.Context(), probes...)
	time.Sleep(netlab.RefuseWait)
	m.Lab.Recheck(results)
	for _, r := range results {
		for _, name := range r.SeenBy {
			if name == "L" || name == "A" || name == "D" {
				t.Errorf("%s", r)
			}
		}
	}
	t.Logf("sent %d probes", len(results))
}
