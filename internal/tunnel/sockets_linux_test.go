package tunnel

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// asNobody runs do as user nobody, on a thread of its own that ends with the goroutine.
func asNobody(t *testing.T, do func()) (done chan struct{}) {
	t.Helper()
	done = make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread keeps the user id
		const nobody = 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			t.Error(errno)
			return
		}
		do()
	}()
	return done
}

// TestReplacedSocketsAreNotShared replaces sockets that still hold their port while another
// user tries to bind it in every way that the system offers: none succeeds.
func TestReplacedSocketsAreNotShared(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("not root: can't act as another user")
	}
	a, b := newPair(t)
	ping(t, a, b)
	var stop atomic.Bool
	var tries, taken atomic.Int64
	ways := []struct {
		option  int
		address [4]byte
	}{{unix.SO_REUSEPORT, [4]byte{}}, {unix.SO_REUSEADDR, [4]byte{}}, {unix.SO_REUSEPORT, [4]byte{127, 0, 0, 1}}}
	done := asNobody(t, func() {
		for i := 0; !stop.Load(); i++ {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
			if err != nil {
				t.Error(err)
				return
			}
			way := ways[i%len(ways)]
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, way.option, 1); err != nil {
				t.Error(err)
			}
			if unix.Bind(fd, &unix.SockaddrInet4{Port: int(a.ListenPort()), Addr: way.address}) == nil {
				taken.Add(1)
			}
			unix.Close(fd)
			tries.Add(1)
		}
	})
	f := a.sockets.families.Load()[0]
	for range 100 {
		f.mu.Lock()
		old := f.sock
		f.fail(errSocketEnded) // reported as ended, while it still holds the port
		f.signal()
		f.mu.Unlock()
		until(t, "the socket is replaced", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.sock != old && f.err == nil
		})
		until(t, "the one that was replaced is closed", func() bool { return !old.usable() })
	}
	before := tries.Load()
	until(t, "the other user tried", func() bool { return tries.Load() > before+10 })
	stop.Store(true)
	<-done
	if taken.Load() > 0 {
		t.Errorf("another user bound the port %d times of %d", taken.Load(), tries.Load())
	}
	ping(t, a, b)
}

// TestPortIsJoinedByNone has another program of the same user try to bind the port, which
// Linux allows where both sockets have SO_REUSEPORT. It is refused after the first socket,
// after its replacement, and after an attempt to replace it that failed.
func TestPortIsJoinedByNone(t *testing.T) {
	s := listening(t)
	f := s.families.Load()[0]
	join := func(port uint16) (int, error) {
		t.Helper()
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			t.Fatal(err)
		}
		return fd, unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)})
	}
	refused := func(when string) {
		t.Helper()
		if _, err := join(s.port); err != unix.EADDRINUSE {
			t.Errorf("%s another program's bind of the port returns %v, want EADDRINUSE", when, err)
		}
	}
	refused("after the first socket")
	if !f.replace(f.sock) {
		t.Fatal("not replaced")
	}
	refused("after the replacement")
	other, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := openSocket("udp4", other.LocalAddr().(*net.UDPAddr).AddrPort().Port(), f.sock); err == nil {
		t.Fatal("another program's port was bound")
	}
	refused("after a failed attempt")

	// Nor does a first socket share the port of another program.
	fd, err := join(0)
	if err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	if sock, err := openSocket("udp4", uint16(name.(*unix.SockaddrInet4).Port), nil); err == nil {
		sock.close()
		t.Error("the socket shares another program's port")
	}
}

// losePort takes the port away from a socket that stays open. Connecting to AF_UNSPEC unbinds
// a socket whose port the system chose (__udp_disconnect in net/ipv4/udp.c). No read fails
// afterwards.
func losePort(t *testing.T, s *socket) {
	t.Helper()
	err := s.control(func(fd int) error {
		nowhere := unix.RawSockaddrInet4{Family: unix.AF_UNSPEC}
		if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&nowhere)), unix.SizeofSockaddrInet4); errno != 0 {
			return errno
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.usable() {
		t.Fatal("the socket still has its port, so the test shows nothing")
	}
}

// TestLostPortIsFound has a socket lose its port without an error: Rebind, as on a change of
// networks, notices it and replaces the socket.
func TestLostPortIsFound(t *testing.T) {
	a, b := newPair(t)
	ping(t, a, b)
	f := a.sockets.families.Load()[0]
	f.mu.Lock()
	old := f.sock
	f.mu.Unlock()
	losePort(t, old)
	rebind(t, a)
	ping(t, b, a)
}

// reads is a connection whose reads return errs one after the other, and then a datagram
// each.
type reads struct {
	batchConn
	errs []error
	n    int
}

func (r *reads) ReadBatch(ms []ipv6.Message, _ int) (int, error) {
	if r.n++; r.n <= len(r.errs) {
		return 0, r.errs[r.n-1]
	}
	ms[0].N, ms[0].NN = 1, 0
	ms[0].Addr = &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
	return 1, nil
}

// TestReadsThatFail has reads fail. After an error that may pass, the socket has some seconds
// to recover before it is replaced; after one that can't pass, it is replaced at once.
func TestReadsThatFail(t *testing.T) {
	for _, c := range []struct {
		name     string
		err      error
		times    int
		portLost bool
		reads    int // reads of the first socket
		replaced bool
		after    time.Duration
	}{
		{"recovers", unix.ENOMEM, readErrors - 1, false, readErrors, false, (readErrors - 1) * readPause},
		{"doesn't recover", unix.ENOMEM, 1000, false, readErrors, true, (readErrors - 1) * readPause},
		// SOCK_DESTROY (udp_abort in net/ipv4/udp.c) has one read fail; later ones wait.
		{"aborted", unix.ECONNABORTED, 1, false, 2, false, readPause},
		{"aborted, and the port is lost", unix.ECONNABORTED, 1, true, 1, true, 0},
		{"closed", net.ErrClosed, 1000, false, 1, true, 0},
		{"no descriptor", unix.EBADF, 1000, false, 1, true, 0},
		{"defunct, as macOS says it", unix.ENOTCONN, 1000, false, 1, true, 0},
		{"shut down", unix.EPIPE, 1000, false, 1, true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := listening(t)
				f := s.list()[0]
				first := &reads{errs: slices.Repeat([]error{c.err}, c.times)}
				f.sock.batch = first
				if c.portLost {
					losePort(t, f.sock)
				}
				s.open = func(network string, port uint16, beside *socket) (*socket, error) {
					sock, err := openSocket(network, port, beside)
					if err != nil {
						go s.Close() // or the receiver would try again for ever
						return nil, err
					}
					sock.batch = &reads{}
					return sock, nil
				}
				old, start := f.sock, time.Now()
				n, err := f.receive([][]byte{make([]byte, 10)}, make([]int, 1), make([]conn.Endpoint, 1))
				if n != 1 || err != nil {
					t.Errorf("%d datagrams, %v", n, err)
				}
				if replaced := f.sock != old; replaced != c.replaced || first.n != c.reads || time.Since(start) != c.after {
					t.Errorf("replaced %t after %d reads and %v, want %t, %d, %v", replaced, first.n, time.Since(start), c.replaced, c.reads, c.after)
				}
			})
		})
	}
}

// inNamespace runs test in a new network namespace, whose loopback has the given MTU. test
// must create its sockets on the calling thread.
func inNamespace(t *testing.T, mtu int, test func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread keeps the namespace and ends with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Logf("skipped: no network namespace: %v", err)
			return
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetMTU(lo, mtu)
		}
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			t.Error(err)
			return
		}
		test()
	}()
	<-done
}

// opened returns open sockets and their receivers.
func opened(t *testing.T) (*Sockets, []conn.ReceiveFunc) {
	t.Helper()
	s := NewSockets(slog.New(slog.DiscardHandler))
	fns, _, err := s.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Release)
	return s, fns
}

// carry sends bufs from one Sockets to another and compares the datagrams that arrive.
func carry(t *testing.T, from, to *Sockets, receive conn.ReceiveFunc, ep conn.Endpoint, bufs [][]byte) {
	t.Helper()
	if err := from.Send(bufs, ep); err != nil {
		t.Fatal(err)
	}
	space, sizes, eps := make([][]byte, batchSize), make([]int, batchSize), make([]conn.Endpoint, batchSize)
	for i := range space {
		space[i] = make([]byte, maxMessage)
	}
	for want := bufs; len(want) > 0; {
		n, err := receive(space, sizes, eps)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if !bytes.Equal(space[i][:sizes[i]], want[0]) {
				t.Fatalf("datagram %d of %d has %d bytes, want %d", len(bufs)-len(want), len(bufs), sizes[i], len(want[0]))
			}
			if got := eps[i].(*endpoint).dst; got.Port() != from.port {
				t.Fatalf("from %v, want port %d", got, from.port)
			}
			want = want[1:]
		}
	}
}

// TestBatches sends batches of many sizes, with segmentation offload (UDP_SEGMENT), without
// it, and over a path whose MTU is too small for it: all datagrams arrive.
func TestBatches(t *testing.T) {
	random := rand.New(rand.NewPCG(10, 10))
	batches := func() (out [][][]byte) {
		for i := range 40 {
			bufs := make([][]byte, 1+random.IntN(batchSize))
			size := 32 + random.IntN(1400)
			for j := range bufs {
				if i%2 == 0 && random.IntN(4) == 0 {
					size = 32 + random.IntN(1400)
				}
				bufs[j] = bytes.Repeat([]byte{byte(i), byte(j)}, size)[:size]
			}
			out = append(out, bufs)
		}
		return out
	}
	run := func(t *testing.T, prepare func(*Sockets)) {
		a, _ := opened(t)
		b, receivers := opened(t)
		prepare(a)
		for i, address := range []string{"127.0.0.1", "[::1]"} {
			ep, err := a.ParseEndpoint(fmt.Sprintf("%s:%d", address, b.port))
			if err != nil {
				t.Fatal(err)
			}
			for _, bufs := range batches() {
				carry(t, a, b, receivers[i], ep, bufs)
			}
		}
	}
	t.Run("joined", func(t *testing.T) { run(t, func(*Sockets) {}) })
	t.Run("alone", func(t *testing.T) {
		run(t, func(s *Sockets) {
			for _, f := range s.list() {
				f.sock.segments.Store(false)
			}
		})
	})
	t.Run("larger than the MTU", func(t *testing.T) {
		inNamespace(t, 1280, func() { run(t, func(*Sockets) {}) })
	})
}

// TestSource checks that a peer is answered from the address to which it sent, and from the
// system's choice once the host has lost that address or its networks changed.
func TestSource(t *testing.T) {
	host, receivers := opened(t)
	peer, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.7.7"), host.port)
	hear := func() *endpoint {
		t.Helper()
		if _, err := peer.WriteToUDPAddrPort(make([]byte, 40), to); err != nil {
			t.Fatal(err)
		}
		sizes, eps := make([]int, 1), make([]conn.Endpoint, 1)
		if n, err := receivers[0]([][]byte{make([]byte, 100)}, sizes, eps); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		return eps[0].(*endpoint)
	}
	answered := func(ep conn.Endpoint) string {
		t.Helper()
		if err := host.Send([][]byte{make([]byte, 40)}, ep); err != nil {
			t.Fatal(err)
		}
		_, from, err := peer.ReadFromUDPAddrPort(make([]byte, 100))
		if err != nil {
			t.Fatal(err)
		}
		return from.Addr().String()
	}
	ep := hear()
	if got := answered(ep); got != "127.0.7.7" || ep.SrcIP().String() != got {
		t.Errorf("answered from %s, endpoint %v", got, ep.SrcIP())
	}
	if again := hear(); again != ep {
		t.Error("a second datagram from the same source gives another endpoint")
	}
	host.sources.Add(1)
	if got := answered(ep); got != "127.0.0.1" {
		t.Errorf("after a change of networks answered from %s", got)
	}
	lost := hear()
	lost.control = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte{192, 0, 2, 9}})
	if got := answered(lost); got != "127.0.0.1" {
		t.Errorf("after the loss of an address answered from %s", got)
	}
	if lost.source(host.sources.Load(), new(routeLookup)) != nil {
		t.Error("a source address that the host lost is still used")
	}
}

// TestEmptyDatagrams sends empty datagrams among others: they are left out, and all others
// are received.
func TestEmptyDatagrams(t *testing.T) {
	host, receivers := opened(t)
	peer, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(host.port)})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	const count = 100
	for range count {
		for _, size := range []int{0, 0, 40, 0} {
			if _, err := peer.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
		}
	}
	sizes, eps := make([]int, batchSize), make([]conn.Endpoint, batchSize)
	space := make([][]byte, batchSize)
	for i := range space {
		space[i] = make([]byte, 100)
	}
	for got := 0; got < count; {
		n, err := receivers[0](space, sizes, eps)
		if err != nil {
			t.Fatal(err)
		}
		for _, size := range sizes[:n] {
			if size != 40 {
				t.Fatalf("received a datagram of %d bytes, want 40", size)
			}
		}
		got += n
	}
}

// FuzzReadControl reads control messages that a kernel wouldn't write.
func FuzzReadControl(f *testing.F) {
	f.Add(unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte{127, 0, 0, 1}}))
	f.Add(appendSegmentSize(unix.PktInfo6(&unix.Inet6Pktinfo{Ifindex: 3}), 1400))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		own, _, size := readControl(b)
		if len(b) < syscall.SizeofCmsghdr && (own.IsValid() || size != 0) {
			t.Errorf("%v and %d from %x", own, size, b)
		}
	})
}
