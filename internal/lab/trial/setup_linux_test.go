package trial

// The setup of tests: a mesh, its peers and their permissions.

import (
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// generous is how long a test waits for an expected event.
const generous = 60 * time.Second

const everything = mesh.Incoming | mesh.Routing | mesh.LAN

var protos = []netlab.Proto{netlab.ICMP, netlab.TCP, netlab.UDP}

// newStage builds the network and the program, and starts servers on every host. No
// helper runs yet. Every test has its own hosts and mostly waits, so the tests run in
// parallel.
func newStage(t testing.TB) *Mesh {
	t.Helper()
	if test, ok := t.(*testing.T); ok {
		test.Parallel()
	}
	return newQuietStage(t)
}

// newQuietStage is newStage for a test that measures: no other test runs beside it.
func newQuietStage(t testing.TB) *Mesh {
	t.Helper()
	m := newSilentStage(t)
	for _, h := range m.Hosts() {
		if err := h.Serve(); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// newSilentStage is newQuietStage without servers; the test starts those that it needs.
func newSilentStage(t testing.TB) *Mesh {
	t.Helper()
	if err := netlab.Unavailable(); err != nil {
		t.Skip("can't create hosts to test on:", err)
	}
	lab, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error("close lab:", err)
		}
	})
	p, err := netlab.NewPicture(lab)
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && m.Helper != nil {
			t.Logf("the helper printed:\n%s", m.Helper.Output())
		}
	})
	return m
}

// newMesh is a stage with a running helper and the peers A and D (own) and C (external),
// each in the state after `peer add`.
func newMesh(t testing.TB) *Mesh {
	t.Helper()
	m := newStage(t)
	start(t, m)
	addPeers(t, m)
	return m
}

func start(t testing.TB, m *Mesh) {
	t.Helper()
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func addPeers(t testing.TB, m *Mesh) {
	t.Helper()
	for _, p := range []struct {
		name, kind string
		host       *netlab.Host
	}{{"A", "--own", m.A}, {"C", "--external", m.C}, {"D", "--own", m.D}} {
		if _, err := m.AddPeer(t.Context(), p.name, p.host, p.kind); err != nil {
			t.Fatal(err)
		}
	}
}

// stop stops the helper in an orderly way.
func stop(t testing.TB, m *Mesh) {
	t.Helper()
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
}

func permit(t testing.TB, m *Mesh, name string, may mesh.Permissions) {
	t.Helper()
	if err := m.Permit(t.Context(), name, may); err != nil {
		t.Fatal(err)
	}
}

// do runs a command that must succeed.
func do(t testing.TB, m *Mesh, args ...string) Output {
	t.Helper()
	o, err := m.Do(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func status(t testing.TB, m *Mesh) Status {
	t.Helper()
	s, err := m.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ruleset(t testing.TB, m *Mesh, may map[string]mesh.Permissions) *policy.Ruleset {
	t.Helper()
	r, err := m.Ruleset(t.Context(), may)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func snapshot(t testing.TB, h *netlab.Host) netlab.Snapshot {
	t.Helper()
	s, err := h.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return s
}
