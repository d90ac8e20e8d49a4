package darwintest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// A Kernel simulates the part of a Mac's kernel that routes: interfaces, addresses,
// the routing table, and the kernel variables for forwarding. It is a [darwin.Kernel]
// that exchanges routing messages, and a [darwin.Runner] for ifconfig(8), sysctl(8) and
// the DNS configuration of scutil(8). Like the real one it refuses a second route to the
// same destination and the deletion of a route that doesn't exist, and it deletes the
// route to a destination whatever interface the request names.
//
// The other methods do what happens on a Mac independently of the program under test:
// cables, DHCP, commands of other users, reboots.
type Kernel struct {
	mu         sync.Mutex
	interfaces []*darwin.Interface
	routes     []darwin.Route
	variables  map[string]string                  // sysctl(8), by name
	flags      map[ownAddress]darwin.AddressFlags // of IPv6 addresses
	resolvers  []darwin.Resolver
	boots      int               // so far, from which the boot session is made
	lastIndex  int               // highest index of an interface
	lastUtun   int               // next unit number of utun
	sockets    map[*socket]bool  // open routing sockets
	bound      map[boundPort]int // sockets bound to each port
	changes    int               // see Changes
}

// A boundPort is a port in one of the kernel's lists of sockets, TCPSockets or UDPSockets.
type boundPort struct {
	list string
	port uint16
}

// ownAddress identifies an address of an interface.
type ownAddress struct {
	index int
	addr  netip.Addr
}

// Changes returns the number of changes of interfaces, addresses and routes so far. As long
// as it stays the same, darwin.Observe returns the same result.
func (k *Kernel) Changes() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.changes
}

// NewKernel returns the kernel of a Mac that has just booted, with only a loopback
// interface.
func NewKernel() *Kernel {
	k := &Kernel{sockets: map[*socket]bool{}, flags: map[ownAddress]darwin.AddressFlags{}}
	k.reset()
	k.AddInterface("lo0", darwin.InterfaceUp|darwin.InterfaceLoopback|darwin.InterfaceRunning|darwin.InterfaceMulticast, 16384)
	k.AddAddress("lo0", netip.MustParsePrefix("127.0.0.1/8"))
	k.AddAddress("lo0", netip.MustParsePrefix("::1/128"))
	return k
}

// reset sets the variables and bound ports to those after a boot.
func (k *Kernel) reset() {
	k.boots++
	// mDNSResponder is bound to its port on every Mac.
	k.bound = map[boundPort]int{{xnu.UDPSockets, 5353}: 1}
	k.variables = map[string]string{
		xnu.IPv4Forwarding: "0",
		xnu.IPv6Forwarding: "0",
		xnu.PortFirst:      "49152", xnu.PortLast: "65535", xnu.PortHiFirst: "49152", xnu.PortHiLast: "65535",
		xnu.IPv4CheckInterface: "1", xnu.IPv6CheckInterface: "1",
		xnu.BootSession: fmt.Sprintf("4E4A2428-2FBD-4164-B6B6-%012X", k.boots),
	}
}

// Boot restarts the kernel: another boot session, no forwarding, no tunnels, and
// none of the routes that were added by hand.
func (k *Kernel) Boot() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reset()
	for _, i := range slices.Clone(k.interfaces) {
		if strings.HasPrefix(i.Name, "utun") {
			k.remove(i)
		}
	}
	k.routes = slices.DeleteFunc(k.routes, func(r darwin.Route) bool { return r.Flags&darwin.RouteProto1 != 0 })
	k.changes++
	k.lastUtun = 0
	for s := range k.sockets {
		s.fail(syscall.ENOTCONN)
	}
}

// AddInterface adds an interface and returns its index, which is never reused.
func (k *Kernel) AddInterface(name string, flags darwin.InterfaceFlags, mtu int) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lastIndex++
	i := &darwin.Interface{Name: name, Index: k.lastIndex, Flags: flags, MTU: mtu}
	k.interfaces = append(k.interfaces, i)
	k.announceInterface(i)
	return i.Index
}

// CreateTunnel creates a utun interface and returns its name. For "utun" the kernel chooses
// a unit number that wasn't used since the boot. For utunN it uses that name; the error is
// EBUSY if it exists (netbird#2196).
func (k *Kernel) CreateTunnel(name string, mtu int) (string, error) {
	number, ok := strings.CutPrefix(name, "utun")
	n, err := strconv.Atoi(number)
	switch {
	case !ok || number != "" && err != nil:
		return "", fmt.Errorf("create %q: the name must be utun or utunN", name)
	case number != "" && k.Has(name):
		return "", fmt.Errorf("create %s: %w", name, syscall.EBUSY)
	case number == "":
		for n = k.lastUtun; k.Has("utun" + strconv.Itoa(n)); n++ {
		}
		k.lastUtun = n + 1
	}
	name = "utun" + strconv.Itoa(n)
	k.AddInterface(name, darwin.InterfaceUp|darwin.InterfacePointToPoint|darwin.InterfaceRunning|darwin.InterfaceMulticast, mtu)
	return name, nil
}

// Has reports whether an interface of that name exists.
func (k *Kernel) Has(name string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.find(name) != nil
}

// RemoveInterface removes an interface with its addresses and routes.
func (k *Kernel) RemoveInterface(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if i := k.find(name); i != nil {
		k.remove(i)
	}
}

// remove is RemoveInterface with the lock held. It announces what goes in the kernel's
// order: routes, addresses, the interface.
func (k *Kernel) remove(i *darwin.Interface) {
	for _, r := range slices.Clone(k.routes) {
		if r.Index == i.Index {
			k.drop(r)
		}
	}
	k.interfaces = slices.DeleteFunc(k.interfaces, func(o *darwin.Interface) bool { return o == i })
	for _, a := range i.Addresses {
		delete(k.flags, ownAddress{i.Index, a.Prefix.Addr()})
		k.changed(xnu.AddressMessage(xnu.RTMDelAddr, i.Index, a.Prefix, a.Peer))
		k.dropOwn(i, a)
	}
	i.Flags &^= darwin.InterfaceUp | darwin.InterfaceRunning
	k.announceInterface(i)
}

// find returns the interface of that name, nil if there is none.
func (k *Kernel) find(name string) *darwin.Interface {
	for _, i := range k.interfaces {
		if i.Name == name {
			return i
		}
	}
	return nil
}

// index returns the interface with that index, nil if there is none.
func (k *Kernel) index(n int) *darwin.Interface {
	for _, i := range k.interfaces {
		if i.Index == n {
			return i
		}
	}
	return nil
}

// AddAddress adds an address to an interface, and the routes that the kernel adds with it.
//
// IPv4 (in_ifinit of xnu bsd/netinet/in.c): a route to the network on a broadcast
// interface, to the address itself on a loopback interface, and to the remote address on
// a point-to-point one. If that has no remote address, the route to its own address goes
// through the interface, so the Mac's packets to it leave there; the route only has the
// flag of a local address (bsd/netinet/in_rmx.c:168).
//
// IPv6 (in6_ifinit of bsd/netinet6/in6.c:3000, and nd6.c:2990): a route to the network,
// and one to the address itself through lo0, also on a point-to-point interface.
func (k *Kernel) AddAddress(name string, p netip.Prefix) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.find(name)
	switch {
	case i == nil:
		return syscall.ENXIO
	case slices.ContainsFunc(i.Addresses, func(a darwin.Address) bool { return a.Prefix.Addr() == p.Addr() }):
		return syscall.EEXIST
	}
	a := darwin.Address{Prefix: p}
	if i.Flags&darwin.InterfacePointToPoint != 0 && p.Addr().Is4() {
		a.Peer = p.Addr()
	}
	i.Addresses = append(i.Addresses, a)
	k.changed(xnu.AddressMessage(xnu.RTMNewAddr, i.Index, a.Prefix, a.Peer))
	for _, r := range k.ownRoutes(i, a) {
		k.install(r)
	}
	return nil
}

// ownRoutes returns the routes that the kernel adds and removes with an address.
func (k *Kernel) ownRoutes(i *darwin.Interface, a darwin.Address) (routes []darwin.Route) {
	addr := a.Prefix.Addr()
	if !a.Prefix.IsSingleIP() {
		routes = append(routes, darwin.Route{Dst: a.Prefix.Masked(), Index: i.Index, Flags: darwin.RouteUp | routeCloning})
	}
	itself := darwin.Route{Dst: netip.PrefixFrom(addr, addr.BitLen()), Index: i.Index, Flags: darwin.RouteUp | darwin.RouteHost | darwin.RouteLocal}
	switch lo := k.find("lo0"); {
	case addr.Is4() && i.Flags&darwin.InterfaceLoopback != 0:
		routes = append(routes, itself)
	case addr.Is4() && a.Peer.IsValid():
		if a.Peer != addr {
			itself.Dst, itself.Flags = netip.PrefixFrom(a.Peer, 32), itself.Flags&^darwin.RouteLocal
		}
		routes = append(routes, itself)
	case addr.Is6() && lo != nil:
		itself.Index, itself.Flags = lo.Index, itself.Flags|darwin.RouteLLInfo
		routes = append(routes, itself)
	}
	return routes
}

// AddAddress6 adds an IPv6 address with flags to an interface.
func (k *Kernel) AddAddress6(name string, p netip.Prefix, flags darwin.AddressFlags) error {
	// Set the flags first: a program that is told of the address may ask for them at once.
	k.mu.Lock()
	if i := k.find(name); i != nil {
		k.flags[ownAddress{i.Index, p.Addr()}] = flags
	}
	k.mu.Unlock()
	return k.AddAddress(name, p)
}

// SetAddressFlags changes the flags of an IPv6 address: it is no longer tentative, or is
// deprecated. The kernel reports that neither to routing sockets nor to pf.
func (k *Kernel) SetAddressFlags(name string, a netip.Addr, flags darwin.AddressFlags) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.find(name)
	if i == nil || !slices.ContainsFunc(i.Addresses, func(o darwin.Address) bool { return o.Prefix.Addr() == a }) {
		return syscall.EADDRNOTAVAIL
	}
	k.flags[ownAddress{i.Index, a}] = flags
	return nil
}

// Addresses6 returns the IPv6 addresses of an interface with their flags.
func (k *Kernel) Addresses6(name string) (out []darwin.Address6) {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.find(name)
	if i == nil {
		return nil
	}
	for _, a := range i.Addresses {
		if !a.Prefix.Addr().Is6() {
			continue
		}
		one := darwin.Address6{Prefix: a.Prefix, Peer: a.Peer, Flags: k.flags[ownAddress{i.Index, a.Prefix.Addr()}]}
		if a.Prefix.Addr().IsLinkLocalUnicast() {
			one.Scope = i.Index
		}
		out = append(out, one)
	}
	return out
}

// routeCloning is RTF_CLONING, the flag of a route to an attached network.
const routeCloning darwin.RouteFlags = 0x100

// RemoveAddress removes an address and its routes.
func (k *Kernel) RemoveAddress(name string, a netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.find(name)
	if i == nil {
		return syscall.ENXIO
	}
	n := slices.IndexFunc(i.Addresses, func(o darwin.Address) bool { return o.Prefix.Addr() == a })
	if n < 0 {
		return syscall.EADDRNOTAVAIL
	}
	gone := i.Addresses[n]
	delete(k.flags, ownAddress{i.Index, a})
	i.Addresses = slices.Delete(i.Addresses, n, n+1)
	k.changed(xnu.AddressMessage(xnu.RTMDelAddr, i.Index, gone.Prefix, gone.Peer))
	k.dropOwn(i, gone)
	return nil
}

// dropOwn removes the routes that the kernel added with an address.
func (k *Kernel) dropOwn(i *darwin.Interface, a darwin.Address) {
	for _, own := range k.ownRoutes(i, a) {
		for _, r := range slices.Clone(k.routes) {
			if r.Dst == own.Dst && r.Index == own.Index && r.Flags&darwin.RouteProto1 == 0 {
				k.drop(r)
			}
		}
	}
}

// AddRoute adds a route, as route(8) does.
func (k *Kernel) AddRoute(r darwin.Route) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.add(r)
}

// InstallRoute adds a route with any flags and addresses, without the checks of AddRoute,
// as the kernel itself does.
func (k *Kernel) InstallRoute(r darwin.Route) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.install(r)
}

// DeleteRoute deletes the route to dst through any interface.
func (k *Kernel) DeleteRoute(dst netip.Prefix) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.delete(darwin.Route{Dst: dst})
}

// add is AddRoute with the lock held.
func (k *Kernel) add(r darwin.Route) error {
	i := k.index(r.Index)
	switch {
	case !r.Dst.IsValid() || r.Dst != r.Dst.Masked():
		return syscall.EINVAL
	case k.lookup(r) >= 0:
		return syscall.EEXIST
	case i == nil || !r.Gateway.IsValid() && !hasFamily(i, r.Dst.Addr()):
		// ifa_ifwithroute of xnu bsd/net/route.c finds no address to use.
		return syscall.ENETUNREACH
	}
	k.install(r)
	return nil
}

// hasFamily reports whether the interface has an address of a's family.
func hasFamily(i *darwin.Interface, a netip.Addr) bool {
	return slices.ContainsFunc(i.Addresses, func(o darwin.Address) bool { return o.Prefix.Addr().Is4() == a.Is4() })
}

// delete deletes the route with r's destination and scope, ignoring gateway and interface
// (RTM_DELETE in rtrequest_common_locked, xnu bsd/net/route.c).
func (k *Kernel) delete(r darwin.Route) error {
	n := k.lookup(r)
	if n < 0 {
		return syscall.ESRCH
	}
	k.drop(k.routes[n])
	return nil
}

// lookup returns the index of the route with r's destination and scope, -1 if there is
// none. Of scoped routes, each interface may have one.
func (k *Kernel) lookup(r darwin.Route) int {
	return slices.IndexFunc(k.routes, func(o darwin.Route) bool {
		if o.Dst != r.Dst || o.Flags&darwin.RouteScoped != r.Flags&darwin.RouteScoped {
			return false
		}
		return r.Flags&darwin.RouteScoped == 0 || o.Index == r.Index
	})
}

// install adds a route unless it exists, and announces it.
func (k *Kernel) install(r darwin.Route) {
	if k.lookup(r) < 0 {
		k.routes = append(k.routes, r)
		k.changed(xnu.AppendRoute(nil, xnu.RTMAdd, 0, message(r)))
	}
}

// drop removes a route and announces that.
func (k *Kernel) drop(r darwin.Route) {
	k.routes = slices.DeleteFunc(k.routes, func(o darwin.Route) bool { return o == r })
	k.changed(xnu.AppendRoute(nil, xnu.RTMDelete, 0, message(r)))
}

// Sysctl implements darwin.Kernel.
func (k *Kernel) Sysctl(name string) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	v, ok := k.variables[name]
	if !ok {
		return "", syscall.ENOENT
	}
	return v, nil
}

// BindTCP binds a socket of the Mac to a TCP port. unbind closes the socket.
func (k *Kernel) BindTCP(port uint16) (unbind func()) {
	return k.bind(boundPort{xnu.TCPSockets, port})
}

// BindUDP is BindTCP for a UDP port.
func (k *Kernel) BindUDP(port uint16) (unbind func()) {
	return k.bind(boundPort{xnu.UDPSockets, port})
}

// bind counts one more socket on a port.
func (k *Kernel) bind(b boundPort) (unbind func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.bound[b]++
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.bound[b] > 0 {
			k.bound[b]--
		}
	}
}

// Table implements darwin.Kernel for the lists of TCP and UDP sockets.
func (k *Kernel) Table(name string) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if name != xnu.TCPSockets && name != xnu.UDPSockets {
		return nil, syscall.ENOENT
	}
	b := xnu.Order.AppendUint32(nil, xnu.SizeXinpgen)
	b = append(b, make([]byte, xnu.SizeXinpgen-4)...)
	for at, n := range k.bound {
		if at.list != name {
			continue
		}
		for range n {
			b = appendSocket(b, at)
		}
	}
	return append(b, b[:xnu.SizeXinpgen]...), nil
}

// appendSocket appends the kernel's description of a socket: a struct xinpcb_n, with its
// length on arm64, and an xsocket_n, of which only the header matters.
func appendSocket(b []byte, at boundPort) []byte {
	const sizeXinpcb, sizeXsocket, kindSocket = 104, 76, 1
	b = xnu.Order.AppendUint32(b, sizeXinpcb)
	b = xnu.Order.AppendUint32(b, xnu.KindInpcb)
	b = append(b, make([]byte, xnu.OffXinpLocal-8)...)
	b = append(b, byte(at.port>>8), byte(at.port))
	b = append(b, make([]byte, sizeXinpcb-xnu.MinXinpcb)...)
	b = xnu.Order.AppendUint32(b, sizeXsocket)
	b = xnu.Order.AppendUint32(b, kindSocket)
	return append(b, make([]byte, sizeXsocket-8+xnu.SocketAlignment-sizeXsocket%xnu.SocketAlignment)...)
}

// Variable returns a kernel variable as text, or "" if it doesn't exist.
func (k *Kernel) Variable(name string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.variables[name]
}

// SetVariable sets a kernel variable, as other software does.
func (k *Kernel) SetVariable(name, value string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.variables[name] = value
}

// BreakSockets makes every open routing socket fail with err.
func (k *Kernel) BreakSockets(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for s := range k.sockets {
		s.fail(err)
	}
}

// Miss announces to all routing sockets that a lookup of a failed (RTM_MISS), as the
// kernel does for every packet to an unreachable host.
func (k *Kernel) Miss(a netip.Addr) {
	k.Announce(xnu.AppendRoute(nil, xnu.RTMMiss, 0, xnu.Route{Dst: netip.PrefixFrom(a, a.BitLen()), Flags: uint32(darwin.RouteUp | darwin.RouteHost)}))
}

// Announce sends a message, which may be malformed, to all routing sockets. Nothing
// changes.
func (k *Kernel) Announce(m []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.announce(m)
}

// changed counts a change and announces it.
func (k *Kernel) changed(m []byte) {
	k.changes++
	k.announce(m)
}

// announce sends a message to all routing sockets. The lock is held.
func (k *Kernel) announce(m []byte) {
	for s := range k.sockets {
		s.deliver(m)
	}
}

// Interfaces implements darwin.Kernel.
func (k *Kernel) Interfaces() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var b []byte
	for _, i := range k.interfaces {
		b = append(b, xnu.InterfaceMessage(xnu.RTMIfInfo2, xnu.SizeIf2, wire(i))...)
		for _, a := range i.Addresses {
			b = append(b, xnu.AddressMessage(xnu.RTMNewAddr, i.Index, a.Prefix, a.Peer)...)
		}
	}
	return b, nil
}

// Routes implements darwin.Kernel.
func (k *Kernel) Routes() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var b []byte
	for _, r := range k.routes {
		b = append(b, xnu.DumpMessage(message(r))...)
	}
	return b, nil
}

// OpenRoute implements darwin.Kernel.
func (k *Kernel) OpenRoute() (io.ReadWriteCloser, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &socket{k: k, in: make(chan []byte, 64), failed: make(chan struct{})}
	k.sockets[s] = true
	return s, nil
}

// A socket is a routing socket. Its buffer holds a limited number of messages; a real one
// holds a limited number of bytes.
type socket struct {
	k  *Kernel
	in chan []byte // messages to read

	mu     sync.Mutex
	err    error         // of Read, once failed is closed
	failed chan struct{} // closed by fail
	lost   bool          // messages didn't fit: the next Read fails with ENOBUFS
}

// fail makes the current and all further calls of Read fail with err.
func (s *socket) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
		close(s.failed)
	}
}

// deliver queues a message, or records its loss if the queue is full.
func (s *socket) deliver(m []byte) {
	select {
	case s.in <- slices.Clone(m):
	default:
		s.mu.Lock()
		s.lost = true
		s.mu.Unlock()
	}
}

// Read returns one message. Like the kernel's it truncates a message that doesn't fit.
func (s *socket) Read(b []byte) (int, error) {
	s.mu.Lock()
	lost := s.lost
	s.lost = false
	s.mu.Unlock()
	if lost {
		return 0, syscall.ENOBUFS
	}
	select {
	case m := <-s.in:
		return copy(b, m), nil
	case <-s.failed:
		return 0, s.err
	}
}

// Close makes a blocked Read return.
func (s *socket) Close() error {
	s.fail(io.ErrClosedPipe)
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	delete(s.k.sockets, s)
	return nil
}

// Write handles one message as route_output of xnu bsd/net/rtsock.c does.
func (s *socket) Write(m []byte) (int, error) {
	if len(m) < xnu.SizeRt || int(xnu.Order.Uint16(m)) != len(m) {
		return 0, syscall.EINVAL
	}
	if m[2] != xnu.RTMVersion {
		return 0, syscall.EPROTONOSUPPORT
	}
	sa, ok := xnu.Sockaddrs(m, xnu.SizeRt, xnu.Order.Uint32(m[xnu.OffRtAddrs:]))
	sent, valid := xnu.ParseRoute(m)
	if !ok || !valid {
		return 0, syscall.EINVAL
	}
	r := darwin.Route{Dst: sent.Dst, Gateway: sent.Gateway, Index: sent.Index, Flags: darwin.RouteFlags(sent.Flags)}
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	var err error
	switch m[3] {
	case xnu.RTMAdd:
		if r, err = s.k.resolve(r, sa[xnu.RTAXGateway]); err == nil {
			err = s.k.add(r)
		}
	case xnu.RTMDelete:
		err = s.k.delete(r)
	default:
		err = syscall.EOPNOTSUPP
	}
	if err != nil {
		return 0, err
	}
	return len(m), nil
}

// resolve sets the interface of a route to be added, by its gateway: a link address names
// it, and an IP address must be in a network of it.
func (k *Kernel) resolve(r darwin.Route, gateway []byte) (darwin.Route, error) {
	switch {
	case len(gateway) == 0:
		return r, syscall.EINVAL
	case gateway[1] == xnu.AFLink:
		r.Index = int(xnu.Order.Uint16(gateway[2:]))
		return r, nil
	}
	for _, i := range k.interfaces {
		for _, a := range i.Addresses {
			if a.Prefix.Contains(r.Gateway) {
				r.Index = i.Index
				return r, nil
			}
		}
	}
	return r, syscall.ENETUNREACH
}

// SetResolvers sets the DNS configuration. Routing sockets don't announce that.
func (k *Kernel) SetResolvers(list []darwin.Resolver) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.resolvers = slices.Clone(list)
}

// DNS returns the DNS configuration.
func (k *Kernel) DNS() []darwin.Resolver {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.resolvers)
}

// Run implements darwin.Runner for ifconfig, sysctl and scutil --dns.
func (k *Kernel) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, -1, err
	}
	var out, complaint string
	switch path {
	case "/usr/sbin/sysctl":
		out, complaint = k.sysctl(args)
	case "/usr/sbin/scutil":
		if !slices.Equal(args, []string{"--dns"}) {
			complaint = "usage: scutil --dns"
			break
		}
		out = formatResolvers(k.DNS())
	case "/sbin/ifconfig":
		if len(args) == 2 && args[1] == "inet6" && k.Has(args[0]) {
			out = k.showAddresses6(args[0])
			break
		}
		complaint = k.ifconfig(args)
	default:
		return nil, nil, -1, &exec.Error{Name: path, Err: exec.ErrNotFound}
	}
	if complaint != "" {
		return nil, []byte(complaint + "\n"), 1, nil
	}
	return []byte(out), nil, 0, nil
}

// sysctl is sysctl -n NAME and sysctl -w NAME=VALUE. It returns the output, or the error
// message.
func (k *Kernel) sysctl(args []string) (out, complaint string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(args) != 2 {
		return "", "usage: sysctl [-bdehiNnoqx] name[=value]"
	}
	name, value, _ := strings.Cut(args[1], "=")
	old, ok := k.variables[name]
	switch {
	case !ok:
		return "", fmt.Sprintf("sysctl: unknown oid '%s'", name)
	case args[0] == "-n":
		return old + "\n", ""
	case args[0] != "-w" || name == xnu.BootSession:
		return "", fmt.Sprintf("sysctl: oid '%s' is read only", name)
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < 0 && name == xnu.IPv6Forwarding {
		return "", fmt.Sprintf("sysctl: %s=%s: Invalid argument", name, value)
	}
	if name == xnu.IPv6Forwarding {
		n = min(n, 1)
	}
	k.variables[name] = strconv.Itoa(n)
	return fmt.Sprintf("%s: %s -> %d\n", name, old, n), ""
}

// showAddresses6 returns the output of `ifconfig NAME inet6`.
func (k *Kernel) showAddresses6(name string) string {
	var b strings.Builder
	k.mu.Lock()
	i := k.find(name)
	fmt.Fprintf(&b, "%s: flags=%x<UP,RUNNING> mtu %d\n", name, uint32(i.Flags), i.MTU)
	k.mu.Unlock()
	for _, a := range k.Addresses6(name) {
		addr := a.Prefix.Addr()
		if a.Scope != 0 {
			addr = addr.WithZone(name)
		}
		fmt.Fprintf(&b, "\tinet6 %s prefixlen %d ", addr, a.Prefix.Bits())
		if words := a.Flags.String(); words != "" {
			b.WriteString(words + " ")
		}
		if a.Scope != 0 {
			fmt.Fprintf(&b, "scopeid 0x%x ", a.Scope)
		}
		b.WriteString("\n")
	}
	b.WriteString("\tnd6 options=201<PERFORMNUD,DAD>\n")
	return b.String()
}

// ifconfig handles the forms that darwin.Ifconfig uses, and returns the error message.
func (k *Kernel) ifconfig(args []string) (complaint string) {
	if len(args) < 2 {
		return "ifconfig: bad value"
	}
	name, rest := args[0], args[1:]
	if !k.Has(name) {
		return fmt.Sprintf("ifconfig: interface %s does not exist", name)
	}
	var err error
	var what string
	switch form := strings.Join(slices.DeleteFunc(slices.Clone(rest), isOperand), " "); form {
	case "inet alias":
		what, err = "SIOCAIFADDR", k.alias(name, rest[1])
	case "inet6 prefixlen alias":
		what, err = "SIOCAIFADDR_IN6", k.alias(name, rest[1]+"/"+rest[3])
	case "inet -alias", "inet6 -alias":
		what, err = "SIOCDIFADDR", k.unalias(name, rest[1])
	case "mtu up":
		what, err = "set mtu", k.setMTU(name, rest[1])
	default:
		return "ifconfig: " + form + ": bad value"
	}
	if err == nil {
		return ""
	}
	// The messages of macOS's strerror(3), which differ from Linux's for these errors.
	text := err.Error()
	if errors.Is(err, syscall.EADDRNOTAVAIL) {
		text = "Can't assign requested address"
	} else if errors.Is(err, syscall.EEXIST) {
		text = "File exists"
	}
	return fmt.Sprintf("ifconfig: ioctl (%s): %s", what, text)
}

// isOperand reports whether an argument of ifconfig is an address or a number.
func isOperand(s string) bool {
	return s != "" && strings.Contains("0123456789:", s[:1]) || strings.Contains(s, ":")
}

// alias is ifconfig NAME inet ADDRESS alias, for both families.
func (k *Kernel) alias(name, address string) error {
	p, err := netip.ParsePrefix(address)
	if err != nil {
		return syscall.EINVAL
	}
	return k.AddAddress(name, p)
}

// unalias is ifconfig NAME inet ADDRESS -alias, for both families.
func (k *Kernel) unalias(name, address string) error {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return syscall.EINVAL
	}
	return k.RemoveAddress(name, a)
}

// setMTU is ifconfig NAME mtu N up.
func (k *Kernel) setMTU(name, value string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	n, err := strconv.Atoi(value)
	if err != nil || n < 576 || n > 65535 {
		return syscall.EINVAL
	}
	i := k.find(name)
	i.MTU = n
	i.Flags |= darwin.InterfaceUp
	k.announceInterface(i)
	return nil
}

// announceInterface announces a change of an interface. The lock is held.
func (k *Kernel) announceInterface(i *darwin.Interface) {
	k.changed(xnu.InterfaceMessage(xnu.RTMIfInfo, xnu.SizeIf, wire(i)))
}

// message returns a route as routing messages have it.
func message(r darwin.Route) xnu.Route {
	return xnu.Route{Dst: r.Dst, Gateway: r.Gateway, Index: r.Index, Flags: uint32(r.Flags)}
}

// wire returns an interface as routing messages have it.
func wire(i *darwin.Interface) xnu.Interface {
	return xnu.Interface{Name: i.Name, Index: i.Index, Flags: uint32(i.Flags), MTU: i.MTU}
}

// formatResolvers returns the output of `scutil --dns`.
func formatResolvers(list []darwin.Resolver) string {
	if len(list) == 0 {
		return "No DNS configuration available\n"
	}
	var b strings.Builder
	for _, scoped := range []bool{false, true} {
		title := "DNS configuration\n"
		if scoped {
			title = "\nDNS configuration (for scoped queries)\n"
		}
		n := 0
		for _, r := range list {
			if r.Scoped != scoped {
				continue
			}
			if n++; n == 1 {
				b.WriteString(title)
			}
			fmt.Fprintf(&b, "\nresolver #%d\n", n)
			if r.Domain != "" {
				fmt.Fprintf(&b, "  domain   : %s\n", r.Domain)
			}
			for i, a := range r.Servers {
				fmt.Fprintf(&b, "  nameserver[%d] : %s\n", i, a)
			}
			if r.Port != 0 {
				fmt.Fprintf(&b, "  port     : %d\n", r.Port)
			}
			if r.Interface != "" {
				fmt.Fprintf(&b, "  if_index : 7 (%s)\n", r.Interface)
			}
			flags := ""
			if scoped {
				flags = "Scoped, "
			} else if r.Domain != "" {
				flags = "Supplemental, "
			}
			fmt.Fprintf(&b, "  flags    : %sRequest A records\n  reach    : 0x00000002 (Reachable)\n", flags)
		}
		if !scoped && n == 0 {
			b.WriteString(title)
		}
	}
	return b.String()
}
