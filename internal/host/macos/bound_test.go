package macos

import (
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// TestNoPeerUsesUpTheStates has one peer flood the Mac with flows, by every rule and in
// both families, while the anchor is loaded again and again: another peer and the Mac
// itself can still open flows.
func TestNoPeerUsesUpTheStates(t *testing.T) {
	g := newRig(t)
	g.open()
	port := uint16(1024)
	open := func(src, dst string) bool {
		port++
		p := syn(src, dst)
		p.SrcPort = port
		return g.mac.Receive(p, g.p.name).Fate != simmac.Dropped
	}
	for round := range 5 {
		m := testMesh(3+round%2, everything) // different tables in each round
		g.enforce(m)
		g.p.loaded = nil // and a reload of the anchor
		g.enforce(m)
		for range 2500 {
			open(first, "9.9.9.9")
			open(first, "192.168.77.9")
			open(first, "100.64.0.1")
			open(first6, "2620:fe::fe")
		}
		if !open(second, "9.9.9.9") || !open(second6, "2620:fe::fe") || !open(second, "100.64.0.1") {
			t.Fatalf("round %d: the other peer can't open a flow", round)
		}
		p := syn("203.0.113.1", "9.9.9.9")
		p.SrcPort = port
		if o := g.mac.Send(p); o.Fate != simmac.Sent {
			t.Fatalf("round %d: this Mac can't open a flow: %s", round, o.Why)
		}
	}
	g.mac.Judge(func(m *pfsim.PF) {
		if n := m.StateCount(); n > MaxStates*3/4 {
			t.Errorf("pf holds %d states", n)
		} else {
			t.Logf("%d states after 50,000 flows of one peer and 10 loads", n)
		}
	})
}
