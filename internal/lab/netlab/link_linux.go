package netlab

// Links between hosts, and a host's interfaces, addresses and routes, by netlink.

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// Port is one end of a link between two hosts.
type Port struct {
	Host  *Host          // required
	Name  string         // required: the interface's name, at most 15 bytes
	MAC   string         // optional: makes the link-local and advertised addresses predictable
	Addrs []netip.Prefix // optional: addresses with the length of their network
}

// Link joins two hosts by virtual Ethernet (veth(4)) with an MTU of 1500 bytes, adds the
// addresses of both ends and sets them up.
func (l *Lab) Link(a, b Port) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = a.Name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: b.Name, PeerNamespace: netlink.NsFd(b.Host.netFD)}
	var err error
	if veth.HardwareAddr, err = parseMAC(a.MAC); err != nil {
		return err
	}
	if veth.PeerHardwareAddr, err = parseMAC(b.MAC); err != nil {
		return err
	}
	if err := a.Host.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("link %s:%s to %s:%s: %w", a.Host.Name, a.Name, b.Host.Name, b.Name, err)
	}
	for _, ends := range [][2]Port{{a, b}, {b, a}} {
		p, other := ends[0], ends[1]
		far, err := other.Host.link(other.Name)
		if err != nil {
			return err
		}
		l.setNeighbour(p.Host, p.Name, far.Attrs().HardwareAddr)
		if err := p.Host.SetUp(p.Name, true); err != nil {
			return err
		}
		for _, addr := range p.Addrs {
			if err := p.Host.AddAddr(p.Name, addr); err != nil {
				return err
			}
		}
	}
	return nil
}

func parseMAC(s string) (net.HardwareAddr, error) {
	if s == "" {
		return nil, nil
	}
	return net.ParseMAC(s)
}

// Netlink returns a route netlink handle of the host, for operations without a method
// here. The lab closes it.
func (h *Host) Netlink() *nlconn.Handle { return h.nl }

func (h *Host) link(name string) (netlink.Link, error) {
	link, err := h.nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find interface %s of %s: %w", name, h.Name, err)
	}
	return link, nil
}

// SetUp sets an interface up or down.
func (h *Host) SetUp(name string, up bool) error {
	link, err := h.link(name)
	if err != nil {
		return err
	}
	set := h.nl.LinkSetDown
	if up {
		set = h.nl.LinkSetUp
	}
	if err := set(link); err != nil {
		return fmt.Errorf("set interface %s of %s up=%t: %w", name, h.Name, up, err)
	}
	return nil
}

// SetMTU sets an interface's MTU in bytes.
func (h *Host) SetMTU(name string, mtu int) error {
	link, err := h.link(name)
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set MTU of %s of %s to %d: %w", name, h.Name, mtu, err)
	}
	return nil
}

// AddAddr adds an address to an interface. It can be used at once.
func (h *Host) AddAddr(name string, p netip.Prefix) error {
	link, err := h.link(name)
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}
	if err := h.nl.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add address %s to %s of %s: %w", p, name, h.Name, err)
	}
	return nil
}

// DelAddr removes an address from an interface.
func (h *Host) DelAddr(name string, p netip.Prefix) error {
	link, err := h.link(name)
	if err != nil {
		return err
	}
	if err := h.nl.AddrDel(link, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
		return fmt.Errorf("delete address %s of %s of %s: %w", p, name, h.Name, err)
	}
	return nil
}

// Route is a route of a host's main table.
type Route struct {
	To   netip.Prefix // required
	Via  netip.Addr   // optional: the gateway; none for a network on the link
	Link string       // optional: needed without a gateway, or with a link-local one
}

// AddRoute adds a route, or replaces the one to the same prefix.
func (h *Host) AddRoute(r Route) error {
	route, err := h.route(r)
	if err != nil {
		return err
	}
	if err := h.nl.RouteReplace(route); err != nil {
		return fmt.Errorf("add route to %s via %s %s on %s: %w", r.To, r.Via, r.Link, h.Name, err)
	}
	return nil
}

// DelRoute deletes a route.
func (h *Host) DelRoute(r Route) error {
	route, err := h.route(r)
	if err != nil {
		return err
	}
	if err := h.nl.RouteDel(route); err != nil {
		return fmt.Errorf("delete route to %s on %s: %w", r.To, h.Name, err)
	}
	return nil
}

// DropLearnedRoute deletes the default route that an interface learned from router
// advertisements.
func (h *Host) DropLearnedRoute(name string) error {
	link, err := h.link(name)
	if err != nil {
		return err
	}
	routes, err := h.nl.RouteList(link, netlink.FAMILY_V6)
	if err != nil {
		return fmt.Errorf("list routes of %s of %s: %w", name, h.Name, err)
	}
	for _, r := range routes {
		if r.Protocol != unix.RTPROT_RA || r.Gw == nil {
			continue
		}
		if err := h.nl.RouteDel(&r); err != nil {
			return fmt.Errorf("delete learned route of %s of %s: %w", name, h.Name, err)
		}
		return nil
	}
	return fmt.Errorf("delete learned route of %s of %s: there is none", name, h.Name)
}

func (h *Host) route(r Route) (*netlink.Route, error) {
	route := &netlink.Route{Dst: ipNet(r.To.Masked())}
	if r.Via.IsValid() {
		route.Gw = r.Via.AsSlice()
	} else if r.To.Addr().Is4() {
		route.Scope = netlink.SCOPE_LINK
	}
	if r.Link != "" {
		link, err := h.link(r.Link)
		if err != nil {
			return nil, err
		}
		route.LinkIndex = link.Attrs().Index
	}
	return route, nil
}

// Detour routes a prefix by another interface, with a policy rule that comes before the
// main table and so overrides its routes.
func (h *Host) Detour(r Route) error {
	const table = 77
	route, err := h.route(r)
	if err != nil {
		return err
	}
	route.Table = table
	if err := h.nl.RouteReplace(route); err != nil {
		return fmt.Errorf("add detour to %s on %s: %w", r.To, h.Name, err)
	}
	rule := netlink.NewRule()
	rule.Dst, rule.Table, rule.Family = ipNet(r.To), table, netlink.FAMILY_V4
	if r.To.Addr().Is6() {
		rule.Family = netlink.FAMILY_V6
	}
	if err := h.nl.RuleAdd(rule); err != nil {
		return fmt.Errorf("add detour to %s on %s: %w", r.To, h.Name, err)
	}
	return nil
}

// TurnOut routes the host's packets to one of its own addresses into an interface, as
// macOS does with the IPv4 address of a point-to-point interface. Packets that arrive
// for that address are still delivered to the host.
func (h *Host) TurnOut(link string, own netip.Addr) error {
	const table, first, then = 78, 1, 2
	route, err := h.route(Route{To: netip.PrefixFrom(own, own.BitLen()), Link: link})
	if err != nil {
		return err
	}
	route.Table, route.Src = table, own.AsSlice()
	if err := h.nl.RouteReplace(route); err != nil {
		return fmt.Errorf("lead %s into %s of %s: %w", own, link, h.Name, err)
	}
	family := netlink.FAMILY_V4
	if own.Is6() {
		family = netlink.FAMILY_V6
	}
	sent, local, found := netlink.NewRule(), netlink.NewRule(), netlink.NewRule()
	sent.Priority, sent.IifName, sent.Table = first, "lo", table
	local.Priority, local.Table = then, unix.RT_TABLE_LOCAL
	found.Priority, found.Table = 0, unix.RT_TABLE_LOCAL
	for _, rule := range []*netlink.Rule{sent, local, found} {
		rule.Family = family
	}
	sent.Dst = ipNet(netip.PrefixFrom(own, own.BitLen()))
	if err := errors.Join(h.nl.RuleAdd(sent), h.nl.RuleAdd(local), h.nl.RuleDel(found)); err != nil {
		return fmt.Errorf("lead %s into %s of %s: %w", own, link, h.Name, err)
	}
	return nil
}

// Addrs lists the global and private addresses of an interface, IPv4 first.
// Link-local ones are left out.
func (h *Host) Addrs(name string) ([]netip.Prefix, error) {
	link, err := h.link(name)
	if err != nil {
		return nil, err
	}
	var all []netip.Prefix
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		addrs, err := h.nl.AddrList(link, family)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s of %s: %w", name, h.Name, err)
		}
		for _, a := range addrs {
			if p := prefixOf(a.IPNet); !p.Addr().IsLinkLocalUnicast() {
				all = append(all, p)
			}
		}
	}
	return all, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) netip.Prefix {
	addr, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits)
}
