package mactest

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// PeerOptions configure a peer.
type PeerOptions struct {
	// Config is the configuration as `peer add` prints it, with an endpoint.
	Config string // required
	// Do runs the function that opens the UDP socket, if that has to happen in another
	// network namespace than the caller's. Optional.
	Do func(func() error) error
}

// A Peer is a peer of the mesh in this process: a stock WireGuard device with a
// TCP/IP stack of its own. It sends everything into the tunnel, and records the packets
// that come out of it.
type Peer struct {
	// Addresses are the peer's own addresses in the mesh.
	Addresses Pair

	device *device.Device
	link   *link
	stack  *stack.Stack
	echoes atomic.Uint32 // counts the pings
}

// A Pair has an address of each family.
type Pair struct{ V4, V6 netip.Addr }

// List returns the pair as a list, IPv4 first.
func (p Pair) List() []netip.Addr { return []netip.Addr{p.V4, p.V6} }

// nic is the number of the stack's only interface, the tunnel.
const nic tcpip.NICID = 1

// NewPeer makes a peer and brings its tunnel up. The first handshake begins when it sends
// something, or after its keepalive interval.
func NewPeer(o PeerOptions) (*Peer, error) {
	config, err := netlab.ParseConfig(o.Config)
	if err != nil {
		return nil, fmt.Errorf("make peer: read configuration: %w", err)
	}
	p := &Peer{}
	for _, a := range config.Addresses {
		if a.Addr().Is4() {
			p.Addresses.V4 = a.Addr()
		} else {
			p.Addresses.V6 = a.Addr()
		}
	}
	if len(config.Peers) != 1 || !config.Peers[0].Endpoint.IsValid() || !p.Addresses.V4.IsValid() || !p.Addresses.V6.IsValid() {
		return nil, errors.New("make peer: want one peer with an endpoint, and an address of each family")
	}
	mtu := config.MTU
	if mtu == 0 {
		mtu = device.DefaultMTU
	}
	p.link = newLink(mtu)
	if err := p.openStack(); err != nil {
		p.link.Close()
		return nil, fmt.Errorf("make peer: %w", err)
	}
	if o.Do == nil {
		o.Do = func(f func() error) error { return f() }
	}
	bind := &doBind{Bind: conn.NewStdNetBind(), do: o.Do}
	p.device = device.NewDevice(p.link, bind, device.NewLogger(device.LogLevelSilent, ""))
	if err = p.device.IpcSet(settings(config)); err == nil {
		err = p.device.Up()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make peer: %w", err), p.Close())
	}
	return p, nil
}

// openStack makes the TCP/IP stack, which routes everything to the tunnel.
func (p *Peer) openStack() error {
	p.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	if err := p.stack.CreateNIC(nic, p.link.ep); err != nil {
		return fmt.Errorf("make interface of the stack: %v", err)
	}
	for _, a := range p.Addresses.List() {
		at := tcpip.AddrFromSlice(a.AsSlice())
		own := tcpip.ProtocolAddress{Protocol: networkOf(a), AddressWithPrefix: at.WithPrefix()}
		if err := p.stack.AddProtocolAddress(nic, own, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("add address %v to the stack: %v", a, err)
		}
		everywhere := tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(make([]byte, at.Len()))}
		p.stack.AddRoute(tcpip.Route{Destination: everywhere.Subnet(), NIC: nic})
	}
	return nil
}

// networkOf returns the network protocol of an address.
func networkOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// settings returns a configuration in the format of WireGuard's configuration protocol,
// https://www.wireguard.com/xplatform/.
func settings(c netlab.Config) string {
	host := c.Peers[0]
	var b strings.Builder
	fmt.Fprintf(&b, "private_key=%s\nreplace_peers=true\npublic_key=%s\nendpoint=%s\n",
		hex.EncodeToString(c.PrivateKey[:]), hex.EncodeToString(host.PublicKey[:]), host.Endpoint)
	fmt.Fprintf(&b, "persistent_keepalive_interval=%d\nreplace_allowed_ips=true\n", host.Keepalive)
	for _, a := range host.AllowedIPs {
		fmt.Fprintf(&b, "allowed_ip=%s\n", a)
	}
	return b.String()
}

// Close closes the tunnel and all connections of the peer.
func (p *Peer) Close() error {
	if p.device != nil {
		p.device.Close()
	}
	p.stack.RemoveNIC(nic)
	p.stack.Destroy()
	return nil
}

// LastHandshake returns the time of the last completed handshake, the zero time if there
// was none.
func (p *Peer) LastHandshake() (time.Time, error) {
	answer, err := p.device.IpcGet()
	if err != nil {
		return time.Time{}, fmt.Errorf("ask the peer's device: %w", err)
	}
	for line := range strings.Lines(answer) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "last_handshake_time_sec="); ok {
			sec, err := strconv.ParseInt(text, 10, 64)
			if err != nil || sec == 0 {
				return time.Time{}, err
			}
			return time.Unix(sec, 0), nil
		}
	}
	return time.Time{}, nil
}

// DialTCP opens a connection through the tunnel.
func (p *Peer) DialTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	c, err := gonet.DialContextTCP(ctx, p.stack, fullAddress(to), networkOf(to.Addr()))
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DialUDP returns a socket whose datagrams go to one address, through the tunnel.
func (p *Peer) DialUDP(to netip.AddrPort) (net.Conn, error) {
	at := fullAddress(to)
	c, err := gonet.DialUDP(p.stack, nil, &at, networkOf(to.Addr()))
	if err != nil {
		return nil, err
	}
	return c, nil
}

// fullAddress returns an address and port as the stack has them.
func fullAddress(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

// Ping sends echo requests until one is answered or ctx ends.
func (p *Peer) Ping(ctx context.Context, to netip.Addr) error {
	id := uint16(0x6d00 + p.echoes.Add(1))
	from := p.Addresses.V4
	if to.Is6() {
		from = p.Addresses.V6
	}
	request := flowtest.Echo(from, to, id, false, 32)
	began := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := p.stack.WriteRawPacket(nic, networkOf(to), buffer.MakeWithData(request)); err != nil {
			return fmt.Errorf("send echo request: %v", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("ping %v: no answer: %w", to, context.Cause(ctx))
		case <-tick.C:
		}
		if p.Arrived(to, began).Packets > 0 {
			return nil
		}
	}
}

// Arrivals sums up packets that came out of the tunnel. Bytes are those of whole IP
// packets.
type Arrivals struct {
	Packets, Bytes int
	// Last is the time of the last packet; zero if there was none.
	Last time.Time
}

// Arrived returns the packets with this source that came out of the tunnel after a time.
// It doesn't count ICMP errors: a host that refuses a packet may send them with the
// source of the packet's destination.
func (p *Peer) Arrived(from netip.Addr, after time.Time) Arrivals {
	p.link.mu.Lock()
	defer p.link.mu.Unlock()
	var out Arrivals
	for _, a := range p.link.arrivals {
		if a.from == from && !a.isError && a.at.After(after) {
			out.Packets++
			out.Bytes += a.size
			out.Last = a.at
		}
	}
	return out
}

// Refusals returns the number of ICMP errors that came out of the tunnel after a time.
func (p *Peer) Refusals(after time.Time) int {
	p.link.mu.Lock()
	defer p.link.mu.Unlock()
	n := 0
	for _, a := range p.link.arrivals {
		if a.isError && a.at.After(after) {
			n++
		}
	}
	return n
}

// doBind opens its sockets inside do. NewPeer can't do that itself: wireguard-go opens
// them, again whenever the device comes up, from goroutines of its own.
type doBind struct {
	conn.Bind
	do func(func() error) error
}

// Open implements conn.Bind.
func (b *doBind) Open(port uint16) (fns []conn.ReceiveFunc, actual uint16, err error) {
	err = b.do(func() (err error) {
		fns, actual, err = b.Bind.Open(port)
		return err
	})
	return fns, actual, err
}
