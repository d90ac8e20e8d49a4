package mactrial

// explain's answers, compared with the fate of a peer's packets.

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// TestExplainOnAMac compares explain with the fate of a peer's packets: with our rules
// alone, and beside another product's.
func TestExplainOnAMac(t *testing.T) {
	g := newRig(t)
	g.start()
	defer func() { g.stop() }()
	g.add("C", "own")
	g.permit("C", everything)
	internet := netip.MustParseAddr("9.9.9.9")
	check := func(want bool, where string) {
		t.Helper()
		e, err := g.d.Explain(t.Context(), api.Question{Peer: "C", To: internet, Proto: "tcp", Port: g.opening(g.device().name, g.peers["C"][0], internet, netlab.TCP).DstPort})
		g.must(err)
		a := g.open(guarded, g.opening(g.device().name, g.peers["C"][0], internet, netlab.TCP))
		if arrives := a.at != ""; arrives != want || e.Pass != want || e.Unclear {
			t.Errorf("explain says %v (%+v), but the packet got to %q; want %v", e.Pass, e.Stops, a.at, want)
		}
		if where != "" && (len(e.Stops) != 1 || !strings.Contains(e.Stops[0].Message, where)) {
			t.Errorf("stopped by %+v, want %q", e.Stops, where)
		}
	}
	check(true, "")
	g.must(g.mac.LoadAnchor("com.apple/100.firewall", "block drop out quick on en0 inet proto tcp from any to 9.0.0.0/8\n"))
	check(false, "of the anchor com.apple/100.firewall drops it")
	g.must(g.mac.LoadAnchor("com.apple/100.firewall", ""))
	check(true, "")
}
