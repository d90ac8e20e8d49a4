package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// Errors of a [Network]'s methods.
var (
	ErrNotOpen = errors.New("the mesh interface isn't open")
	ErrNotMesh = errors.New("not an address of the mesh")
)

// Network opens sockets on the host's mesh addresses, for what the helper itself serves
// to peers or requests from them. Only peers reach such a socket: it ignores packets that
// arrive on other interfaces or come from the host itself, and it sends by the mesh
// interface alone. (A kernel may complete a TCP handshake before the connection is closed
// unseen.) A socket is closed when the mesh interface is removed. Whether a peer may
// connect is up to the ruleset, as for any other program's socket.
//
// Errors are [ErrNotOpen] while there is no mesh interface, and [ErrNotMesh] for an
// address that isn't of the mesh. An address that Enforce hasn't set yet, or a port in
// use, gives the system's error.
type Network interface {
	// Listen accepts TCP connections of peers at local, which must have one of the host's
	// mesh addresses. With port 0 the system chooses a free one.
	Listen(ctx context.Context, local netip.AddrPort) (net.Listener, error)
	// ListenPacket receives UDP datagrams of peers; local is as for Listen.
	ListenPacket(ctx context.Context, local netip.AddrPort) (net.PacketConn, error)
	// Dial connects to a peer's mesh address from the host's own of the same family. The
	// protocol is "tcp" or "udp".
	Dial(ctx context.Context, protocol string, remote netip.AddrPort) (net.Conn, error)
}

// KernelNetwork is the [Network] of a host whose kernel has the mesh interface: each
// socket is bound to a mesh address and to the interface. Some kernels still deliver
// packets of other interfaces to such a socket, and those are dropped here. The zero
// value has no interface.
type KernelNetwork struct {
	mu sync.Mutex
	up *meshLink // nil while there is no interface
}

// meshLink is one mesh interface, from Opened to Closed.
type meshLink struct {
	name string
	cfg  Interface
	// gone ends with the interface; end ends it.
	gone context.Context
	end  context.CancelFunc
}

// Opened sets the mesh interface after it was created. Sockets on an earlier one are
// closed.
func (k *KernelNetwork) Opened(name string, cfg Interface) {
	k.Closed()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.up = &meshLink{name: name, cfg: cfg}
	k.up.gone, k.up.end = context.WithCancel(context.Background())
}

// Closed closes all sockets after the mesh interface was removed.
func (k *KernelNetwork) Closed() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.up != nil {
		k.up.end()
		k.up = nil
	}
}

// link returns the mesh interface, or ErrNotOpen.
func (k *KernelNetwork) link() (*meshLink, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.up == nil {
		return nil, ErrNotOpen
	}
	return k.up, nil
}

// Listen implements [Network].
func (k *KernelNetwork) Listen(ctx context.Context, local netip.AddrPort) (net.Listener, error) {
	l, c, err := k.listenConfig(local.Addr())
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w", local, err)
	}
	inner, err := c.Listen(ctx, family("tcp", local.Addr()), local.String())
	if err != nil {
		return nil, err
	}
	return &listener{inner, l, context.AfterFunc(l.gone, func() { inner.Close() })}, nil
}

// ListenPacket implements [Network].
func (k *KernelNetwork) ListenPacket(ctx context.Context, local netip.AddrPort) (net.PacketConn, error) {
	l, c, err := k.listenConfig(local.Addr())
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w", local, err)
	}
	inner, err := c.ListenPacket(ctx, family("udp", local.Addr()), local.String())
	if err != nil {
		return nil, err
	}
	read, err := l.reader(inner)
	if err != nil {
		return nil, errors.Join(err, inner.Close())
	}
	return &packetConn{inner, read, context.AfterFunc(l.gone, func() { inner.Close() })}, nil
}

// listenConfig returns how to listen at one of the host's mesh addresses.
func (k *KernelNetwork) listenConfig(local netip.Addr) (*meshLink, *net.ListenConfig, error) {
	l, err := k.link()
	if err != nil {
		return nil, nil, err
	}
	if !slices.Contains(l.cfg.Addresses, local) {
		return nil, nil, ErrNotMesh
	}
	c := &net.ListenConfig{Control: bindTo(l.name)}
	c.SetMultipathTCP(false) // MPTCP would tell the peer the host's other addresses
	return l, c, nil
}

// Dial implements [Network].
func (k *KernelNetwork) Dial(ctx context.Context, protocol string, remote netip.AddrPort) (net.Conn, error) {
	fail := func(err error) error { return fmt.Errorf("dial %s %v: %w", protocol, remote, err) }
	l, err := k.link()
	if err != nil {
		return nil, fail(err)
	}
	own := slices.IndexFunc(l.cfg.Addresses, func(a netip.Addr) bool { return a.Is4() == remote.Addr().Is4() })
	if own < 0 || !l.isPeer(remote.Addr()) {
		return nil, fail(ErrNotMesh)
	}
	d := net.Dialer{Control: bindTo(l.name)}
	local := netip.AddrPortFrom(l.cfg.Addresses[own], 0)
	switch protocol {
	case "tcp":
		d.LocalAddr = net.TCPAddrFromAddrPort(local)
	case "udp":
		d.LocalAddr = net.UDPAddrFromAddrPort(local)
	default:
		return nil, fail(net.UnknownNetworkError(protocol))
	}
	inner, err := d.DialContext(ctx, family(protocol, remote.Addr()), remote.String())
	if err != nil {
		return nil, err
	}
	c := &conn{inner, inner.Read, context.AfterFunc(l.gone, func() { inner.Close() })}
	if datagrams, ok := inner.(net.PacketConn); ok {
		read, err := l.reader(datagrams)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.read = func(b []byte) (int, error) {
			n, _, err := read(b)
			return n, err
		}
	}
	return c, nil
}

// family returns Go's name of a network for one family, such as "tcp4".
func family(protocol string, a netip.Addr) string {
	if a.Is4() {
		return protocol + "4"
	}
	return protocol + "6"
}

// isPeer reports whether a peer may have this address.
func (l *meshLink) isPeer(a netip.Addr) bool {
	in := func(p netip.Prefix) bool { return p.Contains(a) }
	return slices.ContainsFunc(l.cfg.Prefixes, in) && !slices.Contains(l.cfg.Addresses, a)
}

// isPeerAt is isPeer for a net.Addr.
func (l *meshLink) isPeerAt(a net.Addr) bool {
	at, err := netip.ParseAddrPort(a.String())
	return err == nil && l.isPeer(at.Addr().Unmap())
}

// reader returns a function that reads only datagrams of peers that arrived on the mesh
// interface.
func (l *meshLink) reader(c net.PacketConn) (func([]byte) (int, net.Addr, error), error) {
	i, err := net.InterfaceByName(l.name)
	if err != nil {
		return nil, fmt.Errorf("find interface %q: %w", l.name, err)
	}
	var receive func([]byte) (n, by int, from net.Addr, err error)
	if at, _ := netip.ParseAddrPort(c.LocalAddr().String()); at.Addr().Unmap().Is4() {
		p := ipv4.NewPacketConn(c)
		err = p.SetControlMessage(ipv4.FlagInterface, true)
		receive = func(b []byte) (n, by int, from net.Addr, err error) {
			n, about, from, err := p.ReadFrom(b)
			if about != nil {
				by = about.IfIndex
			}
			return n, by, from, err
		}
	} else {
		p := ipv6.NewPacketConn(c)
		err = p.SetControlMessage(ipv6.FlagInterface, true)
		receive = func(b []byte) (n, by int, from net.Addr, err error) {
			n, about, from, err := p.ReadFrom(b)
			if about != nil {
				by = about.IfIndex
			}
			return n, by, from, err
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ask for the interface of each datagram: %w", err)
	}
	return func(b []byte) (int, net.Addr, error) {
		for {
			n, by, from, err := receive(b)
			if err != nil || by == i.Index && l.isPeerAt(from) {
				return n, from, err
			}
		}
	}, nil
}

// listener accepts connections of peers until the mesh interface is removed.
type listener struct {
	net.Listener
	link *meshLink
	stop func() bool
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if !l.link.isPeerAt(c.RemoteAddr()) {
			c.Close()
			continue
		}
		return &conn{c, c.Read, context.AfterFunc(l.link.gone, func() { c.Close() })}, nil
	}
}

func (l *listener) Close() error {
	l.stop()
	return l.Listener.Close()
}

// conn is a connection that is closed with the mesh interface.
type conn struct {
	net.Conn
	read func([]byte) (int, error)
	stop func() bool
}

func (c *conn) Read(b []byte) (int, error) { return c.read(b) }

func (c *conn) Close() error {
	c.stop()
	return c.Conn.Close()
}

// packetConn receives datagrams of peers until the mesh interface is removed.
type packetConn struct {
	net.PacketConn
	read func([]byte) (int, net.Addr, error)
	stop func() bool
}

func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) { return c.read(b) }

func (c *packetConn) Close() error {
	c.stop()
	return c.PacketConn.Close()
}
