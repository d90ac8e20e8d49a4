package macos

import (
	"net/netip"
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
// destinations, and keeps the others; so it is with destinations that another
// class or interface has now. Where the peer is gone, has lost routing, or its
// translated flows can't go on as they were, all its states end, whoever opened
// them: what may go on makes itself new ones. That is also what a nil old does.
func Kills(old, next *policy.Ruleset, narrowed []policy.Narrowed) []Kill {
	var moved []netip.Prefix
	if old != nil {
		moved = movedPrefixes(old, next)
	}
	lan := outsideMesh(next.Sets())
	var out []Kill
	for _, n := range narrowed {
		for _, a := range n.Addresses {
			if old == nil || n.Removed || n.Lost.Has(policy.Routing) || isUprooted(old, next, a) {
				out = append(out, killAll(a)...)
				continue
			}
			to := slices.Clone(moved)
			if n.Lost.Has(policy.Incoming) {
				to = append(to, next.Sets().Self...)
			}
			if n.Lost.Has(policy.LAN) {
				to = append(to, lan...)
			}
			out = append(out, killTo(a, sorted(to))...)
		}
	}
	if len(out) > maxKills {
		return coarse(out, next.Sets().Mesh)
	}
	return out
}

// maxKills bounds how many states' ends are named one by one: each is a run of
// pfctl, of some milliseconds.
const maxKills = 256

// coarse names whole mesh prefixes instead of single peers. Peers that lost
// nothing then have flows ended, too; that many lose something at once only when
// the host moves, or at the start.
func coarse(kills []Kill, mesh []netip.Prefix) []Kill {
	widen := func(p netip.Prefix) netip.Prefix {
		for _, m := range mesh {
			if p.IsSingleIP() && m.Contains(p.Addr()) {
				return m
			}
		}
		return p
	}
	seen := map[Kill]bool{}
	var out []Kill
	for _, k := range kills {
		if k = (Kill{widen(k.From), widen(k.To)}); !seen[k] {
			seen[k] = true
			out = append(out, k)
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

// movedPrefixes returns the destinations that may be in another class now, or
// behind another interface.
func movedPrefixes(old, next *policy.Ruleset) []netip.Prefix {
	a, b := old.Sets(), next.Sets()
	var out []netip.Prefix
	for _, s := range [][2][]netip.Prefix{{a.Martians, b.Martians}, {a.Self, b.Self}, {a.Mesh, b.Mesh}, {a.LAN, b.LAN}} {
		out = append(append(out, missing(s[0], s[1])...), missing(s[1], s[0])...)
	}
	if old.Mesh().DNS != next.Mesh().DNS {
		out = append(out, hostPrefixes(old.Mesh().Addresses)...)
	}
	return out
}

// missing returns what is in a and not in b.
func missing[T comparable](a, b []T) []T {
	in := map[T]bool{}
	for _, one := range b {
		in[one] = true
	}
	return slices.DeleteFunc(slices.Clone(a), func(one T) bool { return in[one] })
}

// isUprooted reports whether the flows of an address's family have lost what they
// stand on: the mesh interface, the uplink, forwarding, or an address that they
// are translated to.
func isUprooted(old, next *policy.Ruleset, a netip.Addr) bool {
	x, y := old.Host(), next.Host()
	return x.Interface != y.Interface || x.Uplink(a) != y.Uplink(a) || x.Forwarding.Of(a) != y.Forwarding.Of(a) ||
		slices.ContainsFunc(missing(attachments(x), attachments(y)), func(t attachment) bool { return t.address.Is4() == a.Is4() })
}

// attachment is an address on its interface, or where a route leads.
type attachment struct {
	address netip.Addr
	bits    int
	name    string
}

// attachments are what translated flows depend on: the addresses of interfaces,
// and the interfaces of routes.
func attachments(h policy.Host) []attachment {
	var out []attachment
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			out = append(out, attachment{p.Addr(), p.Bits(), i.Name})
		}
	}
	for _, r := range h.Routes {
		out = append(out, attachment{r.Prefix.Addr(), r.Prefix.Bits(), r.Interface})
	}
	return out
}
