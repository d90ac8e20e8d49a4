package trial

// Translation: the source ports of peers' flows, and flows after a loss of the rules.

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestPeerTakesNoHandshakes has C keep sending from WireGuard's port, out of its tunnel,
// to A's endpoint: A's handshakes reach the host and not C, while C may route, after it
// was denied, and after it was removed.
func TestPeerTakesNoHandshakes(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing)
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
	m.Peers["A"].End.Config.ListenPort = port // a client with a fixed port
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
		// As after a long silence of A: the host has no flow with it.
		if err := m.B.ForgetFlows(); err != nil {
			t.Fatal(err)
		}
		forge()
		switch when {
		case "while C may route":
			// Once the packet has arrived at A, the host has the flow.
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
			// Traffic makes the tunnel start a handshake.
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

// TestFlowsRecoverFromFlushes deletes the helper's table again and again, while another
// program's table keeps connection tracking on and C opens flows at once: flows that left
// untranslated meanwhile work once the table is restored.
func TestFlowsRecoverFromFlushes(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing)
	at := netlab.Addresses()
	if err := m.B.TrackFlows(); err != nil {
		t.Fatal(err)
	}
	if !m.reaches(t, m.C, at.I.V4, true) {
		t.Fatal("C doesn't reach I")
	}
	untranslated, err := m.I.Watch(func(p netlab.Packet) bool {
		return !p.Out && (p.Src == m.Peers["C"].Addresses.V4 || p.Src == m.Peers["C"].Addresses.V6)
	})
	if err != nil {
		t.Fatal(err)
	}
	begun := 0
	for range 10 {
		var flows []net.Conn
		before := status(t, m).Repairs
		if err := m.B.DeleteTable("meshhelper"); err != nil {
			t.Fatal(err)
		}
		for _, addr := range at.I.List() {
			for range 5 {
				var c net.Conn
				if err := m.C.Do(func() (err error) {
					c, err = net.Dial("udp", netip.AddrPortFrom(addr, netlab.EchoPort).String())
					return err
				}); err != nil {
					t.Fatal(err)
				}
				flows = append(flows, c)
				c.Write([]byte("first"))
			}
		}
		begun += len(flows)
		for deadline := time.Now().Add(generous); status(t, m).Repairs == before; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the table isn't repaired")
			}
		}
		for _, c := range flows {
			answered := false
			for b := make([]byte, 100); ; { // answers from before
				c.SetReadDeadline(time.Now().Add(time.Millisecond))
				if _, err := c.Read(b); err != nil {
					break
				}
			}
			for deadline := time.Now().Add(generous); !answered && time.Now().Before(deadline); {
				c.Write([]byte("again")) // an ICMP error is returned here, and is no reason to stop
				c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				n, err := c.Read(make([]byte, 100))
				answered = err == nil && n > 0
			}
			if !answered {
				t.Errorf("the flow from %v to %v never recovered", c.LocalAddr(), c.RemoteAddr())
			}
			c.Close()
		}
		if t.Failed() {
			break
		}
	}
	packets, err := untranslated.Packets()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d flows were opened, %d packets left untranslated", begun, len(packets))
}
