package daemon

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/explain"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestRuleIsOneThatIsLoaded asks for the rule while the rules are known to be loaded, and
// while they aren't.
func TestRuleIsOneThatIsLoaded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		o := r.options()
		o.Languages = map[string]explain.Language{o.Host.Language: {
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

// TestExplainNamesTheWayOutOfThePrefix asks about an address inside the mesh prefix that
// another VPN has, and about one that no peer has.
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
