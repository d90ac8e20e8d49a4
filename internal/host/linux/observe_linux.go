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

// resolverFiles are where Linux keeps the servers that it asks for names
// (resolv.conf(5)). Where systemd-resolved answers at 127.0.0.53, the second one
// has the servers that it asks itself (systemd-resolved.service(8)).
var resolverFiles = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

// observer reads the host's facts from the kernel.
type observer struct {
	nl     *nlconn.Handle
	xfrm   *nlconn.Handle // nil where the kernel has no IPsec
	routes *nlconn.Conn
	mesh   string
	// own are the host's mesh addresses: rules for sources around them are meant
	// for peers too.
	own []netip.Addr
	// sources is what params.sources is to be.
	sources map[bool]netip.Addr
}

// facts returns interfaces, routes and uplinks. An interface whose name no packet filter's
// language takes has a stand-in for it: its addresses and networks count, but it is no
// uplink.
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
		if strings.HasPrefix(up.iface, standInPrefix) {
			up, equal = routeEntry{}, nil
		}
		if up.router.IsValid() && up.router.Is4() != (family == netlink.FAMILY_V4) {
			up.router = netip.Addr{} // IPv4 by a router's IPv6 address (RFC 5549)
		}
		source, err := o.source(up, family == netlink.FAMILY_V4)
		if err != nil {
			return h, err
		}
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

// elsewhere are addresses of the internet that no host has (RFC 5737, RFC 3849),
// and of the space that IANA gives out, by family: what the kernel would do with
// packets to them is what it does by the default route.
var probes = map[bool][]netip.Addr{
	true:  {netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.1")},
	false: {netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2000::1")},
}

// noRoute are the errors by which the kernel says that a route leads nowhere: it is
// unreachable, prohibited or a blackhole, or there is none (fib_props of Linux
// net/ipv4/fib_semantics.c, ip6_rt_type_to_error of net/ipv6/route.c).
var noRoute = []error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL}

// source returns the address that the host itself uses by a default route, which
// is the one that the route prefers, or else one that the kernel chooses. It is
// not valid where there is none.
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

// masquerades returns the address that the kernel translates to what leaves by a default
// route of IPv4: the interface's first on the router's network, or else its first
// (inet_select_addr in net/ipv4/devinet.c). Of IPv6 it asks no route
// (nf_nat_masquerade_ipv6 in net/netfilter/nf_nat_masquerade.c), and it isn't known.
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

// standInPrefix begins the name that stands for one that isn't usable; its index follows. No
// interface has such a name (dev_valid_name in net/core/dev.c).
const standInPrefix = "if:"

// usableName reports what policy.Host.Validate accepts.
func usableName(n string) bool {
	for _, c := range []byte(n) {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !ok && !strings.ContainsRune("._-@:+", rune(c)) {
			return false
		}
	}
	return n != "" && len(n) < ifnameSize
}

// passing are the flags of addresses that aren't settled or go away by themselves
// (rtnetlink(7), Linux include/uapi/linux/if_addr.h): tentative ones, those whose
// check for duplicates failed or hasn't ended, and deprecated ones.
const unstable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_OPTIMISTIC | unix.IFA_F_DEPRECATED

// lasting returns the addresses of the uplinks that others may be told. Of an IPv6
// address IFA_F_SECONDARY means that it is temporary (if_addr.h: IFA_F_TEMPORARY).
// Addresses that the kernel makes by itself, as a subnet's router anycast one, are
// in no list of RTM_GETADDR of this kind.
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

func (o observer) interfaces(list []netlink.Addr, names map[int]string) []policy.Interface {
	byName := map[string][]netip.Prefix{}
	for _, a := range list {
		name, ok := names[a.LinkIndex]
		if !ok || name == o.mesh {
			continue
		}
		// Link-local IPv6 addresses are martians wherever they are.
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
// point-to-point link the prefix is the other end's. The lowest address of an
// IPv6 prefix is every router's (RFC 4291 2.6.1): the kernel answers to it while
// it forwards, except on /127 (RFC 6164).
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

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// routing reads the tables that policy rules choose.
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

// takesPeers reports whether a policy rule applies to a peer's packet to the
// internet, which has no mark, no socket and comes in by the mesh. A rule for
// all but one mark, as VPNs make it for their own packets, does.
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

// entries returns a unicast route, once for each of its next hops.
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

// routesOf returns the routes that say what is behind which interface. Link-local
// ones and multicast say nothing.
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

// chosen returns the routes of all tables that some rule chooses, each once.
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

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
