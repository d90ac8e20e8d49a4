package mactrial

// A permission that ends while the Mac sleeps.

import (
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestEndsWhileAsleep grants C routing for an hour and has the Mac sleep for two: the
// wall clock advances, the monotonic clock doesn't. After the helper's next round no
// packet of C's passes, on running flows either, past the guard or pf. The flows of D,
// whose permission lasts longer, go on, and the sockets are reopened.
func TestEndsWhileAsleep(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	g.add("D", "own")
	for peer, ends := range map[string]string{"C": "1h", "D": "5h"} {
		_, err := g.d.ChangePeer(t.Context(), peer, api.PeerChange{Permissions: map[string]api.PermissionChange{
			mesh.Routing.String(): {Allowed: true, For: &ends}}})
		g.must(err)
	}
	var ended, kept []flow
	for _, w := range []way{guarded, alone} {
		for family := range 2 {
			for _, proto := range protos {
				ended = append(ended, g.run(w, "C", server[family], proto, family))
				kept = append(kept, g.run(w, "D", server[family], proto, family))
			}
		}
	}
	binds := g.binds.Load()
	g.mac.Sleep(2 * time.Hour)
	g.wait("the helper has looked", func() bool {
		for _, p := range g.d.Status().Peers {
			if p.Name == "C" && !p.Permissions.Of(mesh.Routing).Allowed {
				return g.d.Status().State == api.Enforcing && g.binds.Load() > binds
			}
		}
		return false
	})
	rounds := g.rounds.Load()
	g.wait("and cut", func() bool { return g.rounds.Load() > rounds+1 })
	for _, f := range ended {
		if got := g.ends(f, 5); got > 0 {
			t.Errorf("%d of 10 packets of %s arrived", got, f.name)
		}
		if a := g.open(f.w, g.opening(g.device().name, f.opened.Src, f.opened.Dst, netlab.UDP)); a.at != "" {
			t.Errorf("a new flow of %v got to %q", f.opened.Src, a.at)
		}
	}
	for _, f := range kept {
		if got := g.ends(f, 5); got != 10 {
			t.Errorf("%d of 10 packets of %s arrived", got, f.name)
		}
	}
}
