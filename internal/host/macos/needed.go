package macos

import (
	"slices"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// isNeeded reports whether the packet filter is needed for a ruleset: some peer
// may be forwarded for, or this host forwards anyway.
func isNeeded(r *policy.Ruleset) bool {
	h := r.Host()
	return h.FoundForwarding != policy.Families{} || slices.ContainsFunc(r.Peers(), func(peer policy.PeerRules) bool {
		return peer.Permissions.Has(mesh.Routing)
	})
}

// needed is isNeeded, or that something else asks for the filter: connections that
// were cut before this helper started, which its guard knows nothing of, or a Mac that
// was told to take packets to a tunnel's address from any interface.
func (b *Backend) needed(r *policy.Ruleset) bool {
	return isNeeded(r) || b.hasInheritedCuts(r) || !b.closesTunnels()
}

// closesTunnels reports whether the kernel drops packets to the mesh addresses that
// arrive on other interfaces, while it doesn't forward. What can't be read counts as
// no.
func (b *Backend) closesTunnels() bool {
	for _, f := range []darwin.Family{darwin.IPv4, darwin.IPv6} {
		if closes, err := b.sysctl.ClosesTunnels(f); err != nil || !closes {
			return false
		}
	}
	return true
}
