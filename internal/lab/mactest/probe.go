package mactest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
)

// A Probe finds out with real packets whether the rules of an anchor are evaluated. It
// has the other end of a TUN device, so it stands for the whole network behind it.
type Probe struct {
	// Load loads rules for the device into the anchor; "" empties it. Required.
	Load func(ctx context.Context, rules string) error
	// Do runs the functions that open sockets, in the network namespace of the device.
	// Required.
	Do func(func() error) error
	// Own is the device's address and Far one that is reached through it, both IPv4.
	// Required.
	Own, Far netip.Addr

	dev     tun.Device
	name    string
	packets chan datagram
	done    chan struct{} // closed when nothing reads packets any more
	once    sync.Once
	phase   uint16 // loads so far, added to ports so that each phase has flows of its own
	reader  errgroup.Group
}

// datagram has the ends of a UDP datagram that came out of the device.
type datagram struct{ src, dst netip.AddrPort }

// probeOffset is the space in bytes that a TUN device needs in front of a packet, enough
// for each system.
const probeOffset = 16

// probeWait is how long the probe waits for a packet that must arrive, and probePause the
// time between two attempts.
const probeWait, probePause = 20 * time.Second, 50 * time.Millisecond

// firstFarPort is the first port of the far end. It uses this one and those above it.
const firstFarPort = 40000

// NewProbe returns a probe that owns the device. The other fields have to be set
// before it is used.
func NewProbe(dev tun.Device) (*Probe, error) {
	name, err := dev.Name()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make probe: %w", err), dev.Close())
	}
	p := &Probe{dev: dev, name: name, packets: make(chan datagram), done: make(chan struct{})}
	p.reader.Go(p.read)
	return p, nil
}

// Close closes the device.
func (p *Probe) Close() error {
	p.once.Do(func() { close(p.done) })
	return errors.Join(p.dev.Close(), p.reader.Wait())
}

// read passes the UDP datagrams that the host sends through the device to packets.
func (p *Probe) read() error {
	bufs, sizes := make([][]byte, p.dev.BatchSize()), make([]int, p.dev.BatchSize())
	for i := range bufs {
		bufs[i] = make([]byte, probeOffset+65536)
	}
	for {
		n, err := p.dev.Read(bufs, sizes, probeOffset)
		for i := range n {
			d, ok := parseDatagram(bufs[i][probeOffset : probeOffset+sizes[i]])
			if !ok {
				continue
			}
			select {
			case p.packets <- d:
			case <-p.done:
				return nil
			}
		}
		switch {
		case errors.Is(err, tun.ErrTooManySegments):
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
			select {
			case <-p.done:
				return nil // on some systems a closed device returns another error
			default:
				return fmt.Errorf("read from %s: %w", p.name, err)
			}
		}
	}
}

// parseDatagram returns the ends of a UDP datagram over IPv4 and whether b is one.
func parseDatagram(b []byte) (datagram, bool) {
	if len(b) < 20 || b[0]>>4 != 4 || b[9] != flowtest.UDP {
		return datagram{}, false
	}
	head := int(b[0]&15) * 4
	if head < 20 || len(b) < head+8 {
		return datagram{}, false
	}
	src, _ := netip.AddrFromSlice(b[12:16])
	dst, _ := netip.AddrFromSlice(b[16:20])
	return datagram{
		netip.AddrPortFrom(src, binary.BigEndian.Uint16(b[head:])),
		netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[head+2:])),
	}, true
}

// Filter loads a rule that blocks one port and not another, and reports whether it was
// evaluated. An error says why that isn't known.
func (p *Probe) Filter(ctx context.Context) (bool, error) {
	blocked, open, err := p.listenTwice()
	if err != nil {
		return false, err
	}
	defer blocked.Close()
	defer open.Close()
	rule := fmt.Sprintf("block drop in quick on %s inet proto udp from %s to %s port %d\n", p.name, p.Far, p.Own, portOf(blocked))
	// First without the rule: if nothing arrives then, its absence later proves nothing.
	if err := p.load(ctx, ""); err != nil {
		return false, err
	}
	if err := p.deliver(ctx, portOf(blocked), blocked); err != nil {
		return false, fmt.Errorf("without a rule: %w", err)
	}
	if err := p.load(ctx, rule); err != nil {
		return false, err
	}
	drain(blocked)
	for range 3 {
		if err := p.inject(portOf(blocked)); err != nil {
			return false, err
		}
	}
	// Packets keep their order, so once this one has arrived, no earlier one will.
	if err := p.deliver(ctx, portOf(open), open); err != nil {
		return false, fmt.Errorf("beside the rule: %w", err)
	}
	return !drain(blocked), p.load(ctx, "")
}

// RDR loads a rule that redirects one port to another, on which a socket listens, and
// reports whether it was evaluated.
func (p *Probe) RDR(ctx context.Context) (bool, error) {
	target, control, err := p.listenTwice()
	if err != nil {
		return false, err
	}
	defer target.Close()
	defer control.Close()
	asked, err := p.freePort()
	if err != nil {
		return false, err
	}
	rule := fmt.Sprintf("rdr on %s inet proto udp from %s to %s port %d -> %s port %d\n",
		p.name, p.Far, p.Own, asked, p.Own, portOf(target))
	if err := p.load(ctx, rule); err != nil {
		return false, err
	}
	for range 3 {
		if err := p.inject(asked); err != nil {
			return false, err
		}
	}
	if err := p.deliver(ctx, portOf(control), control); err != nil {
		return false, fmt.Errorf("beside the rule: %w", err)
	}
	return drain(target), p.load(ctx, "")
}

// NAT loads a rule that translates the source of packets, and reports whether it was
// evaluated.
func (p *Probe) NAT(ctx context.Context) (bool, error) {
	// In TEST-NET-2 (RFC 5737), which no network uses.
	translated := netip.MustParseAddr("198.51.100.213")
	if err := p.load(ctx, ""); err != nil {
		return false, err
	}
	if d, err := p.emit(ctx); err != nil || d.src.Addr() != p.Own {
		return false, errors.Join(fmt.Errorf("without a rule a datagram leaves from %v, want %v", d.src, p.Own), err)
	}
	rule := fmt.Sprintf("nat on %s inet proto udp from %s to %s -> %s\n", p.name, p.Own, p.Far, translated)
	if err := p.load(ctx, rule); err != nil {
		return false, err
	}
	d, err := p.emit(ctx)
	return d.src.Addr() == translated, errors.Join(err, p.load(ctx, ""))
}

// load loads rules. Packets that are injected afterwards belong to a new flow, so no
// earlier state passes them.
func (p *Probe) load(ctx context.Context, rules string) error {
	p.phase++
	if err := p.Load(ctx, rules); err != nil {
		return fmt.Errorf("load %q: %w", rules, err)
	}
	return nil
}

// listenTwice opens two sockets on free ports.
func (p *Probe) listenTwice() (a, b *net.UDPConn, err error) {
	err = p.Do(func() (err error) {
		at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.Own, 0))
		if a, err = net.ListenUDP("udp4", at); err != nil {
			return err
		}
		if b, err = net.ListenUDP("udp4", at); err != nil {
			a.Close()
		}
		return err
	})
	return a, b, err
}

// freePort returns a UDP port to which no socket is bound.
func (p *Probe) freePort() (uint16, error) {
	a, b, err := p.listenTwice()
	if err != nil {
		return 0, err
	}
	return portOf(a), errors.Join(a.Close(), b.Close())
}

// portOf returns the socket's own port.
func portOf(c *net.UDPConn) uint16 { return c.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// inject sends a datagram from the far address to a port of the device's own.
func (p *Probe) inject(port uint16) error {
	packet := flowtest.Datagram(netip.AddrPortFrom(p.Far, firstFarPort+p.phase), netip.AddrPortFrom(p.Own, port), 8)
	if _, err := p.dev.Write([][]byte{append(make([]byte, probeOffset), packet...)}, probeOffset); err != nil {
		return fmt.Errorf("send by %s: %w", p.name, err)
	}
	return nil
}

// deliver injects datagrams until a socket receives one.
func (p *Probe) deliver(ctx context.Context, port uint16, at *net.UDPConn) error {
	ctx, cancel := context.WithTimeout(ctx, probeWait)
	defer cancel()
	for ctx.Err() == nil {
		if err := p.inject(port); err != nil {
			return err
		}
		if received(at, probePause) {
			return nil
		}
	}
	return fmt.Errorf("a datagram to %s port %d doesn't arrive: %w", p.Own, port, context.Cause(ctx))
}

// received waits for a datagram and reports whether one arrived in time.
func received(c *net.UDPConn, wait time.Duration) bool {
	c.SetReadDeadline(time.Now().Add(wait))
	_, err := c.Read(make([]byte, 64))
	return err == nil
}

// drain reads the datagrams that a socket has received, and reports whether there were any.
func drain(c *net.UDPConn) (any bool) {
	for received(c, probePause) {
		any = true
	}
	return any
}

// emit sends datagrams from the device's own address until one comes out of the device,
// and returns it.
func (p *Probe) emit(ctx context.Context) (datagram, error) {
	ctx, cancel := context.WithTimeout(ctx, probeWait)
	defer cancel()
	var out *net.UDPConn
	to := netip.AddrPortFrom(p.Far, firstFarPort)
	err := p.Do(func() (err error) {
		// Not connected, so that an ICMP error isn't returned as an error of the socket.
		out, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.Own, 0)))
		return err
	})
	if err != nil {
		return datagram{}, err
	}
	defer out.Close()
	for {
		if _, err := out.WriteToUDPAddrPort([]byte("mactest"), to); err != nil {
			return datagram{}, err
		}
		select {
		case d := <-p.packets:
			if d.dst == to {
				return d, nil
			}
		case <-time.After(probePause):
		case <-ctx.Done():
			return datagram{}, fmt.Errorf("a datagram to %v doesn't come out of %s: %w", to, p.name, context.Cause(ctx))
		}
	}
}
