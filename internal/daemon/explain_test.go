package daemon

import (
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestAnswersOfTheHostItself asks about what comes from the host's own mesh address,
// which is on the mesh interface and not among the other interfaces' addresses.
func TestAnswersOfTheHostItself(t *testing.T) {
	own, peer := netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("100.64.0.2")
	mesh := policy.Mesh{Prefixes: []netip.Prefix{policy.DefaultPrefix4}, Addresses: []netip.Addr{own}, Peers: []policy.Peer{
		{Name: "phone", Addresses: []netip.Addr{peer}, Grants: policy.Grants{Incoming: policy.Grant{Allowed: true}}}}}
	r, err := policy.Compile(mesh, policy.Host{Interface: "utun7", Uplink4: "en0"}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	q := api.Question{Peer: "phone", To: own, From: own, Port: 80, Proto: "tcp"}
	if a, err := ask(r, q); err != nil || !a.v.Pass {
		t.Errorf("its answer: %v, %v", a.v.Rule, err)
	}
	q.To = netip.Addr{}
	if a, err := ask(r, q); err != nil || a.v.Rule != policy.RuleHostToPeer {
		t.Errorf("its own connection to the peer: %v, %v", a.v.Rule, err)
	}
}
