package tunnel

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/conn/bindtest"
	"golang.zx2c4.com/wireguard/tun/tuntest"
)

// withoutSockets returns two ends whose datagrams are carried by channels, with each Bind
// wrapped by wrap.
func withoutSockets(t *testing.T, wrap func(conn.Bind) conn.Bind) (a, b *end) {
	t.Helper()
	binds := bindtest.NewChannelBinds()
	a, b = newEndOn(t, 20, wrap(binds[0])), newEndOn(t, 21, wrap(binds[1]))
	for i, set := range []struct{ at, of *end }{{a, b}, {b, a}} {
		p := set.of.peer()
		p.Endpoint = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(i+1)) // bindtest's Bind sends to the channel of this port
		if err := set.at.Set(p); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

// TestAnyBind runs devices on a Bind that isn't an Underlay: they carry packets, and Rebind,
// Listening and SetOwnEndpoints do nothing.
func TestAnyBind(t *testing.T) {
	a, b := withoutSockets(t, func(b conn.Bind) conn.Bind { return b })
	ping(t, a, b)
	rebind(t, a)
	ping(t, b, a)
	if err := a.Listening(); err != nil {
		t.Error(err)
	}
	a.SetOwnEndpoints([]netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:1")}) // must not fail, though the Bind has no use for it
	ping(t, a, b)
}

// underlay is a Bind that is also an Underlay, other than Sockets.
type underlay struct {
	conn.Bind
	loops    func(netip.AddrPort) bool
	onReopen func()
	renewed  atomic.Int64
	failure  error
}

func (u *underlay) Attach(loops func(netip.AddrPort) bool, onReopen func()) {
	u.loops, u.onReopen = loops, onReopen
}

func (u *underlay) Renew(context.Context) error { u.renewed.Add(1); return u.failure }

func (u *underlay) Listening() error { return u.failure }

// TestUnderlay checks that the device uses each method of an Underlay, and acts on its calls.
func TestUnderlay(t *testing.T) {
	var under []*underlay
	a, b := withoutSockets(t, func(b conn.Bind) conn.Bind {
		under = append(under, &underlay{Bind: b})
		return under[len(under)-1]
	})
	a.send(t, tuntest.Ping(b.addr[0], a.addr[0])) // one way only: b answers nothing by itself
	b.receive(t)
	u := under[0]
	rebind(t, a)
	if n := u.renewed.Load(); n != 1 {
		t.Errorf("Renew was called %d times, want once", n)
	}
	before := b.fresh(t)[a.PublicKey()].RxBytes
	u.onReopen()
	until(t, "the peer hears from the host", func() bool { return b.fresh(t)[a.PublicKey()].RxBytes > before })

	self := netip.MustParseAddrPort("198.51.100.1:51820")
	a.SetOwnEndpoints([]netip.AddrPort{self})
	for at, want := range map[netip.AddrPort]bool{
		self:                                   true,
		netip.AddrPortFrom(a.addr[0], 7):       true,
		netip.AddrPortFrom(b.addr[1], 7):       true,
		netip.MustParseAddrPort("0.0.0.0:7"):   true,
		netip.MustParseAddrPort("192.0.2.1:7"): false,
	} {
		if got := u.loops(at); got != want {
			t.Errorf("loops(%v) is %v, want %v", at, got, want)
		}
	}
	u.failure = errors.New("no network")
	if err := a.Listening(); !errors.Is(err, u.failure) {
		t.Errorf("Listening: %v", err)
	}
	if err := a.Rebind(t.Context()); !errors.Is(err, u.failure) {
		t.Errorf("Rebind: %v", err)
	}
}
