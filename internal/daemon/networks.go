package daemon

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/stock"
)

// maxNetworks bounds how many networks of the host a configuration names, so that it fits into
// a QR code: one holds 2953 bytes (ISO/IEC 18004, version 40-L). A host with more is a router
// whose operator knows which of them to name.
const maxNetworks = 32

// allowedIPs returns the AllowedIPs of a peer's configuration, and warnings about networks that
// aren't among them. sends is one of the mesh.Tunnel constants. endpoint is the host's, as in
// the configuration.
func (d *Daemon) allowedIPs(sends string, h policy.Host, endpoint mesh.Endpoint) ([]netip.Prefix, []string) {
	if sends == mesh.TunnelFull {
		return stock.Everything(), nil
	}
	var out []netip.Prefix
	for _, a := range d.id.Own.List() {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	if sends == mesh.TunnelHost {
		return out, nil
	}
	var warnings []string
	at, _ := netip.ParseAddr(endpoint.Host)
	networks := h.Networks()
	networks = slices.DeleteFunc(networks, func(n netip.Prefix) bool {
		if slices.ContainsFunc(d.id.List(), n.Overlaps) {
			return true // the policy refuses all of the mesh prefixes, whoever else uses them
		}
		// A device elsewhere would send WireGuard's own packets into the tunnel. With a private
		// endpoint the device is in that network itself, or needs another endpoint anyway.
		if at.IsValid() && n.Contains(at) && !at.IsPrivate() {
			warnings = append(warnings, fmt.Sprintf("the network %v isn't in the configuration, because the endpoint %v is in it", n, at))
			return true
		}
		return false
	})
	if more := len(networks) - maxNetworks; more > 0 {
		networks = networks[:maxNetworks]
		warnings = append(warnings, fmt.Sprintf("the configuration names the first %d networks of this host, and not the other %d: add those that are needed to AllowedIPs", maxNetworks, more))
	}
	return append(out, networks...), warnings
}
