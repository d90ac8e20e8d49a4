package explain

import (
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestAnswersOfTheHostItself asks about what comes from the host's own mesh address,
// which is on the mesh interface and not among the other interfaces' addresses.
func TestAnswersOfTheHostItself(t *testing.T) {
	own, peer := netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("100.64.0.2")
	m := policy.Mesh{Prefixes: []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6}, Addresses: []netip.Addr{own}, Peers: []mesh.Peer{
		{Name: "phone", Addresses: mesh.Addresses{peer, netip.MustParseAddr("fd6d:6573:6800::2")}, Permissions: mesh.Granted(mesh.Incoming)}}}
	r, err := policy.Compile(m, policy.Host{Interface: "utun7", Uplink4: "en0"}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	q := api.Question{Peer: "phone", To: own, From: own, Port: 80, Proto: "tcp"}
	if e, err := evaluate(r, q); err != nil || !e.verdict.Pass {
		t.Errorf("its answer: %v, %v", e.verdict.Rule, err)
	}
	q.To = netip.Addr{}
	if e, err := evaluate(r, q); err != nil || e.verdict.Rule != policy.RuleHostToPeer {
		t.Errorf("its own connection to the peer: %v, %v", e.verdict.Rule, err)
	}
}
