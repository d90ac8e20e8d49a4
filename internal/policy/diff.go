package policy

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Narrowed names a peer that lost something by a change.
type Narrowed struct {
	PublicKey mesh.PublicKey
	Name      string
	// Addresses are those the peer had before the change; its flows carry them.
	Addresses []netip.Addr
	// Lost are the permissions that no longer have an effect. All of what the
	// peer had when Removed, and none when only the host's facts changed.
	Lost mesh.Permissions
	// Removed says that the peer is gone, or has other addresses now.
	Removed bool
}

// Diff returns the peers for which something that passed under old is refused by
// next, in old's order; nil old means that nothing passed. A change of the
// host's facts that can move a destination to another class, or a flow to
// another uplink, names every peer: that costs a second look at their flows and
// misses none.
func Diff(old, next *Ruleset) []Narrowed {
	if old == nil {
		return nil
	}
	// Of one ground, both have the same peers in the same order.
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

// sameGround reports whether everything but the peers is as it was.
func sameGround(a, b *Ruleset) bool {
	x, y := a.host, b.host
	return x.Interface == y.Interface && x.Uplink4 == y.Uplink4 && x.Uplink6 == y.Uplink6 &&
		slices.Equal(x.Equal4, y.Equal4) && slices.Equal(x.Equal6, y.Equal6) &&
		x.Source4 == y.Source4 && x.Source6 == y.Source6 &&
		x.Forwarding == y.Forwarding && x.FoundForwarding == y.FoundForwarding &&
		a.mesh.DNS == b.mesh.DNS && a.mesh.ListenPort == b.mesh.ListenPort && a.mesh.ThroughPeer == b.mesh.ThroughPeer &&
		x.OutsidePort == y.OutsidePort && slices.Equal(a.sets.Outside, b.sets.Outside) &&
		slices.Equal(a.mesh.Addresses, b.mesh.Addresses) &&
		slices.Equal(a.sets.Martians, b.sets.Martians) &&
		slices.Equal(a.sets.Self, b.sets.Self) &&
		slices.Equal(a.sets.Mesh, b.sets.Mesh) &&
		slices.Equal(a.sets.LANOutsideMesh(), b.sets.LANOutsideMesh())
}

// LANOutsideMesh returns the prefixes of class lan that aren't of class mesh
// already: another VPN's routes inside a mesh prefix come and go, and are nothing
// to a peer. For the same reason neither Others nor Former is ground: a peer's
// packets there are class mesh with and without them.
func (s Sets) LANOutsideMesh() []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(s.LAN), func(p netip.Prefix) bool {
		return slices.ContainsFunc(s.Mesh, func(m netip.Prefix) bool {
			return m.Bits() <= p.Bits() && m.Contains(p.Addr())
		})
	})
}
