package hostfake

import (
	"os"
	"sync"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/host"
)

// device is a TUN device to which the host sends nothing, and which counts the packets
// that it is given. Closing it removes the interface.
type device struct {
	host   *Host
	name   string
	mtu    int
	events chan tun.Event
	closed chan struct{}
	once   sync.Once
}

func newDevice(h *Host, cfg host.Interface) *device {
	d := &device{host: h, name: h.iface, mtu: cfg.MTU, events: make(chan tun.Event, 1), closed: make(chan struct{})}
	d.events <- tun.EventUp
	return d
}

func (d *device) File() *os.File { return nil }

func (d *device) Read([][]byte, []int, int) (int, error) {
	<-d.closed
	return 0, os.ErrClosed
}

func (d *device) Write(bufs [][]byte, _ int) (int, error) {
	select {
	case <-d.closed:
		return 0, os.ErrClosed
	default:
	}
	d.host.delivered.Add(int64(len(bufs)))
	return len(bufs), nil
}

func (d *device) MTU() (int, error) { return d.mtu, nil }

func (d *device) Name() (string, error) { return d.name, nil }

func (d *device) Events() <-chan tun.Event { return d.events }

func (d *device) BatchSize() int { return 1 }

func (d *device) Close() error {
	d.once.Do(func() {
		d.host.mu.Lock()
		defer d.host.mu.Unlock()
		if d.host.device == d {
			d.host.iface = ""
		}
		close(d.closed)
		close(d.events)
	})
	return nil
}
