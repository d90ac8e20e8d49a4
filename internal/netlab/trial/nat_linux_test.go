package trial

import (
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/netlab"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestPeerTakesNoHandshakes has C send from WireGuard's port to A's outer address
// and port, out of its tunnel, again and again: A's handshakes reach the host and not
// C, while C may route, after it was denied, and after it was removed.
func TestPeerTakesNoHandshakes(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", policy.Routing)
	at := netlab.Addresses()
	if !m.reaches(t, m.C, at.I.V4, true) {
		t.Fatal("C doesn't reach I")
	}
	stolen, err := m.C.Watch(func(p netlab.Packet) bool {
		return !p.Out && p.Link == "wg0" && p.Is(netlab.UDP) && p.Src == at.A.V4
	})
	if err != nil {
		t.Fatal(err)
	}
	port, err := m.Peers["A"].End.ListenPort()
	if err != nil {
		t.Fatal(err)
	}
	m.Peers["A"].End.Config.ListenPort = port // a client that keeps its port
	heard, err := m.A.Watch(func(p netlab.Packet) bool {
		return !p.Out && p.Is(netlab.UDP) && p.DstPort == port && string(p.Payload) == "from C"
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"while C may route", "after deny", "after remove"} {
		forge := func() {
			t.Helper()
			p := netlab.UDPPacket(netip.AddrPortFrom(m.Peers["C"].Addresses.V4, listenPort), netip.AddrPortFrom(at.A.V4, port), []byte("from C"))
			if err := m.C.Forge("wg0", p); err != nil {
				t.Fatal(err)
			}
		}
		// As if A had been silent for long, so that the host has no flow with it.
		if err := m.B.ForgetFlows(); err != nil {
			t.Fatal(err)
		}
		forge()
		switch when {
		case "while C may route":
			// It has arrived at A, so that the host has the flow.
			if err := heard.Wait(1, generous); err != nil {
				t.Fatal(err)
			}
		case "after deny":
			permit(t, m, "C", 0)
		case "after remove":
			do(t, m, "peer", "remove", "C")
		}
		before := time.Now()
		if err := m.Peers["A"].End.Renew(); err != nil {
			t.Fatal(err)
		}
		for deadline := before.Add(generous); ; time.Sleep(50 * time.Millisecond) {
			forge()
			last, err := m.Peers["A"].End.LastHandshake()
			if err != nil {
				t.Fatal(err)
			}
			if last.After(before) {
				break
			}
			// Traffic makes the tunnel begin one.
			m.Lab.Probe(t.Context(), netlab.Probe{From: m.A, To: status(t, m).Address().V4, Proto: netlab.ICMP, Wait: netlab.RefuseWait})
			if time.Now().After(deadline) {
				t.Fatalf("%s, A has no handshake with the host within %s", when, generous)
			}
		}
	}
	if packets, err := stolen.Packets(); err != nil || len(packets) > 0 {
		t.Errorf("C received %d packets that A sent: %v", len(packets), err)
	}
}
