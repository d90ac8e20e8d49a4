package trial

// A restart of the helper while its peers are silent.

import (
	"context"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestHostReachesPeersAfterRestart restarts the helper while the peers are silent: the
// host reaches a peer at once, though no configuration has its endpoint.
func TestHostReachesPeersAfterRestart(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Incoming)
	peer := m.Peers["C"].Addresses.V4
	// The peer sends once, so that the helper learns its endpoint.
	probe := netlab.Probe{From: m.C, To: status(t, m).Address().V4, Proto: netlab.ICMP}
	if r := m.Lab.Probe(t.Context(), probe); !r[0].OK {
		t.Fatalf("before the restart: %v", r[0])
	}
	time.Sleep(2 * time.Second) // the helper's statistics may be one second old
	stop(t, m)
	start(t, m)
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), generous)
	defer cancel()
	r := m.Lab.Probe(ctx, netlab.Probe{From: m.B, To: peer, Proto: netlab.ICMP, Wait: generous})
	if !r[0].OK {
		t.Fatalf("the host doesn't reach the peer: %v", r[0])
	}
	took := time.Since(began)
	t.Logf("the host reached the peer %s after the restart", took.Round(time.Millisecond))
	if took > 5*time.Second {
		t.Errorf("reached after %s", took)
	}
}
