package policy

import (
	"net/netip"
	"slices"
	"testing"
)

// excludePrivate is the list of routes that the WireGuard apps write for "exclude private
// IPs": all of IPv4 except the private networks. The IPv6 part is made in the same way.
var excludePrivate = prefixes(
	"0.0.0.0/5", "8.0.0.0/7", "11.0.0.0/8", "12.0.0.0/6", "16.0.0.0/4", "32.0.0.0/3", "64.0.0.0/2", "128.0.0.0/3",
	"160.0.0.0/5", "168.0.0.0/6", "172.0.0.0/12", "172.32.0.0/11", "172.64.0.0/10", "172.128.0.0/9", "173.0.0.0/8", "174.0.0.0/7",
	"176.0.0.0/4", "192.0.0.0/9", "192.128.0.0/11", "192.160.0.0/13", "192.169.0.0/16", "192.170.0.0/15", "192.172.0.0/14",
	"192.176.0.0/12", "192.192.0.0/10", "193.0.0.0/8", "194.0.0.0/7", "196.0.0.0/6", "200.0.0.0/5", "208.0.0.0/4",
	"::/1", "8000::/2", "c000::/3", "e000::/4", "f000::/5", "f800::/6", "fe00::/9", "ff00::/8",
)

// TestExcludePrivateIPs checks that these routes together count as a default route, so that
// public addresses stay in class internet, and that NearlyDefault reports the missing part
// when one of the routes is left out.
func TestExcludePrivateIPs(t *testing.T) {
	by := func(ps []netip.Prefix) *Ruleset {
		m, h := picture(7), pictureHost()
		h.Uplink4, h.Uplink6 = "utun3", "utun3"
		for _, p := range ps {
			h.Routes = append(h.Routes, Route{p, "utun3"})
		}
		return compile(t, m, h)
	}
	whole := by(excludePrivate)
	for _, a := range []string{"1.1.1.1", "9.9.9.9", "11.0.0.1", "172.15.0.1", "172.32.0.1", "192.169.0.1", "209.85.0.1", "2606:4700::1", "2a00::1"} {
		if got := whole.Class(addr(a)); got != Internet {
			t.Errorf("%s is %v", a, got)
		}
	}
	for _, a := range []string{"10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.0.1", "fd00::1"} {
		if got := whole.Class(addr(a)); got != OnLAN {
			t.Errorf("%s is %v", a, got)
		}
	}
	if got := whole.Host().NearlyDefault(); len(got) > 0 {
		t.Errorf("the complete list is reported as nearly a default route: %+v", got)
	}
	for i, p := range excludePrivate {
		if public(p) == 0 {
			continue
		}
		without := by(slices.Delete(slices.Clone(excludePrivate), i, i+1))
		got := without.Host().NearlyDefault()
		if p == prefix("::/1") {
			if len(got) > 0 { // no route covers any of 2000::/3 now
				t.Errorf("without %v: %+v", p, got)
			}
			continue
		}
		if len(got) != 1 || got[0].Interface != "utun3" || got[0].Share < 0.5 || got[0].Share >= 1 {
			t.Fatalf("without %v: %+v", p, got)
		}
		if !slices.ContainsFunc(got[0].Missing, p.Overlaps) {
			t.Errorf("without %v the missing prefixes are %v, want one that overlaps it", p, got[0].Missing)
		}
	}
	// A VPN that routes a few networks only isn't reported.
	if got := by(prefixes("10.0.0.0/8", "203.0.112.0/20", "2001:db8::/32")).Host().NearlyDefault(); len(got) > 0 {
		t.Errorf("a few networks are reported as nearly a default route: %+v", got)
	}
	if got := by(prefixes("2000::/4", "3000::/5")).Host().NearlyDefault(); len(got) != 1 || got[0].Missing[len(got[0].Missing)-1] != prefix("3800::/5") {
		t.Errorf("three quarters of IPv6: %+v", got)
	}
}
