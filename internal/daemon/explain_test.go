package daemon

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
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
	if a, err := ask(r, q); err != nil || !a.v.Pass {
		t.Errorf("its answer: %v, %v", a.v.Rule, err)
	}
	q.To = netip.Addr{}
	if a, err := ask(r, q); err != nil || a.v.Rule != policy.RuleHostToPeer {
		t.Errorf("its own connection to the peer: %v, %v", a.v.Rule, err)
	}
}

// TestRuleIsOneThatIsLoaded asks while the rules are known to be loaded, and while they
// aren't.
func TestRuleIsOneThatIsLoaded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		o := r.options()
		o.Languages = map[string]Language{o.Host.Language: {
			Render: func(*policy.Ruleset) (anchor, text string, err error) { return "", "accept", nil },
			Find:   func(text string, _ policy.Rule, _ policy.Packet) string { return text },
		}}
		r.startWith(o)
		defer r.end()
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		loaded := func() string {
			t.Helper()
			e, err := r.d.Explain(t.Context(), api.Question{Peer: "phone", To: netip.MustParseAddr("9.9.9.9"), Proto: "tcp", Port: 443})
			if err != nil {
				t.Fatal(err)
			}
			return e.Loaded
		}
		if got := loaded(); got != "accept" {
			t.Errorf("while it enforces: %q", got)
		}
		r.host.SetFault(func(step string) error {
			if step == "enforce" {
				return errors.New("no")
			}
			return nil
		})
		r.host.Drift("gone")
		r.after(DefaultTick)
		if got := loaded(); got != "" {
			t.Errorf("while it is closed: %q", got)
		}
	})
}

// TestExplainNamesTheWayOutOfThePrefix asks for what another VPN has inside the mesh
// prefix, and for a mesh address that nobody has.
func TestExplainNamesTheWayOutOfThePrefix(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.host.Change(func(h *policy.Host) {
			h.Interfaces = append(h.Interfaces, policy.Interface{Name: "tailscale0", Addresses: []netip.Prefix{netip.MustParsePrefix("100.99.1.1/24")}})
		})
		r.after(DefaultTick)
		r.add("phone")
		for to, want := range map[string]string{"100.99.1.2": "meshhelper settings mesh-prefix4 10.", "100.98.1.2": ""} {
			e, err := r.d.Explain(t.Context(), api.Question{Peer: "phone", To: netip.MustParseAddr(to), Proto: "tcp", Port: 22})
			if err != nil || e.Pass || !strings.HasPrefix(e.Command, want) || (e.Command == "") != (want == "") {
				t.Errorf("%s: %+v, %v; want %q", to, e, err, want)
			}
		}
	})
}
