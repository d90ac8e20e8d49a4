package netlab

// Flows between hosts of the lab, without the product.

import (
	"testing"
	"time"
)

// generous is how long a test waits for what must happen.
const generous = 30 * time.Second

// TestFlowsSendByThemselves proves that both ends of a flow send, that what
// arrives is noticed with its time, and that a cut in one place shows: after it,
// what is sent doesn't arrive, though the ends go on.
func TestFlowsSendByThemselves(t *testing.T) {
	m := newPlainMesh(t)
	for _, proto := range protos {
		for _, to := range Addresses().I.List() {
			f, err := m.Lab.Flow(FlowOptions{From: m.C, To: m.I, Addr: to, Proto: proto})
			if err != nil {
				t.Fatal(err)
			}
			if err := f.WaitBothWays(20, generous); err != nil {
				t.Error(err)
				continue
			}
			if err := m.B.SetUp("wg0", false); err != nil {
				t.Fatal(err)
			}
			cut := time.Now()
			sent := [2]uint64{f.Sent(Forth), f.Sent(Back)}
			for f.Sent(Back) < sent[Back]+20 || f.Sent(Forth) < sent[Forth]+20 {
				if time.Since(cut) > generous {
					t.Fatalf("%s flow: the ends fell silent", proto)
				}
				time.Sleep(time.Millisecond)
			}
			for _, way := range []Way{Forth, Back} {
				if late := f.SentAfter(way, cut); len(late) > 0 {
					t.Errorf("%s flow to %s: %d packets sent %s after the cut arrived", proto, to, len(late), way)
				}
			}
			f.Stop()
			restart(t, m)
		}
	}
}

// restart sets B's tunnel up again; its addresses and routes went with it.
func restart(t *testing.T, m *plainMesh) {
	t.Helper()
	if err := m.B.SetUp("wg0", true); err != nil {
		t.Fatal(err)
	}
	for _, a := range m.ends["B"].Config.Addresses {
		m.B.AddAddr("wg0", a) // the IPv4 one stays
	}
	for _, p := range m.ends["B"].Config.Peers {
		for _, to := range p.AllowedIPs {
			if err := m.ends["B"].route(to); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestFlowNoticesWhatArrivesAfterATime proves that SentAfter can find something.
func TestFlowNoticesWhatArrivesAfterATime(t *testing.T) {
	m := newPlainMesh(t)
	f, err := m.Lab.Flow(FlowOptions{From: m.C, To: m.L, Addr: Addresses().L.V4, Proto: UDP})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.WaitBothWays(10, generous); err != nil {
		t.Fatal(err)
	}
	when := time.Now()
	if err := f.WaitBothWays(10, generous); err != nil {
		t.Fatal(err)
	}
	for _, way := range []Way{Forth, Back} {
		if len(f.SentAfter(way, when)) < 5 {
			t.Errorf("%s: %d packets sent after the time were found", way, len(f.SentAfter(way, when)))
		}
	}
	if forth, back := f.Finish(generous); forth != 0 || back != 0 {
		t.Errorf("%d packets forth and %d back never arrived", forth, back)
	}
}

// TestPathMTU proves that the ends learn of the narrow hop behind B.
func TestPathMTU(t *testing.T) {
	m := newPlainMesh(t)
	if err := m.NarrowHop(1280); err != nil {
		t.Fatal(err)
	}
	for _, to := range Addresses().I.List() {
		forth, back, err := m.Lab.PathMTU(t.Context(), m.C, m.I, to)
		if err != nil || forth != 1280 || back != 1280 {
			t.Errorf("path MTU to %s is %d forth and %d back, %v; want 1280", to, forth, back, err)
		}
	}
	forth, back, err := m.Lab.PathMTU(t.Context(), m.C, m.L, Addresses().L.V4)
	if err != nil || forth != 1420 || back != 1420 {
		t.Errorf("path MTU to L is %d forth and %d back, %v; want the tunnel's 1420", forth, back, err)
	}
}

// TestForgedPacketsAreSeen proves that a packet with any source can be sent and
// that the far host's watch shows it.
func TestForgedPacketsAreSeen(t *testing.T) {
	m := newPlainMesh(t)
	at := Addresses()
	a, c := m.mesh["A"], m.mesh["C"]
	watch, err := m.C.Watch(func(p Packet) bool { return !p.Out && string(p.Payload) == "forged" })
	if err != nil {
		t.Fatal(err)
	}
	forged := [][]byte{
		EchoPacket(at.I.V4, c.V4, true, 1, 1, []byte("forged")),
		EchoPacket(a.V6, c.V6, false, 1, 1, []byte("forged")),
		UDPPacket(portOf(a.V4, 53), portOf(c.V4, 53), []byte("forged")),
		TCPPacket(portOf(at.I.V6, 443), portOf(c.V6, 4711), SYN|ACK, 1, 2, []byte("forged")),
	}
	for _, p := range forged {
		if err := m.W.Forge("b0", p); err != nil {
			t.Fatal(err)
		}
	}
	if err := watch.Wait(len(forged), generous); err != nil {
		t.Error(err)
	}
	if err := watch.Sync(); err != nil {
		t.Error(err)
	}
	got, err := watch.Packets()
	if err != nil || len(got) != len(forged) {
		t.Errorf("C saw %v, %v; want %d packets", got, err, len(forged))
	}
	for _, p := range got {
		if p.Link != "wg0" {
			t.Errorf("%s came by %s, want wg0", p, p.Link)
		}
	}
}
