package darwin

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
)

// A FakeKernel is the part of a Mac's kernel that routes: interfaces, addresses,
// the routing table, and the kernel variables for forwarding. It is a [Kernel]
// that speaks real routing messages, and a [Runner] for ifconfig(8), sysctl(8) and
// the DNS configuration of scutil(8). It refuses what the real one refuses: a
// second route to the same destination, and the deletion of a route that doesn't
// exist; and a deletion takes the route to the destination by any interface, as on
// a real Mac.
//
// The other methods are what happens on a Mac without us: cables, DHCP, commands
// of other users, reboots.
type FakeKernel struct {
	mu         sync.Mutex
	interfaces []*Interface
	routes     []Route
	variables  map[string]string
	flags      map[ownAddress]AddressFlags
	resolvers  []Resolver
	boots      int
	lastIndex  int
	lastUtun   int
	sockets    map[*fakeSocket]bool
	bound      map[boundPort]int
	changes    int
}

// boundPort is a port that sockets have, in the list of that name.
type boundPort struct {
	list string
	port uint16
}

// ownAddress is an address of an interface.
type ownAddress struct {
	index int
	addr  netip.Addr
}

// Changes counts the changes of interfaces, addresses and routes so far: while it
// stays, so does what Observe returns.
func (k *FakeKernel) Changes() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.changes
}

// NewFakeKernel returns a Mac that was just booted, with a loopback interface and
// nothing else.
func NewFakeKernel() *FakeKernel {
	k := &FakeKernel{sockets: map[*fakeSocket]bool{}, flags: map[ownAddress]AddressFlags{}}
	k.reset()
	k.AddInterface("lo0", InterfaceUp|InterfaceLoopback|InterfaceRunning|InterfaceMulticast, 16384)
	k.AddAddress("lo0", netip.MustParsePrefix("127.0.0.1/8"))
	k.AddAddress("lo0", netip.MustParsePrefix("::1/128"))
	return k
}

// reset sets the variables as a boot does.
func (k *FakeKernel) reset() {
	k.boots++
	// mDNSResponder's port is taken on any Mac.
	k.bound = map[boundPort]int{{udpSockets, 5353}: 1}
	k.variables = map[string]string{
		ipv4Forwarding: "0",
		ipv6Forwarding: "0",
		portFirst:      "49152", portLast: "65535", portHiFirst: "49152", portHiLast: "65535",
		ipv4CheckInterface: "1", ipv6CheckInterface: "1",
		bootSession: fmt.Sprintf("4E4A2428-2FBD-4164-B6B6-%012X", k.boots),
	}
}

// Boot restarts the kernel: another boot session, no forwarding, no tunnels, and
// none of the routes that were added by hand.
func (k *FakeKernel) Boot() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reset()
	for _, i := range slices.Clone(k.interfaces) {
		if strings.HasPrefix(i.Name, "utun") {
			k.remove(i)
		}
	}
	k.routes = slices.DeleteFunc(k.routes, func(r Route) bool { return r.Flags&RouteProto1 != 0 })
	k.changes++
	k.lastUtun = 0
	for s := range k.sockets {
		s.fail(syscall.ENOTCONN)
	}
}

// AddInterface adds an interface and returns its number, which isn't used again.
func (k *FakeKernel) AddInterface(name string, flags InterfaceFlags, mtu int) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lastIndex++
	i := &Interface{Name: name, Index: k.lastIndex, Flags: flags, MTU: mtu}
	k.interfaces = append(k.interfaces, i)
	k.announceInterface(i)
	return i.Index
}

// CreateTunnel makes a utun interface. "utun" gives the next number, which climbs;
// utunN gives that one, or EBUSY when it is taken (netbird#2196).
func (k *FakeKernel) CreateTunnel(name string, mtu int) (string, error) {
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
	k.AddInterface(name, InterfaceUp|InterfacePointToPoint|InterfaceRunning|InterfaceMulticast, mtu)
	return name, nil
}

// Has reports whether there is an interface of that name.
func (k *FakeKernel) Has(name string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.find(name) != nil
}

// RemoveInterface takes an interface away, its addresses and routes with it.
func (k *FakeKernel) RemoveInterface(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if i := k.find(name); i != nil {
		k.remove(i)
	}
}

func (k *FakeKernel) remove(i *Interface) {
	for _, r := range slices.Clone(k.routes) {
		if r.Index == i.Index {
			k.drop(r)
		}
	}
	k.interfaces = slices.DeleteFunc(k.interfaces, func(o *Interface) bool { return o == i })
	for _, a := range i.Addresses {
		delete(k.flags, ownAddress{i.Index, a.Prefix.Addr()})
		k.changed(addressMessage(rtmDelAddr, i, a))
		k.dropOwn(i, a)
	}
	i.Flags &^= InterfaceUp | InterfaceRunning
	k.announceInterface(i)
}

func (k *FakeKernel) find(name string) *Interface {
	for _, i := range k.interfaces {
		if i.Name == name {
			return i
		}
	}
	return nil
}

func (k *FakeKernel) index(n int) *Interface {
	for _, i := range k.interfaces {
		if i.Index == n {
			return i
		}
	}
	return nil
}

// AddAddress gives an interface an address, and the routes that come with it.
//
// IPv4 (in_ifinit of xnu bsd/netinet/in.c): to the network on a broadcast
// interface; to the address itself on a loopback one; to the other end on a
// point-to-point one. Without another end that is the address itself, by the
// interface: the Mac's packets to it leave there. The route only has the mark of a
// local address (bsd/netinet/in_rmx.c:168).
//
// IPv6 (in6_ifinit of bsd/netinet6/in6.c:3000, and nd6.c:2990): to the network, and
// to the address itself by lo0, also on a point-to-point interface.
func (k *FakeKernel) AddAddress(name string, p netip.Prefix) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.find(name)
	switch {
	case i == nil:
		return syscall.ENXIO
	case slices.ContainsFunc(i.Addresses, func(a Address) bool { return a.Prefix.Addr() == p.Addr() }):
		return syscall.EEXIST
	}
	a := Address{Prefix: p}
	if i.Flags&InterfacePointToPoint != 0 && p.Addr().Is4() {
		a.Peer = p.Addr()
	}
	i.Addresses = append(i.Addresses, a)
	k.changed(addressMessage(rtmNewAddr, i, a))
	for _, r := range k.ownRoutes(i, a) {
		k.install(r)
	}
	return nil
}

// ownRoutes returns the routes that come and go with an address.
func (k *FakeKernel) ownRoutes(i *Interface, a Address) (routes []Route) {
	addr := a.Prefix.Addr()
	if !a.Prefix.IsSingleIP() {
		routes = append(routes, Route{Dst: a.Prefix.Masked(), Index: i.Index, Flags: RouteUp | routeCloning})
	}
	itself := Route{Dst: netip.PrefixFrom(addr, addr.BitLen()), Index: i.Index, Flags: RouteUp | RouteHost | RouteLocal}
	switch lo := k.find("lo0"); {
	case addr.Is4() && i.Flags&InterfaceLoopback != 0:
		routes = append(routes, itself)
	case addr.Is4() && a.Peer.IsValid():
		if a.Peer != addr {
			itself.Dst, itself.Flags = netip.PrefixFrom(a.Peer, 32), itself.Flags&^RouteLocal
		}
		routes = append(routes, itself)
	case addr.Is6() && lo != nil:
		itself.Index, itself.Flags = lo.Index, itself.Flags|RouteLLInfo
		routes = append(routes, itself)
	}
	return routes
}

// AddAddress6 gives an interface an IPv6 address of a kind.
func (k *FakeKernel) AddAddress6(name string, p netip.Prefix, flags AddressFlags) error {
	// The flags first: a listener that hears of the address may ask for them.
	k.mu.Lock()
	if i := k.find(name); i != nil {
		k.flags[ownAddress{i.Index, p.Addr()}] = flags
	}
	k.mu.Unlock()
	return k.AddAddress(name, p)
}

// SetAddressFlags changes what an IPv6 address is: no longer tentative, or
// deprecated. The kernel reports that to no listener, neither routing sockets nor pf.
func (k *FakeKernel) SetAddressFlags(name string, a netip.Addr, flags AddressFlags) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.find(name)
	if i == nil || !slices.ContainsFunc(i.Addresses, func(o Address) bool { return o.Prefix.Addr() == a }) {
		return syscall.EADDRNOTAVAIL
	}
	k.flags[ownAddress{i.Index, a}] = flags
	return nil
}

// Addresses6 returns the IPv6 addresses of an interface with their kinds.
func (k *FakeKernel) Addresses6(name string) (out []Address6) {
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
		one := Address6{Prefix: a.Prefix, Peer: a.Peer, Flags: k.flags[ownAddress{i.Index, a.Prefix.Addr()}]}
		if a.Prefix.Addr().IsLinkLocalUnicast() {
			one.Scope = i.Index
		}
		out = append(out, one)
	}
	return out
}

const routeCloning RouteFlags = 0x100 // RTF_CLONING

// RemoveAddress takes an address and its routes away.
func (k *FakeKernel) RemoveAddress(name string, a netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.find(name)
	if i == nil {
		return syscall.ENXIO
	}
	n := slices.IndexFunc(i.Addresses, func(o Address) bool { return o.Prefix.Addr() == a })
	if n < 0 {
		return syscall.EADDRNOTAVAIL
	}
	gone := i.Addresses[n]
	delete(k.flags, ownAddress{i.Index, a})
	i.Addresses = slices.Delete(i.Addresses, n, n+1)
	k.changed(addressMessage(rtmDelAddr, i, gone))
	k.dropOwn(i, gone)
	return nil
}

// dropOwn takes the routes of an address away.
func (k *FakeKernel) dropOwn(i *Interface, a Address) {
	for _, own := range k.ownRoutes(i, a) {
		for _, r := range slices.Clone(k.routes) {
			if r.Dst == own.Dst && r.Index == own.Index && r.Flags&RouteProto1 == 0 {
				k.drop(r)
			}
		}
	}
}

// AddRoute adds a route, as route(8) does.
func (k *FakeKernel) AddRoute(r Route) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.add(r)
}

// DeleteRoute deletes the route to dst, whatever it leads to.
func (k *FakeKernel) DeleteRoute(dst netip.Prefix) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.delete(Route{Dst: dst})
}

func (k *FakeKernel) add(r Route) error {
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

func hasFamily(i *Interface, a netip.Addr) bool {
	return slices.ContainsFunc(i.Addresses, func(o Address) bool { return o.Prefix.Addr().Is4() == a.Is4() })
}

// delete takes away the route with the destination and scope, ignoring gateway
// and interface (xnu bsd/net/route.c, rtrequest_common_locked, RTM_DELETE).
func (k *FakeKernel) delete(r Route) error {
	n := k.lookup(r)
	if n < 0 {
		return syscall.ESRCH
	}
	k.drop(k.routes[n])
	return nil
}

// lookup finds the route with the same destination and scope.
func (k *FakeKernel) lookup(r Route) int {
	return slices.IndexFunc(k.routes, func(o Route) bool {
		if o.Dst != r.Dst || o.Flags&RouteScoped != r.Flags&RouteScoped {
			return false
		}
		return r.Flags&RouteScoped == 0 || o.Index == r.Index
	})
}

func (k *FakeKernel) install(r Route) {
	if k.lookup(r) < 0 {
		k.routes = append(k.routes, r)
		k.changed(appendRoute(nil, rtmAdd, 0, r))
	}
}

func (k *FakeKernel) drop(r Route) {
	k.routes = slices.DeleteFunc(k.routes, func(o Route) bool { return o == r })
	k.changed(appendRoute(nil, rtmDelete, 0, r))
}

// Sysctl implements Kernel.
func (k *FakeKernel) Sysctl(name string) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	v, ok := k.variables[name]
	if !ok {
		return "", syscall.ENOENT
	}
	return v, nil
}

// BindTCP gives a TCP port to a socket of the Mac, BindUDP a UDP port; the function
// that they return closes it.
func (k *FakeKernel) BindTCP(port uint16) (unbind func()) { return k.bind(boundPort{tcpSockets, port}) }

// BindUDP is like BindTCP.
func (k *FakeKernel) BindUDP(port uint16) (unbind func()) { return k.bind(boundPort{udpSockets, port}) }

func (k *FakeKernel) bind(b boundPort) (unbind func()) {
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

// Table implements Kernel for the lists of sockets.
func (k *FakeKernel) Table(name string) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if name != tcpSockets && name != udpSockets {
		return nil, syscall.ENOENT
	}
	b := order.AppendUint32(nil, sizeXinpgen)
	b = append(b, make([]byte, sizeXinpgen-4)...)
	for at, n := range k.bound {
		if at.list != name {
			continue
		}
		for range n {
			b = appendSocket(b, at)
		}
	}
	return append(b, b[:sizeXinpgen]...), nil
}

// appendSocket adds what the kernel tells of a socket: a struct xinpcb_n, here with
// its length on arm64, and an xsocket_n, of which only the head matters.
func appendSocket(b []byte, at boundPort) []byte {
	const sizeXinpcb, sizeXsocket, kindSocket = 104, 76, 1
	b = order.AppendUint32(b, sizeXinpcb)
	b = order.AppendUint32(b, kindInpcb)
	b = append(b, make([]byte, offXinpLocal-8)...)
	b = append(b, byte(at.port>>8), byte(at.port))
	b = append(b, make([]byte, sizeXinpcb-minXinpcb)...)
	b = order.AppendUint32(b, sizeXsocket)
	b = order.AppendUint32(b, kindSocket)
	return append(b, make([]byte, sizeXsocket-8+socketAlignment-sizeXsocket%socketAlignment)...)
}

// Variable returns a kernel variable, as text; "" is one that there isn't.
func (k *FakeKernel) Variable(name string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.variables[name]
}

// SetVariable sets a kernel variable, as other software does.
func (k *FakeKernel) SetVariable(name, value string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.variables[name] = value
}

// BreakSockets makes every open routing socket fail with err.
func (k *FakeKernel) BreakSockets(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for s := range k.sockets {
		s.fail(err)
	}
}

// Miss tells all routing sockets that a lookup of a failed (RTM_MISS), as happens
// with every packet to a host that can't be reached.
func (k *FakeKernel) Miss(a netip.Addr) {
	k.Announce(appendRoute(nil, rtmMiss, 0, Route{Dst: netip.PrefixFrom(a, a.BitLen()), Flags: RouteUp | RouteHost}))
}

// Announce sends a message, of any form, to all routing sockets. Nothing changes.
func (k *FakeKernel) Announce(m []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.announce(m)
}

// changed counts a change and announces it.
func (k *FakeKernel) changed(m []byte) {
	k.changes++
	k.announce(m)
}

func (k *FakeKernel) announce(m []byte) {
	for s := range k.sockets {
		s.deliver(m)
	}
}

// Interfaces implements Kernel.
func (k *FakeKernel) Interfaces() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var b []byte
	for _, i := range k.interfaces {
		b = append(b, interfaceMessage(rtmIfInfo2, sizeIf2, i)...)
		for _, a := range i.Addresses {
			b = append(b, addressMessage(rtmNewAddr, i, a)...)
		}
	}
	return b, nil
}

// Routes implements Kernel.
func (k *FakeKernel) Routes() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var b []byte
	for _, r := range k.routes {
		b = append(b, dumpMessage(r)...)
	}
	return b, nil
}

// OpenRoute implements Kernel.
func (k *FakeKernel) OpenRoute() (io.ReadWriteCloser, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &fakeSocket{k: k, in: make(chan []byte, 64), failed: make(chan struct{})}
	k.sockets[s] = true
	return s, nil
}

// A fakeSocket is a routing socket.
type fakeSocket struct {
	k  *FakeKernel
	in chan []byte

	mu     sync.Mutex
	err    error
	failed chan struct{}
	lost   bool // messages didn't fit: the next read says ENOBUFS
}

func (s *fakeSocket) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
		close(s.failed)
	}
}

func (s *fakeSocket) deliver(m []byte) {
	select {
	case s.in <- slices.Clone(m):
	default:
		s.mu.Lock()
		s.lost = true
		s.mu.Unlock()
	}
}

func (s *fakeSocket) Read(b []byte) (int, error) {
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

func (s *fakeSocket) Close() error {
	s.fail(io.ErrClosedPipe)
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	delete(s.k.sockets, s)
	return nil
}

// Write takes one message, as route_output of xnu bsd/net/rtsock.c does.
func (s *fakeSocket) Write(m []byte) (int, error) {
	if len(m) < sizeRt || int(order.Uint16(m)) != len(m) {
		return 0, syscall.EINVAL
	}
	if m[2] != rtmVersion {
		return 0, syscall.EPROTONOSUPPORT
	}
	sa, ok := sockaddrs(m, sizeRt, order.Uint32(m[offRtAddrs:]))
	r, valid := parseRoute(m)
	if !ok || !valid {
		return 0, syscall.EINVAL
	}
	s.k.mu.Lock()
	defer s.k.mu.Unlock()
	var err error
	switch m[3] {
	case rtmAdd:
		if r, err = s.k.resolve(r, sa[rtaxGateway]); err == nil {
			err = s.k.add(r)
		}
	case rtmDelete:
		err = s.k.delete(r)
	default:
		err = syscall.EOPNOTSUPP
	}
	if err != nil {
		return 0, err
	}
	return len(m), nil
}

// resolve finds the interface of a route that is to be added, by its gateway.
func (k *FakeKernel) resolve(r Route, gateway []byte) (Route, error) {
	switch {
	case len(gateway) == 0:
		return r, syscall.EINVAL
	case gateway[1] == afLink:
		r.Index = int(order.Uint16(gateway[2:]))
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

// SetResolvers sets the DNS configuration. Routing sockets don't hear of it.
func (k *FakeKernel) SetResolvers(list []Resolver) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.resolvers = slices.Clone(list)
}

// DNS returns the DNS configuration.
func (k *FakeKernel) DNS() []Resolver {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.resolvers)
}

// Run implements Runner for ifconfig, sysctl and scutil --dns.
func (k *FakeKernel) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, -1, err
	}
	var out, complaint string
	switch path {
	case sysctlPath:
		out, complaint = k.sysctl(args)
	case scutilPath:
		if !slices.Equal(args, []string{"--dns"}) {
			complaint = "usage: scutil --dns"
			break
		}
		out = formatResolvers(k.DNS())
	case ifconfigPath:
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

func (k *FakeKernel) sysctl(args []string) (out, complaint string) {
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
	case args[0] != "-w" || name == bootSession:
		return "", fmt.Sprintf("sysctl: oid '%s' is read only", name)
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < 0 && name == ipv6Forwarding {
		return "", fmt.Sprintf("sysctl: %s=%s: Invalid argument", name, value)
	}
	if name == ipv6Forwarding {
		n = min(n, 1)
	}
	k.variables[name] = strconv.Itoa(n)
	return fmt.Sprintf("%s: %s -> %d\n", name, old, n), ""
}

// showAddresses6 prints what `ifconfig NAME inet6` does.
func (k *FakeKernel) showAddresses6(name string) string {
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

// ifconfig knows the forms that Ifconfig uses.
func (k *FakeKernel) ifconfig(args []string) (complaint string) {
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
	// strerror(3) of macOS, which differs from Linux's in these.
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

func (k *FakeKernel) alias(name, address string) error {
	p, err := netip.ParsePrefix(address)
	if err != nil {
		return syscall.EINVAL
	}
	return k.AddAddress(name, p)
}

func (k *FakeKernel) unalias(name, address string) error {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return syscall.EINVAL
	}
	return k.RemoveAddress(name, a)
}

func (k *FakeKernel) setMTU(name, value string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	n, err := strconv.Atoi(value)
	if err != nil || n < 576 || n > 65535 {
		return syscall.EINVAL
	}
	i := k.find(name)
	i.MTU = n
	i.Flags |= InterfaceUp
	k.announceInterface(i)
	return nil
}

func (k *FakeKernel) announceInterface(i *Interface) {
	k.changed(interfaceMessage(rtmIfInfo, sizeIf, i))
}

// interfaceMessage writes an if_msghdr or if_msghdr2.
func interfaceMessage(typ byte, size int, i *Interface) []byte {
	b := appendSockaddr(make([]byte, size), sockaddrLink(i.Index, i.Name))
	putHeader(b, typ)
	order.PutUint32(b[offIfAddrs:], 1<<rtaxIfp)
	order.PutUint32(b[offIfFlags:], uint32(i.Flags))
	order.PutUint16(b[offIfIndex:], uint16(i.Index))
	if size == sizeIf2 {
		order.PutUint32(b[offIf2Mtu:], uint32(i.MTU))
	}
	return b
}

// addressMessage writes an ifa_msghdr.
func addressMessage(typ byte, i *Interface, a Address) []byte {
	b := appendSockaddr(make([]byte, sizeIfa), trimmedMask(a.Prefix))
	b = appendSockaddr(b, sockaddr(a.Prefix.Addr()))
	mask := uint32(1<<rtaxNetmask | 1<<rtaxIfa)
	if a.Peer.IsValid() {
		b = appendSockaddr(b, sockaddr(a.Peer))
		mask |= 1 << rtaxBrd
	}
	putHeader(b, typ)
	order.PutUint32(b[offIfAddrs:], mask)
	order.PutUint16(b[offIfIndex:], uint16(i.Index))
	return b
}

// dumpMessage writes an rt_msghdr2, with the mask as short as the kernel's.
func dumpMessage(r Route) []byte {
	b := appendSockaddr(make([]byte, sizeRt), sockaddr(r.Dst.Addr()))
	gateway := sockaddrLink(r.Index, "")
	if r.Gateway.IsValid() {
		gateway = sockaddr(r.Gateway)
	}
	b = appendSockaddr(b, gateway)
	mask := uint32(1<<rtaxDst | 1<<rtaxGateway)
	if r.Flags&RouteHost == 0 {
		b = appendSockaddr(b, trimmedMask(r.Dst))
		mask |= 1 << rtaxNetmask
	}
	putHeader(b, rtmGet2)
	order.PutUint16(b[offRtIndex:], uint16(r.Index))
	order.PutUint32(b[offRtFlags:], uint32(r.Flags))
	order.PutUint32(b[offRtAddrs:], mask)
	return b
}

// trimmedMask writes a netmask as the kernel keeps it: without family and without
// the zeros at the end; of a default route nothing is left.
func trimmedMask(p netip.Prefix) []byte {
	b := sockaddrMask(p)
	b[1] = 0
	n := len(b)
	for n > 1 && b[n-1] == 0 {
		n--
	}
	if n <= 1 {
		return nil
	}
	b = b[:n]
	b[0] = byte(n)
	return b
}
