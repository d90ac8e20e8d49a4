package linux

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// resolverFiles are the files with the host's DNS servers (resolv.conf(5)). If
// systemd-resolved answers at 127.0.0.53, the second file has the servers that it uses
// itself (systemd-resolved.service(8)).
var resolverFiles = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

// observer reads the facts about the host from the kernel.
type observer struct {
	nl     *nlconn.Handle
	xfrm   *nlconn.Handle // nil if the kernel has no IPsec
	routes *nlconn.Conn
	mesh   string
	// own are the host's mesh addresses; a policy rule for a source prefix around them
	// also applies to peers.
	own []netip.Addr
	// sources is where facts stores params.sources.
	sources map[bool]netip.Addr
}

// facts returns interfaces, routes and uplinks. An interface whose name can't be written
// in a packet filter's language gets a stand-in name: its addresses and networks count,
// but it is never an uplink.
func (o observer) facts() (policy.Host, error) {
	h := policy.Host{Interface: o.mesh}
	links, err := o.nl.LinkList()
	if err != nil {
		return h, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		n, index := l.Attrs().Name, l.Attrs().Index
		if !usableName(n) {
			n = standInPrefix + strconv.Itoa(index)
		}
		names[index] = n
	}
	list, err := o.nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return h, fmt.Errorf("list addresses: %w", err)
	}
	h.Interfaces = o.interfaces(list, names)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		r, err := o.routing(family, names)
		if err != nil {
			return h, err
		}
		h.Routes = append(h.Routes, o.routesOf(r)...)
		secured, err := o.ipsec(family)
		if err != nil {
			return h, err
		}
		h.IPsec = append(h.IPsec, secured...)
		up, equal := r.uplink(o.mesh)
		// No rule could let packets out by an interface whose name can't be written.
		if strings.HasPrefix(up.iface, standInPrefix) {
			up, equal = routeEntry{}, nil
		}
		if up.router.IsValid() && up.router.Is4() != (family == netlink.FAMILY_V4) {
			up.router = netip.Addr{} // an IPv4 route by an IPv6 gateway (RFC 5549)
		}
		source, err := o.source(up, family == netlink.FAMILY_V4)
		if err != nil {
			return h, err
		}
		// Masquerade ignores a route's preferred source, so such a route needs snat.
		delete(o.sources, family == netlink.FAMILY_V4)
		if up.source.IsValid() && up.source == source && source != masquerades(up, list, names) {
			o.sources[family == netlink.FAMILY_V4] = source
		}
		if family == netlink.FAMILY_V4 {
			h.Uplink4, h.Router4, h.Source4, h.Equal4 = up.iface, up.router, source, equal
		} else {
			h.Uplink6, h.Router6, h.Source6, h.Equal6 = up.iface, up.router, source, equal
		}
	}
	h.Lasting = lasting(h, list, names)
	return h, nil
}

// probes are addresses of the internet that no host has (RFC 5737, RFC 3849), and one of
// the space that IANA allocates from, by family (IPv4 under true). The kernel routes
// packets to them by the default route.
var probes = map[bool][]netip.Addr{
	true:  {netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.1")},
	false: {netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2000::1")},
}

// noRoute are the errors of a route lookup that finds an unreachable, prohibit or
// blackhole route, or none (fib_props in net/ipv4/fib_semantics.c, ip6_rt_type_to_error
// in net/ipv6/route.c).
var noRoute = []error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL}

// source returns the source address that the host itself uses by a default route: the one
// that the route prefers, or else the kernel's choice. It isn't valid if there is none.
func (o observer) source(up routeEntry, v4 bool) (netip.Addr, error) {
	if up.iface == "" {
		return netip.Addr{}, nil
	}
	for _, dst := range probes[v4] {
		routes, err := o.nl.RouteGetWithOptions(dst.AsSlice(), &netlink.RouteGetOptions{Oif: up.iface})
		if err != nil && !slices.ContainsFunc(noRoute, func(e error) bool { return errors.Is(err, e) }) {
			return netip.Addr{}, fmt.Errorf("route to %v by %s: %w", dst, up.iface, err)
		}
		for _, r := range routes {
			if a := addrOf(r.Src); a.IsValid() && a.Is4() == v4 && !a.IsUnspecified() && !a.IsLinkLocalUnicast() {
				return a, nil
			}
		}
	}
	return netip.Addr{}, nil
}

// masquerades returns the address to which masquerade translates what leaves by an IPv4
// default route: the interface's first address on the router's network, or else its first
// one (inet_select_addr in net/ipv4/devinet.c). It isn't valid for IPv6, where masquerade
// doesn't depend on the route (nf_nat_masquerade_ipv6 in
// net/netfilter/nf_nat_masquerade.c).
func masquerades(up routeEntry, list []netlink.Addr, names map[int]string) netip.Addr {
	var first netip.Addr
	for _, a := range list {
		p, ok := toPrefix(a.IPNet)
		if !ok || !p.Addr().Is4() || !up.prefix.Addr().Is4() || names[a.LinkIndex] != up.iface ||
			a.Flags&unix.IFA_F_SECONDARY != 0 || a.Scope > unix.RT_SCOPE_UNIVERSE {
			continue
		}
		if up.router.IsValid() && p.Contains(up.router) {
			return p.Addr()
		}
		if !first.IsValid() {
			first = p.Addr()
		}
	}
	return first
}

// standInPrefix begins the stand-in for an unusable name; the interface's index follows.
// No interface can have such a name (dev_valid_name in net/core/dev.c refuses the colon).
const standInPrefix = "if:"

// usableName reports whether policy.Host.Validate accepts a name.
func usableName(n string) bool {
	for _, c := range []byte(n) {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !ok && !strings.ContainsRune("._-@:+", rune(c)) {
			return false
		}
	}
	return n != "" && len(n) < ifnameSize
}

// unstable are the flags of addresses that aren't usable yet or will be removed
// (rtnetlink(7), include/uapi/linux/if_addr.h): tentative, failed or unfinished duplicate
// detection, deprecated.
const unstable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_OPTIMISTIC | unix.IFA_F_DEPRECATED

// lasting returns the uplinks' addresses that may be told to others. For IPv6,
// IFA_F_SECONDARY means temporary (IFA_F_TEMPORARY in if_addr.h). The kernel doesn't list
// anycast addresses that it makes itself, such as the subnet-router one, in RTM_GETADDR.
func lasting(h policy.Host, list []netlink.Addr, names map[int]string) []netip.Addr {
	var out []netip.Addr
	for _, a := range list {
		local, ok := toPrefix(a.IPNet)
		at := local.Addr()
		if !ok || names[a.LinkIndex] == "" || names[a.LinkIndex] != h.Uplink(at) || at.IsLinkLocalUnicast() ||
			a.Scope >= unix.RT_SCOPE_LINK || a.Flags&unstable != 0 || at.Is6() && a.Flags&unix.IFA_F_TEMPORARY != 0 {
			continue
		}
		out = append(out, at)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// interfaces returns the host's interfaces with their addresses and attached prefixes,
// without the mesh interface. Subnet-router anycast addresses are among them, as netlink
// lists them for a host that forwards.
func (o observer) interfaces(list []netlink.Addr, names map[int]string) []policy.Interface {
	byName := map[string][]netip.Prefix{}
	for _, a := range list {
		name, ok := names[a.LinkIndex]
		if !ok || name == o.mesh {
			continue
		}
		// Link-local IPv6 addresses are class martian on any interface.
		local, ok := toPrefix(a.IPNet)
		if !ok || local.Addr().Is6() && local.Addr().IsLinkLocalUnicast() {
			continue
		}
		byName[name] = append(byName[name], attachedPrefixes(local, a)...)
	}
	var out []policy.Interface
	for _, name := range sortedKeys(byName) {
		ps := byName[name]
		slices.SortFunc(ps, comparePrefix)
		out = append(out, policy.Interface{Name: name, Addresses: slices.Compact(ps)})
	}
	return out
}

// attachedPrefixes returns an address with the prefix that it attaches. On a
// point-to-point link that is the other end's prefix. The lowest address of an IPv6
// prefix is the subnet-router anycast address (RFC 4291 2.6.1): the kernel answers to it
// while it forwards, except on /127 (RFC 6164).
func attachedPrefixes(local netip.Prefix, a netlink.Addr) []netip.Prefix {
	out := []netip.Prefix{local}
	if peer, ok := toPrefix(a.Peer); ok && peer.Addr() != local.Addr() {
		out = []netip.Prefix{single(local.Addr())}
		if !peer.IsSingleIP() {
			out = append(out, netip.PrefixFrom(local.Addr(), peer.Bits()))
		}
	}
	if first := local.Masked().Addr(); local.Addr().Is6() && local.Bits() < 127 {
		out = append(out, single(first))
	}
	return out
}

// comparePrefix orders prefixes by address, then by length.
func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// routing reads the routes in all tables, and the policy rules that select tables
// (ip-rule(8)).
func (o observer) routing(family int, names map[int]string) (hostRouting, error) {
	h := hostRouting{tables: map[int][]routeEntry{}}
	rules, err := o.nl.RuleList(family)
	if err != nil {
		return h, fmt.Errorf("list routing rules: %w", err)
	}
	for _, r := range rules {
		if r.Table == 0 || r.Table == unix.RT_TABLE_LOCAL {
			continue
		}
		h.rules = append(h.rules, routingRule{
			priority: r.Priority, table: r.Table, suppress: r.SuppressPrefixlen, forPeers: o.takesPeers(r),
		})
	}
	slices.SortStableFunc(h.rules, func(a, b routingRule) int { return cmp.Compare(a.priority, b.priority) })
	filter := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
	byNexthop := false
	begin := func() {
		clear(h.tables)
		byNexthop = false
	}
	err = o.nl.EachRoute(family, filter, netlink.RT_FILTER_TABLE, begin, func(r netlink.Route) {
		h.tables[r.Table] = append(h.tables[r.Table], entries(family, r, names)...)
		byNexthop = byNexthop || r.Type == unix.RTN_UNICAST && r.LinkIndex == 0 && len(r.MultiPath) == 0
	})
	if err != nil {
		return h, fmt.Errorf("list routes: %w", err)
	}
	if !byNexthop {
		return h, nil
	}
	more, err := viaNexthops(o.routes, family, names)
	if err != nil {
		return h, err
	}
	for table, es := range more {
		h.tables[table] = append(h.tables[table], es...)
	}
	return h, nil
}

// takesPeers reports whether a policy rule applies to a peer's packet to the internet,
// which has no mark and no socket and arrives on the mesh interface. A rule for all marks
// except one, as VPNs make it for their own packets, applies (wg-quick: "not fwmark 51820
// table 51820"; Tailscale has its peers' /32 routes in table 52, by rule 5270).
func (o observer) takesPeers(r netlink.Rule) bool {
	if r.Dst != nil || r.OifName != "" || r.UIDRange != nil || r.IPProto != 0 || r.Dport != nil || r.Sport != nil {
		return false
	}
	source := true
	if p, ok := toPrefix(r.Src); ok {
		source = slices.ContainsFunc(o.own, p.Contains)
	}
	if r.Invert {
		return r.Mark != 0 || r.Src != nil && !source
	}
	return r.Mark == 0 && source && (r.IifName == "" || r.IifName == o.mesh)
}

// entries returns the entries of a unicast route, one per next hop.
func entries(family int, r netlink.Route, names map[int]string) []routeEntry {
	if r.Type != unix.RTN_UNICAST || r.Table == unix.RT_TABLE_LOCAL {
		return nil
	}
	prefix, ok := toPrefix(r.Dst)
	if !ok {
		prefix = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if family == netlink.FAMILY_V6 {
			prefix = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	var out []routeEntry
	add := func(index, flags int, router net.IP) {
		if name, ok := names[index]; ok && flags&unix.RTNH_F_DEAD == 0 {
			out = append(out, routeEntry{prefix, name, r.Priority, addrOf(router), addrOf(r.Src)})
		}
	}
	if len(r.MultiPath) == 0 {
		add(r.LinkIndex, r.Flags, r.Gw)
	}
	for _, hop := range r.MultiPath {
		add(hop.LinkIndex, hop.Flags, hop.Gw)
	}
	return out
}

// routesOf returns the routes that tell which destinations an interface leads to.
// Link-local and multicast routes don't tell that.
func (o observer) routesOf(h hostRouting) []policy.Route {
	var out []policy.Route
	for _, r := range h.chosen() {
		if r.iface == o.mesh || r.prefix.Addr().IsLinkLocalUnicast() || r.prefix.Addr().IsMulticast() {
			continue
		}
		out = append(out, policy.Route{Prefix: r.prefix, Interface: r.iface})
	}
	slices.SortFunc(out, func(a, b policy.Route) int {
		return cmp.Or(comparePrefix(a.Prefix, b.Prefix), cmp.Compare(a.Interface, b.Interface))
	})
	return slices.Compact(out)
}

// chosen returns the routes of all tables that policy rules select, each table once.
func (h hostRouting) chosen() []routeEntry {
	var out []routeEntry
	seen := map[int]bool{}
	for _, rule := range h.rules {
		if seen[rule.table] {
			continue
		}
		seen[rule.table] = true
		out = append(out, h.tables[rule.table]...)
	}
	return out
}

// addrOf converts an address; it isn't valid for nil.
func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
