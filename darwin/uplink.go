package darwin

import (
	"net/netip"
	"slices"
	"strings"
)

// never are the kinds of interfaces that don't lead to the internet by themselves,
// whatever routes they carry: peer-to-peer Wi-Fi, coprocessors, and tunnels that Apple
// uses itself. utun and ipsec interfaces of VPNs do lead there, and so do bridges:
// bridge0 of Thunderbolt, or one that was created in System Settings (Tunnelblick#799).
var never = []string{"gif", "stf", "awdl", "llw", "XHC", "anpi", "lo", "ap"}

func leadsOut(i *Interface) bool {
	if i == nil || i.Flags&InterfaceUp == 0 {
		return false
	}
	return !slices.Contains(never, kind(i.Name))
}

// kind returns an interface's name without its unit number.
func kind(name string) string { return strings.TrimRight(name, "0123456789") }

// canCarry reports whether packets of the family can leave by an interface with an
// address of its own. macOS has tunnels for its own use with only a link-local IPv6
// address.
func (i *Interface) canCarry(f Family) bool {
	if k := kind(i.Name); k != "utun" && k != "ipsec" {
		return true
	}
	return slices.ContainsFunc(i.Addresses, func(a Address) bool {
		return a.Prefix.Addr().Is6() == (f == IPv6) && !a.Prefix.Addr().IsLinkLocalUnicast()
	})
}

// Uplink returns the interface by which the kernel reaches the internet, and the router
// there, which is invalid if the route has no gateway. It returns nil and an invalid
// address if there is no such interface. except names interfaces that don't count, such as
// the caller's own tunnel, which may have routes to the internet through a peer.
//
// An interface is the uplink if its routes cover the family: by a default route, or by
// longer ones, which win over it: 0.0.0.0/1 and 128.0.0.0/1, ::/1 and 8000::/1, or
// 2000::/3, as VPNs make them (DefGuard/client#780), with or without the private and
// special-purpose prefixes. If several interfaces cover it by longer routes, the one with
// the longest wins, as in the kernel. Scoped routes (RTF_IFSCOPE) don't count, since they
// only serve sockets bound to their interface.
//
// If parts of the family lead to different interfaces and none covers all of it, the
// uplink is the default route's interface, if there is one. It doesn't reach destinations
// for which another interface has a longer route.
func (n *Network) Uplink(f Family, except ...string) (*Interface, netip.Addr) {
	var best *Interface
	var router netip.Addr
	length := -1
	for index, routes := range n.leading(f, except) {
		parts, ok := coverFamily(f, routes)
		if !ok || len(parts) == 0 {
			continue
		}
		// The shortest route of a cover is the first that another one beats.
		shortest := slices.MinFunc(parts, func(a, b Route) int { return a.Dst.Bits() - b.Dst.Bits() })
		i := n.byIndex(index)
		if b := shortest.Dst.Bits(); b > length || b == length && i.Index < best.Index {
			best, router, length = i, shortest.Gateway, b
		}
	}
	return best, router
}

// leading returns the routes that may lead to the internet, by interface index.
func (n *Network) leading(f Family, except []string) map[int][]Route {
	out := map[int][]Route{}
	for _, r := range n.Routes {
		if r.Dst.Addr().Is6() != (f == IPv6) || !r.serves() {
			continue
		}
		if i := n.byIndex(r.Index); leadsOut(i) && i.canCarry(f) && !slices.Contains(except, i.Name) {
			out[r.Index] = append(out[r.Index], r)
		}
	}
	return out
}

// special holds the prefixes that routes to the internet may leave out: private addresses
// and the special-purpose ones that aren't globally reachable (RFC 6890 and IANA's
// registries). For IPv6 it is all but 2000::/3, the only prefix that IANA allocates from.
var special = map[Family][]netip.Prefix{
	IPv4: parsePrefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
		"192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
	IPv6: parsePrefixes("::/3", "4000::/2", "8000::/1"),
}

func parsePrefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// coverFamily returns the widest of routes, the default route last, that together
// cover the family but for special space. It reports false if they don't.
func coverFamily(f Family, routes []Route) ([]Route, bool) {
	var zero *Route
	var longer []Route
	for i := range routes {
		if routes[i].Dst.Bits() == 0 {
			zero = &routes[i]
		} else {
			longer = append(longer, routes[i])
		}
	}
	slices.SortFunc(longer, func(a, b Route) int { return a.Dst.Compare(b.Dst) })
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if f == IPv6 {
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if parts, ok := cover(all, longer, special[f]); ok {
		return parts, true
	}
	if zero != nil {
		return []Route{*zero}, true
	}
	return nil, false
}

// cover returns those of routes that together with the holes make up p. routes are sorted
// and longer than p. The recursion goes no deeper than the next route or hole, so their
// number bounds the work.
func cover(p netip.Prefix, routes []Route, holes []netip.Prefix) ([]Route, bool) {
	for _, r := range routes {
		if r.Dst == p {
			return []Route{r}, true
		}
		if r.Dst.Addr() != p.Addr() {
			break // sorted: by address and then length
		}
	}
	if slices.ContainsFunc(holes, func(h netip.Prefix) bool { return h.Overlaps(p) && h.Bits() <= p.Bits() }) {
		return nil, true
	}
	if p.IsSingleIP() || len(routes) == 0 {
		return nil, false
	}
	low, high := halves(p)
	middle, _ := slices.BinarySearchFunc(routes, high.Addr(), func(r Route, a netip.Addr) int { return r.Dst.Addr().Compare(a) })
	a, ok := cover(low, routes[:middle], holes)
	if !ok {
		return nil, false
	}
	b, ok := cover(high, routes[middle:], holes)
	return append(a, b...), ok
}

// halves splits a prefix into the two that are one bit longer.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	b := p.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	a, _ := netip.AddrFromSlice(b) // 4 or 16 bytes
	return netip.PrefixFrom(p.Addr(), p.Bits()+1), netip.PrefixFrom(a, p.Bits()+1)
}
