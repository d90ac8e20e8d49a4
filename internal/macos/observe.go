package macos

import (
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/policy"
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
	if i, _ := n.Uplink(f); i != nil && i.Name != mesh {
		return i.Name
	}
	return ""
}

// sharingBridge begins the names of the bridges that Internet Sharing and virtual
// machines make: bridge100 and on.
const sharingBridge = "bridge1"

// isSharing reports whether Internet Sharing or a virtual machine forwards by
// this host: it has made a bridge with an address. bridge0 is Thunderbolt's.
func isSharing(n *darwin.Network) bool {
	for _, i := range n.Interfaces {
		if strings.HasPrefix(i.Name, sharingBridge) && len(i.Name) == len(sharingBridge)+2 && len(i.Addresses) > 0 {
			return true
		}
	}
	return false
}
