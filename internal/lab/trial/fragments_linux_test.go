package trial

// Fragments of datagrams that are never complete, from colluding peers.

import (
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestColludingFragments has three peers send incomplete datagrams, as many as the guard
// allows each: a fourth peer's fragmented datagrams arrive.
func TestColludingFragments(t *testing.T) {
	m := newSilentStage(t)
	start(t, m)
	addPeers(t, m)
	if _, err := m.AddPeer(t.Context(), "P", m.P, "--external"); err != nil {
		t.Fatal(err)
	}
	colluders := []string{"A", "C", "P"}
	for _, name := range append(colluders, "D") {
		permit(t, m, name, mesh.Routing)
	}
	to := netip.AddrPortFrom(netlab.Addresses().I.V4, 9)
	for i := range 60 {
		for _, name := range colluders {
			peer := m.Peers[name]
			whole := netlab.UDPPacket(netip.AddrPortFrom(peer.Addresses.V4, uint16(2000+i)), to, make([]byte, 12000))
			for _, b := range flowtest.Fragments(whole, uint32(i), 1200)[:9] {
				if err := peer.Host.Forge(peer.End.Name, b); err != nil {
					t.Fatal(err)
				}
			}
		}
		time.Sleep(5 * time.Millisecond) // to lose only a few
	}
	w, err := m.I.Watch(func(p netlab.Packet) bool { return !p.Out && p.Src == netlab.Addresses().BUplink.V4 })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	seen := map[uint16]bool{}
	const datagrams = 20
	for deadline := time.Now().Add(20 * time.Second); len(seen) < datagrams && time.Now().Before(deadline); {
		for i := range uint16(datagrams) {
			whole := netlab.UDPPacket(netip.AddrPortFrom(m.Peers["D"].Addresses.V4, 7000+i), to, make([]byte, 1600+int(i)))
			for _, b := range flowtest.Fragments(whole, uint32(100+i), 816) {
				if err := m.D.Forge(m.Peers["D"].End.Name, b); err != nil {
					t.Fatal(err)
				}
			}
		}
		time.Sleep(200 * time.Millisecond)
		if err := w.Sync(); err != nil {
			t.Fatal(err)
		}
		packets, _ := w.Packets()
		for _, p := range packets {
			if p.DstPort == 9 {
				seen[p.SrcPort] = true
			}
		}
	}
	if len(seen) < datagrams {
		t.Errorf("of D's %d fragmented datagrams %d arrived; refused: %s", datagrams, len(seen), refusals(t, m))
	}
}
