package tunnel

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/mesh/meshtest"
)

// patience bounds every wait for an event that usually takes milliseconds.
const patience = 30 * time.Second

// syncBuffer is a log to which several goroutines may write.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// deadTUN is a tunnel device that the system has removed.
type deadTUN struct{ tun.Device }

func (deadTUN) Read([][]byte, []int, int) (int, error) { return 0, os.ErrClosed }

// end is one device of a test, with its tunnel and its log.
type end struct {
	*Device
	sockets *Sockets // the device's own, or nil with another Bind
	tun     *tuntest.ChannelTUN
	key     mesh.PrivateKey
	addr    mesh.Addresses
	log     *syncBuffer
}

func newEnd(t testing.TB, seed byte) *end { return newEndOn(t, seed, nil) }

// newEndOn is like newEnd, with the given Bind; nil is for sockets of its own.
func newEndOn(t testing.TB, seed byte, bind conn.Bind) *end {
	t.Helper()
	e := &end{tun: tuntest.NewChannelTUN(), key: meshtest.Key(t, seed), log: new(syncBuffer)}
	addr, err := mesh.DefaultPrefixes().Derive(e.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	e.addr = addr
	e.Device, err = NewDevice(Options{
		TUN: e.tun.TUN(), PrivateKey: e.key, Addresses: addr.List(), Bind: bind,
		Logger: slog.New(slog.NewTextHandler(e.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	e.sockets, _ = e.bind.(*Sockets)
	t.Cleanup(e.Close)
	return e
}

// allowed returns the allowed IPs of a peer with a pair of addresses.
func allowed(a mesh.Addresses) []netip.Prefix {
	p := a.Prefixes()
	return p[:]
}

// prefixes parses prefixes.
func prefixes(texts ...string) (out []netip.Prefix) {
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

// fresh returns e's current statistics, not those of the cache.
func (e *end) fresh(t testing.TB) map[mesh.PublicKey]PeerStats {
	t.Helper()
	stats, err := e.readStats()
	if err != nil {
		t.Fatal(err)
	}
	return stats
}

// peer returns e as a peer of another end.
func (e *end) peer() Peer {
	return Peer{
		PublicKey: e.PublicKey(), AllowedIPs: allowed(e.addr),
		Endpoint: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), e.ListenPort()),
	}
}

// send passes a packet to e through its tunnel device; receive waits for a packet to arrive.
func (e *end) send(t testing.TB, packet []byte) {
	t.Helper()
	select {
	case e.tun.Outbound <- packet:
	case <-time.After(patience):
		t.Fatal("the device doesn't read from its tunnel")
	}
}

func (e *end) receive(t testing.TB) []byte {
	t.Helper()
	select {
	case p := <-e.tun.Inbound:
		return p
	case <-time.After(patience):
		t.Fatalf("no packet arrived; log:\n%s", e.log)
		return nil
	}
}

func newPair(t testing.TB) (a, b *end) {
	t.Helper()
	a, b = newEnd(t, 20), newEnd(t, 21)
	for _, err := range []error{a.Set(b.peer()), b.Set(a.peer())} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

// ping sends a packet in each direction and compares those that arrive with them.
func ping(t testing.TB, a, b *end) {
	t.Helper()
	for range 2 {
		want := tuntest.Ping(b.addr[0], a.addr[0])
		a.send(t, want)
		if got := b.receive(t); !bytes.Equal(got, want) {
			t.Fatalf("sent %x, arrived %x", want, got)
		}
		a, b = b, a
	}
}

// TestTwoDevices carries packets between two devices: the statistics count them, no log has a
// complete key, and nothing is left of a removed peer.
func TestTwoDevices(t *testing.T) {
	a, b := newPair(t)
	ping(t, a, b)

	s := a.fresh(t)[b.PublicKey()]
	if s.RxBytes == 0 || s.TxBytes == 0 || time.Since(s.LastHandshake).Abs() > time.Hour || s.Endpoint != b.peer().Endpoint {
		t.Errorf("statistics after a ping: %+v", s)
	}
	for _, e := range []*end{a, b} {
		for _, key := range []string{a.key.Reveal(), a.PublicKey().String(), b.PublicKey().String()} {
			if strings.Contains(e.log.String(), key[:40]) {
				t.Errorf("the log holds a whole key: %s", e.log)
			}
		}
	}
	if err := a.Remove(b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	if got := a.Peers(); len(got) != 0 {
		t.Errorf("after Remove there are peers %v, want none", got)
	}
	if stats := a.fresh(t); len(stats) != 0 {
		t.Errorf("after Remove there are statistics %v, want none", stats)
	}
}

// TestChangeKeepsSession changes the endpoint, the keepalive and the addresses of a peer that
// has a session, and adds and removes other peers: no new handshake follows.
func TestChangeKeepsSession(t *testing.T) {
	a, b := newPair(t)
	ping(t, a, b)
	before := a.fresh(t)

	other := newEnd(t, 22)
	changed := b.peer()
	changed.Keepalive = 25 * time.Second
	moved := other.peer()
	for _, set := range []Peer{changed, changed, moved, {PublicKey: moved.PublicKey, AllowedIPs: moved.AllowedIPs}} {
		if err := a.Set(set); err != nil {
			t.Fatal(err)
		}
	}
	changed.AllowedIPs[1] = netip.MustParsePrefix("fd6d:6573:6800::7/128")
	if err := a.Set(changed); err != nil {
		t.Fatal(err)
	}
	if err := a.Remove(moved.PublicKey); err != nil {
		t.Fatal(err)
	}
	ping(t, a, b)
	after := a.fresh(t)
	if x, y := before[b.PublicKey()], after[b.PublicKey()]; !x.LastHandshake.Equal(y.LastHandshake) || x.RxBytes >= y.RxBytes {
		t.Errorf("the session changed: %+v, then %+v", x, y)
	}
}

// TestDisallowedSource sends packets with a source that isn't the peer's: both are counted as
// spoofed. The count is taken from wireguard-go's log message, so the test fails when its
// text changes.
func TestDisallowedSource(t *testing.T) {
	a, b := newPair(t)
	ping(t, a, b)
	a.send(t, tuntest.Ping(b.addr[0], netip.MustParseAddr("100.64.0.9")))
	v6 := make([]byte, 40)
	v6[0], v6[6], v6[7] = 0x60, 59, 64
	copy(v6[8:], netip.MustParseAddr("fd6d:6573:6800::9").AsSlice())
	copy(v6[24:], b.addr[1].AsSlice())
	a.send(t, v6)
	ping(t, a, b) // packets arrive in order, so the two were judged before
	if got := b.fresh(t)[a.PublicKey()].Spoofed; got != 2 {
		t.Errorf("%d spoofed packets counted, want 2", got)
	}
}

// TestLearnedEndpoint gives a new device the endpoint that an earlier one learned of a peer.
// The device sends a handshake there by itself, and a learned endpoint never replaces one
// from which the device itself has heard the peer since.
func TestLearnedEndpoint(t *testing.T) {
	a, b := newEnd(t, 20), newEnd(t, 21)
	if err := b.Set(Peer{PublicKey: a.PublicKey(), AllowedIPs: allowed(a.addr)}); err != nil {
		t.Fatal(err)
	}
	learned := Peer{PublicKey: b.PublicKey(), AllowedIPs: allowed(b.addr), Learned: b.peer().Endpoint}
	if err := a.Sync([]Peer{learned}); err != nil {
		t.Fatal(err)
	}
	// Neither tunnel device got a packet, so the device begins by itself.
	limit := time.Now().Add(patience)
	for a.fresh(t)[b.PublicKey()].LastHandshake.IsZero() {
		if time.Now().After(limit) {
			t.Fatalf("no handshake with the learned endpoint; log:\n%s", a.log)
		}
		time.Sleep(time.Millisecond)
	}
	ping(t, b, a)
	before := a.fresh(t)[b.PublicKey()]

	learned.Learned = netip.MustParseAddrPort("192.0.2.1:9")
	for _, err := range []error{a.Set(learned), a.Sync([]Peer{learned})} {
		if err != nil {
			t.Fatal(err)
		}
	}
	learned.Keepalive = 25 * time.Second
	if err := a.Set(learned); err != nil {
		t.Fatal(err)
	}
	if got := a.fresh(t)[b.PublicKey()]; got.Endpoint != before.Endpoint || !got.LastHandshake.Equal(before.LastHandshake) {
		t.Errorf("a learned endpoint replaced one from which the peer was heard: %+v, before %+v", got, before)
	}
	if got := a.Peers(); len(got) != 1 || got[0].Endpoint.IsValid() {
		t.Errorf("a learned endpoint counts as configured: %+v", got)
	}
}

// TestSetRefuses calls Set with one wrong field each: it returns an error, and the peers stay
// as they were.
func TestSetRefuses(t *testing.T) {
	a, b := newPair(t)
	good := newEnd(t, 23).peer()
	for name, change := range map[string]func(*Peer){
		"own key":         func(p *Peer) { p.PublicKey = a.PublicKey() },
		"no key":          func(p *Peer) { p.PublicKey = mesh.PublicKey{} },
		"another's IPv4":  func(p *Peer) { p.AllowedIPs[0] = b.peer().AllowedIPs[0] },
		"another's IPv6":  func(p *Peer) { p.AllowedIPs[1] = b.peer().AllowedIPs[1] },
		"one more":        func(p *Peer) { p.AllowedIPs = append(p.AllowedIPs, b.peer().AllowedIPs[0]) },
		"no prefix":       func(p *Peer) { p.AllowedIPs[0] = netip.Prefix{} },
		"mapped":          func(p *Peer) { p.AllowedIPs[1] = netip.PrefixFrom(netip.AddrFrom16(b.addr[0].As16()), 128) },
		"host bits":       func(p *Peer) { p.AllowedIPs[0] = netip.MustParsePrefix("192.0.2.1/24") },
		"half a second":   func(p *Peer) { p.Keepalive = time.Second / 2 },
		"long keepalive":  func(p *Peer) { p.Keepalive = mesh.MaxKeepalive + time.Second },
		"learned port 0":  func(p *Peer) { p.Learned = netip.AddrPortFrom(b.addr[0], 0) },
		"endpoint port 0": func(p *Peer) { p.Endpoint = netip.AddrPortFrom(b.addr[0], 0) },
	} {
		bad := good
		bad.AllowedIPs = slices.Clone(good.AllowedIPs)
		change(&bad)
		if err := a.Set(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
		if got := a.Peers(); len(got) != 1 || !got[0].same(b.peer()) {
			t.Errorf("%s: the peers are now %v", name, got)
		}
	}
	ping(t, a, b)
}

// TestSync moves addresses between peers, each time in one Sync: sessions and the peers that
// don't change stay.
func TestSync(t *testing.T) {
	a, b := newPair(t)
	ping(t, a, b)
	make := func(seed byte, v4, v6 string) Peer {
		return Peer{
			PublicKey:  meshtest.Key(t, seed).Public(),
			AllowedIPs: prefixes(v4+"/32", v6+"/128"),
		}
	}
	x, y, z := make(30, "100.64.1.1", "fd6d:6573:6800::11"), make(31, "100.64.1.2", "fd6d:6573:6800::12"), make(32, "100.64.1.3", "fd6d:6573:6800::13")
	traded, freed := x, y
	traded.AllowedIPs, freed.AllowedIPs = y.AllowedIPs, x.AllowedIPs
	chain := x
	chain.AllowedIPs = z.AllowedIPs
	zMoved := make(32, "100.64.1.4", "fd6d:6573:6800::14")
	for i, want := range [][]Peer{
		{b.peer(), x, y},
		{b.peer(), traded, freed},
		{b.peer(), x, z},
		{b.peer(), chain, zMoved},
		{b.peer()},
	} {
		if err := a.Sync(want); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		got := a.Peers()
		if len(got) != len(want) {
			t.Fatalf("step %d: %d peers, want %d", i, len(got), len(want))
		}
		config, err := a.wg.IpcGet()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range want {
			section := fmt.Sprintf("public_key=%x\n", p.PublicKey[:])
			_, section, _ = strings.Cut(config, section)
			section, _, _ = strings.Cut(section, "public_key=")
			if !strings.Contains(section, "allowed_ip="+p.AllowedIPs[0].String()+"\n") || strings.Count(section, "allowed_ip=") != 2 {
				t.Errorf("step %d: peer %v has %s", i, p.PublicKey, section)
			}
		}
	}
	if err := a.Sync([]Peer{b.peer(), {}}); err == nil {
		t.Error("a peer without a key is accepted")
	}
	ping(t, a, b)
	if before := strings.Count(b.log.String(), "Received handshake"); before != 1 {
		t.Errorf("%d handshakes, want only the first one", before)
	}
}

// TestNewDeviceRefuses creates a device without options, and one on a port in use: NewDevice
// returns an error, and closes the tunnel device.
func TestNewDeviceRefuses(t *testing.T) {
	if _, err := NewDevice(Options{}); err == nil {
		t.Error("empty options are accepted")
	}
	taken, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	tunnel := tuntest.NewChannelTUN()
	_, err = NewDevice(Options{
		TUN: tunnel.TUN(), ListenPort: uint16(taken.LocalAddr().(*net.UDPAddr).Port),
		PrivateKey: meshtest.Key(t, 24), Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err == nil {
		t.Fatal("a port in use is accepted")
	}
	if _, open := <-tunnel.TUN().Events(); open {
		// The first event is EventUp. Then the channel must be closed.
		if _, open = <-tunnel.TUN().Events(); open {
			t.Error("the tunnel device stays open")
		}
	}
}

// TestDoneWhenTunnelDies has the system remove the tunnel device: Done is closed.
func TestDoneWhenTunnelDies(t *testing.T) {
	d, err := NewDevice(Options{
		TUN: deadTUN{tuntest.NewChannelTUN().TUN()}, PrivateKey: meshtest.Key(t, 25), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Done():
	case <-time.After(patience):
		t.Error("Done isn't closed, though the tunnel device was removed")
	}
	d.Close()
}

// benchPeers returns n peers whose keys and addresses are made from numbers.
func benchPeers(n int) []Peer {
	peers := make([]Peer, n)
	for i := range peers {
		peers[i].PublicKey = mesh.PublicKey{1: 9, 2: byte(i), 3: byte(i >> 8), 4: byte(i >> 16)}
		a, _ := mesh.DefaultPrefixes().Propose(peers[i].PublicKey, func(netip.Addr) bool { return false })
		a[0] = netip.AddrFrom4([4]byte{100, 64 + byte(i>>16), byte(i >> 8), byte(i)})
		peers[i].AllowedIPs = allowed(a)
	}
	return peers
}

func BenchmarkDevice(b *testing.B) {
	const n = 10_000
	peers := benchPeers(n + 1)
	tunnel := tuntest.NewChannelTUN()
	d, err := NewDevice(Options{TUN: tunnel.TUN(), PrivateKey: meshtest.Key(b, 26), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	if err := d.Sync(peers[:n]); err != nil {
		b.Fatal(err)
	}
	last := peers[n]
	b.Run("addremove", func(b *testing.B) {
		for b.Loop() {
			if d.Set(last) != nil || d.Remove(last.PublicKey) != nil {
				b.Fatal("refused")
			}
		}
	})
	b.Run("change", func(b *testing.B) {
		p := peers[7]
		for b.Loop() {
			p.Keepalive ^= time.Second
			if d.Set(p) != nil {
				b.Fatal("refused")
			}
		}
	})
	b.Run("sync one changed", func(b *testing.B) {
		for b.Loop() {
			peers[8].Keepalive ^= time.Second
			if d.Sync(peers[:n]) != nil {
				b.Fatal("refused")
			}
		}
	})
	b.Run("stats uncached", func(b *testing.B) {
		for b.Loop() {
			if _, err := d.readStats(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("stats", func(b *testing.B) {
		for b.Loop() {
			if _, err := d.Stats(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
