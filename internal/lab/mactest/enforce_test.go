package mactest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/macos"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// tableMeshes are meshes of every size and with every permission. Their addresses
// are at the end of the prefixes, where other VPNs rarely give any out.
func tableMeshes() map[string]policy.Mesh {
	const all = mesh.Incoming | mesh.Routing | mesh.LAN
	m := func(each ...mesh.Permissions) policy.Mesh {
		m := policy.Mesh{
			Prefixes:   []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6},
			Addresses:  tableAddresses(0).List(),
			ListenPort: 51820,
		}
		for i, may := range each {
			p := mesh.Peer{PublicKey: mesh.PublicKey{byte(i >> 8), byte(i), 1}, Name: fmt.Sprintf("peer%d", i), Addresses: tableAddresses(i + 1), Permissions: mesh.Granted(may)}
			m.Peers = append(m.Peers, p)
		}
		return m
	}
	var many []mesh.Permissions
	for i := range 300 {
		many = append(many, mesh.Permissions(i)&all)
	}
	former := m(mesh.Routing, mesh.Incoming)
	former.Former, former.Serves = tableAddresses(900).List(), policy.DNS
	return map[string]policy.Mesh{
		"routing":       m(mesh.Routing),
		"everything":    m(all),
		"incoming":      m(mesh.Incoming),
		"one-of-each":   m(0, mesh.Incoming, mesh.Routing, mesh.LAN, mesh.Routing|mesh.LAN, mesh.Incoming|mesh.Routing, all),
		"three-hundred": m(many...),
		"former-dns":    former,
	}
}

func tableAddresses(i int) mesh.Addresses {
	return mesh.Addresses{
		netip.AddrFrom4([4]byte{100, 127, 213 + byte(i>>8), byte(i)}),
		netip.MustParseAddr(fmt.Sprintf("fd6d:6573:6800:ffff::213:%x", i+1)),
	}
}

// tableHosts are the networks of a Mac and other software's addresses and routes on it.
// The test removes nothing from a real Mac, whose own traffic must continue while their
// rules are loaded.
func tableHosts(h policy.Host) map[string]policy.Host {
	prefix := netip.MustParsePrefix
	with := func(change func(*policy.Host)) policy.Host {
		h := h
		h.Interfaces, h.Routes = slices.Clone(h.Interfaces), slices.Clone(h.Routes)
		change(&h)
		return h
	}
	add := func(h *policy.Host, name string, all ...netip.Prefix) {
		h.Interfaces = append(h.Interfaces, policy.Interface{Name: name, Addresses: all})
	}
	return map[string]policy.Host{
		"as-it-is": h,
		"forwarding-found": with(func(h *policy.Host) {
			h.FoundForwarding = policy.Families{IPv4: true, IPv6: true}
		}),
		"two-uplinks": with(func(h *policy.Host) {
			add(h, "en77", prefix("198.51.100.7/24"))
			add(h, "utun77", prefix("2001:db8:77::7/64"))
			h.Uplink4, h.Uplink6 = "en77", "utun77"
			h.Source4, h.Source6 = netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:77::7")
			h.Router4, h.Router6 = netip.MustParseAddr("198.51.100.1"), netip.Addr{}
			h.Forwarding = policy.Families{IPv4: true, IPv6: true}
		}),
		"no-uplink": with(func(h *policy.Host) {
			h.Uplink4, h.Uplink6, h.Source4, h.Source6, h.Router4, h.Router6 = "", "", netip.Addr{}, netip.Addr{}, netip.Addr{}, netip.Addr{}
		}),
		"vpn-and-bridge": with(func(h *policy.Host) {
			add(h, "utun77", prefix("100.101.102.103/32"), prefix("fd7a:115c:a1e0::332:d067/48"))
			add(h, "bridge177", prefix("192.168.177.1/24"), prefix("fd77:0:0:177::1/64"))
			h.Routes = append(h.Routes, policy.Route{Prefix: prefix("100.100.100.100/32"), Interface: "utun77"},
				policy.Route{Prefix: prefix("10.200.0.0/16"), Interface: "utun77"}, policy.Route{Prefix: prefix("2001:db8:aaaa::/48"), Interface: "utun77"})
		}),
	}
}

// enforceTable has the product's own enforcer enforce each mesh on each host and inspect it
// afterwards: pfctl must show the rules that were loaded.
func enforceTable(t *testing.T, o macos.Options, keep func(name, text string)) {
	ctx := t.Context()
	p, err := macos.New(o)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := p.Open(ctx, host.Interface{MTU: 1420, Addresses: tableAddresses(0).List(),
		Prefixes: []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6}})
	t.Cleanup(func() {
		left, err := p.Close(context.WithoutCancel(ctx))
		if err != nil || len(left) > 0 {
			t.Errorf("close: left %+v, %v", left, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	name, err := dev.Name()
	if err != nil {
		t.Fatal(err)
	}
	found, err := p.Observe(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if found.Interface != name {
		t.Errorf("the mesh interface is observed as %q, want %q", found.Interface, name)
	}
	var before *policy.Ruleset
	for hostName, h := range tableHosts(found) {
		for meshName, m := range tableMeshes() {
			t.Run(hostName+"/"+meshName, func(t *testing.T) {
				r, err := policy.Compile(m, h, time.Now())
				if err != nil {
					t.Fatal(err)
				}
				if err := p.Enforce(ctx, r); err != nil {
					t.Error(err)
				}
				if err := p.Cut(ctx, r, policy.Diff(before, r)); err != nil {
					t.Error(err)
				}
				before = r
				report, err := p.Inspect(ctx, r)
				if err != nil {
					t.Error(err)
				}
				for _, d := range report.Drift {
					t.Errorf("right after enforcing: %s: %s", d.Step, d.Message)
				}
				for _, d := range report.Problems {
					t.Logf("a problem: %s: %s", d.Step, d.Message)
				}
				_, text, err := p.Rules(ctx)
				if err != nil {
					t.Error(err)
				}
				keep("rules-"+hostName+"-"+meshName+".txt", text)
			})
		}
	}
}

// TestEnforceTable runs enforceTable on the simulated Mac, as it also runs on a real one.
func TestEnforceTable(t *testing.T) {
	mac := simmac.New(simmac.Options{Seed: 9})
	for _, err := range []error{
		mac.AddEthernet("en0", []string{"192.0.2.10/24", "2001:db8:1::1/64"}, "192.0.2.1", "2001:db8:1::fe"),
		mac.AddEthernet("en5", []string{"192.168.77.1/24", "fd77::1/64"}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	kept := 0
	enforceTable(t, macos.Options{
		StateDir: t.TempDir(), Label: scratchLabel, Runner: mac, Kernel: mac, CreateTUN: mac.CreateTUN,
	}, func(_, text string) {
		if text != "" {
			kept++
		}
	})
	if kept == 0 {
		t.Error("no rules were shown")
	}
	if bad := mac.PF.Misuse(); bad != nil {
		t.Error(errors.New("misuse of pfctl"), bad)
	}
}
