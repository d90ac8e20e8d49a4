package trial

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/netlab"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// part returns the fragment of an IPv4 packet that holds its payload's bytes from one to
// another, both multiples of 8 but for the end.
func part(whole []byte, id uint16, from, to int) []byte {
	const header, more = 20, 0x2000
	b := append(append([]byte{}, whole[:header]...), whole[header+from:header+to]...)
	field := uint16(from / 8)
	if header+to < len(whole) {
		field |= more
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], field)
	b[10], b[11] = 0, 0
	sum := uint32(0)
	for i := 0; i < header; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	return b
}

// TestColludingFragments has three peers send datagrams without an end, as many as the
// guard lets each: a fourth's datagrams in fragments arrive.
func TestColludingFragments(t *testing.T) {
	m := newSilentStage(t)
	start(t, m)
	addPeers(t, m)
	if _, err := m.AddPeer(t.Context(), "P", m.P, "--external"); err != nil {
		t.Fatal(err)
	}
	colluders := []string{"A", "C", "P"}
	for _, name := range append(colluders, "D") {
		permit(t, m, name, policy.Routing)
	}
	to := netip.AddrPortFrom(netlab.Addresses().I.V4, 9)
	for i := range 60 {
		for _, name := range colluders {
			peer := m.Peers[name]
			whole := netlab.UDPPacket(netip.AddrPortFrom(peer.Addresses.V4, uint16(2000+i)), to, make([]byte, 12000))
			for n := range 9 {
				if err := peer.Host.Forge(peer.End.Name, part(whole, uint16(i), n*1200, (n+1)*1200)); err != nil {
					t.Fatal(err)
				}
			}
		}
		time.Sleep(5 * time.Millisecond) // so that few are lost
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
			for _, b := range [][]byte{part(whole, 100+i, 0, 800), part(whole, 100+i, 800, len(whole)-20)} {
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
		t.Errorf("of D's %d datagrams in fragments %d arrived; refused: %s", datagrams, len(seen), refusals(t, m))
	}
}
