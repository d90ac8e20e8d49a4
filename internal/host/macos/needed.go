package macos

import (
	"slices"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// isNeeded reports whether a ruleset needs pf: some peer may route, or this host was
// found forwarding, so that the kernel would forward a peer's packets without us.
func isNeeded(r *policy.Ruleset) bool {
	h := r.Host()
	return h.FoundForwarding != policy.Families{} || slices.ContainsFunc(r.Peers(), func(peer policy.PeerRules) bool {
		return peer.Permissions.Has(mesh.Routing)
	})
}

// needed reports whether pf is needed: for the ruleset, for connections that an
// earlier helper cut, which this one's guard doesn't know, or because the kernel accepts
// packets to the mesh addresses on other interfaces.
func (b *Backend) needed(r *policy.Ruleset) bool {
	return isNeeded(r) || b.hasInheritedCuts(r) || !b.closesTunnels()
}

// closesTunnels reports whether the kernel drops packets to the mesh addresses that
// arrive on other interfaces. It does so by default while forwarding is disabled
// (net.inet.ip.check_interface, ip_input in xnu bsd/netinet/ip_input.c). If the sysctl
// can't be read, it returns false.
func (b *Backend) closesTunnels() bool {
	for _, f := range []darwin.Family{darwin.IPv4, darwin.IPv6} {
		if closes, err := b.sysctl.ClosesTunnels(f); err != nil || !closes {
			return false
		}
	}
	return true
}
