package explain

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestChecksWithoutAHelper: a command that reaches no helper lists the helper's checks, and
// compares the mesh prefixes with the interfaces by itself.
func TestChecksWithoutAHelper(t *testing.T) {
	m := []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd6d:6573:6800::/48")}
	for address, want := range map[string]string{
		"192.168.1.7/24": "no interface has an address inside", "100.99.1.1/32": "the interface tailscale0 has 100.99.1.1/32, inside the mesh prefix 100.64.0.0/10",
	} {
		checks := ChecksWithout("no helper answers", m, []policy.Interface{{Name: "tailscale0", Addresses: []netip.Prefix{netip.MustParsePrefix(address)}}})
		var names []string
		for _, c := range checks {
			names = append(names, c.Name)
			if c.Name == stepPrefix && (!strings.HasPrefix(c.Message, want) || c.OK != (c.Hint == "")) || c.Name != stepPrefix && (c.OK || c.Follows != nameHelper) {
				t.Errorf("%s: %+v", address, c)
			}
		}
		if !slices.Equal(names, checkNames) {
			t.Errorf("the checks are %q, not those of a helper, %q", names, checkNames)
		}
	}
}
