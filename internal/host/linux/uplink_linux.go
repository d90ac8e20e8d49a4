package linux

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// hostRouting is the kernel's routing of one family, as far as it says what is
// behind which interface.
type hostRouting struct {
	rules  []routingRule // by priority
	tables map[int][]routeEntry
}

// routingRule is a policy rule that looks into a table.
type routingRule struct {
	priority int
	table    int
	// forPeers says that it takes a peer's packets to the internet, rather than
	// only marked ones or those of certain sources.
	forPeers bool
	// suppress is the longest prefix whose routes the rule doesn't take, or -1:
	// VPNs use it to take all of a table but its default route.
	suppress int
}

// routeEntry is a unicast route.
type routeEntry struct {
	prefix netip.Prefix
	iface  string
	metric int
	// router is the next hop; not valid where there is none.
	router netip.Addr
	// source is the address that the route names for packets of the host; not valid where
	// it names none.
	source netip.Addr
}

// uplink returns the default route that the rules choose first, not counting
// routes by the interface ignored; one without an interface where there is none.
// Within a table, routes that together cover the family win over /0, as they do
// in the kernel, being longer: then it is the widest of them. equal are the other
// interfaces of routes as good, among which the kernel draws for each flow.
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

// widest returns the route by an interface, /0 excepted, that has the shortest
// prefix, and of several the first.
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

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
