package trial

// Other hosts that forge the source addresses of peers and of the host.

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// forgery is a packet with another device's source address.
type forgery struct {
	by     *netlab.Host
	link   string
	src    netip.AddrPort
	dst    netip.AddrPort
	proto  netlab.Proto
	token  string
	reason string
}

func (f forgery) packet() []byte {
	switch f.proto {
	case netlab.TCP:
		return netlab.TCPPacket(f.src, f.dst, netlab.ACK|netlab.PSH, 1, 1, []byte(f.token))
	case netlab.UDP:
		return netlab.UDPPacket(f.src, f.dst, []byte(f.token))
	}
	return netlab.EchoPacket(f.src.Addr(), f.dst.Addr(), false, f.src.Port(), 1, []byte(f.token))
}

// send sends the forgeries, several times each, and reports every one that a host other
// than B or a server of B's received.
func send(t *testing.T, m *Mesh, forgeries []forgery) {
	t.Helper()
	sent := 0
	forge := func(f forgery) {
		sent++
		if err := f.by.Forge(f.link, f.packet()); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		for _, f := range forgeries {
			forge(f)
		}
		time.Sleep(netlab.RefuseWait / 3)
	}
	// A sniffer on a busy machine loses packets: those that it missed are sent again.
	for end := time.Now().Add(generous); time.Now().Before(end); time.Sleep(netlab.RefuseWait) {
		missed := 0
		for _, f := range forgeries {
			if by, _ := m.Lab.Saw(f.token); f.link != "wg0" && !slices.Contains(by, "B") {
				missed++
				forge(f)
			}
		}
		if missed == 0 {
			break
		}
	}
	for _, f := range forgeries {
		by, served := m.Lab.Saw(f.token)
		// A packet from a tunnel may be dropped before it reaches B's interface.
		if f.link != "wg0" && !slices.Contains(by, "B") {
			t.Errorf("%s: the forged packet didn't reach B, so the test proves nothing", f.reason)
		}
		if len(slices.DeleteFunc(by, func(name string) bool { return name == "B" })) > 0 || served {
			t.Errorf("%s: %s %s to %s sent by %s was received by %v, served=%t",
				f.reason, f.proto, f.src, f.dst, f.by.Name, by, served)
		}
	}
	t.Logf("sent %d forged packets", sent)
}

// TestForgedSources has W and L send packets with the peers' addresses to every
// destination that a peer may reach.
func TestForgedSources(t *testing.T) {
	m := newMesh(t)
	for name := range m.Peers {
		permit(t, m, name, everything)
	}
	at, own := netlab.Addresses(), status(t, m).Address()
	var forgeries []forgery
	for _, from := range []struct {
		host *netlab.Host
		link string
	}{{m.W, "b0"}, {m.L, "eth0"}, {m.V, "eth0"}} {
		for _, peer := range []string{"A", "C"} {
			for _, to := range []netlab.Pair{own, at.BLAN, at.BUplink, at.L, at.I, at.P, at.Behind, m.Peers["D"].Addresses} {
				for i, dst := range to.List() {
					src := m.Peers[peer].Addresses.List()[i]
					for _, proto := range protos {
						forgeries = append(forgeries, forgery{by: from.host, link: from.link, proto: proto,
							src: netip.AddrPortFrom(src, 4711), dst: netip.AddrPortFrom(dst, netlab.EchoPort),
							token: m.Lab.Token(), reason: peer + "'s address from outside"})
					}
				}
			}
		}
	}
	send(t, m, forgeries)
}

// TestForgedFlows has L and W send packets with the addresses and ports of C's running
// flows: as C, and as the other end.
func TestForgedFlows(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", everything)
	at, own := netlab.Addresses(), status(t, m).Address()
	var forgeries []forgery
	var flows []*netlab.Flow
	for _, to := range []struct {
		host *netlab.Host
		at   netlab.Pair
	}{{m.I, at.I}, {m.L, at.L}, {m.B, own}} {
		for _, addr := range to.at.List() {
			for _, proto := range protos {
				f, err := m.Lab.Flow(netlab.FlowOptions{From: m.C, To: to.host, Addr: addr, Proto: proto})
				if err != nil {
					t.Fatal(err)
				}
				if err := f.WaitBothWays(5, generous); err != nil {
					t.Fatal(err)
				}
				flows = append(flows, f)
				c, far := f.Opener(), f.Target()
				if proto == netlab.ICMP {
					peer := m.Peers["C"].Addresses.V4
					if addr.Is6() {
						peer = m.Peers["C"].Addresses.V6
					}
					c = netip.AddrPortFrom(peer, far.Port())
				}
				for _, by := range []struct {
					host *netlab.Host
					link string
				}{{m.L, "eth0"}, {m.W, "b0"}} {
					forgeries = append(forgeries, forgery{by: by.host, link: by.link, proto: proto, src: c, dst: far,
						token: m.Lab.Token(), reason: "as C in its running flow"})
					if to.host != by.host {
						forgeries = append(forgeries, forgery{by: by.host, link: by.link, proto: proto, src: far, dst: c,
							token: m.Lab.Token(), reason: "as the other end, straight to C"})
					}
				}
			}
		}
	}
	send(t, m, forgeries)
	for _, f := range flows {
		if err := f.WaitBothWays(5, generous); err != nil {
			t.Error("after the forgeries:", err)
		}
	}
}

// TestForgedOwnPlace sends C's handshake initiation from an address of the host itself,
// which Linux accepts for IPv6. From another port it may come from a program of the
// host's, and is answered. From WireGuard's own port it isn't: otherwise the host would
// go on to send C's packets to itself.
func TestForgedOwnPlace(t *testing.T) {
	m := newMesh(t)
	at, end := netlab.Addresses(), m.Peers["C"].End
	host := netip.AddrPortFrom(at.BUplink.V6, listenPort)
	real := end.Config.Peers[0].Endpoint
	// C's own datagrams to this address are lost, so the host sees the forged ones first.
	lost := netip.AddrPortFrom(at.I.V6, listenPort)
	begun, err := m.C.Watch(func(p netlab.Packet) bool {
		return p.Out && p.Link == "eth0" && p.Is(netlab.UDP) && p.Dst == lost.Addr() && p.DstPort == lost.Port()
	})
	if err != nil {
		t.Fatal(err)
	}
	arrived, err := m.B.Watch(func(p netlab.Packet) bool {
		return !p.Out && p.Link == netlab.Uplink && p.Is(netlab.UDP) && p.Src == host.Addr() && p.DstPort == listenPort
	})
	if err != nil {
		t.Fatal(err)
	}
	answers := map[uint16]*netlab.Watch{}
	for _, port := range []uint16{listenPort, 4500} {
		if answers[port], err = m.B.Watch(func(p netlab.Packet) bool {
			return p.Out && p.Is(netlab.UDP) && p.Dst == host.Addr() && p.SrcPort == listenPort && p.DstPort == port
		}); err != nil {
			t.Fatal(err)
		}
	}
	mesh := status(t, m).Address().V4
	renew := func(to netip.AddrPort) {
		t.Helper()
		end.Config.Peers[0].Endpoint = to
		if err := end.Renew(); err != nil {
			t.Fatal(err)
		}
		m.Lab.Probe(t.Context(), netlab.Probe{From: m.C, To: mesh, Proto: netlab.ICMP, Wait: netlab.RefuseWait})
	}
	for i, port := range []uint16{listenPort, 4500} {
		seen, _ := begun.Packets()
		renew(lost)
		if err := begun.Wait(len(seen)+1, generous); err != nil {
			t.Fatal(err)
		}
		sent, err := begun.Packets()
		if err != nil {
			t.Fatal(err)
		}
		forged := netlab.UDPPacket(netip.AddrPortFrom(host.Addr(), port), host, sent[len(sent)-1].Payload)
		if err := m.C.Forge("eth0", forged); err != nil {
			t.Fatal(err)
		}
		if err := arrived.Wait(i+1, generous); err != nil {
			t.Fatal(err)
		}
	}
	if err := answers[4500].Wait(1, generous); err != nil {
		t.Errorf("an initiation from another port of the host isn't answered: %v", err)
	}
	renew(real)
	// The host accepts one initiation in 50 ms, and C tries again after 5 s.
	for limit := time.Now().Add(generous); ; {
		last, err := end.LastHandshake()
		if err != nil {
			t.Fatal(err)
		}
		if !last.IsZero() {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("C has no session with the host within %s", generous)
		}
		m.Lab.Probe(t.Context(), netlab.Probe{From: m.C, To: mesh, Proto: netlab.ICMP, Wait: netlab.RefuseWait})
	}
	if packets, err := answers[listenPort].Packets(); err != nil || len(packets) > 0 {
		t.Errorf("the host sent %d datagrams to itself: %v", len(packets), err)
	}
}

// TestNoDeviceIsThere has a host on the uplink forge C's handshake initiation with sources
// that can't be a device's: the unspecified address, the broadcast address of the host's
// LAN, and port 0. Nothing is sent there: that would reach the host's own loopback address
// or all hosts of the LAN. With another host's address and port it is answered.
func TestNoDeviceIsThere(t *testing.T) {
	m := newMesh(t)
	at, end := netlab.Addresses(), m.Peers["C"].End
	lost := netip.AddrPortFrom(at.I.V6, listenPort)
	begun, err := m.C.Watch(func(p netlab.Packet) bool {
		return p.Out && p.Link == "eth0" && p.Is(netlab.UDP) && p.Dst == lost.Addr() && p.DstPort == lost.Port()
	})
	if err != nil {
		t.Fatal(err)
	}
	const port = 7000
	broadcast := netip.MustParseAddr("192.168.77.255")
	arrived, err := m.B.Watch(func(p netlab.Packet) bool {
		return !p.Out && p.Link == netlab.Uplink && p.Is(netlab.UDP) && (p.SrcPort == port || p.SrcPort == 0) && p.DstPort == listenPort
	})
	if err != nil {
		t.Fatal(err)
	}
	answers, err := m.B.Watch(func(p netlab.Packet) bool {
		return p.Out && p.Is(netlab.UDP) && p.SrcPort == listenPort && (p.DstPort == port || p.DstPort == 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	mesh := status(t, m).Address().V4
	end.Config.Peers[0].Endpoint = lost
	for i, from := range []netip.AddrPort{
		netip.AddrPortFrom(netip.IPv6Unspecified(), port), netip.AddrPortFrom(broadcast, port), netip.AddrPortFrom(at.I.V4, 0),
		netip.AddrPortFrom(at.I.V6, port), netip.AddrPortFrom(at.I.V4, port),
	} {
		seen, _ := begun.Packets()
		if err := end.Renew(); err != nil {
			t.Fatal(err)
		}
		m.Lab.Probe(t.Context(), netlab.Probe{From: m.C, To: mesh, Proto: netlab.ICMP, Wait: netlab.RefuseWait})
		if err := begun.Wait(len(seen)+1, generous); err != nil {
			t.Fatal(err)
		}
		sent, err := begun.Packets()
		if err != nil {
			t.Fatal(err)
		}
		to := at.BUplink.V4
		if from.Addr().Is6() {
			to = at.BUplink.V6
		}
		if err := m.W.Forge("b0", netlab.UDPPacket(from, netip.AddrPortFrom(to, listenPort), sent[len(sent)-1].Payload)); err != nil {
			t.Fatal(err)
		}
		if err := arrived.Wait(i+1, generous); err != nil {
			t.Fatal(err)
		}
		if from.Addr() == at.I.V6 || from == netip.AddrPortFrom(at.I.V4, port) {
			if err := answers.Wait(1, generous); err != nil {
				t.Errorf("the initiation from %v isn't answered, so the test proves nothing: %v", from, err)
			}
		}
	}
	packets, err := answers.Packets()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range packets {
		if p.Dst != at.I.V4 && p.Dst != at.I.V6 || p.DstPort == 0 {
			t.Errorf("the host sent to an address without a device: %v", p)
		}
	}
}
