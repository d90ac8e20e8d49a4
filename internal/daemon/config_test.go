package daemon

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/stock"
)

// addrs reads addresses, separated by spaces.
func addrs(text string) (out []netip.Addr) {
	for f := range strings.FieldsSeq(text) {
		out = append(out, netip.MustParseAddr(f))
	}
	return out
}

// configFor returns what a peer's app is handed, and the warnings beside it.
func (r *rig) configFor(name string) (stock.Config, []string) {
	r.t.Helper()
	c, err := r.d.Config(name)
	if err != nil {
		r.t.Fatal(err)
	}
	parsed, err := stock.ParseConfig(c.Text)
	if err != nil {
		r.t.Fatal(err)
	}
	return parsed, c.Warnings
}

// TestEndpointOfUplink prints configurations on hosts with several addresses.
func TestEndpointOfUplink(t *testing.T) {
	for _, c := range []struct {
		name, lasting, source, want, says string
	}{
		{"public IPv4", "203.0.113.7 2001:db8:1::2", "", "203.0.113.7", "where that changes"},
		{"private IPv4 and IPv6", "192.168.1.5 2001:db8:1::2", "", "2001:db8:1::2", "lets UDP port 51820 in"},
		{"a provider's NAT and IPv6", "100.70.1.2 2001:db8:1::2", "", "2001:db8:1::2", "settings endpoint HOST"},
		{"a provider's NAT alone", "100.70.1.2", "", "100.70.1.2", "behind a provider's NAT"},
		{"private alone", "192.168.1.5 fd00::5", "", "192.168.1.5", "forward UDP port 51820 on the router"},
		{"of two the one in use", "203.0.113.7 203.0.113.9", "203.0.113.9", "203.0.113.9", ""},
		{"IPv6 in use", "2001:db8:1::2 2001:db8:1::3", "2001:db8:1::3", "2001:db8:1::3", ""},
		{"unique local and IPv6", "fd00::5 2001:db8:1::2", "", "2001:db8:1::2", ""},
		{"none", "", "", "", "no endpoint is known"},
		{"link-local", "169.254.3.4", "", "", "no endpoint is known"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.add("phone")
				r.host.Change(func(h *policy.Host) {
					h.Lasting = addrs(c.lasting)
					h.Interfaces[0].Addresses = []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/128")}
					for _, a := range h.Lasting {
						h.Interfaces[0].Addresses = append(h.Interfaces[0].Addresses, netip.PrefixFrom(a, a.BitLen()))
					}
					h.Uplink6 = h.Uplink4
					for _, a := range addrs(c.source) {
						if a.Is4() {
							h.Source4 = a
						} else {
							h.Source6 = a
						}
					}
				})
				r.after(DefaultTick)
				config, warnings := r.configFor("phone")
				if config.Endpoint.Host != c.want {
					t.Errorf("endpoint %q, want %q", config.Endpoint.Host, c.want)
				}
				if len(warnings) != 1 || !strings.Contains(warnings[0], c.says) {
					t.Errorf("says %q, want %q in it", warnings, c.says)
				}
			})
		})
	}
}

// TestResolversThatAreReached prints configurations on hosts with one address family only.
func TestResolversThatAreReached(t *testing.T) {
	for _, c := range []struct {
		name, up4, up6, dns, want, says string
	}{
		{"both", "eth0", "eth0", "", "9.9.9.9 149.112.112.112", ""},
		{"IPv4", "eth0", "", "", "9.9.9.9 149.112.112.112", ""},
		{"IPv6", "", "eth0", "", "2620:fe::fe 2620:fe::9", ""},
		{"given", "eth0", "eth0", "192.0.2.53", "192.0.2.53", ""},
		{"given for IPv4, has IPv6", "", "eth0", "192.0.2.53", "192.0.2.53", "no IPv4 uplink"},
		{"given for IPv6, has IPv4", "eth0", "", "2001:db8::53", "2001:db8::53", "no IPv6 uplink"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.end()
				o := r.options()
				o.DNS = addrs(c.dns)
				r.startWith(o)
				r.add("phone")
				r.mustAllow("phone", "routing", "")
				r.host.Change(func(h *policy.Host) {
					h.Uplink4, h.Uplink6 = c.up4, c.up6
					h.Lasting = addrs("203.0.113.7 2001:db8:1::2")
				})
				r.after(DefaultTick)
				config, warnings := r.configFor("phone")
				if diff := cmp.Diff(addrs(c.want), config.DNS, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
					t.Error(diff)
				}
				said := slices.ContainsFunc(warnings, func(w string) bool { return strings.Contains(w, "resolve no names") && strings.Contains(w, c.says) })
				if said != (c.says != "") {
					t.Errorf("says %q", warnings)
				}
			})
		})
	}
}

// TestConfigurationSendsWhatThePeerMay prints a configuration for each set of permissions
// and each choice of --tunnel.
func TestConfigurationSendsWhatThePeerMay(t *testing.T) {
	const all, networks = "0.0.0.0/0 ::/0", "HOST 10.7.0.0/16 192.168.77.0/24 2001:db8:77::/64"
	for _, c := range []struct{ tunnel, may, want string }{
		{"", "", "HOST"},
		{"", "incoming", "HOST"},
		{"", "routing", all},
		{"", "lan", "HOST"},
		{"", "routing lan", all},
		{"full", "", all},
		{"full", "incoming routing lan", all},
		{"split", "", "HOST"},
		{"split", "lan", "HOST"},
		{"split", "routing", "HOST"},
		{"split", "incoming routing lan", networks},
	} {
		t.Run(c.tunnel+"/"+c.may, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.host.Change(func(h *policy.Host) {
					h.Interfaces[0].Addresses = append(h.Interfaces[0].Addresses, netip.MustParsePrefix("100.80.0.5/24"))
					h.Interfaces[1].Addresses = append(h.Interfaces[1].Addresses, netip.MustParsePrefix("2001:db8:77::1/64"))
					h.Routes = append(h.Routes, policy.Route{Prefix: netip.MustParsePrefix("10.7.0.0/16"), Interface: "eth1"},
						policy.Route{Prefix: netip.MustParsePrefix("10.7.3.0/24"), Interface: "eth1"})
				})
				r.after(DefaultTick)
				may := map[string]api.PermissionChange{}
				for _, one := range strings.Fields(c.may) {
					may[one] = api.PermissionChange{Allowed: true}
				}
				_, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "phone", PublicKey: keyOf("phone"), Tunnel: c.tunnel, Permissions: may})
				if err != nil {
					t.Fatal(err)
				}
				config, _ := r.configFor("phone")
				var got []string
				for _, p := range config.AllowedIPs {
					got = append(got, p.String())
				}
				own := r.d.id.Own
				want := strings.ReplaceAll(c.want, "HOST", own[0].String()+"/32 "+own[1].String()+"/128")
				if strings.Join(got, " ") != want {
					t.Errorf("sends %v, want %s", got, want)
				}
				if (len(config.DNS) > 0) != (c.want == all) {
					t.Errorf("resolvers %v with a configuration that sends %v", config.DNS, got)
				}
			})
		})
	}
}

// TestEndSaysThatAConfigurationDoesntFit lets permissions expire: an event names each
// device whose configuration no longer fits.
func TestEndSaysThatAConfigurationDoesntFit(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.add("nas")
		r.mustAllow("phone", "routing", "1h")
		r.mustAllow("nas", "incoming", "1h")
		r.after(2 * time.Hour)
		want := []string{"routing of phone ended", "incoming of nas ended",
			"a configuration of phone made before this change routes everything through this host, so that the device has no internet while it is connected; if the device uses one, print a new one with: meshhelper peer config phone"}
		got := r.events(events.Expired)
		slices.Sort(got)
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}
