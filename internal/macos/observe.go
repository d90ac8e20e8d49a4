package macos

import (
	"context"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// facts turns what the kernel says into the policy's words. Forwarding is what
// will be, for both families: a Mac always has both.
func facts(n *darwin.Network, mesh string, found policy.Families) policy.Host {
	h := policy.Host{
		Interface:       mesh,
		Forwarding:      policy.Families{IPv4: true, IPv6: true},
		FoundForwarding: found,
		Uplink4:         uplink(n, darwin.IPv4, mesh),
		Uplink6:         uplink(n, darwin.IPv6, mesh),
	}
	for _, i := range n.Interfaces {
		if i.Flags&darwin.InterfaceLoopback != 0 || len(i.Addresses) == 0 {
			continue
		}
		one := policy.Interface{Name: i.Name}
		for _, a := range i.Addresses {
			one.Addresses = append(one.Addresses, a.Prefix)
		}
		h.Interfaces = append(h.Interfaces, one)
	}
	for _, r := range n.Routed() {
		if r.Interface != mesh {
			h.Routes = append(h.Routes, policy.Route{Prefix: r.Prefix.Masked(), Interface: r.Interface})
		}
	}
	return h
}

// uplink returns the name of the default route's interface, or "".
func uplink(n *darwin.Network, f darwin.Family, mesh string) string {
	if i, _ := n.Uplink(f, mesh); i != nil {
		return i.Name
	}
	return ""
}

// sharingAnchor is where Internet Sharing, and what makes networks for virtual
// machines (vmnet), keep their rules, in it and in its children.
const sharingAnchor = "com.apple.internet-sharing"

// shared says for which families somebody else translates, and so forwards:
// Internet Sharing switches on what is on already, so its rules have to tell. A
// virtual machine's network that isn't translated isn't shared.
func (p *Platform) shared(ctx context.Context) (policy.Families, error) {
	children, err := p.pf.Anchors(ctx, sharingAnchor)
	if err != nil {
		return policy.Families{}, err
	}
	var out policy.Families
	for _, anchor := range append(children, sharingAnchor) {
		text, err := p.pf.NAT(ctx, anchor)
		if err != nil {
			return policy.Families{}, err
		}
		for _, rule := range pfconf.ParseShown(text).Rules {
			out.IPv4 = out.IPv4 || rule.Action == pfconf.Nat && rule.Family != pfconf.Inet6
			out.IPv6 = out.IPv6 || rule.Action == pfconf.Nat && rule.Family != pfconf.Inet
		}
	}
	return out, nil
}
