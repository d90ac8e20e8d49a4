package policy

import (
	"math"
	"net/netip"
	"slices"
	"strings"
)

// Nearly is an interface whose routes cover at least half of the internet of a family, but
// not all of it, so that together they aren't a default route.
type Nearly struct {
	Interface string
	// Missing has the prefixes that the routes don't cover, sorted. Private and
	// special-purpose space next to a gap may be part of it.
	Missing []netip.Prefix
	// Share is the covered share of the public addresses, from 0.5 to less than 1.
	Share float64
}

// NearlyDefault returns the interfaces whose routes are nearly a default route of a family,
// such as a VPN's that leaves out its own server. Their destinations are class lan, like
// other routed networks, which may surprise. They are sorted by interface, IPv4 first.
func (h Host) NearlyDefault() []Nearly {
	type key struct {
		name string
		v4   bool
	}
	routed := map[netip.Prefix]bool{}
	for _, p := range h.routed() {
		routed[p] = true
	}
	by := map[key][]netip.Prefix{}
	for _, r := range h.Routes {
		if p := r.Prefix.Masked(); routed[p] && r.Interface != h.Interface && !IsLoopback(r.Interface) {
			k := key{r.Interface, p.Addr().Is4()}
			by[k] = append(by[k], p)
		}
	}
	var out []Nearly
	for k, ps := range by {
		all := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		if k.v4 {
			all = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		slices.SortFunc(ps, comparePrefix)
		n := Nearly{Interface: k.name, Missing: holes(all, slices.Compact(ps))}
		left := 0.0
		for _, p := range n.Missing {
			left += public(p)
		}
		if n.Share = 1 - left/public(all); n.Share >= 0.5 && n.Share < 1 {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b Nearly) int {
		if c := strings.Compare(a.Interface, b.Interface); c != 0 {
			return c
		}
		return a.Missing[0].Addr().Compare(b.Missing[0].Addr()) // netip sorts IPv4 first
	})
	return out
}

// holes returns the parts of p that neither prefixes nor special space cover. prefixes is
// sorted, and all of it is inside p. Like cover, holes splits p no further than a prefix
// requires.
func holes(p netip.Prefix, prefixes []netip.Prefix) []netip.Prefix {
	switch {
	case len(prefixes) > 0 && prefixes[0] == p || public(p) == 0:
		return nil
	case len(prefixes) == 0 || p.IsSingleIP():
		return []netip.Prefix{p}
	}
	low, high := halves(p)
	middle, _ := slices.BinarySearchFunc(prefixes, high.Addr(), func(q netip.Prefix, a netip.Addr) int { return q.Addr().Compare(a) })
	return append(holes(low, prefixes[:middle]), holes(high, prefixes[middle:])...)
}

// public returns the share of the family's whole address space, from 0 to 1, that is in p
// and not in special space. The prefixes of special don't overlap.
func public(p netip.Prefix) float64 {
	size := math.Ldexp(1, -p.Bits())
	for _, s := range special {
		switch {
		case !s.Overlaps(p):
		case s.Bits() <= p.Bits():
			return 0
		default:
			size -= math.Ldexp(1, -s.Bits())
		}
	}
	return size
}
