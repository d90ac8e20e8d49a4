package daemon

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestMeshPrefixChanges changes the IPv4 prefix of a mesh with peers: a helper that starts
// with the new prefix does what the plan says, IPv6 addresses and permissions stay, and for
// a day nothing to the old addresses leaves the host.
func TestMeshPrefixChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.start()
		defer func() { r.end() }()
		names := []string{"phone", "laptop", "tablet"}
		was := map[string]api.Peer{}
		for _, name := range names {
			r.add(name)
			r.mustAllow(name, "routing", "")
			was[name], _ = r.d.Peer(name)
		}
		own := r.d.Status().Addresses
		next := mesh.Prefixes{V4: netip.MustParsePrefix("10.213.0.0/16"), V6: mesh.DefaultPrefixes().V6}
		plan, err := r.d.PlanPrefixes(next)
		if err != nil {
			t.Fatal(err)
		}
		if len(plan) != 3 || plan[0].Name != "laptop" || plan[2].Name != "tablet" {
			t.Fatalf("the plan names %+v", plan)
		}
		for _, p := range plan {
			if !slices.Equal(p.Was, was[p.Name].Addresses) || p.Is[1] != p.Was[1] || !next.V4.Contains(p.Is[0]) {
				t.Errorf("%s: %v becomes %v", p.Name, p.Was, p.Is)
			}
			if len(p.Lines) == 0 || p.Lines[0].Section != "[Interface]" || !strings.HasPrefix(p.Lines[0].Was, "Address = "+p.Was[0].String()) ||
				!strings.HasPrefix(p.Lines[0].Is, "Address = "+p.Is[0].String()) {
				t.Errorf("%s: lines %+v", p.Name, p.Lines)
			}
		}
		// Nothing changed yet.
		if p, _ := r.d.Peer("phone"); !slices.Equal(p.Addresses, was["phone"].Addresses) {
			t.Errorf("the plan changed phone: %v", p.Addresses)
		}
		r.stop()

		o := r.options()
		o.Prefixes = next
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), "doesn't fit this mesh") {
			t.Fatalf("without Renumber: %v", err)
		}
		o.Renumber = true
		told := len(r.events(events.Change)) // which outlasts a restart
		r.startWith(o)
		for _, p := range plan {
			is, err := r.d.Peer(p.Name)
			if err != nil || !slices.Equal(is.Addresses, p.Is) || is.Permissions != was[p.Name].Permissions {
				t.Errorf("%s became %+v (%v), want %v", p.Name, is, err, p.Is)
			}
			if got := r.loaded(p.Name); !got.Has(mesh.Routing) {
				t.Errorf("%s may %v", p.Name, got)
			}
		}
		if got := r.d.Status().Addresses; !next.V4.Contains(got[0]) || got[1] != own[1] {
			t.Errorf("the host has %v", got)
		}
		if got := r.events(events.Change)[told:]; len(got) != 3 || !strings.Contains(got[0], "meshhelper peer config ") {
			t.Errorf("events: %q", got)
		}
		keptIn := func(when string, want bool) {
			t.Helper()
			for _, p := range plan {
				v := r.host.Loaded().FromHost(policy.Packet{Src: netip.MustParseAddr("192.0.2.1"), Dst: p.Was[0], Proto: policy.ProtoUDP})
				if (v.Rule == policy.RuleFormer) != want || v.Pass == want {
					t.Errorf("%s: the host's packet to %v: %v", when, p.Was[0], v.Rule)
				}
				from := r.host.Loaded().Peers()[0].Addresses[0]
				v = r.host.Loaded().FromPeer(policy.Packet{Src: from, Dst: p.Was[0], Proto: policy.ProtoUDP})
				if (v.Rule == policy.RuleMesh) != want {
					t.Errorf("%s: a peer's packet to %v: %v", when, p.Was[0], v.Rule)
				}
			}
		}
		keptIn("at first", true)
		// Starting again changes nothing more.
		r.stop()
		told = len(r.events(events.Change))
		r.startWith(o)
		if got := r.events(events.Change)[told:]; len(got) > 0 {
			t.Errorf("events after another start: %q", got)
		}
		keptIn("after another start", true)
		r.after(24*time.Hour + time.Minute)
		keptIn("a day later", false)
		// And back.
		plan, err = r.d.PlanPrefixes(mesh.DefaultPrefixes())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range plan {
			if !slices.Equal(p.Is, was[p.Name].Addresses) {
				t.Errorf("back: %s gets %v, and had %v", p.Name, p.Is, was[p.Name].Addresses)
			}
		}
	})
}

// TestChangedLines checks which lines of a configuration change.
func TestChangedLines(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	text := "[Interface]\nPrivateKey = AAAA=\nAddress = 100.70.8.9/32, fd00::9/128\nDNS = 100.64.0.1, 9.9.9.9\n\n[Peer]\nPublicKey = BBBB=\nAllowedIPs = 100.64.0.1/32,192.168.1.0/24\nEndpoint = 100.64.0.1:51820\nAllowedIPs = 100.64.0.0/10\n"
	got := changedLines(text, map[netip.Addr]netip.Addr{addr("100.70.8.9"): addr("10.1.8.9"), addr("100.64.0.1"): addr("10.1.0.1")},
		map[netip.Prefix]netip.Prefix{prefix("100.64.0.0/10"): prefix("10.1.0.0/16")})
	want := []api.ChangedLine{
		{Section: "[Interface]", Was: "Address = 100.70.8.9/32, fd00::9/128", Is: "Address = 10.1.8.9/32, fd00::9/128"},
		{Section: "[Interface]", Was: "DNS = 100.64.0.1, 9.9.9.9", Is: "DNS = 10.1.0.1, 9.9.9.9"},
		{Section: "[Peer]", Was: "AllowedIPs = 100.64.0.1/32,192.168.1.0/24", Is: "AllowedIPs = 10.1.0.1/32, 192.168.1.0/24"},
		{Section: "[Peer]", Was: "AllowedIPs = 100.64.0.0/10", Is: "AllowedIPs = 10.1.0.0/16"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v", got)
	}
	if got := changedLines(text, nil, nil); len(got) != 1 { // written with spaces
		t.Errorf("nothing moves: %+v", got)
	}
}
