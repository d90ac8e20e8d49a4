package macos

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// Way implements [host.Ways]. macOS has one routing table, and looks routes up by
// destination only: neither the incoming interface nor the source nor ports count. It
// doesn't take pf rules with route-to into account, which send packets elsewhere.
func (b *Backend) Way(_ context.Context, packet host.Packet) (host.Way, error) {
	if !packet.Dst.IsValid() {
		return host.Way{}, fmt.Errorf("find the route: the packet has no destination")
	}
	n, err := darwin.Observe(b.o.Kernel)
	if err != nil {
		return host.Way{}, fmt.Errorf("find the route to %v: %w", packet.Dst, err)
	}
	return wayOf(n, packet), nil
}

// WayCommand implements [host.Ways]: route(8), which takes an address for an IPv4 one unless
// it is told otherwise.
func (*Backend) WayCommand(to netip.Addr) string {
	if to.Is6() {
		return fmt.Sprintf("route -n get -inet6 %v", to)
	}
	return fmt.Sprintf("route -n get %v", to)
}

// wayOf looks a packet up in the routing table, after the host's own addresses. Zones
// are ignored, as a link-local address is local on whichever interface has it.
func wayOf(n *darwin.Network, packet host.Packet) host.Way {
	for _, i := range n.Interfaces {
		for _, a := range i.Addresses {
			if a.Prefix.Addr().WithZone("") == packet.Dst.WithZone("") {
				return host.Way{Local: true}
			}
		}
	}
	r, i, ok := n.Way(packet.Dst)
	switch {
	case !ok || i == nil:
		return host.Way{Refused: host.WayNone}
	case r.Flags&darwin.RouteReject != 0:
		return host.Way{Refused: host.WayUnreachable}
	case r.Flags&darwin.RouteBlackhole != 0:
		return host.Way{Refused: host.WayBlackhole}
	}
	w := host.Way{Interface: i.Name, Router: r.Gateway.WithZone("")}
	family := pfconf.Inet
	if packet.Dst.Is6() {
		family = pfconf.Inet6
	}
	if as := addresses(facts(n, "", policy.Families{}), i.Name, family); len(as) > 0 {
		w.Source = as[0]
	}
	return w
}
