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

// sink is a place where a test sees what is sent to it, and nothing answers.
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

// endpoint returns where e sends what is for a peer.
func (e *end) endpoint(t testing.TB, of *end) netip.AddrPort {
	t.Helper()
	return e.fresh(t)[of.PublicKey()].Endpoint
}

// TestRoamedPeerStays hears a peer elsewhere than it is configured. Whatever else about it is
// changed, and whoever gets its addresses, what is for it goes on to where it was heard, in
// the same session; another configured endpoint moves it, at once.
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
		{"the endpoint taken back", func() { p.Endpoint = netip.AddrPort{} }},
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
		t.Errorf("the session is another one: %+v", s)
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
	ping(t, b, a) // and the peer is heard again where it is
	if at := a.endpoint(t, b); at != heard {
		t.Errorf("the endpoint is %v, the peer was heard from %v", at, heard)
	}
}

// again returns e's device made anew, on another port, as after a restart.
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

// TestBeginsWhereLearned makes a device anew: it sends a handshake to where a peer was last
// heard, before anybody has a packet to send, not to where the peer is configured, and stays
// there when the time to answer is over.
func TestBeginsWhereLearned(t *testing.T) {
	a, b := newEnd(t, 20), newEnd(t, 21)
	configured, sent := sink(t)
	fromA := a.peer()
	fromA.Endpoint = netip.AddrPort{} // b is silent by itself
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
	until(t, "the time to answer is over", func() bool { return a.tried() == 0 })
	if at := a.endpoint(t, b); at != p.Learned || sent() {
		t.Errorf("the endpoint is %v, learned is %v", at, p.Learned)
	}
	ping(t, a, b)
	if strings.Contains(a.log.String(), "turning to") {
		t.Errorf("log:\n%s", a.log)
	}
}

// tried returns how many peers have time to answer where they were last heard.
func (d *Device) tried() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.onLearned)
}

// TestTurnsToConfigured makes a device anew whose peers don't answer where they were last
// heard: it turns to the configured endpoint where there is one, and finds the peer there,
// without a packet to send.
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

// TestTrialEnds has what was decided about a peer meanwhile stand when its time to answer is
// over: another endpoint, its removal, and its coming back.
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
			t.Errorf("%s: the endpoint is %v, %d tried; want %v and %d", about, got, a.tried(), at, tried)
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
		t.Errorf("%d tried of none", n)
	}
	p.Learned = netip.AddrPort{}
	set(p)
	want("nothing learned", second, 0)
	a.expireLearned()
	want("nothing to give up", second, 0)
	// Time for one that comes later isn't over with that of an earlier one.
	p.Learned = learned
	if err := a.Remove(p.PublicKey); err != nil {
		t.Fatal(err)
	}
	set(p)
	a.expireLearned()
	want("too early", learned, 1)
	a.Close()
	a.expireLearned() // changes nothing any more
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
