package guard

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

func TestMain(m *testing.M) { os.Exit(netlab.Main(m.Run)) }

// kernelHost is the picture's host B in a network namespace: a real tunnel
// device behind a guard, two more interfaces, and forwarding without any packet
// filter, so that the guard alone decides.
type kernelHost struct {
	*netlab.Host
	guard  *Device
	inner  tun.Device
	beyond map[string]*netlab.Host // what is behind its other interfaces
}

// meshLink is the tunnel device's name.
const meshLink = "mh0"

func newKernelHost(t testing.TB) *kernelHost {
	t.Helper()
	if err := netlab.Unavailable(); err != nil {
		t.Skip(err)
	}
	lab, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	b := &kernelHost{beyond: map[string]*netlab.Host{}}
	for _, step := range []func() error{
		func() error { return b.join(lab) },
		b.open,
		b.route,
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = b.guard.Close() })
	if b.guard.wake == nil {
		t.Fatal("the kernel's tunnel device has no read deadlines")
	}
	return b
}

// join makes the host with its uplink and its LAN.
func (b *kernelHost) join(lab *netlab.Lab) (err error) {
	if b.Host, err = lab.Host("B"); err != nil {
		return err
	}
	for _, l := range []struct{ name, own, other string }{
		{"en0", "203.0.113.9/24 2001:db8:1::9/64", "203.0.113.1/24 2001:db8:1::1/64"},
		{"en5", "192.168.77.1/24 2001:db8:77::1/64", "192.168.77.20/24 2001:db8:77::20/64"},
	} {
		other, err := lab.Host("beyond " + l.name)
		if err != nil {
			return err
		}
		b.beyond[l.name] = other
		err = lab.Link(
			netlab.Port{Host: b.Host, Name: l.name, Addrs: prefixes(l.own)},
			netlab.Port{Host: other, Name: l.name, Addrs: prefixes(l.other)})
		if err != nil {
			return err
		}
	}
	return nil
}

// open makes the tunnel device and the guard around it.
func (b *kernelHost) open() error {
	err := b.Do(func() (err error) {
		b.inner, err = tun.CreateTUN(meshLink, 1420)
		return err
	})
	if err != nil {
		return err
	}
	b.guard = New(b.inner, Options{})
	return b.SetUp(meshLink, true)
}

// route gives the tunnel device its addresses and routes, and switches forwarding
// on.
func (b *kernelHost) route() error {
	for _, own := range prefixes("100.64.0.1/32 fd6d:6573:6800::1/128") {
		if err := b.AddAddr(meshLink, own); err != nil {
			return err
		}
	}
	for _, peer := range prefixes("100.64.0.2/31 fd6d:6573:6800::2/127") {
		if err := b.AddRoute(netlab.Route{To: peer, Link: meshLink}); err != nil {
			return err
		}
	}
	for _, gateway := range []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:1::1")} {
		everything := netip.PrefixFrom(gateway, 0).Masked()
		if err := b.AddRoute(netlab.Route{To: everything, Via: gateway}); err != nil {
			return err
		}
	}
	return errors.Join(b.SetSysctl("net.ipv4.ip_forward", "1"), b.SetSysctl("net.ipv6.conf.all.forwarding", "1"))
}

// prefixes reads prefixes separated by spaces.
func prefixes(texts string) (out []netip.Prefix) {
	for _, text := range strings.Fields(texts) {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

// listen returns a UDP socket of the host.
func (b *kernelHost) listen(t testing.TB, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	err := b.Do(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// write gives a packet of a peer to the guard.
func (b *kernelHost) write(t testing.TB, p []byte) {
	t.Helper()
	if _, err := b.guard.Write([][]byte{append(make([]byte, offset), p...)}, offset); err != nil {
		t.Fatal(err)
	}
}

// readFrom reads batches until one has a packet with the source that is wanted.
func (b *kernelHost) readFrom(t testing.TB, want netip.AddrPort) []byte {
	t.Helper()
	for {
		for _, p := range read(t, b.guard) {
			if got, ok := netlab.ParsePacket(p); ok && got.Src == want.Addr() && got.SrcPort == want.Port() {
				return p
			}
		}
	}
}

// TestKernelAnswers has C talk with a socket of the host over the kernel's own
// tunnel device, then denies it: the answer comes although Read is blocked in the
// kernel.
func TestKernelAnswers(t *testing.T) {
	b := newKernelHost(t)
	for _, tt := range []struct{ peer, host netip.Addr }{{flowtest.PeerC4, flowtest.HostB4}, {flowtest.PeerC6, flowtest.HostB6}} {
		b.guard.Set(flowtest.Picture(t, mesh.Incoming))
		server := b.listen(t, at(tt.host, 7000))
		question := flowtest.Datagram(at(tt.peer, 9), at(tt.host, 7000), 8)
		b.write(t, question)
		buf := make([]byte, 100)
		_ = server.SetReadDeadline(time.Now().Add(patience))
		n, from, err := server.ReadFromUDPAddrPort(buf)
		if err != nil || n != 8 || from != at(tt.peer, 9) {
			t.Fatalf("the socket got %d bytes from %v, %v", n, from, err)
		}
		if _, err := server.WriteToUDPAddrPort([]byte("answer"), from); err != nil {
			t.Fatal(err)
		}
		if p := b.readFrom(t, at(tt.host, 7000)); !bytes.HasSuffix(p, []byte("answer")) {
			t.Errorf("the answer on its way to C is %x", p)
		}

		b.guard.Set(flowtest.Picture(t, 0))
		if _, err := server.WriteToUDPAddrPort([]byte("cut"), from); err != nil {
			t.Fatal(err)
		}
		got := make(chan []byte, 1)
		go func() { got <- b.readFrom(t, netip.AddrPortFrom(tt.host, 0)) }()
		time.Sleep(10 * time.Millisecond) // most likely blocked by now; right either way
		b.write(t, question)
		select {
		case p := <-got:
			checkAnswer(t, p, tt.host, tt.peer, question)
		case <-time.After(patience):
			t.Fatal("no answer comes")
		}
		_ = server.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, _, err := server.ReadFromUDPAddrPort(buf); err == nil {
			t.Errorf("the socket got %d bytes after the denial", n)
		}
	}
}

// TestKernelTurnsRound is a host whose own addresses lead into the tunnel device,
// as a Mac's do. It talks to itself all the same, with the guard open and closed.
// Without the guard nothing arrives.
func TestKernelTurnsRound(t *testing.T) {
	b := newKernelHost(t)
	for _, own := range []netip.Addr{flowtest.HostB4, flowtest.HostB6} {
		if err := b.TurnOut(meshLink, own); err != nil {
			t.Fatal(err)
		}
	}
	// What WireGuard does with the device.
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		bufs, sizes := make([][]byte, b.guard.BatchSize()), make([]int, b.guard.BatchSize())
		for i := range bufs {
			bufs[i] = make([]byte, 65536)
		}
		for {
			if _, err := b.guard.Read(bufs, sizes, offset); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = b.guard.Close()
		<-stopped
	})
	r := flowtest.Picture(t, 0)
	b.guard.Set(r)
	for _, in := range []*policy.Ruleset{r, nil} {
		b.guard.Set(in)
		for _, own := range []netip.Addr{flowtest.HostB4, flowtest.HostB6} {
			if got, err := b.toItself(own); err != nil || got != 1<<20 {
				t.Errorf("open %v: %d bytes by TCP to %v: %v", in != nil, got, own, err)
			}
		}
	}
	b.guard.own.Store(newOwn(nil))
	if got, err := b.toItself(flowtest.HostB4); err == nil {
		t.Errorf("%d bytes without the guard, so the test shows nothing", got)
	}
}

// toItself sends a mebibyte from the host to one of its own addresses and returns
// how much arrived.
func (b *kernelHost) toItself(own netip.Addr) (received int64, err error) {
	err = b.Do(func() error {
		l, err := net.Listen("tcp", at(own, 0).String())
		if err != nil {
			return err
		}
		defer func() { _ = l.Close() }()
		got := make(chan int64, 1)
		go func() {
			c, err := l.Accept()
			if err != nil {
				got <- 0
				return
			}
			defer func() { _ = c.Close() }()
			n, _ := io.Copy(io.Discard, c)
			got <- n
		}()
		c, err := net.DialTimeout("tcp", l.Addr().String(), 2*time.Second)
		if err != nil {
			return err
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		_, err = c.Write(make([]byte, 1<<20))
		if err := errors.Join(err, c.Close()); err != nil {
			return err
		}
		received = <-got
		return nil
	})
	return received, err
}

// TestKernelMutated sends random and mutated packets of C, who may only route,
// through the guard and the forwarding kernel, and looks at all that leaves the
// host with a source of C's or A's: internet by the uplink, and nothing else.
func TestKernelMutated(t *testing.T) {
	n := 1_000_000
	if testing.Short() {
		n = 50_000
	}
	b := newKernelHost(t)
	r := flowtest.Picture(t, mesh.Routing)
	b.guard.Set(r)
	var left, wrong atomic.Int64
	watch, err := b.Watch(func(p netlab.Packet) bool {
		_, ofPeer := r.PeerByAddr(p.Src)
		if !p.Out || p.Link == meshLink || !ofPeer {
			return false
		}
		left.Add(1)
		if p.Link == "en0" && r.Class(p.Dst) == policy.Internet {
			return false
		}
		wrong.Add(1)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(5, 6))
	seeds := seedPackets()
	const batch = 64
	for done := 0; done < n; done += batch {
		bufs := make([][]byte, batch)
		for i := range bufs {
			bufs[i] = append(make([]byte, offset), flowtest.Mutate(random, seeds[random.IntN(len(seeds))])...)
		}
		// The kernel may refuse what the guard lets through.
		_, _ = b.guard.Write(bufs, offset)
	}
	if err := watch.Sync(); err != nil {
		t.Fatal(err)
	}
	bad, err := watch.Packets()
	if err != nil {
		t.Log(err) // packets that the watch lost aren't judged
	}
	for _, p := range bad[:min(len(bad), 5)] {
		t.Errorf("by %s leaves %x", p.Link, p.Data)
	}
	if left.Load() == 0 {
		t.Error("nothing left the host, so the test shows nothing")
	}
	t.Logf("%d packets, %d left the host, %d wrongly", n, left.Load(), wrong.Load())
}

// sourceTUN is a tunnel device that always has the same packet to read, in
// batches, until it is told to stop.
type sourceTUN struct {
	tun.Device
	packet []byte
	stop   chan struct{}
	credit chan int // how many packets the next Read gives
}

func (s *sourceTUN) BatchSize() int { return 128 }

func (s *sourceTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case n := <-s.credit:
		for i := range n {
			sizes[i] = copy(bufs[i][offset:], s.packet)
		}
		return n, nil
	case <-s.stop:
		return 0, os.ErrClosed
	}
}

func (s *sourceTUN) Close() error {
	close(s.stop)
	return s.Device.Close()
}

// countTUN counts what is written to the real device behind it.
type countTUN struct {
	tun.Device
	packets atomic.Int64
}

func (c *countTUN) Write(bufs [][]byte, offset int) (int, error) {
	n := len(bufs)
	_, err := c.Device.Write(bufs, offset)
	c.packets.Add(int64(n))
	return n, err
}

// BenchmarkForwarded sends packets by WireGuard from one device to another, that
// writes them to the kernel's tunnel device, with the guard between and without,
// in turns. The processor time that a packet costs is measured: throughput is
// bound by it, and a busy machine doesn't change it as much.
func BenchmarkForwarded(b *testing.B) {
	h := newKernelHost(b)
	h.guard.Set(flowtest.Picture(b, 7))
	plain, guarded := newPipe(b, h, false), newPipe(b, h, true)
	var cost [2]time.Duration
	const turn = 64 * 100
	plain.send(b, turn)
	guarded.send(b, turn)
	rounds := 0
	for b.Loop() {
		for i, p := range []*pipe{plain, guarded} {
			before := cpuTime(b)
			p.send(b, turn)
			cost[i] += cpuTime(b) - before
		}
		rounds++
	}
	perPacket := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / float64(rounds*turn) }
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(perPacket(cost[0]), "cpu-ns/packet-without")
	b.ReportMetric(perPacket(cost[1]), "cpu-ns/packet-with")
	b.ReportMetric(float64(cost[0])/float64(cost[1]), "throughput-ratio")
}

// pipe is a peer that sends to the host by WireGuard.
type pipe struct {
	source *sourceTUN
	sink   *countTUN
}

// newPipe starts two WireGuard devices in the host's namespace.
func newPipe(b *testing.B, h *kernelHost, guarded bool) *pipe {
	b.Helper()
	p := &pipe{
		source: &sourceTUN{
			Device: tuntest.NewChannelTUN().TUN(), stop: make(chan struct{}), credit: make(chan int),
			packet: flowtest.TCPSegment(at(flowtest.PeerC4, 40000), at(flowtest.LAN4, 9), flowtest.ACK, 1300),
		},
		sink: &countTUN{Device: h.inner},
	}
	var into tun.Device = unclosed{p.sink, make(chan struct{})}
	if guarded {
		g := New(into, Options{})
		g.Set(flowtest.Picture(b, 7))
		into = g
	}
	var devices [2]*tunnel.Device
	keys := [2]mesh.PrivateKey{}
	for i, t := range []tun.Device{p.source, into} {
		key, err := mesh.GeneratePrivateKey(rand.NewChaCha8([32]byte{byte(i)}))
		if err != nil {
			b.Fatal(err)
		}
		keys[i] = key
		err = h.Do(func() (err error) {
			devices[i], err = tunnel.NewDevice(tunnel.Options{TUN: t, PrivateKey: key, Logger: slog.New(slog.DiscardHandler)})
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(devices[i].Close)
	}
	addresses := []mesh.Addresses{{flowtest.PeerC4, flowtest.PeerC6}, {flowtest.LAN4, flowtest.LAN6}}
	for i, d := range devices {
		err := h.Do(func() error {
			peer := addresses[1-i].Prefixes()
			return d.Set(tunnel.Peer{
				PublicKey: keys[1-i].Public(), AllowedIPs: peer[:],
				Endpoint: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), devices[1-i].ListenPort()),
			})
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	return p
}

// unclosed is a device that its user can't close, and that has nothing to read.
type unclosed struct {
	*countTUN
	done chan struct{}
}

func (unclosed) File() *os.File           { return nil }
func (unclosed) Events() <-chan tun.Event { return nil }

func (u unclosed) Close() error {
	close(u.done)
	return nil
}

func (u unclosed) Read([][]byte, []int, int) (int, error) {
	<-u.done
	return 0, os.ErrClosed
}

// send sends n packets and waits until they are written, a batch at a time so
// that none is lost on the way.
func (p *pipe) send(b *testing.B, n int) {
	b.Helper()
	const batch = 64
	for range n / batch {
		want := p.sink.packets.Load() + batch
		p.source.credit <- batch
		for deadline := time.Now().Add(patience); p.sink.packets.Load() < want; {
			if time.Now().After(deadline) {
				b.Fatal(fmt.Errorf("%d of %d packets arrive", p.sink.packets.Load(), want))
			}
			time.Sleep(10 * time.Microsecond)
		}
	}
}

// cpuTime is the processor time that this process has used.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
