package daemon

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// TestOverlapsAreNamed gives parts of the mesh prefix to other interfaces and routes:
// status, doctor and one event each name them, with a way out, until they are gone.
func TestOverlapsAreNamed(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		named := func() (out []api.Problem) {
			for _, p := range r.d.Status().Problems {
				if p.Step == "mesh prefix" {
					out = append(out, p)
				}
			}
			return out
		}
		phone := r.add("phone")
		r.after(time.Second)
		if got := named(); len(got) > 0 {
			t.Fatalf("at first: %v", got)
		}
		equal := netip.MustParsePrefix(phone.Addresses[0].String() + "/32")
		r.host.Change(func(h *policy.Host) {
			h.Interfaces = append(h.Interfaces,
				policy.Interface{Name: "tailscale0", Addresses: []netip.Prefix{netip.MustParsePrefix("100.99.1.1/32")}},
				policy.Interface{Name: "other0", Addresses: []netip.Prefix{equal}})
			h.Routes = append(h.Routes, policy.Route{Prefix: netip.MustParsePrefix("100.101.2.3/32"), Interface: "tailscale0"})
			h.Resolvers = append(h.Resolvers, netip.MustParseAddr("100.100.2.136"))
		})
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{Endpoint: netip.MustParseAddrPort("100.90.5.2:51820")})
		r.after(10 * time.Second)
		wants := []string{
			"tailscale0 has 100.99.1.1/32, inside the mesh prefix 100.64.0.0/10",
			"other0 has " + equal.String(), "the very mesh address of phone",
			"routes by tailscale0 lead to 100.101.2.3/32",
			"DNS servers 100.100.2.136",
			"phone is reached at 100.90.5.2, inside",
		}
		all := ""
		for _, p := range named() {
			all += p.Message + "\n"
			if !strings.Contains(p.Hint, "meshhelper settings mesh-prefix4 ") {
				t.Errorf("no way out of %q: %q", p.Message, p.Hint)
			}
		}
		checks, err := r.d.Doctor(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		doctor := ""
		for _, c := range checks {
			if !c.OK {
				doctor += c.Message + "\n"
			}
		}
		for _, want := range wants {
			if !strings.Contains(all, want) || !strings.Contains(doctor, want) {
				t.Errorf("%q isn't named by status:\n%s\nor by doctor:\n%s", want, all, doctor)
			}
		}
		if n := len(named()); n != 5 {
			t.Errorf("%d overlaps are named, want 5:\n%s", n, all)
		}
		told := 0
		for _, message := range r.events(events.Problem) {
			if strings.HasPrefix(message, "mesh prefix"+": ") {
				told++
			}
		}
		if told != 5 {
			t.Errorf("%d events tell of them, want 5", told)
		}
		// The peer's own mesh address as its outer one is a loop.
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{Endpoint: netip.AddrPortFrom(phone.Addresses[0], 51820)})
		r.host.Change(func(h *policy.Host) {
			h.Interfaces = h.Interfaces[:len(h.Interfaces)-2]
			h.Routes, h.Resolvers = h.Routes[:len(h.Routes)-1], nil
		})
		r.after(10 * time.Second)
		if got := named(); len(got) != 1 || !strings.Contains(got[0].Message, "the tunnel doesn't carry itself") {
			t.Errorf("at last: %v", got)
		}
	})
}

// TestNearlyADefaultRouteIsNamed routes most of the internet into a VPN, in parts.
func TestNearlyADefaultRouteIsNamed(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		named := func() (out []api.Problem) {
			for _, p := range r.d.Status().Problems {
				if p.Step == "default route" {
					out = append(out, p)
				}
			}
			return out
		}
		r.host.Change(func(h *policy.Host) {
			for _, p := range []string{"0.0.0.0/1", "128.0.0.0/2", "192.0.0.0/4"} {
				h.Routes = append(h.Routes, policy.Route{Prefix: netip.MustParsePrefix(p), Interface: "wg0"})
			}
		})
		r.after(10 * time.Second)
		if got := named(); len(got) != 1 || !strings.Contains(got[0].Message, "routes by wg0 lead to most of the internet, but not to 208.0.0.0/4") {
			t.Fatalf("named: %v", got)
		}
		r.host.Change(func(h *policy.Host) {
			h.Routes = append(h.Routes, policy.Route{Prefix: netip.MustParsePrefix("208.0.0.0/4"), Interface: "wg0"})
		})
		r.after(10 * time.Second)
		if got := named(); len(got) > 0 {
			t.Errorf("named although they cover all that isn't special: %v", got)
		}
	})
}
