package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// routeProtocol marks our routes for people who read them (rtm_protocol in rtnetlink(7)).
// 0 to 4 are the kernel's, and /etc/iproute2/rt_protos names some above.
const routeProtocol = 109

// nameTemplate makes the kernel choose the first free number (TUNSETIFF).
const nameTemplate = "mesh%d"

// createTUN creates the mesh interface, down and without addresses.
func createTUN(cfg host.Interface) (tun.Device, string, error) {
	want := cfg.Name
	if want == "" {
		want = nameTemplate
	}
	dev, err := tun.CreateTUN(want, cfg.MTU)
	if err != nil {
		return nil, "", tunError(want, err)
	}
	got, err := dev.Name()
	if err != nil {
		dev.Close()
		return nil, "", fmt.Errorf("read the interface's name: %w", err)
	}
	return dev, got, nil
}

// tunError adds a hint to the error of creating a TUN device.
func tunError(name string, err error) error {
	e := &host.StepError{Step: StepInterface, Err: fmt.Errorf("create interface %q: %w", name, err)}
	_, missing := os.Stat("/dev/net/tun")
	switch {
	case errors.Is(missing, fs.ErrNotExist):
		e.Hint = "load the kernel's tun module (modprobe tun), or give the container /dev/net/tun"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		e.Hint = "run the helper as root"
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		e.Hint = "choose another --interface"
	case errors.Is(err, unix.EINVAL):
		e.Hint = "choose a name of 1 to 15 bytes that no other interface has"
	}
	return e
}

// restrictInterface stops the kernel from sending on the mesh interface by itself (router
// solicitations, link-local addresses, redirects) and from accepting redirects and source
// routes there. The sysctls disappear with the interface
// (Documentation/networking/ip-sysctl.rst).
func restrictInterface(sys sysctls, iface string) error {
	for _, s := range [...]struct{ family, key, value string }{
		{"ipv4", "accept_redirects", "0"}, {"ipv4", "send_redirects", "0"}, {"ipv4", "accept_source_route", "0"},
		{"ipv6", "disable_ipv6", "0"}, {"ipv6", "accept_redirects", "0"},
		{"ipv6", "accept_ra", "0"}, {"ipv6", "autoconf", "0"}, {"ipv6", "addr_gen_mode", "1"},
	} {
		err := sys.write(conf(s.family, iface, s.key), s.value)
		if errors.Is(err, fs.ErrNotExist) && s.family == "ipv6" {
			return nil // a kernel without IPv6
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// link is the mesh interface as netlink sees it.
type link struct {
	nl    *nlconn.Handle
	index int
}

// ipNet converts a prefix for the library.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// toPrefix converts a prefix of the library's. ok is false for nil and for a mask with
// holes. A mask of 32 bits is IPv4's, whose address may have the 16-byte form.
func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, size := n.Mask.Size()
	if !ok || size == 0 {
		return netip.Prefix{}, false
	}
	if size == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, ones), true
}

// single returns the prefix with just this address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// addrs returns the interface's addresses, without link-local ones.
func (l link) addrs() (map[netip.Prefix]bool, error) {
	list, err := l.nl.AddrList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: l.index}}, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := map[netip.Prefix]bool{}
	for _, a := range list {
		if p, ok := toPrefix(a.IPNet); ok && !p.Addr().IsLinkLocalUnicast() {
			out[p] = true
		}
	}
	return out, nil
}

// addr returns an address as netlink takes it. IFA_F_NODAD: a TUN device has no
// neighbours that could have the address, and duplicate detection would delay its use.
// IFA_F_NOPREFIXROUTE: peers have host routes.
func (l link) addr(a netip.Addr) *netlink.Addr {
	return &netlink.Addr{IPNet: ipNet(single(a)), Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE}
}

// setAddrs gives the interface exactly these addresses. It calls begin before each
// change.
func (l link) setAddrs(want []netip.Addr, begin func()) error {
	have, err := l.addrs()
	if err != nil {
		return err
	}
	dev := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: l.index}}
	keep := map[netip.Prefix]bool{}
	for _, a := range want {
		keep[single(a)] = true
		if have[single(a)] {
			continue
		}
		begin()
		if err := l.nl.AddrReplace(dev, l.addr(a)); err != nil {
			return fmt.Errorf("add address %v: %w", a, err)
		}
	}
	for p := range have {
		if keep[p] {
			continue
		}
		begin()
		if err := l.nl.AddrDel(dev, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
			return fmt.Errorf("delete address %v: %w", p, err)
		}
	}
	return nil
}

// rename restores the interface's name if another program changed it, because the table's
// rules use the name.
func (l link) rename(name string) error {
	now, err := l.nl.LinkByIndex(l.index)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if now.Attrs().Name == name {
		return nil
	}
	// Older kernels rename only an interface that is down.
	if err := errors.Join(l.nl.LinkSetDown(now), l.nl.LinkSetName(now, name)); err != nil {
		return fmt.Errorf("rename interface %s to %s: %w", now.Attrs().Name, name, err)
	}
	return nil
}

// up brings the interface up, which it may already be.
func (l link) up() error {
	return l.nl.LinkSetUp(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: l.index}})
}

// hostRoute is a route to one peer, with the source address for the host's packets to it.
type hostRoute struct{ to, source netip.Addr }

// peerRoutes returns the host routes for a ruleset's peers, without IPv6 if the kernel
// has none.
func peerRoutes(r *policy.Ruleset, ipv6 bool) map[netip.Addr]hostRoute {
	var source4, source6 netip.Addr
	for _, a := range r.Mesh().Addresses {
		if a.Is4() {
			source4 = a
		} else {
			source6 = a
		}
	}
	out := map[netip.Addr]hostRoute{}
	for _, p := range r.Peers() {
		for _, a := range p.Addresses {
			switch {
			case a.Is4():
				out[a] = hostRoute{a, source4}
			case ipv6:
				out[a] = hostRoute{a, source6}
			}
		}
	}
	return out
}

// routes returns the host routes by the interface in the main table.
func (l link) routes() (map[netip.Addr]hostRoute, error) {
	out := map[netip.Addr]hostRoute{}
	filter := &netlink.Route{LinkIndex: l.index, Table: unix.RT_TABLE_MAIN}
	mask := netlink.RT_FILTER_OIF | netlink.RT_FILTER_TABLE
	err := l.nl.EachRoute(netlink.FAMILY_ALL, filter, mask, func() { clear(out) }, func(r netlink.Route) {
		p, ok := toPrefix(r.Dst)
		if ok && p.IsSingleIP() && r.Type == unix.RTN_UNICAST {
			source, _ := netip.AddrFromSlice(r.Src)
			out[p.Addr()] = hostRoute{p.Addr(), source.Unmap()}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return out, nil
}

// route returns a route as netlink takes it.
func (l link) route(r hostRoute) *netlink.Route {
	nr := &netlink.Route{
		LinkIndex: l.index, Dst: ipNet(single(r.to)), Protocol: routeProtocol,
		Scope: netlink.SCOPE_LINK, Table: unix.RT_TABLE_MAIN,
	}
	if r.source.IsValid() {
		nr.Src = r.source.AsSlice()
	}
	if r.to.Is6() {
		// IPv6's metric 0 means 1024 (IP6_RT_PRIO_USER), and any other route would win.
		nr.Priority = 1
		nr.Scope = netlink.SCOPE_UNIVERSE
	}
	return nr
}

// addRoutes adds routes that are missing or differ. It calls begin before each change.
func (l link) addRoutes(have, want map[netip.Addr]hostRoute, begin func()) error {
	for to, r := range want {
		if have[to] == r {
			continue
		}
		begin()
		if err := l.nl.RouteReplace(l.route(r)); err != nil {
			return fmt.Errorf("add route to %v: %w", to, err)
		}
	}
	return nil
}

// delRoutes deletes routes that aren't wanted. It calls begin before each change.
func (l link) delRoutes(have, want map[netip.Addr]hostRoute, begin func()) error {
	for to, r := range have {
		if _, ok := want[to]; ok {
			continue
		}
		begin()
		if err := l.nl.RouteDel(l.route(r)); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("delete route to %v: %w", to, err)
		}
	}
	return nil
}
