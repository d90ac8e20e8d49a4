package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun/tuntest"
)

// until waits until done reports true, which usually takes milliseconds; what describes it.
func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	for limit := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// squat binds the port as another program would, or returns nil if it is taken.
func squat(port uint16) net.PacketConn {
	c, err := net.ListenPacket("udp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return nil
	}
	return c
}

// rebind has e rebind its sockets, as on a change of networks.
func rebind(t *testing.T, e *end) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := e.Rebind(ctx); err != nil {
		t.Error(err)
	}
}

// released waits until the port is free: the system may have given it to another program
// meanwhile.
func released(t *testing.T, port uint16) {
	t.Helper()
	until(t, fmt.Sprintf("port %d is free", port), func() bool {
		c := squat(port)
		if c != nil {
			c.Close()
		}
		return c != nil
	})
}

// end ends the socket of a family as the system would: the descriptor is dead, and the port
// is free. The returned function reports whether another socket has replaced it.
func (s *Sockets) end(family int) (replaced func() bool) {
	f := s.families.Load()[family]
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.sock
	old.close()
	return func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.sock != old && f.err == nil
	}
}

// TestRebindKeepsThePort has another program try to bind the port while the host changes
// networks: the port is never free.
func TestRebindKeepsThePort(t *testing.T) {
	a, b := newPair(t)
	ping(t, a, b)
	stop, got := make(chan struct{}), make(chan bool)
	go func() {
		taken := false
		for {
			select {
			case <-stop:
				got <- taken
				return
			default:
			}
			if c := squat(a.ListenPort()); c != nil {
				taken = true
				c.Close()
			}
		}
	}()
	for range 200 {
		rebind(t, a)
	}
	close(stop)
	if <-got {
		t.Error("another socket was bound to the port")
	}
	ping(t, a, b)
}

// TestSquatterLeaves has the system end the socket, and another program bind the port at
// once. Listening and Rebind report that the port is taken. Once the program closes its
// socket, the device binds the port again by itself.
func TestSquatterLeaves(t *testing.T) {
	a, b := newPair(t)
	ping(t, a, b)
	port := a.ListenPort()
	open, free := a.sockets.open, make(chan struct{})
	taken := make(chan net.PacketConn, 1)
	a.sockets.open = func(network string, port uint16, beside *socket) (*socket, error) {
		// The other program binds the port before the receiver does.
		select {
		case <-free:
			return open(network, port, beside)
		default:
			if c := squat(port); c != nil {
				taken <- c
			}
			return nil, syscall.EADDRINUSE
		}
	}
	a.sockets.end(0)
	squatter := <-taken
	until(t, "the device says that the port is taken", func() bool { return errors.Is(a.Listening(), syscall.EADDRINUSE) })
	err := a.Listening()
	if want := fmt.Sprintf("bind UDP port: %d over udp4: ", port); !strings.HasPrefix(err.Error(), want) {
		t.Errorf("Listening: %v, want %q", err, want)
	}
	close(free) // from here on only the squatter keeps the port from the device
	ended, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	if err := a.Rebind(ended); !errors.Is(err, syscall.EADDRINUSE) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Rebind while another program has the port: %v", err)
	}
	cancel()
	if a.Listening() == nil {
		t.Fatal("Listening reports no error while another program has the port")
	}
	squatter.Close()
	until(t, "the port is served again", func() bool { return a.Listening() == nil })
	if got := a.ListenPort(); got != port {
		t.Errorf("port %d, before %d", got, port)
	}
	ping(t, a, b)
	ping(t, b, a)
}

// TestEndedSocketsAreReplaced ends the sockets more often than wireguard-go's receiver
// tolerates errors: each socket is replaced, and no receiver ends.
func TestEndedSocketsAreReplaced(t *testing.T) {
	a, b := newPair(t)
	for i := range 50 {
		ping(t, a, b)
		replaced := a.sockets.end(i % 2)
		if i%3 == 0 {
			rebind(t, a)
		}
		until(t, "the socket is replaced", replaced)
	}
	ping(t, a, b)
	a.Close()
	rebind(t, a)
	if c := squat(a.ListenPort()); c == nil {
		t.Error("a closed device keeps its port")
	} else {
		c.Close()
	}
}

// TestPortOutlivesTheDevice closes a device, as when its interface is removed, and starts
// another one with the same sockets: the port is never free.
func TestPortOutlivesTheDevice(t *testing.T) {
	sockets := NewSockets(slog.New(slog.DiscardHandler))
	defer sockets.Release()
	a, b := newEnd(t, 20), newEnd(t, 21)
	a.Close()
	port := uint16(0)
	for range 2 {
		a.tun = tuntest.NewChannelTUN()
		d, err := NewDevice(Options{
			TUN: a.tun.TUN(), PrivateKey: a.key, Logger: slog.New(slog.DiscardHandler), Bind: sockets, ListenPort: port,
		})
		if err != nil {
			t.Fatal(err)
		}
		a.Device = d
		if port != 0 && d.ListenPort() != port {
			t.Errorf("port %d, before %d", d.ListenPort(), port)
		}
		port = d.ListenPort()
		for _, err := range []error{a.Set(b.peer()), b.Remove(a.PublicKey()), b.Set(a.peer())} {
			if err != nil {
				t.Fatal(err)
			}
		}
		ping(t, a, b)
		// The interface goes down and up, which ends the receivers.
		if err := d.wg.Down(); err != nil {
			t.Fatal(err)
		}
		if c := squat(port); c != nil {
			c.Close()
			t.Error("the port is free while the interface is down")
		}
		if err := d.wg.Up(); err != nil {
			t.Fatal(err)
		}
		ping(t, a, b)
		d.Close()
		if c := squat(port); c != nil {
			c.Close()
			t.Error("the port is free after the device was closed")
		}
	}
}

// listening returns open sockets without a device.
func listening(t *testing.T) *Sockets {
	t.Helper()
	s := NewSockets(slog.New(slog.DiscardHandler))
	if _, _, err := s.Open(0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Release)
	return s
}

// TestTakenPortChangesNothing asks for another port that another program has in one of the
// address families. Open fails, the sockets keep their port, and no socket is left on the
// other one. After Release, Open returns sockets with receivers again.
func TestTakenPortChangesNothing(t *testing.T) {
	for i, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := listening(t)
			before := s.port
			other, err := net.ListenPacket(network, ":0")
			if err != nil {
				t.Skipf("no %s: %v", network, err)
			}
			defer other.Close()
			wanted := other.LocalAddr().(*net.UDPAddr).AddrPort().Port()
			if _, _, err := s.Open(wanted); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("Open of port %d, which another program has, returns %v, want EADDRINUSE", wanted, err)
			}
			if c := squat(before); c != nil {
				c.Close()
				t.Error("the former port is free")
			}
			if fns, port, err := s.Open(0); err != nil || port != before || len(fns) == 0 {
				t.Errorf("port %d with %d receivers, %v; before %d", port, len(fns), err, before)
			}
			if i == 1 { // IPv6 is taken, and IPv4 was bound before it
				released(t, wanted)
			}
			s.Release()
			if fns, port, err := s.Open(0); err != nil || port == 0 || len(fns) == 0 {
				t.Errorf("after Release: port %d with %d receivers, %v", port, len(fns), err)
			}
		})
	}
}

// TestPortIsDrawnAgain has another program hold in IPv6 the port that the system chose for
// IPv4: Open has the system choose another port.
func TestPortIsDrawnAgain(t *testing.T) {
	s := NewSockets(slog.New(slog.DiscardHandler))
	defer s.Release()
	open, drawn := s.open, []uint16(nil)
	s.open = func(network string, port uint16, beside *socket) (*socket, error) {
		if network == "udp6" && len(drawn) < 3 {
			drawn = append(drawn, port)
			return nil, syscall.EADDRINUSE
		}
		return open(network, port, beside)
	}
	if _, port, err := s.Open(0); err != nil || port == 0 {
		t.Errorf("port %d, %v", port, err)
	}
	for _, port := range drawn {
		if port == s.port {
			continue
		}
		released(t, port)
	}
}

// TestAttemptsGoOn has a port that can't be bound again: the receiver tries at least once per
// openPauseMax, without end, and at once when the host's networks change.
func TestAttemptsGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listening(t)
		var tries atomic.Int64
		s.open = func(string, uint16, *socket) (*socket, error) {
			tries.Add(1)
			return nil, syscall.EADDRINUSE
		}
		s.end(0)
		done := make(chan error)
		f := s.list()[0]
		go func() {
			_, err := f.receive(nil, nil, nil)
			done <- err
		}()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n, least := tries.Load(), int64(time.Hour/openPauseMax); n < least || n > 2*least {
			t.Errorf("%d attempts in an hour, want %d to %d", n, least, 2*least)
		}
		time.Sleep(openPauseMin)
		synctest.Wait()
		before := tries.Load()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := s.Renew(ctx); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("Renew returns %v, want EADDRINUSE", err)
		}
		if tries.Load() != before+1 {
			t.Errorf("%d attempts when the networks changed, want 1", tries.Load()-before)
		}
		s.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("the receiver ended with %v", err)
		}
	})
}

// TestReleaseWhileReplaced calls Release while a socket is being replaced: the new socket
// doesn't keep the port.
func TestReleaseWhileReplaced(t *testing.T) {
	s := listening(t)
	port, open := s.port, s.open
	begun, goOn := make(chan struct{}), make(chan struct{})
	s.open = func(network string, port uint16, beside *socket) (*socket, error) {
		close(begun)
		<-goOn
		return open(network, port, nil)
	}
	s.end(0)
	done := make(chan error)
	f := s.list()[0]
	go func() {
		_, err := f.receive(nil, nil, nil)
		done <- err
	}()
	<-begun
	s.Release()
	close(goOn)
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("the receiver ended with %v", err)
	}
	released(t, port)
}

// TestCloseWhileReplaced calls Close while a socket is being replaced: the receiver ends, and
// the receiver of the next Open reads from the new socket.
func TestCloseWhileReplaced(t *testing.T) {
	s := listening(t)
	open := s.open
	begun, goOn := make(chan struct{}), make(chan struct{})
	s.open = func(network string, port uint16, beside *socket) (*socket, error) {
		close(begun)
		<-goOn
		return open(network, port, beside)
	}
	replaced := s.end(0)
	done := make(chan error)
	f := s.list()[0]
	go func() {
		_, err := f.receive(nil, nil, nil)
		done <- err
	}()
	<-begun
	s.Close()
	close(goOn)
	if err := <-done; !errors.Is(err, net.ErrClosed) || !replaced() {
		t.Errorf("the receiver ended with %v, a new socket: %t", err, replaced())
	}
	fns, port, err := s.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(port)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("datagram")); err != nil {
		t.Fatal(err)
	}
	sizes := make([]int, 1)
	if n, err := fns[0]([][]byte{make([]byte, 100)}, sizes, make([]conn.Endpoint, 1)); n != 1 || err != nil || sizes[0] != len("datagram") {
		t.Errorf("%d datagrams of %v bytes, %v", n, sizes, err)
	}
}

// TestSenderFindsEndedSocket sends with a socket that the system ended, before a receiver has
// noticed: Send fails, and Listening reports it.
func TestSenderFindsEndedSocket(t *testing.T) {
	s := listening(t)
	s.end(0)
	to, err := s.ParseEndpoint("127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send([][]byte{{1}}, to); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Send: %v", err)
	}
	if err := s.Listening(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Listening: %v", err)
	}
}

// TestReopenedIsHeard replaces a socket of a host that has nothing to send: the host sends to
// its peers all the same, as their datagrams may have been lost meanwhile.
func TestReopenedIsHeard(t *testing.T) {
	a, b := newPair(t)
	// In one direction only, as an end that received data sends a keepalive by itself.
	a.send(t, tuntest.Ping(b.addr[0], a.addr[0]))
	b.receive(t)
	before := b.fresh(t)[a.PublicKey()].RxBytes
	a.sockets.end(0)
	until(t, "the peer hears from the host", func() bool { return b.fresh(t)[a.PublicKey()].RxBytes > before })
}

// relay carries datagrams between two ends. Those to the second end, at to, have source as
// their source address. It returns the address to which the first end sends.
func relay(t *testing.T, to netip.AddrPort, source string) netip.AddrPort {
	t.Helper()
	front, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	back, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(source)})
	if err != nil {
		t.Skipf("no address %s on this system's loopback: %v", source, err)
	}
	t.Cleanup(func() { front.Close(); back.Close() })
	heard := make(chan netip.AddrPort, 1)
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := front.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			select {
			case heard <- from:
			default:
			}
			_, _ = back.WriteToUDPAddrPort(b[:n], to)
		}
	}()
	go func() {
		b := make([]byte, 1<<16)
		var first netip.AddrPort
		for {
			n, _, err := back.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if !first.IsValid() {
				first = <-heard
			}
			_, _ = front.WriteToUDPAddrPort(b[:n], first)
		}
	}()
	return front.LocalAddr().(*net.UDPAddr).AddrPort()
}

// TestMeshSourceDiscarded gives the peers mesh addresses of the loopback network, so that
// datagrams can come from them. A datagram from the mesh address of a known peer or of the
// host is discarded; one from another address of that network, as of a carrier, is accepted.
func TestMeshSourceDiscarded(t *testing.T) {
	for source, want := range map[string]bool{"127.0.9.1": true, "127.0.9.2": false, "127.0.9.3": false, "127.0.9.4": false} {
		t.Run(source, func(t *testing.T) {
			a, b, other := newEnd(t, 20), newEnd(t, 21), newEnd(t, 22)
			a.addr[0], other.addr[0] = netip.MustParseAddr("127.0.9.2"), netip.MustParseAddr("127.0.9.3")
			b.loopFilter.add(netip.MustParseAddr("127.0.9.4"))
			toB := b.peer()
			toB.Endpoint = relay(t, b.peer().Endpoint, source)
			fromA := a.peer()
			fromA.Endpoint = netip.AddrPort{}
			for _, err := range []error{b.Sync([]Peer{fromA, other.peer()}), a.Set(toB)} {
				if err != nil {
					t.Fatal(err)
				}
			}
			before := b.sockets.Looped()
			a.send(t, tuntest.Ping(b.addr[0], a.addr[0]))
			if want {
				b.receive(t)
				return
			}
			until(t, "the handshake is discarded", func() bool { return b.sockets.Looped() > before })
			if s := b.fresh(t)[a.PublicKey()]; s.RxBytes != 0 || s.Endpoint.IsValid() {
				t.Errorf("a datagram from %s was accepted: %+v", source, s)
			}
			// Once the peers are removed, datagrams from their addresses are accepted.
			if err := b.Sync(nil); err != nil {
				t.Fatal(err)
			}
			if a := netip.MustParseAddr("127.0.9.3"); b.sockets.loops(netip.AddrPortFrom(a, 51820)) {
				t.Errorf("%v is discarded though no peer has it", a)
			}
		})
	}
}

// TestOwnPlaceDiscarded has a peer's datagrams come from an endpoint of the host itself: they
// are discarded, and nothing is sent to such an endpoint. Datagrams from another port of that
// address are accepted.
func TestOwnPlaceDiscarded(t *testing.T) {
	a, b := newEnd(t, 20), newEnd(t, 21)
	toB := b.peer()
	toB.Endpoint = relay(t, b.peer().Endpoint, "127.0.9.5")
	fromA := a.peer()
	fromA.Endpoint = netip.AddrPort{}
	for _, err := range []error{b.Set(fromA), a.Set(toB)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	a.send(t, tuntest.Ping(b.addr[0], a.addr[0]))
	b.receive(t)
	place := b.fresh(t)[a.PublicKey()].Endpoint
	if place.Addr() != netip.MustParseAddr("127.0.9.5") {
		t.Fatalf("the peer is heard from %v", place)
	}
	heard := func() PeerStats { return b.fresh(t)[a.PublicKey()] }
	b.SetOwnEndpoints([]netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), b.ListenPort()), place})
	rx, looped := heard().RxBytes, b.sockets.Looped()
	a.send(t, tuntest.Ping(b.addr[0], a.addr[0]))
	until(t, "the datagram is discarded", func() bool { return b.sockets.Looped() > looped })
	if s := heard(); s.RxBytes != rx {
		t.Errorf("a datagram from the host's own endpoint was accepted: %+v", s)
	}
	tx := b.sockets.Looped()
	b.send(t, tuntest.Ping(a.addr[0], b.addr[0]))
	until(t, "a datagram to the host's own endpoint is discarded", func() bool { return b.sockets.Looped() > tx })
	// The peer sends from another port now: its datagrams are accepted.
	toB.Endpoint = relay(t, b.peer().Endpoint, "127.0.9.5")
	if err := a.Set(toB); err != nil {
		t.Fatal(err)
	}
	a.send(t, tuntest.Ping(b.addr[0], a.addr[0]))
	b.receive(t)
	if got := heard().Endpoint; got.Addr() != place.Addr() || got == place {
		t.Errorf("the peer is heard from %v, want another port than that of %v", got, place)
	}
	// An endpoint that is no longer the host's is like any other.
	b.SetOwnEndpoints(nil)
	if b.sockets.loops(place) {
		t.Errorf("%v is discarded, though it is no longer the host's endpoint", place)
	}
}

// TestNothingSentToMesh configures a peer with an endpoint that is another peer's mesh
// address: nothing is sent there, and that isn't logged as an error.
func TestNothingSentToMesh(t *testing.T) {
	a, b := newEnd(t, 20), newEnd(t, 21)
	trap, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP("127.0.9.3")})
	if err != nil {
		t.Skipf("no address 127.0.9.3 on this system's loopback: %v", err)
	}
	defer trap.Close()
	other := newEnd(t, 22).peer()
	other.AllowedIPs[0] = netip.MustParsePrefix("127.0.9.3/32")
	other.Endpoint = netip.AddrPort{}
	p := b.peer()
	p.Endpoint = trap.LocalAddr().(*net.UDPAddr).AddrPort()
	if err := a.Sync([]Peer{p, other}); err != nil {
		t.Fatal(err)
	}
	a.send(t, tuntest.Ping(b.addr[0], a.addr[0]))
	until(t, "the handshake is discarded", func() bool { return a.sockets.Looped() > 0 })
	if err := trap.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, _, err := trap.ReadFromUDPAddrPort(make([]byte, 100)); err == nil {
		t.Errorf("%d bytes were sent to a mesh address", n)
	}
	if strings.Contains(a.log.String(), "level=ERROR") {
		t.Errorf("an error is logged: %s", a.log)
	}
}

// TestDiscardAllocates checks the verdict on sources of datagrams, which must not allocate.
func TestDiscardAllocates(t *testing.T) {
	var inside loopFilter
	for _, p := range benchPeers(1000) {
		inside.addPrefixes(p.AllowedIPs)
	}
	s := NewSockets(slog.New(slog.DiscardHandler))
	s.Attach(inside.loops, func() {})
	self := make([]netip.AddrPort, 0, 3)
	for _, text := range []string{"203.0.113.7:51820", "[fe80::1]:51820", "[2001:db8::7]:51820"} {
		self = append(self, netip.MustParseAddrPort(text))
	}
	inside.setSelf(self)
	known := netip.AddrPortFrom(benchPeers(1)[0].AllowedIPs[0].Addr(), 9)
	for text, want := range map[string]bool{
		known.String(): true, "203.0.113.7:51820": true, "[fe80::1%lo]:51820": true, "[2001:db8::7]:51820": true,
		"203.0.113.7:51821": false, "[::]:7": true, "0.0.0.0:7": true, "203.0.113.8:0": true, "203.0.113.8:51820": false, "[fe80::2%lo]:51820": false,
	} {
		at := netip.MustParseAddrPort(text)
		if got := s.loops(at); got != want {
			t.Errorf("%v is discarded: %t, want %t", at, got, want)
		}
		if n := testing.AllocsPerRun(1000, func() { s.loops(at) }); n != 0 {
			t.Errorf("%v: %v allocations", at, n)
		}
	}
}
