package daemon

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/stock"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// Config returns the wg-quick(8) configuration for a peer's WireGuard app. The private key is a
// placeholder, for the helper never learns it. The prefixes that it sends through this host
// follow the peer's permissions as of now. Warnings name what won't work with it, such as an
// endpoint that isn't reachable from everywhere.
func (d *Daemon) Config(ref string) (api.Config, error) {
	doc := d.wanted.Document()
	i, err := doc.Find(ref)
	if err != nil {
		return api.Config{}, err
	}
	p := &doc.Peers[i]
	now, _ := d.loop.State()
	endpoint, warnings := d.endpoint(now)
	sends := wanted.Sends(p, d.wanted.Now())
	allowed, warned := d.allowedIPs(sends, now.Host, endpoint)
	warnings = append(warnings, warned...)
	var dns []netip.Addr
	if sends == mesh.TunnelFull {
		// An app sends all DNS queries to the configuration's servers, and in a split tunnel
		// those of the network that the device is in should stay in use.
		dns, warned = d.resolvers(now.Host)
		warnings = append(warnings, warned...)
		if !p.Permissions.Of(mesh.Routing).In(d.wanted.Now()) {
			warnings = append(warnings, fmt.Sprintf("this configuration sends everything, and %s may not route: it has no internet while it is connected; run: meshhelper peer allow %s routing", p.Name, p.Name))
		}
	}
	config := stock.ForPeer(mesh.PrivateKey{},
		p.Addresses, d.id.Key, endpoint, allowed, dns)
	if err := config.Validate(); err != nil {
		return api.Config{}, err
	}
	return api.Config{Text: config.Text(), Warnings: warnings}, nil
}

// endpoint returns where peers reach this host: the setting, with WireGuard's port if it has
// none, or the uplink's address. It is zero if neither is known. The warnings aren't nil, so
// that JSON has a list; a setting gives none, as its owner chose it.
func (d *Daemon) endpoint(s held.State) (mesh.Endpoint, []string) {
	if e := d.wanted.Settings().Endpoint; e.Host != "" {
		if e.Port == 0 {
			e.Port = s.ListenPort
		}
		return e, []string{}
	}
	a, ok := s.Host.LastingAddress()
	if !ok || s.ListenPort == 0 {
		return mesh.Endpoint{}, []string{
			"no endpoint is known: this host has no address by which peers could reach it; add Endpoint = HOST:PORT to the [Peer] section, or run: meshhelper settings endpoint HOST",
		}
	}
	return mesh.Endpoint{Host: a.String(), Port: s.ListenPort}, []string{endpointWarning(a, s.ListenPort)}
}

// endpointWarning returns the warning for an endpoint that is the host's address a: from where
// peers reach it, and what to do if that isn't enough. port is WireGuard's UDP port.
func endpointWarning(a netip.Addr, port uint16) string {
	switch {
	case policy.SharedSpace.Contains(a):
		return fmt.Sprintf("the endpoint %v is an address behind a provider's NAT (100.64.0.0/10): from outside no device reaches it. "+
			"Where the router can be given a public address, forward UDP port %d on it to this host and run: meshhelper settings endpoint HOST, with the router's public name or address", a, port)
	case a.IsPrivate():
		return fmt.Sprintf("the endpoint %v is a private address: only devices in the same network reach it. "+
			"For others forward UDP port %d on the router to this host, and run: meshhelper settings endpoint HOST, with the router's public name or address", a, port)
	case a.Is6():
		return fmt.Sprintf("the endpoint %v is this host's IPv6 address: devices in networks without IPv6 don't reach it, nor do others before the router's firewall lets UDP port %d in. "+
			"A name or another address is given with: meshhelper settings endpoint HOST", a, port)
	}
	return fmt.Sprintf("the endpoint %v is this host's own address: where that changes, the configuration has to, too; a name that follows it is given with: meshhelper settings endpoint HOST", a)
}

// resolvers returns the DNS servers for the configuration of a full tunnel: those of the setting
// dns, otherwise public ones of a family for which the host has an uplink. It warns about a
// setting without any server that peers reach through this host.
func (d *Daemon) resolvers(h policy.Host) ([]netip.Addr, []string) {
	only6 := h.Uplink4 == "" && h.Uplink6 != ""
	switch {
	case len(d.wanted.Settings().DNS) == 0 && only6:
		return defaultDNS6, nil
	case len(d.wanted.Settings().DNS) == 0:
		return defaultDNS, nil
	case only6 && !slices.ContainsFunc(d.wanted.Settings().DNS, netip.Addr.Is6):
		return d.wanted.Settings().DNS, []string{"this host has no IPv4 uplink, and no resolver of the setting dns has an IPv6 address: devices that route everything resolve no names"}
	case h.Uplink6 == "" && h.Uplink4 != "" && !slices.ContainsFunc(d.wanted.Settings().DNS, netip.Addr.Is4):
		return d.wanted.Settings().DNS, []string{"this host has no IPv6 uplink, and no resolver of the setting dns has an IPv4 address: devices that route everything resolve no names"}
	}
	return d.wanted.Settings().DNS, nil
}

// The public resolvers of Quad9 (quad9.net, "Service Addresses & Features"), for a host without
// the setting dns. Without a resolver in the configuration, a device with a full tunnel would
// go on asking the one of its own network, whose address then leads into the tunnel.
var (
	defaultDNS  = []netip.Addr{netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("149.112.112.112")}
	defaultDNS6 = []netip.Addr{netip.MustParseAddr("2620:fe::fe"), netip.MustParseAddr("2620:fe::9")}
)
