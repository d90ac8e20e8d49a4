package darwin

import (
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// RouteFlags are RTF_*.
type RouteFlags uint32

// The flags that matter here.
const (
	RouteUp        RouteFlags = 0x1
	RouteGateway   RouteFlags = 0x2
	RouteHost      RouteFlags = 0x4
	RouteReject    RouteFlags = 0x8
	RouteLLInfo    RouteFlags = 0x400 // a neighbour's link-layer address
	RouteStatic    RouteFlags = 0x800
	RouteBlackhole RouteFlags = 0x1000
	// RouteProto1 is for the use of routing daemons (route(4)). A [Router] marks its routes
	// with it, to recognise them after a crash.
	RouteProto1    RouteFlags = 0x8000
	RouteCloned    RouteFlags = 0x20000
	RouteLocal     RouteFlags = 0x200000
	RouteBroadcast RouteFlags = 0x400000
	RouteMulticast RouteFlags = 0x800000
	// RouteScoped routes only serve sockets that are bound to the interface.
	RouteScoped RouteFlags = 0x1000000
)

// InterfaceFlags are IFF_*.
type InterfaceFlags uint32

// The flags that matter here.
const (
	InterfaceUp           InterfaceFlags = 0x1
	InterfaceBroadcast    InterfaceFlags = 0x2
	InterfaceLoopback     InterfaceFlags = 0x8
	InterfacePointToPoint InterfaceFlags = 0x10
	InterfaceRunning      InterfaceFlags = 0x40
	InterfaceMulticast    InterfaceFlags = 0x8000
)

// A Route is one entry of the routing table.
type Route struct {
	Dst netip.Prefix
	// Gateway is the next router; invalid if the destination is on the link.
	Gateway netip.Addr
	// Index is the interface's index.
	Index int
	Flags RouteFlags
}

// parseRoute reads one route. It reports false for a message that isn't about an IPv4 or
// IPv6 route, or is malformed.
func parseRoute(m []byte) (Route, bool) {
	r, ok := xnu.ParseRoute(m)
	return Route{Dst: r.Dst, Gateway: r.Gateway, Index: r.Index, Flags: RouteFlags(r.Flags)}, ok
}

// appendRoute appends the message that adds or deletes a route.
func appendRoute(b []byte, typ byte, seq int, r Route) []byte {
	return xnu.AppendRoute(b, typ, seq, xnu.Route{Dst: r.Dst, Gateway: r.Gateway, Index: r.Index, Flags: uint32(r.Flags)})
}

// ParseRoutes reads the routing table in the format of sysctl NET_RT_DUMP2. It leaves out
// messages that aren't about IPv4 or IPv6 routes, and fails if the list is truncated.
func ParseRoutes(rib []byte) ([]Route, error) {
	var routes []Route
	err := xnu.EachMessage(rib, func(typ byte, m []byte) error {
		if r, ok := parseRoute(m); ok && typ == xnu.RTMGet2 {
			routes = append(routes, r)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read routing table: %w", err)
	}
	return routes, nil
}

// ParseInterfaces reads the interfaces and their addresses in the format of sysctl
// NET_RT_IFLIST2. It fails if an interface is malformed or the list is truncated.
func ParseInterfaces(rib []byte) ([]Interface, error) {
	var list []Interface
	err := xnu.EachMessage(rib, func(typ byte, m []byte) error {
		switch typ {
		case xnu.RTMIfInfo2:
			i, ok := parseInterface(m)
			if !ok {
				return fmt.Errorf("message of interface %d is malformed", len(list))
			}
			list = append(list, i)
		case xnu.RTMNewAddr:
			// The kernel lists an interface and then its addresses.
			index, a, peer := parseAddress(m)
			if last := len(list) - 1; last >= 0 && a.IsValid() && list[last].Index == index {
				list[last].Addresses = append(list[last].Addresses, Address{a, peer})
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read interface list: %w", err)
	}
	return list, nil
}

func parseInterface(m []byte) (Interface, bool) {
	if len(m) < xnu.SizeIf2 {
		return Interface{}, false
	}
	sa, ok := xnu.Sockaddrs(m, xnu.SizeIf2, xnu.Order.Uint32(m[xnu.OffIfAddrs:]))
	i := Interface{
		Name:  xnu.LinkName(sa[xnu.RTAXIfp]),
		Index: int(xnu.Order.Uint16(m[xnu.OffIfIndex:])),
		Flags: InterfaceFlags(xnu.Order.Uint32(m[xnu.OffIfFlags:])),
		MTU:   int(xnu.Order.Uint32(m[xnu.OffIf2MTU:])),
	}
	return i, ok && checkInterface(i.Name) == nil && i.Index > 0
}

// parseAddress returns the interface's index, an address with its prefix length,
// and the other end of a point-to-point link. The prefix is invalid when the
// message isn't about an IPv4 or IPv6 address.
func parseAddress(m []byte) (index int, p netip.Prefix, peer netip.Addr) {
	if len(m) < xnu.SizeIfa {
		return 0, netip.Prefix{}, peer
	}
	sa, ok := xnu.Sockaddrs(m, xnu.SizeIfa, xnu.Order.Uint32(m[xnu.OffIfAddrs:]))
	a := xnu.ReadSockaddr(sa[xnu.RTAXIfa])
	if !ok || !a.IsValid() {
		return 0, netip.Prefix{}, peer
	}
	n, ok := xnu.MaskBits(sa[xnu.RTAXNetmask], a)
	if !ok {
		return 0, netip.Prefix{}, peer
	}
	return int(xnu.Order.Uint16(m[xnu.OffIfIndex:])), netip.PrefixFrom(a, n), xnu.ReadSockaddr(sa[xnu.RTAXBrd])
}
