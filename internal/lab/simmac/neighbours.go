package simmac

// Changes that macOS and other programs make to interfaces, addresses and routes while
// nothing uses the Mac.

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
)

// churn is the state of the interfaces and addresses that Churn changes.
type churn struct {
	round     int
	tunnel    string       // the system's utun
	local     netip.Addr   // the link-local address of awdl0 and llw0
	temporary []netip.Addr // the link's temporary addresses, oldest first
	route     netip.Prefix // another program's host route
}

// virtualLAN is the host's address in the network of virtual machines (vmnet).
const virtualLAN = "192.168.64.1/24"

// Churn makes one round of the changes that happen many times an hour on an idle Mac
// (captured on macOS 26 by yoloai and others). awdl0 and llw0 get new link-local
// addresses. One of the system's utuns is replaced by another, with a scoped default
// route. A virtual machine's bridge appears, or disappears. link, an Ethernet with
// IPv6, gets a new temporary address; the previous one becomes deprecated, and the one
// before that expires. Another program's host route by link replaces its last one. And
// route lookups fail (RTM_MISS).
func (m *Mac) Churn(link string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &m.churn
	c.round++
	n, err := darwin.Observe(m.Kernel)
	if err != nil {
		return err
	}
	i := n.Interface(link)
	if i == nil {
		return fmt.Errorf("churn: there is no %s", link)
	}
	for _, step := range []func(*Mac, *darwin.Interface) error{c.peerToPeer, c.systemTunnel, c.bridge, c.privacy, c.foreignRoute} {
		if err := step(m, i); err != nil {
			return fmt.Errorf("churn: %w", err)
		}
	}
	for range 3 {
		m.Kernel.Miss(netip.AddrFrom4([4]byte{198, 51, 100, byte(c.round)}))
	}
	return nil
}

// numbered returns an address in a network with the number of the round in its last
// bytes.
func (c *churn) numbered(network netip.Prefix) netip.Addr {
	b := network.Masked().Addr().AsSlice()
	binary.BigEndian.PutUint16(b[len(b)-2:], uint16(c.round))
	if len(b) == 16 {
		b[8] = 0x77 // no static address has this byte
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

var linkLocal = netip.MustParsePrefix("fe80::/64")

// peerToPeer changes the link-local addresses of awdl0 and llw0.
func (c *churn) peerToPeer(m *Mac, _ *darwin.Interface) error {
	next := c.numbered(linkLocal)
	for _, name := range []string{"awdl0", "llw0"} {
		if !m.Kernel.Has(name) {
			m.Kernel.AddInterface(name, darwin.InterfaceUp|darwin.InterfaceBroadcast|darwin.InterfaceRunning|darwin.InterfaceMulticast, 1500)
		} else if c.local.IsValid() {
			if err := m.Kernel.RemoveAddress(name, c.local); err != nil {
				return err
			}
		}
		if err := m.Kernel.AddAddress6(name, netip.PrefixFrom(next, 64), 0); err != nil {
			return err
		}
	}
	c.local = next
	return nil
}

// systemTunnel replaces a utun of the system's.
func (c *churn) systemTunnel(m *Mac, _ *darwin.Interface) error {
	if c.tunnel != "" {
		m.Kernel.RemoveInterface(c.tunnel)
	}
	name, err := m.Kernel.CreateTunnel("utun", 1380)
	if err != nil {
		return err
	}
	c.tunnel = name
	if err := m.Kernel.AddAddress6(name, netip.PrefixFrom(c.numbered(linkLocal), 64), 0); err != nil {
		return err
	}
	n, err := darwin.Observe(m.Kernel)
	if err != nil {
		return err
	}
	return m.Kernel.AddRoute(darwin.Route{Dst: netip.PrefixFrom(netip.IPv6Unspecified(), 0), Gateway: netip.MustParseAddr("fe80::"),
		Index: n.Interface(name).Index, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteScoped})
}

// bridge adds or removes a virtual machine's bridge and its member interface.
func (c *churn) bridge(m *Mac, _ *darwin.Interface) error {
	if c.round%2 == 0 {
		m.Kernel.RemoveInterface("vmenet0")
		m.Kernel.RemoveInterface(sharingBridge)
		return nil
	}
	m.Kernel.AddInterface("vmenet0", darwin.InterfaceUp|darwin.InterfaceBroadcast|darwin.InterfaceRunning|darwin.InterfaceMulticast, 1500)
	if m.Kernel.Has(sharingBridge) {
		return nil
	}
	return m.AddEthernet(sharingBridge, []string{virtualLAN, netip.PrefixFrom(c.numbered(linkLocal), 64).String()})
}

// privacy changes the link's temporary addresses (RFC 8981).
func (c *churn) privacy(m *Mac, i *darwin.Interface) error {
	n := slices.IndexFunc(i.Addresses, func(a darwin.Address) bool {
		return a.Prefix.Addr().Is6() && a.Prefix.Bits() == 64 && !a.Prefix.Addr().IsLinkLocalUnicast()
	})
	if n < 0 {
		return nil
	}
	const kind = darwin.AddressAutoconf | darwin.AddressTemporary
	next := c.numbered(i.Addresses[n].Prefix)
	if err := m.Kernel.AddAddress6(i.Name, netip.PrefixFrom(next, 64), kind); err != nil {
		return err
	}
	if last := len(c.temporary) - 1; last >= 0 {
		if err := m.Kernel.SetAddressFlags(i.Name, c.temporary[last], kind|darwin.AddressDeprecated); err != nil {
			return err
		}
	}
	c.temporary = append(c.temporary, next)
	if len(c.temporary) <= 2 {
		return nil
	}
	oldest := c.temporary[0]
	c.temporary = c.temporary[1:]
	return m.Kernel.RemoveAddress(i.Name, oldest)
}

// foreignRoute replaces another program's host route.
func (c *churn) foreignRoute(m *Mac, i *darwin.Interface) error {
	if c.route.IsValid() {
		if err := m.Kernel.DeleteRoute(c.route); err != nil {
			return err
		}
	}
	c.route = netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(c.round >> 8), byte(c.round)}), 32)
	return m.Kernel.AddRoute(darwin.Route{Dst: c.route, Index: i.Index, Flags: darwin.RouteUp | darwin.RouteHost | darwin.RouteStatic})
}

// Tailscale starts another VPN in 100.64.0.0/10, as Tailscale and NetBird do: a utun
// with 100.99.1.1 and an IPv6 address, the given routes by it or one for the whole
// prefix, and a resolver in it for a domain of its own. It returns the utun's name.
func (m *Mac) Tailscale(routes ...string) (string, error) {
	name, err := m.Kernel.CreateTunnel("utun", 1280)
	if err != nil {
		return "", err
	}
	for _, a := range []string{"100.99.1.1/32", "fd7a:115c:a1e0::332:d067/48"} {
		if err := m.Kernel.AddAddress(name, netip.MustParsePrefix(a)); err != nil {
			return "", err
		}
	}
	n, err := darwin.Observe(m.Kernel)
	if err != nil {
		return "", err
	}
	if len(routes) == 0 {
		routes = []string{"100.64.0.0/10"}
	}
	for _, r := range append(routes, "100.100.100.100/32") {
		dst, err := netip.ParsePrefix(r)
		if err != nil {
			return "", err
		}
		flags := darwin.RouteUp | darwin.RouteStatic
		if dst.IsSingleIP() {
			flags |= darwin.RouteHost
		}
		if err := m.Kernel.AddRoute(darwin.Route{Dst: dst, Index: n.Interface(name).Index, Flags: flags}); err != nil {
			return "", fmt.Errorf("route %s by %s: %w", r, name, err)
		}
	}
	m.Kernel.SetResolvers(append(m.Kernel.DNS(), darwin.Resolver{Servers: []netip.Addr{magicDNS}, Domain: "tail3b1a8.ts.net"}))
	return name, nil
}

// magicDNS is Tailscale's resolver.
var magicDNS = netip.MustParseAddr("100.100.100.100")

// StopTailscale removes what Tailscale created, given its utun's name.
func (m *Mac) StopTailscale(name string) {
	m.Kernel.RemoveInterface(name)
	m.Kernel.SetResolvers(slices.DeleteFunc(m.Kernel.DNS(), func(r darwin.Resolver) bool { return slices.Contains(r.Servers, magicDNS) }))
}

// SkipLoopback makes pf skip lo0 until the main ruleset is loaded again, as vmnet and
// Internet Sharing leave it (captured: pfctl -v -s Interfaces shows "lo0 (skip)").
func (m *Mac) SkipLoopback() error {
	return m.LoadMain("set skip on lo0\n" + StockMain)
}

// Slow makes each run of a program, given by its path, wait for d before it does
// anything. Its caller may give up earlier.
func (m *Mac) Slow(path string, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.slow[path] = d
}

// Busy makes the next n loads fail with "Resource busy" (tuist#11425).
func (m *Mac) Busy(n int) {
	m.engine.mu.Lock()
	defer m.engine.mu.Unlock()
	m.engine.busy = n
}
