package simmac

// The utun device, and the bytes of packets on their way to and from it.

import (
	"fmt"
	"os"
	"sync"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// CreateTUN creates a utun interface and its device, as wireguard-go's tun.CreateTUN
// does: packets written to the device arrive on the interface, and packets that the Mac
// routes by the interface are read from the device.
func (m *Mac) CreateTUN(name string, mtu int) (tun.Device, error) {
	name, err := m.Kernel.CreateTunnel(name, mtu)
	if err != nil {
		return nil, err
	}
	t := &tunnel{
		mac: m, name: name, mtu: mtu,
		out:    make(chan []byte, 256),
		events: make(chan tun.Event, 4),
		closed: make(chan struct{}),
	}
	t.events <- tun.EventUp
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tunnels[name] = t
	return t, nil
}

// A tunnel is a utun device. Closing it removes its interface, with its addresses and
// routes.
type tunnel struct {
	mac    *Mac
	name   string
	mtu    int
	out    chan []byte
	events chan tun.Event
	once   sync.Once
	closed chan struct{}
}

func (t *tunnel) File() *os.File           { return nil }
func (t *tunnel) MTU() (int, error)        { return t.mtu, nil }
func (t *tunnel) Name() (string, error)    { return t.name, nil }
func (t *tunnel) Events() <-chan tun.Event { return t.events }

// BatchSize is 1 on macOS (wireguard-go tun/tun_darwin.go).
func (t *tunnel) BatchSize() int { return 1 }

// Read reads one packet that the Mac sent by the interface.
func (t *tunnel) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case p := <-t.out:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	case <-t.closed:
		return 0, os.ErrClosed
	}
}

// Write makes packets arrive on the interface. As in wireguard-go (tun/tun_darwin.go),
// offset must leave 4 bytes before each for the address family.
func (t *tunnel) Write(bufs [][]byte, offset int) (int, error) {
	if offset < 4 {
		return 0, fmt.Errorf("write to %s: offset %d leaves no room for the family", t.name, offset)
	}
	select {
	case <-t.closed:
		return 0, os.ErrClosed
	default:
	}
	for _, b := range bufs {
		t.mac.Inject(t.name, b[offset:])
	}
	return len(bufs), nil
}

// Close implements tun.Device.
func (t *tunnel) Close() error {
	t.once.Do(func() {
		close(t.closed)
		close(t.events)
		t.mac.mu.Lock()
		delete(t.mac.tunnels, t.name)
		t.mac.mu.Unlock()
		t.mac.Kernel.RemoveInterface(t.name)
	})
	return nil
}

// Inject makes a packet, in bytes, arrive on an interface. If it is forwarded it goes to
// a tunnel's device or to the function set by Wire.
func (m *Mac) Inject(link string, b []byte) Outcome {
	p, h, ok := decode(b)
	if !ok {
		return Outcome{Why: "malformed"}
	}
	m.fragments.keep(b, h, p)
	o := m.Receive(p, link)
	m.transmit(o, b, h, p)
	return o
}

// Emit makes the Mac itself send a packet, in bytes.
func (m *Mac) Emit(b []byte) Outcome {
	p, h, ok := decode(b)
	if !ok {
		return Outcome{Why: "malformed"}
	}
	m.fragments.keep(b, h, p)
	o := m.Send(p)
	m.transmit(o, b, h, p)
	return o
}

// Wire sets the function that is called, synchronously, with each packet that leaves by
// an Ethernet interface.
func (m *Mac) Wire(f func(link string, packet []byte)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wire = f
}

// Local sets the function that is called, synchronously, with each packet that is for
// the Mac itself.
func (m *Mac) Local(f func(packet []byte)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.local = f
}

// transmit writes a packet to its destination: a device, the wire, or the Mac itself.
func (m *Mac) transmit(o Outcome, b []byte, h header, was pfsim.Packet) {
	if o.Fate == Dropped {
		return
	}
	if total := max(o.In.Reassembled, o.Out.Reassembled); total > 0 {
		var ok bool
		if b, h, was, ok = m.fragments.whole(was, total); !ok {
			return
		}
	}
	out := encode(b, h, was, o.Packet)
	m.mu.Lock()
	t, wire, local := m.tunnels[o.Link], m.wire, m.local
	m.mu.Unlock()
	switch {
	case o.Fate == Delivered:
		if local != nil {
			local(out)
		}
	case t != nil:
		select {
		case t.out <- out:
		default: // the socket's buffer is full: ENOBUFS, the packet is lost
		}
	case wire != nil:
		wire(o.Link, out)
	}
}
