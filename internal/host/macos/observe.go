package macos

import (
	"context"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// facts turns what the kernel says into the policy's words. Forwarding is what
// will be, for both families: a Mac always has both.
//
// Link-local addresses are left out. Those of awdl0, llw0 and the system's own
// tunnels change many times an hour, and nothing depends on them: a peer reaches
// none. So are IPv4-mapped ones, which are martians.
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

func isLinkLocal6(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() }

// looped returns the routes that lead to the loopback interface, without those of
// the host's own addresses.
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

// uplink returns the name of the default route's interface, or "", and its router.
func uplink(n *darwin.Network, f darwin.Family, mesh string) (string, netip.Addr) {
	i, router := n.Uplink(f, mesh)
	if i == nil {
		return "", netip.Addr{}
	}
	return i.Name, router
}

// sharingAnchor is where Internet Sharing, and what makes networks for virtual
// machines (vmnet), keep their rules, in it and in its children.
const sharingAnchor = "com.apple.internet-sharing"

// shared says for which families other software translates, and so forwards:
// Internet Sharing switches on what is on already, so its rules have to tell. A
// virtual machine's network that isn't translated isn't shared.
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
