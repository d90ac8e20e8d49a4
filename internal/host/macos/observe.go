package macos

import (
	"context"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// facts converts the kernel's interfaces and routes to the policy's form. mesh is the
// mesh interface, found the families that forward without us. Forwarding is set for
// both families, because the helper can enable it for either.
//
// IPv6 link-local addresses are left out: those of awdl0, llw0 and the system's own
// utuns change many times an hour, and the policy lets no peer reach one. IPv4-mapped
// addresses are left out because they are martians.
func facts(n *darwin.Network, mesh string, found policy.Families) policy.Host {
	h := policy.Host{
		Interface:       mesh,
		Forwarding:      policy.Families{IPv4: true, IPv6: true},
		FoundForwarding: found,
	}
	h.Uplink4, h.Router4 = uplink(n, darwin.IPv4, mesh)
	h.Uplink6, h.Router6 = uplink(n, darwin.IPv6, mesh)
	for _, i := range n.Interfaces {
		one := policy.Interface{Name: i.Name}
		for _, a := range i.Addresses {
			if at := a.Prefix.Addr(); !at.IsLoopback() && !at.Is4In6() && !isLinkLocal6(at) {
				one.Addresses = append(one.Addresses, a.Prefix)
			}
		}
		if len(one.Addresses) > 0 {
			h.Interfaces = append(h.Interfaces, one)
		}
	}
	for _, r := range n.Routed() {
		if r.Interface != mesh && r.Interface != loopback && !r.Prefix.Addr().Is4In6() {
			h.Routes = append(h.Routes, policy.Route{Prefix: r.Prefix.Masked(), Interface: r.Interface})
		}
	}
	h.Routes = append(h.Routes, looped(n)...)
	return h
}

// isLinkLocal6 reports whether an address is in fe80::/10.
func isLinkLocal6(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() }

// looped returns the routes that lead to the loopback interface, except those of the
// host's own addresses. Forwarded packets to such a destination come back to this host.
func looped(n *darwin.Network) []policy.Route {
	const skip = darwin.RouteScoped | darwin.RouteLLInfo | darwin.RouteCloned | darwin.RouteLocal | darwin.RouteBroadcast | darwin.RouteMulticast
	var out []policy.Route
	for _, r := range n.Routes {
		a := r.Dst.Addr()
		if r.Flags&darwin.RouteUp == 0 || r.Flags&skip != 0 || r.Dst.Bits() == 0 || a.IsLoopback() || a.IsMulticast() || a.Is4In6() || isLinkLocal6(a) {
			continue
		}
		for _, i := range n.Interfaces {
			if i.Index == r.Index && i.Name == loopback && !owns(n, r.Dst) {
				out = append(out, policy.Route{Prefix: r.Dst.Masked(), Interface: loopback})
			}
		}
	}
	return out
}

// owns reports whether a prefix is a single address of the host.
func owns(n *darwin.Network, p netip.Prefix) bool {
	return p.IsSingleIP() && slices.ContainsFunc(n.Interfaces, func(i darwin.Interface) bool {
		return slices.ContainsFunc(i.Addresses, func(a darwin.Address) bool { return a.Prefix.Addr() == p.Addr() })
	})
}

// uplink returns the name of the default route's interface and the router's address,
// both zero without a default route. The mesh interface is no candidate.
func uplink(n *darwin.Network, f darwin.Family, mesh string) (string, netip.Addr) {
	i, router := n.Uplink(f, mesh)
	if i == nil {
		return "", netip.Addr{}
	}
	return i.Name, router
}

// sharingAnchor is the anchor in which, with its children (shared_v4, base_nat66 and
// others), Internet Sharing and vmnet, which makes networks for virtual machines, have
// their rules.
const sharingAnchor = "com.apple.internet-sharing"

// shared returns the families in which Internet Sharing or vmnet translates, and so
// needs forwarding. The sysctl can't show that, as they may enable what we enabled
// before; so their nat rules are read. A virtual machine's network without nat doesn't
// need forwarding.
func (b *Backend) shared(ctx context.Context) (policy.Families, error) {
	children, err := b.pf.Anchors(ctx, sharingAnchor)
	if err != nil {
		return policy.Families{}, err
	}
	var out policy.Families
	for _, anchor := range append(children, sharingAnchor) {
		text, err := b.pf.NAT(ctx, anchor)
		if err != nil {
			return policy.Families{}, err
		}
		err = b.withRecover(func() error {
			for _, rule := range pfconf.ParseShown(text).Rules {
				out.IPv4 = out.IPv4 || rule.Action == pfconf.Nat && rule.Family != pfconf.Inet6
				out.IPv6 = out.IPv6 || rule.Action == pfconf.Nat && rule.Family != pfconf.Inet
			}
			return nil
		})
		if err != nil {
			return policy.Families{}, err
		}
	}
	return out, nil
}
