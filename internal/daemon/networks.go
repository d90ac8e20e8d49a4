package daemon

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/stock"
)

// maxNetworks bounds how many networks a configuration names: a QR code holds 2953
// bytes, and a longer list is a router's that has better ways.
const maxNetworks = 32

// through returns the allowed IPs of a configuration that sends what tunnel says, and
// what is to be said of them.
func (d *Daemon) through(carries string, h policy.Host, endpoint mesh.Endpoint) ([]netip.Prefix, []string) {
	if carries == mesh.TunnelFull {
		return stock.Everything(), nil
	}
	var out []netip.Prefix
	for _, a := range d.id.Own.List() {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	if carries == mesh.TunnelHost {
		return out, nil
	}
	var says []string
	at, _ := netip.ParseAddr(endpoint.Host)
	networks := h.Networks()
	networks = slices.DeleteFunc(networks, func(n netip.Prefix) bool {
		if slices.ContainsFunc(d.id.List(), n.Overlaps) {
			return true // peers aren't reached, whatever is in their prefix besides
		}
		// A device that isn't in that network would send WireGuard's own packets into the
		// tunnel. Where the endpoint is private, it is in it, or has to have another one.
		if at.IsValid() && n.Contains(at) && !at.IsPrivate() {
			says = append(says, fmt.Sprintf("the network %v isn't in the configuration, for the endpoint %v is in it", n, at))
			return true
		}
		return false
	})
	if more := len(networks) - maxNetworks; more > 0 {
		networks = networks[:maxNetworks]
		says = append(says, fmt.Sprintf("the configuration names the first %d networks of this host, and not the other %d: add those that are needed to AllowedIPs", maxNetworks, more))
	}
	return append(out, networks...), says
}
