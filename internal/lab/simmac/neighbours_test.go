package simmac

// Changes by macOS itself and by other programs.

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

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/pfconf"
)

func TestChurn(t *testing.T) {
	m := newMac(t)
	_, mesh := newTunnel(t, m)
	uplinks := func() string {
		n, err := darwin.Observe(m)
		must(t, err)
		four, _ := n.Uplink(darwin.IPv4, mesh)
		six, _ := n.Uplink(darwin.IPv6, mesh)
		if four == nil || six == nil {
			t.Fatalf("uplinks %v and %v", four, six)
		}
		return four.Name + " " + six.Name
	}
	before := uplinks()
	seen := map[string]bool{}
	for range 20 {
		changes, dump := m.Kernel.Changes(), m.Dump()
		must(t, m.Churn("en0"))
		if m.Kernel.Changes() == changes || m.Dump() == dump {
			t.Error("nothing changed")
		}
		if got := uplinks(); got != before {
			t.Errorf("uplinks %q, were %q", got, before)
		}
		n, err := darwin.Observe(m)
		must(t, err)
		kinds := map[darwin.AddressFlags]int{}
		for _, a := range m.Kernel.Addresses6("en0") {
			kinds[a.Flags]++
		}
		const kind = darwin.AddressAutoconf | darwin.AddressTemporary
		if kinds[0] != 1 || kinds[kind] != 1 || kinds[kind|darwin.AddressDeprecated] > 1 {
			t.Errorf("en0 has %v", kinds)
		}
		for _, i := range n.Interfaces {
			seen[i.Name] = true
			if len(i.Addresses) > 4 {
				t.Errorf("%s has %v", i.Name, i.Addresses)
			}
		}
		if n.Interface("bridge100") == nil {
			seen["no bridge"] = true
		}
	}
	for _, name := range []string{"awdl0", "llw0", "utun1", "utun20", "bridge100", "vmenet0", "no bridge"} {
		if !seen[name] {
			t.Errorf("never had %s", name)
		}
	}
	if err := m.Churn("en9"); err == nil {
		t.Error("churned an interface that there isn't")
	}
}

func TestTailscale(t *testing.T) {
	m := newMac(t)
	found := m.Dump()
	for _, routes := range [][]string{nil, {"100.99.7.7/32", "100.99.7.8/32"}} {
		name, err := m.Tailscale(routes...)
		must(t, err)
		n, err := darwin.Observe(m)
		must(t, err)
		var prefixes []string
		for _, r := range n.Routed() {
			if r.Interface == name {
				prefixes = append(prefixes, r.Prefix.String())
			}
		}
		if want := max(len(routes), 1) + 2; len(prefixes) != want || !slices.Contains(prefixes, "100.100.100.100/32") {
			t.Errorf("routes by %s: %q", name, prefixes)
		}
		all, err := darwin.Resolvers(t.Context(), m)
		if err != nil || !slices.Equal(all, addresses("100.100.100.100", "203.0.113.254")) {
			t.Errorf("resolvers %v, %v", all, err)
		}
		if o := m.Emit(syn(netip.MustParseAddr("100.99.1.1"), netip.MustParseAddr("100.99.7.7"))); o.Fate != Sent || o.Link != name {
			t.Errorf("to its network: %s by %q, %s", o.Fate, o.Link, o.Why)
		}
		m.StopTailscale(name)
		if now := m.Dump(); now != found {
			t.Errorf("left:\n%s", now)
		}
	}
	if all, err := darwin.Resolvers(t.Context(), m); err != nil || len(all) != 1 {
		t.Errorf("resolvers %v, %v", all, err)
	}
}

func TestLoopbackSkipped(t *testing.T) {
	m := newMac(t)
	pf := darwin.NewPF(m)
	_, err := pf.Enable(t.Context())
	must(t, err)
	must(t, pf.Load(t.Context(), anchor, "block drop quick on lo0 all\n"))
	own := syn(netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.1"))
	if o := m.Emit(own); o.Fate != Dropped || o.Why != "pf" {
		t.Errorf("by lo0: %s, %s", o.Fate, o.Why)
	}
	must(t, m.SkipLoopback())
	if skipped, err := pf.Skipped(t.Context()); err != nil || !slices.Equal(skipped, []string{"lo0"}) {
		t.Errorf("skipped %q, %v", skipped, err)
	}
	if o := m.Emit(own); o.Fate != Delivered {
		t.Errorf("by lo0, skipped: %s, %s", o.Fate, o.Why)
	}
	if rules, err := pf.Rules(t.Context(), ""); err != nil || !strings.Contains(rules, `anchor "com.apple/*" all`) {
		t.Errorf("the hook went: %q, %v", rules, err)
	}
}

// Counters show whether packets come to an anchor: without the hooks of the main
// ruleset they don't.
func TestCountersShow(t *testing.T) {
	m := newMac(t)
	pf := darwin.NewPF(m)
	_, err := pf.Enable(t.Context())
	must(t, err)
	must(t, pf.Load(t.Context(), anchor, "pass in on en0 no state\nblock drop in on en5\n"))
	look := func() (evaluated, packets, matched uint64) {
		all, err := pf.All(t.Context(), anchor)
		must(t, err)
		rules := pfconf.ParseShown(all.Rules).Rules
		if len(rules) == 0 {
			return 0, 0, all.Info.Counters["Counters"]["match"]
		}
		return rules[0].Evaluations, rules[0].Packets, all.Info.Counters["Counters"]["match"]
	}
	send := func() { m.Inject("en0", syn(netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("203.0.113.1"))) }
	evaluated, packets, matched := look()
	send()
	e, p, n := look()
	if e != evaluated+1 || p != packets+1 || n != matched+1 {
		t.Errorf("a packet made of %d, %d, %d: %d, %d, %d", evaluated, packets, matched, e, p, n)
	}
	must(t, m.LoadMain("pass all no state\n"))
	send()
	if e2, p2, n2 := look(); e2 != e || p2 != p || n2 != n+1 {
		t.Errorf("without hooks a packet made of %d, %d, %d: %d, %d, %d", e, p, n, e2, p2, n2)
	}
}

// With Internet Sharing `pfctl -s all` begins as a Mac printed it.
func TestShowAllOfSharing(t *testing.T) {
	m := newMac(t)
	must(t, m.InternetSharing("en0"))
	stdout, _, _, err := m.Run(t.Context(), nil, "/sbin/pfctl", "-s", "all")
	must(t, err)
	b, err := os.ReadFile("../../../pfconf/testdata/mac/pfctl-sa-main-rules-sharing.txt")
	must(t, err)
	_, want, _ := strings.Cut(string(b), "ALTQ related functions disabled\n")
	if got := string(stdout[:min(len(want), len(stdout))]); got != want {
		t.Errorf("(-want +got):\n%s", cmp.Diff(want, got))
	}
}

func TestSlowAndBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := New(Options{})
		pf := darwin.NewPF(m)
		m.Slow("/sbin/pfctl", 4*time.Second)
		begin := time.Now()
		must(t, pf.Load(t.Context(), anchor, "pass all\n"))
		if d := time.Since(begin); d != 4*time.Second {
			t.Errorf("a load took %v", d)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := pf.Load(ctx, anchor, "block all\n"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a load that was given up: %v", err)
		}
		m.Slow("/sbin/pfctl", 0)
		m.Busy(2)
		for range 2 {
			if err := pf.Load(t.Context(), anchor, "block all\n"); !errors.Is(err, darwin.ErrBusy) {
				t.Errorf("busy: %v", err)
			}
		}
		if rules, err := pf.Rules(t.Context(), anchor); err != nil || !strings.HasPrefix(rules, "pass all") {
			t.Errorf("loads that failed changed the rules: %q, %v", rules, err)
		}
		must(t, pf.Load(t.Context(), anchor, "block all\n"))
	})
}
