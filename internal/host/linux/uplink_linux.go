package linux

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// hostRouting is the kernel's routing for one family.
type hostRouting struct {
	rules  []routingRule // by priority
	tables map[int][]routeEntry
}

// routingRule is a policy rule that selects a table.
type routingRule struct {
	priority int
	table    int
	// forPeers is set if the rule applies to a peer's packets to the internet, rather
	// than only to marked packets or certain sources.
	forPeers bool
	// suppress is the length up to which prefixes in the table are ignored
	// (suppress_prefixlength in ip-rule(8)), or -1. VPNs use it to take everything from a
	// table but its default route.
	suppress int
}

// routeEntry is one next hop of a unicast route.
type routeEntry struct {
	prefix netip.Prefix
	iface  string
	metric int
	// router is the gateway; not valid if the destination is on the link.
	router netip.Addr
	// source is the route's preferred source for the host's packets; not valid if it has
	// none.
	source netip.Addr
}

// uplink returns the default route that the rules select first, ignoring routes by one
// interface; its interface is empty if there is none. Within a table, routes that
// together cover the family win over /0, as they do in the kernel, because they are
// longer; up is then the widest of them. equal are the other interfaces of equally good
// routes, among which the kernel chooses per flow (multipath).
func (h hostRouting) uplink(ignored string) (up routeEntry, equal []string) {
	for _, rule := range h.rules {
		if !rule.forPeers {
			continue
		}
		var usable []routeEntry
		for _, r := range h.tables[rule.table] {
			if r.iface != ignored && r.prefix.Bits() > rule.suppress {
				usable = append(usable, r)
			}
		}
		if up = defaultRoute(usable); up.iface == "" {
			continue
		}
		for _, r := range usable {
			if r.prefix == up.prefix && r.metric == up.metric && r.iface != up.iface {
				equal = append(equal, r.iface)
			}
		}
		slices.Sort(equal)
		return up, slices.Compact(equal)
	}
	return routeEntry{}, nil
}

// defaultRoute returns the route by which a table reaches the whole family.
func defaultRoute(routes []routeEntry) routeEntry {
	byIface := map[string][]netip.Prefix{}
	var zero []routeEntry
	for _, r := range routes {
		if r.prefix.Bits() == 0 {
			zero = append(zero, r)
			continue
		}
		byIface[r.iface] = append(byIface[r.iface], r.prefix)
	}
	for _, iface := range sortedKeys(byIface) {
		family := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		if byIface[iface][0].Addr().Is4() {
			family = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		if _, ok := policy.Covering(family, byIface[iface]); ok {
			return widest(routes, iface)
		}
	}
	if len(zero) == 0 {
		return routeEntry{}
	}
	return slices.MinFunc(zero, func(a, b routeEntry) int {
		return cmp.Or(cmp.Compare(a.metric, b.metric), cmp.Compare(a.iface, b.iface), a.router.Compare(b.router))
	})
}

// widest returns the route by an interface, /0 excepted, with the shortest prefix, and of
// several the lowest.
func widest(routes []routeEntry, iface string) routeEntry {
	var out routeEntry
	for _, r := range routes {
		if r.iface != iface || r.prefix.Bits() == 0 {
			continue
		}
		if out.iface == "" || cmp.Or(cmp.Compare(r.prefix.Bits(), out.prefix.Bits()), r.prefix.Addr().Compare(out.prefix.Addr())) < 0 {
			out = r
		}
	}
	return out
}

// sortedKeys returns the keys in order.
func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
