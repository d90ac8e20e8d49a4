package policy

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Narrowed is a peer for which a change may refuse packets that passed before.
type Narrowed struct {
	PublicKey mesh.PublicKey
	Name      string
	// Addresses are the ones before the change, as its existing flows have them.
	Addresses []netip.Addr
	// Lost has the permissions that are no longer effective: all that the peer had if
	// Removed, none if only the host's facts changed.
	Lost mesh.Permissions
	// Removed says that the peer no longer exists, or has other addresses.
	Removed bool
}

// Diff returns the peers for which next may refuse something that passed under old, in the
// order of old. A nil old passed nothing. A change of the host's facts that can move a
// destination to another class, or a flow to another uplink, returns every peer: judging all
// their flows again costs time, but misses none.
func Diff(old, next *Ruleset) []Narrowed {
	if old == nil {
		return nil
	}
	// Rulesets that share a ground have the same peers in the same order; see Recompile.
	of := func(i int) (PeerRules, bool) { return next.peers[i], true }
	moved := false
	if old.ground != next.ground {
		moved = !sameGround(old, next)
		now := make(map[mesh.PublicKey]int, len(next.peers))
		for i := range next.peers {
			now[next.peers[i].PublicKey] = i
		}
		of = func(i int) (PeerRules, bool) {
			at, kept := now[old.peers[i].PublicKey]
			if !kept {
				return PeerRules{}, false
			}
			return next.peers[at], true
		}
	}
	var out []Narrowed
	for i, was := range old.peers {
		is, kept := of(i)
		n := Narrowed{
			PublicKey: was.PublicKey, Name: was.Name, Addresses: was.Addresses.List(),
			Removed: !kept || was.Addresses != is.Addresses,
			Lost:    was.Permissions &^ is.Permissions,
		}
		if n.Removed {
			n.Lost = was.Permissions
		}
		if n.Removed || n.Lost != 0 || moved {
			out = append(out, n)
		}
	}
	return out
}

// sameGround reports whether everything but the peers is equal, as far as it can change a
// verdict on a peer's flow.
func sameGround(a, b *Ruleset) bool {
	x, y := a.host, b.host
	return x.Interface == y.Interface && x.Uplink4 == y.Uplink4 && x.Uplink6 == y.Uplink6 &&
		slices.Equal(x.Equal4, y.Equal4) && slices.Equal(x.Equal6, y.Equal6) &&
		x.Source4 == y.Source4 && x.Source6 == y.Source6 &&
		x.Forwarding == y.Forwarding && x.FoundForwarding == y.FoundForwarding &&
		a.mesh.Serves == b.mesh.Serves && a.mesh.ListenPort == b.mesh.ListenPort && a.mesh.ThroughPeer == b.mesh.ThroughPeer &&
		x.OutsidePort == y.OutsidePort && slices.Equal(a.sets.Outside, b.sets.Outside) &&
		slices.Equal(a.mesh.Addresses, b.mesh.Addresses) &&
		slices.Equal(a.sets.Martians, b.sets.Martians) &&
		slices.Equal(a.sets.Self, b.sets.Self) &&
		slices.Equal(a.sets.Mesh, b.sets.Mesh) &&
		slices.Equal(a.sets.LANOutsideMesh(), b.sets.LANOutsideMesh())
}

// LANOutsideMesh returns the prefixes of class lan outside the mesh prefixes. Those inside,
// such as routes of another VPN that come and go, don't matter to a peer: its packets there
// are class mesh in any case. For the same reason sameGround ignores Others and Former.
func (s Sets) LANOutsideMesh() []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(s.LAN), func(p netip.Prefix) bool {
		return slices.ContainsFunc(s.Mesh, func(m netip.Prefix) bool {
			return m.Bits() <= p.Bits() && m.Contains(p.Addr())
		})
	})
}
