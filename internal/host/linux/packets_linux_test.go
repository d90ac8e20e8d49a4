package linux

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// toMesh waits until the kernel sends a packet with this payload to the mesh.
func (g *rig) toMesh(payload []byte, wait time.Duration) (netlab.Packet, bool) {
	deadline := time.After(wait)
	for {
		g.mu.Lock()
		for _, b := range g.out {
			if p, ok := netlab.ParsePacket(b); ok && bytes.Contains(b, payload) {
				g.mu.Unlock()
				return p, true
			}
		}
		g.mu.Unlock()
		select {
		case <-g.more:
		case <-deadline:
			return netlab.Packet{}, false
		}
	}
}

func udpPacket(src, dst netip.Addr, payload string) []byte {
	return netlab.UDPPacket(netip.AddrPortFrom(src, 4000), netip.AddrPortFrom(dst, 5000), []byte(payload))
}

func TestRoundTrip(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(meshOf(grants{ann: mesh.Routing}))
	for i, dst := range netlab.Addresses().I.List() {
		at, err := g.pic.I.Watch(func(p netlab.Packet) bool { return !p.Out && p.DstPort == 5000 })
		if err != nil {
			t.Fatal(err)
		}
		src := []netip.Addr{ann4, ann6}[i]
		g.inject(udpPacket(src, dst, "hello"))
		if err := at.Wait(1, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		got, err := at.Packets()
		if err != nil {
			t.Fatal(err)
		}
		t.Log(got[0])
		answer := fmt.Sprintf("answer %d", i)
		back := netlab.UDPPacket(netip.AddrPortFrom(dst, 5000), netip.AddrPortFrom(got[0].Src, got[0].SrcPort), []byte(answer))
		if err := g.pic.I.Forge("eth0", back); err != nil {
			t.Fatal(err)
		}
		p, ok := g.toMesh([]byte(answer), 5*time.Second)
		if !ok || p.Dst != src {
			t.Fatalf("the answer didn't arrive: %v", p)
		}
		g.inject(udpPacket([]netip.Addr{bob4, bob6}[i], dst, "not me"))
		g.inject(udpPacket(src, []netip.Addr{bob4, bob6}[i], "not him"))
		if err := at.Sync(); err != nil {
			t.Fatal(err)
		}
		if got, _ = at.Packets(); len(got) != 1 {
			t.Errorf("bob has no routing: %v", got)
		}
	}
	g.close()
}
