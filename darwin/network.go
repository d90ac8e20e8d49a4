package darwin

import (
	"fmt"
	"io"
	"net/netip"
)

// A Kernel gives access to the routing table, the interfaces and the kernel's
// variables, without starting a process. On a Mac it is a [System].
type Kernel interface {
	// Interfaces returns the interfaces and addresses of both families, as sysctl
	// CTL_NET PF_ROUTE 0 0 NET_RT_IFLIST2 0 does.
	Interfaces() ([]byte, error)
	// Routes returns the routing tables of both families, as NET_RT_DUMP2 does.
	Routes() ([]byte, error)
	// OpenRoute opens a routing socket (AF_ROUTE, SOCK_RAW). Read returns one message, and
	// fails once the socket is closed; Write sends one message and returns the kernel's
	// error.
	OpenRoute() (io.ReadWriteCloser, error)
	// Sysctl returns a kernel variable as text, as sysctl(3) does. The error for an unknown
	// variable is ENOENT.
	Sysctl(name string) (string, error)
	// Table returns a kernel variable that is a list of structs, as sysctl(3) does.
	Table(name string) ([]byte, error)
}

// An Interface is a network interface.
type Interface struct {
	Name  string
	Index int
	Flags InterfaceFlags
	MTU   int // bytes
	// Addresses in the kernel's order.
	Addresses []Address
}

// An Address is one address of an interface.
type Address struct {
	// Prefix has the address and the length of its netmask.
	Prefix netip.Prefix
	// Peer is the other end of a point-to-point link or the broadcast address;
	// invalid if there is none.
	Peer netip.Addr
}

// A Network is a snapshot of the kernel's interfaces and routes.
type Network struct {
	Interfaces []Interface
	Routes     []Route
}

// Observe reads the interfaces and the routing table.
func Observe(k Kernel) (*Network, error) {
	b, err := k.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("read interfaces: %w", err)
	}
	list, err := ParseInterfaces(b)
	if err != nil {
		return nil, err
	}
	if b, err = k.Routes(); err != nil {
		return nil, fmt.Errorf("read routing table: %w", err)
	}
	routes, err := ParseRoutes(b)
	if err != nil {
		return nil, err
	}
	return &Network{Interfaces: list, Routes: routes}, nil
}

// Interface returns the interface with the name, or nil.
func (n *Network) Interface(name string) *Interface {
	for i := range n.Interfaces {
		if n.Interfaces[i].Name == name {
			return &n.Interfaces[i]
		}
	}
	return nil
}

// byIndex returns the interface with the index, or nil.
func (n *Network) byIndex(index int) *Interface {
	for i := range n.Interfaces {
		if n.Interfaces[i].Index == index {
			return &n.Interfaces[i]
		}
	}
	return nil
}

// serves reports whether the route applies to packets of any source.
func (r Route) serves() bool {
	return r.Flags&RouteUp != 0 && r.Flags&(RouteScoped|RouteReject|RouteBlackhole) == 0
}

// Way returns the route by which the kernel sends a packet to a: the one with the longest
// prefix that contains a, of several the first, as rtalloc1 looks it up in the radix tree
// (xnu bsd/net/route.c). Scoped routes don't count, since they only serve sockets bound to
// their interface. ok is false if there is no route. The caller must check whether the
// route drops the packet (RouteReject, RouteBlackhole). The interface is nil if it no longer
// exists.
func (n *Network) Way(a netip.Addr) (r Route, i *Interface, ok bool) {
	a = a.WithZone("")
	for _, each := range n.Routes {
		if each.Flags&RouteUp == 0 || each.Flags&RouteScoped != 0 || !each.Dst.Contains(a) {
			continue
		}
		if !ok || each.Dst.Bits() > r.Dst.Bits() {
			r, ok = each, true
		}
	}
	return r, n.byIndex(r.Index), ok
}

// A Routed is a prefix that the host reaches through an interface.
type Routed struct {
	Prefix    netip.Prefix
	Interface string
}

// Routed returns the prefixes in the routing table, default routes included, without
// entries for loopback, multicast, broadcast, link-local addresses and neighbours.
// Blackholed and rejected prefixes are included: the default route doesn't reach them.
func (n *Network) Routed() []Routed {
	const skip = RouteScoped | RouteLLInfo | RouteCloned | RouteLocal | RouteBroadcast | RouteMulticast
	var out []Routed
	for _, r := range n.Routes {
		a := r.Dst.Addr()
		if r.Flags&RouteUp == 0 || r.Flags&skip != 0 || a.IsMulticast() || a.IsLoopback() || a.IsLinkLocalUnicast() {
			continue
		}
		i := n.byIndex(r.Index)
		if i == nil || i.Flags&InterfaceLoopback != 0 && r.Flags&(RouteReject|RouteBlackhole) == 0 {
			continue
		}
		out = append(out, Routed{r.Dst, i.Name})
	}
	return out
}
