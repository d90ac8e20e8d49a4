package tunnel

import (
	"encoding/hex"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/meshhelper/meshhelper/internal/mesh/meshtest"
)

// sink opens a UDP socket that never answers, and returns its address. Each call of heard
// reports whether a datagram has arrived that wasn't reported before.
func sink(t *testing.T) (at netip.AddrPort, heard func() bool) {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	datagrams := make(chan struct{}, 1000)
	go func() {
		for {
			if _, _, err := c.ReadFromUDPAddrPort(make([]byte, 1<<16)); err != nil {
				return
			}
			datagrams <- struct{}{}
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort(), func() bool {
		select {
		case <-datagrams:
			return true
		default:
			return false
		}
	}
}

// endpoint returns the address to which e sends packets for a peer.
func (e *end) endpoint(t testing.TB, of *end) netip.AddrPort {
	t.Helper()
	return e.fresh(t)[of.PublicKey()].Endpoint
}

// TestRoamedPeerStays has a device hear a peer from another address than the configured one.
// Whatever else changes about the peer, even when another peer gets its addresses, packets
// for it go on to the address from which it was heard, in the same session. Only another
// configured endpoint replaces that address, at once.
func TestRoamedPeerStays(t *testing.T) {
	a, b := newEnd(t, 20), newEnd(t, 21)
	configured, _ := sink(t)
	p, other := b.peer(), newEnd(t, 22).peer()
	heard := p.Endpoint
	p.Endpoint, other.Endpoint = configured, netip.AddrPort{}
	for _, err := range []error{a.Sync([]Peer{p, other}), b.Set(a.peer())} {
		if err != nil {
			t.Fatal(err)
		}
	}
	ping(t, b, a)
	session := a.fresh(t)[b.PublicKey()].LastHandshake
	for _, step := range []struct {
		name   string
		change func()
	}{
		{"as before", func() {}},
		{"a keepalive", func() { p.Keepalive = 25 * time.Second }},
		{"an address", func() { p.AllowedIPs = append(p.AllowedIPs, netip.MustParsePrefix("192.0.2.0/24")) }},
		{"addresses traded", func() { p.AllowedIPs, other.AllowedIPs = other.AllowedIPs, p.AllowedIPs }},
		{"traded back", func() { p.AllowedIPs, other.AllowedIPs = other.AllowedIPs, p.AllowedIPs }},
		{"learned elsewhere", func() { p.Learned = netip.MustParseAddrPort("192.0.2.1:9") }},
		{"the configured endpoint removed", func() { p.Endpoint = netip.AddrPort{} }},
	} {
		step.change()
		if err := a.Sync([]Peer{other, p}); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if at := a.endpoint(t, b); at != heard {
			t.Errorf("%s: the endpoint is %v, it was heard from %v", step.name, at, heard)
		}
	}
	ping(t, a, b)
	if s := a.fresh(t)[b.PublicKey()]; !s.LastHandshake.Equal(session) {
		t.Errorf("the session was replaced: %+v", s)
	}
	moved, seen := sink(t)
	p.Endpoint = moved
	if err := a.Sync([]Peer{p, other}); err != nil {
		t.Fatal(err)
	}
	if at := a.endpoint(t, b); at != moved {
		t.Errorf("the endpoint is %v, configured is %v", at, moved)
	}
	a.send(t, tuntest.Ping(b.addr[0], a.addr[0]))
	until(t, "a packet is sent to the new endpoint", seen)
	ping(t, b, a) // the device hears the peer from its address again
	if at := a.endpoint(t, b); at != heard {
		t.Errorf("the endpoint is %v, the peer was heard from %v", at, heard)
	}
}

// again replaces e's device by a new one on another port, as a restart does.
func (e *end) again(t *testing.T) *end {
	t.Helper()
	e.Close()
	fresh := *e
	fresh.tun = tuntest.NewChannelTUN()
	d, err := NewDevice(Options{
		TUN: fresh.tun.TUN(), PrivateKey: e.key, Addresses: e.addr.List(),
		Logger: slog.New(slog.NewTextHandler(e.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	fresh.Device = d
	return &fresh
}

// TestBeginsWhereLearned restarts a device that has a learned and a configured endpoint for a
// peer. Without a packet to send, it sends a handshake to the learned endpoint and not to the
// configured one. The peer answers, so the device stays with it after the timeout.
func TestBeginsWhereLearned(t *testing.T) {
	a, b := newEnd(t, 20), newEnd(t, 21)
	configured, sent := sink(t)
	fromA := a.peer()
	fromA.Endpoint = netip.AddrPort{} // so that b doesn't send first
	if err := b.Set(fromA); err != nil {
		t.Fatal(err)
	}
	a = a.again(t)
	a.learnedTimeout = time.Second
	p := b.peer()
	p.Learned, p.Endpoint = p.Endpoint, configured
	if err := a.Sync([]Peer{p}); err != nil {
		t.Fatal(err)
	}
	until(t, "a handshake where the peer was last heard", func() bool { return !a.fresh(t)[b.PublicKey()].LastHandshake.IsZero() })
	until(t, "the timeout of the learned endpoint is over", func() bool { return a.tried() == 0 })
	if at := a.endpoint(t, b); at != p.Learned || sent() {
		t.Errorf("the endpoint is %v, learned is %v", at, p.Learned)
	}
	ping(t, a, b)
	if strings.Contains(a.log.String(), "turning to") {
		t.Errorf("log:\n%s", a.log)
	}
}

// tried returns the number of peers that haven't answered at their learned endpoint yet, and
// whose timeout isn't over.
func (d *Device) tried() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.onLearned)
}

// TestTurnsToConfigured has peers that don't answer at their learned endpoint. After the
// timeout the device sends a handshake to the configured endpoint, without a packet to send,
// and finds the peer there. A peer without a configured endpoint keeps the learned one.
func TestTurnsToConfigured(t *testing.T) {
	a, b, silent := newEnd(t, 20), newEnd(t, 21), newEnd(t, 22)
	learned, sent := sink(t)
	fromA := a.peer()
	fromA.Endpoint = netip.AddrPort{}
	if err := b.Set(fromA); err != nil {
		t.Fatal(err)
	}
	a.learnedTimeout = 100 * time.Millisecond
	p, q := b.peer(), silent.peer()
	p.Learned, q.Learned, q.Endpoint = learned, learned, netip.AddrPort{}
	if err := a.Sync([]Peer{p, q}); err != nil {
		t.Fatal(err)
	}
	if at := a.endpoint(t, b); at != learned {
		t.Errorf("the device begins with %v, learned is %v", at, learned)
	}
	until(t, "a handshake is sent where the peer was last heard", sent)
	until(t, "a handshake with the configured endpoint", func() bool { return !a.fresh(t)[b.PublicKey()].LastHandshake.IsZero() })
	if at := a.endpoint(t, b); at != p.Endpoint {
		t.Errorf("the endpoint is %v, configured is %v", at, p.Endpoint)
	}
	if at := a.endpoint(t, silent); at != learned {
		t.Errorf("without a configured endpoint the peer is at %v, learned is %v", at, learned)
	}
	ping(t, a, b)
}

// TestTrialEnds changes a peer while the device waits for its answer from the learned
// endpoint: another configured endpoint and the removal of the peer end the wait, and adding
// the peer again begins a new one. The end of an earlier wait changes none of that.
func TestTrialEnds(t *testing.T) {
	a := newEnd(t, 20)
	a.learnedTimeout = time.Hour
	learned, _ := sink(t)
	first, _ := sink(t)
	second, _ := sink(t)
	b := newEnd(t, 21)
	p := b.peer()
	p.Learned, p.Endpoint = learned, first
	set := func(p Peer) {
		t.Helper()
		if err := a.Sync([]Peer{p}); err != nil {
			t.Fatal(err)
		}
	}
	want := func(about string, at netip.AddrPort, tried int) {
		t.Helper()
		if got := a.endpoint(t, b); got != at || a.tried() != tried {
			t.Errorf("%s: the endpoint is %v, %d peers being tried; want %v and %d", about, got, a.tried(), at, tried)
		}
	}
	set(p)
	want("at first", learned, 1)
	p.Keepalive = 25 * time.Second
	set(p)
	want("with a keepalive", learned, 1)
	p.Endpoint = second
	set(p)
	want("another endpoint", second, 0)
	if err := a.Remove(p.PublicKey); err != nil {
		t.Fatal(err)
	}
	set(p)
	want("back again", learned, 1)
	if err := a.Remove(p.PublicKey); err != nil {
		t.Fatal(err)
	}
	if n := a.tried(); n != 0 {
		t.Errorf("%d peers being tried after Remove, want none", n)
	}
	p.Learned = netip.AddrPort{}
	set(p)
	want("nothing learned", second, 0)
	a.expireLearned()
	want("nothing to give up", second, 0)
	// The end of an earlier wait doesn't end that of a peer that was added later.
	p.Learned = learned
	if err := a.Remove(p.PublicKey); err != nil {
		t.Fatal(err)
	}
	set(p)
	a.expireLearned()
	want("too early", learned, 1)
	a.Close()
	a.expireLearned() // must do nothing on a closed device
}

// TestZoneIsNoConfiguration gives endpoints whose zone holds lines of the configuration
// protocol: the peer is refused, and no other one is made.
func TestZoneIsNoConfiguration(t *testing.T) {
	host := newEnd(t, 21)
	other := meshtest.Key(t, 41).Public()
	at, err := netip.ParseAddrPort("[fe80::1%x]:1\npublic_key=" + hex.EncodeToString(other[:]) + "\nallowed_ip=0.0.0.0/0\nendpoint=[fe80::2%y]:9")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []Peer{{Learned: at}, {Endpoint: at}} {
		p.PublicKey, p.AllowedIPs = meshtest.Key(t, 40).Public(), prefixes("100.64.1.1/32")
		if err := host.Sync([]Peer{p}); err == nil {
			t.Errorf("%q is taken", at)
		}
		if got := held(t, host.Device); len(got) != 0 {
			t.Errorf("held %v", got)
		}
	}
}
