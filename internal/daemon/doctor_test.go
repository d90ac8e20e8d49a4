package daemon

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/explain"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/resolve"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// doctor returns the checks by name, and their names in order.
func (r *rig) doctor() (map[string]api.Check, []string) {
	r.t.Helper()
	checks, err := r.d.Doctor(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	by := map[string]api.Check{}
	var names []string
	for _, c := range checks {
		if by[c.Name] = c; !slices.Contains(names, c.Name) {
			names = append(names, c.Name)
		}
		if c.Message == "" || c.OK != (c.Hint == "" && c.Follows == "") {
			r.t.Errorf("%+v", c)
		}
	}
	return by, names
}

// TestDoctorSaysTheCauseFirst causes a fault that several checks notice: the first check
// reports it, and the others refer to that one. The order of the checks is always the same.
func TestDoctorSaysTheCauseFirst(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		_, well := r.doctor()
		names := []string{"helper"}
		for _, c := range explain.ChecksWithout("no helper answers", nil, nil) {
			names = append(names, c.Name)
		}
		if !slices.Equal(well, names) {
			t.Errorf("the checks are %q", well)
		}
		r.host.SetFault(func(step string) error {
			if step == "enforce" {
				return &host.StepError{Step: "load rules", Hint: "load them", Err: errors.New("no")}
			}
			return nil
		})
		r.host.Drift("gone")
		r.after(DefaultTick)
		by, names := r.doctor()
		if len(names) < len(well) || !slices.Equal(names[:len(well)], well) {
			t.Errorf("the checks are %q, before %q", names, well)
		}
		if c := by["helper"]; c.OK || c.Message != "the state is closed: load rules: no" || c.Hint != "load them" {
			t.Errorf("%+v", c)
		}
		for name, c := range by {
			if !c.OK && name != "helper" && c.Follows != "helper" {
				t.Errorf("%+v doesn't follow", c)
			}
		}
		if _, err := r.d.Rules(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "load rules: no") {
			t.Errorf("rules as loaded: %v", err)
		}
	})
}

// TestDoctorWritesIntoTheStateFolder moves the state directory away under a running helper.
// The trial file of a doctor before that is gone.
func TestDoctorWritesIntoTheStateFolder(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		if by, _ := r.doctor(); !by["state folder"].OK {
			t.Errorf("%+v", by["state folder"])
		}
		left, err := os.ReadDir(r.dir)
		if err != nil || slices.ContainsFunc(left, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), ".trial") }) {
			t.Errorf("%v, %v", left, err)
		}
		if err := os.Rename(r.dir, r.dir+".away"); err != nil {
			t.Fatal(err)
		}
		if by, _ := r.doctor(); by["state folder"].OK {
			t.Errorf("%+v", by["state folder"])
		}
		if err := os.Rename(r.dir+".away", r.dir); err != nil {
			t.Fatal(err)
		}
	})
}

// TestDoctorAboutEndpoints checks when doctor reports that peers can't reach the host.
func TestDoctorAboutEndpoints(t *testing.T) {
	for name, c := range map[string]struct {
		endpoint, uplink, resolved, heard string
		alone                             bool // without a peer
		ok                                bool
		want                              string
	}{
		"none, a public uplink":            {uplink: "198.51.100.2/24", ok: true, want: "peers find the host at the uplink's address"},
		"none, a private uplink":           {uplink: "192.168.1.7/24", want: "nothing is known to be forwarded"},
		"none, a carrier's":                {uplink: "100.70.1.7/24", want: "nothing is known to be forwarded"},
		"none, private, no peer yet":       {uplink: "192.168.1.7/24", alone: true, ok: true, want: "nothing is known to be forwarded"},
		"none, private, a peer was heard":  {uplink: "192.168.1.7/24", heard: "203.0.113.9:4000", want: "although one reaches this host from 203.0.113.9, by another address"},
		"its own, private":                 {endpoint: "192.168.1.7", uplink: "192.168.1.7/24", want: "192.168.1.7, this host's endpoint, is private"},
		"none, private, a neighbour heard": {uplink: "192.168.1.7/24", heard: "192.168.1.9:4000", want: "nothing is known to be forwarded"},
		"its own":                          {endpoint: "198.51.100.2", uplink: "198.51.100.2/24", ok: true, want: "an address of this host"},
		"another public one":               {endpoint: "198.51.100.3", uplink: "198.51.100.2/24", want: "isn't an address of this host, nor of its router"},
		"another of its network":           {endpoint: "192.168.1.5", uplink: "192.168.1.7/24", want: "isn't an address of this host, nor of its router"},
		"the router's":                     {endpoint: "203.0.113.1", uplink: "192.168.1.7/24", ok: true, want: "taken for the router's"},
		"a name of its own":                {endpoint: "home.example", resolved: "198.51.100.2", uplink: "198.51.100.2/24", ok: true, want: "an address of this host"},
		"a name of another":                {endpoint: "home.example", resolved: "198.51.100.3", uplink: "198.51.100.2/24", want: "isn't an address of this host, nor of its router"},
		"a name of nothing":                {endpoint: "home.example", uplink: "198.51.100.2/24", want: "doesn't resolve"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.resolveTo(c.resolved)
				r.host.Change(func(h *policy.Host) {
					p := netip.MustParsePrefix(c.uplink)
					h.Interfaces[0].Addresses, h.Lasting = []netip.Prefix{p}, []netip.Addr{p.Addr()}
				})
				o := r.options()
				if c.endpoint != "" {
					o.Endpoint = mesh.Endpoint{Host: c.endpoint, Port: 51820}
				}
				r.startWith(o)
				defer r.end()
				if !c.alone {
					r.add("phone")
				}
				if c.heard != "" {
					r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{LastHandshake: time.Now(), Endpoint: netip.MustParseAddrPort(c.heard)})
				}
				r.after(DefaultTick)
				by, _ := r.doctor()
				if got := by["endpoint"]; got.OK != c.ok || !strings.Contains(got.Message, c.want) {
					t.Errorf("%+v", got)
				}
				told := slices.ContainsFunc(r.d.Status().Problems, func(p api.Problem) bool { return p.Step == "endpoint" })
				if told == c.ok {
					t.Errorf("status tells of it: %v; %+v", told, r.d.Status().Problems)
				}
			})
		})
	}
}

// TestDoctorFollowsTheEndpointSetting changes the endpoint of a running helper, from a name
// to another, to an address and to none: doctor checks the latest one, and the answers name
// the devices that have the previous one.
func TestDoctorFollowsTheEndpointSetting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.resolveTo("203.0.113.1")
		r.host.Change(func(h *policy.Host) {
			p := netip.MustParsePrefix("192.168.1.7/24")
			h.Interfaces[0].Addresses, h.Lasting = []netip.Prefix{p}, []netip.Addr{p.Addr()}
		})
		r.startAs(nil)
		defer r.end()
		r.add("phone")
		r.add("nas")
		for _, c := range []struct {
			value, resolved, want string
			outside               []string
		}{
			{"home.example", "203.0.113.1", "home.example is 203.0.113.1", []string{"203.0.113.1"}},
			{"other.example", "", `the name "other.example" of this host's endpoint doesn't resolve`, nil},
			{"other.example", "203.0.113.2", "other.example is 203.0.113.2", []string{"203.0.113.2"}},
			{"192.168.1.5", "", "192.168.1.5, this host's endpoint, is 192.168.1.5, which isn't an address of this host", []string{"192.168.1.5"}},
			{"", "", "the uplink's address 192.168.1.7 is private", nil},
		} {
			r.resolveTo(c.resolved)
			s := r.mustSet(wanted.SettingEndpoint, c.value)
			if !s.Already && !slices.Equal(s.Outdated, []string{"phone", "nas"}) {
				t.Errorf("%q: outdated %q", c.value, s.Outdated)
			}
			r.after(10 * resolve.Interval)
			by, _ := r.doctor()
			if got := by["endpoint"]; !strings.HasPrefix(got.Message, c.want) {
				t.Errorf("%q: %+v", c.value, got)
			}
			now, _ := r.d.loop.State()
			var outside []string
			for _, a := range now.Host.Outside {
				outside = append(outside, a.String())
			}
			if !slices.Equal(outside, c.outside) {
				t.Errorf("%q: outside %v", c.value, outside)
			}
		}
		if s := r.mustSet(wanted.SettingName, "home"); s.Outdated != nil {
			t.Errorf("the name makes configurations outdated: %q", s.Outdated)
		}
	})
}

// TestDoctorAboutPeersNames sets a peer's endpoint to a name that doesn't resolve, or only to an
// address inside the tunnel, until it does.
func TestDoctorAboutPeersNames(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		if _, err := r.d.AddPeer(context.Background(), api.NewPeer{Name: "nas", PublicKey: keyOf("nas"), Endpoint: "nas.example:51820"}); err != nil {
			t.Fatal(err)
		}
		r.after(time.Second)
		if by, _ := r.doctor(); by["peers' endpoints"].OK || !strings.Contains(by["peers' endpoints"].Message, `"nas.example:51820" of nas doesn't resolve`) {
			t.Errorf("%+v", by["peers' endpoints"])
		}
		for _, a := range append(r.d.id.Own.List(), r.d.wanted.Document().Peers[0].Addresses[:]...) {
			r.resolveTo(a.String())
			r.after(10 * resolve.Interval)
			if by, _ := r.doctor(); by["peers' endpoints"].OK || !strings.Contains(by["peers' endpoints"].Message, a.String()+" is an address in the mesh") {
				t.Errorf("resolved to %v: %+v", a, by["peers' endpoints"])
			}
		}
		r.resolveTo("198.51.100.9")
		r.after(10 * resolve.Interval)
		if by, _ := r.doctor(); !by["peers' endpoints"].OK {
			t.Errorf("%+v", by["peers' endpoints"])
		}
	})
}

// TestDoctorAboutAPeerAtThisHost names a peer whose endpoint is an address of the host itself.
func TestDoctorAboutAPeerAtThisHost(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.after(DefaultTick)
		now, _ := r.d.loop.State()
		own := now.Host.Interfaces[0].Addresses[0].Addr()
		if _, err := r.d.AddPeer(context.Background(), api.NewPeer{Name: "nas", PublicKey: keyOf("nas"), Endpoint: netip.AddrPortFrom(own, 51820).String()}); err != nil {
			t.Fatal(err)
		}
		r.after(DefaultTick)
		if by, _ := r.doctor(); by["peers' endpoints"].OK || !strings.Contains(by["peers' endpoints"].Message, " of nas is an address of this host") {
			t.Errorf("%+v", by["peers' endpoints"])
		}
	})
}

// TestDoctorTellsTheHostFirewallApart lets other software's rules stop WireGuard's own
// packets, and then a peer's.
func TestDoctorTellsTheHostFirewallApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		b := &beset{}
		b.set(0, []host.Problem{
			{Step: "look at other packet filters", Message: "chain input of table inet filter drops packets of a tunnel", Hint: "open it", Kind: host.KindHostFirewall},
			{Step: "look at other packet filters", Message: "chain FORWARD of table ip filter drops packets from peers to the internet", Hint: "let it", Kind: host.KindOtherFilters},
		}, nil)
		o := r.options()
		o.Host.Others = b
		r.startWith(o)
		defer r.end()
		by, _ := r.doctor()
		if by["host firewall"].Hint != "open it" || by["other packet filters"].Hint != "let it" {
			t.Errorf("%+v", by)
		}
	})
}

// TestDoctorGroupsByKind has a host report other software's rules under a step of its own,
// and fail because of one: they belong to the check of their kind, which never says that
// there are none. A kind that isn't examined is said not to be.
func TestDoctorGroupsByKind(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.host.Unexamined(host.KindHostFirewall, "it can't tell")
		r.host.Foreign(host.Problem{Step: "load the anchor", Message: "a rule stops a packet", Hint: "see it", Kind: host.KindOtherFilters})
		r.after(time.Second)
		by, _ := r.doctor()
		if c := by["other packet filters"]; c.OK || c.Message != "a rule stops a packet" || c.Hint != "see it" {
			t.Errorf("%+v", c)
		}
		if c, also := by["load the anchor"]; also {
			t.Errorf("there is a check for it beside that of its kind: %+v", c)
		}
		if c := by["host firewall"]; !c.OK || c.Message != "not examined on this host: it can't tell" {
			t.Errorf("%+v", c)
		}
	})
	inBubble(t, func(t *testing.T, r *rig) {
		r.host.SetFault(func(step string) error {
			if step != "enforce" {
				return nil
			}
			return &host.StepError{Step: "load the anchor", Hint: "remove it", Kind: host.KindOtherFilters, Err: errors.New("a rule passes transit")}
		})
		r.host.Drift("another ruleset is loaded")
		r.after(time.Second)
		by, _ := r.doctor()
		if c := by["helper"]; c.OK || c.Hint != "remove it" {
			t.Errorf("%+v", c)
		}
		if c := by["other packet filters"]; c.OK || c.Message != "a rule passes transit" || c.Follows != "helper" || c.Hint != "" {
			t.Errorf("%+v", c)
		}
	})
}
