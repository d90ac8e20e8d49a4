package macos

import (
	"context"
	"fmt"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// Way implements [host.Ways]. macOS has one routing table, which doesn't go by
// the interface that a packet comes in by, nor by its source or ports; what a rule of pf
// sends elsewhere (route-to) isn't known to it.
func (b *Backend) Way(_ context.Context, packet host.Packet) (host.Way, error) {
	if !packet.Dst.IsValid() {
		return host.Way{}, fmt.Errorf("find the way: there is no destination")
	}
	n, err := darwin.Observe(b.o.Kernel)
	if err != nil {
		return host.Way{}, fmt.Errorf("find the way to %v: %w", packet.Dst, err)
	}
	return wayOf(n, packet), nil
}

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
