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
	tunnel    string       // the system's
	local     netip.Addr   // link-local, of awdl0 and llw0
	temporary []netip.Addr // of the link, oldest first
	route     netip.Prefix // another program's
}

// virtualLAN is the network of virtual machines (vmnet).
const virtualLAN = "192.168.64.1/24"

// Churn does once what goes on many times an hour on an idle Mac
// (captured on macOS 26 by yoloai and others): awdl0 and llw0 get other link-local
// addresses; one of the system's tunnels goes and another comes, with a scoped
// default route; a virtual machine's bridge comes, or goes; link, an Ethernet with
// IPv6, gets another temporary address, the last one becomes deprecated, the one
// before expires; another program's route to a host by link comes and the last one
// goes; and lookups of hosts fail.
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

// numbered returns an address of a network with the round in its last bytes.
func (c *churn) numbered(network netip.Prefix) netip.Addr {
	b := network.Masked().Addr().AsSlice()
	binary.BigEndian.PutUint16(b[len(b)-2:], uint16(c.round))
	if len(b) == 16 {
		b[8] = 0x77 // so that no static address is met
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

var linkLocal = netip.MustParsePrefix("fe80::/64")

// peerToPeer is awdl0 and llw0.
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

// systemTunnel is a utun of Apple's.
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

// bridge is a virtual machine's, and its end at the machine.
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

// privacy is RFC 8981 on link.
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

// foreignRoute is another program's, to a host.
func (c *churn) foreignRoute(m *Mac, i *darwin.Interface) error {
	if c.route.IsValid() {
		if err := m.Kernel.DeleteRoute(c.route); err != nil {
			return err
		}
	}
	c.route = netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(c.round >> 8), byte(c.round)}), 32)
	return m.Kernel.AddRoute(darwin.Route{Dst: c.route, Index: i.Index, Flags: darwin.RouteUp | darwin.RouteHost | darwin.RouteStatic})
}

// Tailscale starts another VPN that has part of 100.64.0.0/10, as Tailscale and
// NetBird do: a tunnel with 100.99.1.1 and an IPv6 address, routes by it, those
// given or all of the prefix, and a resolver in it for a domain of its own. It
// returns the tunnel's name.
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

// StopTailscale takes away what Tailscale made, by its tunnel's name.
func (m *Mac) StopTailscale(name string) {
	m.Kernel.RemoveInterface(name)
	m.Kernel.SetResolvers(slices.DeleteFunc(m.Kernel.DNS(), func(r darwin.Resolver) bool { return slices.Contains(r.Servers, magicDNS) }))
}

// SkipLoopback is what vmnet and Internet Sharing leave behind: pf does nothing on
// lo0 (captured: pfctl -v -s Interfaces has "lo0 (skip)") until the main ruleset is
// loaded again.
func (m *Mac) SkipLoopback() error {
	return m.LoadMain("set skip on lo0\n" + StockMain)
}

// Slow makes a program, by its path, take d before it does anything, each time. Its
// caller may give up before.
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
