package mactest

// The link between a peer's WireGuard device and its TCP/IP stack.

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// link connects a WireGuard device, for which it is a TUN device, with a TCP/IP stack, for
// which it is a network interface. wireguard-go's package tun/netstack does the same, but
// if it is closed while the stack sends, it may send on a closed channel and panic, and
// the test would end before it has restored the Mac.
type link struct {
	ep     *channel.Endpoint
	mtu    int             // bytes
	ctx    context.Context // ends when the device closes the link
	cancel context.CancelFunc
	events chan tun.Event

	mu       sync.Mutex
	arrivals []arrival
}

// arrival describes a packet that came out of the tunnel.
type arrival struct {
	at      time.Time
	from    netip.Addr
	size    int  // bytes
	isError bool // an ICMP error
}

// linkQueue is the number of packets from the stack that can wait for the device. Further
// ones are dropped.
const linkQueue = 1024

// newLink returns an open link.
func newLink(mtu int) *link {
	l := &link{ep: channel.New(linkQueue, uint32(mtu), ""), mtu: mtu, events: make(chan tun.Event)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// Read implements tun.Device: it waits for a packet from the stack.
func (l *link) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	packet := l.ep.ReadContext(l.ctx)
	if packet == nil {
		return 0, os.ErrClosed
	}
	view := packet.ToView()
	packet.DecRef()
	sizes[0] = copy(bufs[0][offset:], view.AsSlice())
	view.Release()
	return 1, nil
}

// Write implements tun.Device: it records packets from the tunnel and passes them to the
// stack.
func (l *link) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		b := b[offset:]
		from, isError, ok := describe(b)
		if !ok {
			continue
		}
		l.mu.Lock()
		l.arrivals = append(l.arrivals, arrival{time.Now(), from, len(b), isError})
		l.mu.Unlock()
		packet := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
		l.ep.InjectInbound(networkOf(from), packet)
		packet.DecRef()
	}
	return len(bufs), nil
}

// describe returns the source of an IP packet and whether the packet is an ICMP error. ok
// is false if it has no complete IP header.
func describe(b []byte) (from netip.Addr, isError, ok bool) {
	const icmp4, icmp6, firstInfo6 = 1, 58, 128
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		from, _ = netip.AddrFromSlice(b[12:16])
		head := int(b[0]&15) * 4
		isError = b[9] == icmp4 && len(b) > head && slices.Contains(icmpErrors4, b[head])
	case len(b) >= 40 && b[0]>>4 == 6:
		from, _ = netip.AddrFromSlice(b[8:24])
		isError = b[6] == icmp6 && len(b) > 40 && b[40] < firstInfo6
	default:
		return from, false, false
	}
	return from, isError, true
}

// icmpErrors4 are the types of ICMP messages about another packet: destination
// unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792). In
// ICMPv6 those are all types below 128 (RFC 4443, section 2.1).
var icmpErrors4 = []byte{3, 4, 5, 11, 12}

// Close implements tun.Device.
func (l *link) Close() error {
	if l.ctx.Err() == nil {
		l.cancel()
		close(l.events)
	}
	return nil
}

// File implements tun.Device. The link has no file.
func (l *link) File() *os.File { return nil }

// MTU implements tun.Device.
func (l *link) MTU() (int, error) { return l.mtu, nil }

// Name implements tun.Device.
func (l *link) Name() (string, error) { return "mactest", nil }

// Events implements tun.Device. There are no events before the link is closed: NewPeer
// brings the device up itself.
func (l *link) Events() <-chan tun.Event { return l.events }

// BatchSize implements tun.Device.
func (l *link) BatchSize() int { return 1 }
