package trial

// Each enforcer alone, with the other one switched off.

import (
	"slices"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// disarmed is a mesh whose helper was built with some of its enforcers switched off.
func disarmed(t *testing.T, name string, edits []netlab.Edit) *Mesh {
	t.Helper()
	m := newStage(t)
	use(t, m, "meshhelper-"+name, edits)
	start(t, m)
	addPeers(t, m)
	return m
}

// someSets are the sets of permissions that are tried of each enforcer alone; the
// long version tries them all.
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

// TestFilterAlone judges by the packet filter, without the guard.
func TestFilterAlone(t *testing.T) {
	truthTable(t, disarmed(t, "without-guard", withoutGuard), someSets())
}

// TestGuardAlone judges by the guard, without the packet filter.
func TestGuardAlone(t *testing.T) {
	truthTable(t, disarmed(t, "without-filter", withoutFilter), someSets())
}

// TestNeitherEnforces shows that the two above switch off what they say: without
// both, C reaches another peer and B itself.
func TestNeitherEnforces(t *testing.T) {
	m := disarmed(t, "without-both", slices.Concat(withoutGuard, withoutFilter))
	permit(t, m, "A", everything) // so that B forwards
	for _, to := range []netlab.Pair{m.Peers["D"].Addresses, status(t, m).Address()} {
		for _, addr := range to.List() {
			if !m.reaches(t, m.C, addr, true) {
				t.Errorf("C doesn't reach %s although nothing enforces, so the tests of each enforcer alone prove nothing", addr)
			}
		}
	}
}
