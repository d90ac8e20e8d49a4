package trial

// Each enforcer alone, with the other one disabled.

import (
	"slices"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// disarmed returns a mesh whose helper was built with some of its enforcers disabled.
func disarmed(t *testing.T, name string, edits []netlab.Edit) *Mesh {
	t.Helper()
	m := newStage(t)
	use(t, m, "meshhelper-"+name, edits)
	start(t, m)
	addPeers(t, m)
	return m
}

// someSets are the permission sets that each enforcer alone is tested with. With -soak
// all sets are.
func someSets() []mesh.Permissions {
	if !*soak {
		return []mesh.Permissions{0, mesh.Routing, everything}
	}
	var all []mesh.Permissions
	for may := mesh.Permissions(0); may <= everything; may++ {
		all = append(all, may)
	}
	return all
}

// TestFilterAlone compares the packet filter, without the guard, with the policy.
func TestFilterAlone(t *testing.T) {
	truthTable(t, disarmed(t, "without-guard", withoutGuard), someSets())
}

// TestGuardAlone compares the guard, without the packet filter, with the policy.
func TestGuardAlone(t *testing.T) {
	truthTable(t, disarmed(t, "without-filter", withoutFilter), someSets())
}

// TestNeitherEnforces shows that the two tests above disable the enforcer that they claim
// to: without both, C reaches another peer and B itself.
func TestNeitherEnforces(t *testing.T) {
	m := disarmed(t, "without-both", slices.Concat(withoutGuard, withoutFilter))
	permit(t, m, "A", everything) // so that B forwards
	for _, to := range []netlab.Pair{m.Peers["D"].Addresses, status(t, m).Address()} {
		for _, addr := range to.List() {
			if !m.reaches(t, m.C, addr, true) {
				t.Errorf("C doesn't reach %s although both enforcers are disabled, so the tests of each one alone prove nothing", addr)
			}
		}
	}
}
