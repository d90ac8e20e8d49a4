package macos

import (
	"net/netip"
	"reflect"
	"slices"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Kill names states to end: those whose opener is in From and whose other end,
// as the opener sees it, is in To. It ends the state on the interface that a
// forwarded packet came in by and the one, with its translation, on the interface
// that it left by: pfctl(8) -k compares the address before translation.
type Kill struct {
	From, To netip.Prefix
}

// Kills returns what has to be ended after the packet filter was given the rules
// of next instead of those of old; narrowed is what [policy.Diff] says of the
// two. States made by rules that are gone go on passing, and translating, until
// then.
//
// A peer that lost a permission loses the states of that permission's
// destinations, and keeps the others. Where the peer is gone, or the host's own
// facts changed or aren't known (old is nil), all its states end, whoever opened
// them: what may go on makes itself a new one, translated flows excepted.
func Kills(old, next *policy.Ruleset, narrowed []policy.Narrowed) []Kill {
	moved := old == nil || !sameGround(old, next)
	var out []Kill
	for _, n := range narrowed {
		for _, a := range n.Addresses {
			if moved || n.Removed || n.Lost.Has(policy.Routing) {
				out = append(out, killAll(a)...)
				continue
			}
			if n.Lost.Has(policy.Incoming) {
				out = append(out, killTo(a, next.Sets().Self)...)
			}
			if n.Lost.Has(policy.LAN) {
				out = append(out, killTo(a, outsideMesh(next.Sets()))...)
			}
		}
	}
	return out
}

// killAll ends everything from and to a peer's address.
func killAll(a netip.Addr) []Kill {
	one := netip.PrefixFrom(a, a.BitLen())
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if a.Is6() {
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return []Kill{{one, all}, {all, one}}
}

// killTo ends what a peer's address opened to the destinations. Nobody behind
// them can have opened anything to a peer but the host itself, and that may go on.
func killTo(a netip.Addr, to []netip.Prefix) []Kill {
	var out []Kill
	for _, p := range to {
		if p.Addr().Is4() == a.Is4() {
			out = append(out, Kill{netip.PrefixFrom(a, a.BitLen()), p})
		}
	}
	return out
}

// outsideMesh returns the class lan without what the class mesh takes out of it,
// so that a peer's connections to the host's mesh address live on.
func outsideMesh(s policy.Sets) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(s.LAN), func(p netip.Prefix) bool {
		return slices.ContainsFunc(s.Mesh, func(m netip.Prefix) bool { return m.Contains(p.Addr()) && m.Bits() <= p.Bits() })
	})
}

// sameGround reports whether the two rulesets differ in nothing but the peers and
// their permissions: then a destination is in the same class, and a flow has the
// same exit.
func sameGround(a, b *policy.Ruleset) bool {
	x, y := a.Host(), b.Host()
	p, q := a.Sets(), b.Sets()
	return reflect.DeepEqual(x, y) && a.Mesh().DNS == b.Mesh().DNS &&
		slices.Equal(p.Martians, q.Martians) && slices.Equal(p.Self, q.Self) &&
		slices.Equal(p.Mesh, q.Mesh) && slices.Equal(p.LAN, q.LAN)
}
