package linux

import (
	"testing"

	"github.com/meshhelper/meshhelper/internal/policy"
)

const all = policy.Incoming | policy.Routing | policy.LAN

func TestInspectFindsWhatEnforceMade(t *testing.T) {
	g := newRig(t)
	before := g.snapshot()
	g.open()
	r := g.enforce(mesh(grants{ann: all}))
	report := g.inspect(r)
	if len(report.Drift) > 0 {
		t.Errorf("right after Enforce: %+v", report.Drift)
	}
	g.close()
	if diff := before.Diff(g.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
	if g.journalExists() {
		t.Error("the journal is still there")
	}
}
