package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.zx2c4.com/wireguard/conn"
)

// Sockets are the UDP sockets of the host's WireGuard device, one per family on
// one port. Once they have the port they keep it: while the device is down, from
// one device to the next, and over changes of networks, so that no local user
// can take it in between. They are bound to no address, so a change of networks
// doesn't end them; one that ended nevertheless is replaced, for ever, by its
// receiver, and until then Listening says so.
//
// Sockets are an Underlay of a Device, which tells them what it takes nothing from and
// sends nothing to.
//
// A datagram whose source is a mesh address of the host or of a known peer came
// out of the mesh: another host's packet was in a tunnel before. It is discarded,
// and none is sent to such an address: else one packet of a peer that carries
// WireGuard inside the tunnel would make the host encrypt to itself, without end.
// A peer's mesh addresses are the allowed IPs that are a single address each.
//
// Nor is one taken from, or sent to, a place where these sockets themselves are reached,
// which is each address of the host with their port: no other device can be there, and a
// peer that forges it as the source of its own datagrams would have the host send to
// itself what is for that peer. From the network IPv6 of Linux takes such a datagram
// (ip6_rcv_core in net/ipv6/ip6_input.c refuses of the host's own sources ::1 alone), and
// IPv4 doesn't (fib_validate_source in net/ipv4/fib_frontend.c). The host's addresses with
// other ports are other programs' on it, such as a second WireGuard's.
//
// Nor is one taken from, or sent to, the unspecified address or port 0, where no device
// is. IPv6 of Linux takes such a datagram from the same link, and what is sent to the
// unspecified address goes to the host's own ::1 (udpv6_sendmsg in net/ipv6/udp.c). And
// the sockets send no broadcast, as Go's may: IPv4 of Linux takes a directed broadcast
// address for a source where it doesn't look for the way back (rp_filter 0).
//
// A Sockets serves one Device at a time. Its methods may be called concurrently.
type Sockets struct {
	log  *slog.Logger
	open func(network string, port uint16, beside *socket) (*socket, error) // openSocket

	mu   sync.Mutex // serialises Open, Close and Release
	port uint16

	// families are IPv4 and IPv6; nil before the first Open and where the host has
	// none. Read by each Send.
	families atomic.Pointer[[2]*family]

	// attached is what the device was told last; nil before the first.
	attached atomic.Pointer[attachment]
	looped   atomic.Uint64 // datagrams discarded; see loops
	sources  atomic.Uint32 // see endpoint.sources
}

// attachment is what Attach was called with.
type attachment struct {
	loops    func(netip.AddrPort) bool
	reopened func()
}

// NewSockets returns sockets that the first device opens. Release closes them.
func NewSockets(log *slog.Logger) *Sockets {
	s := &Sockets{log: log, open: openSocket}
	s.families.Store(new([2]*family))
	return s
}

// networks are the families in the words of package net.
var networks = [...]string{"udp4", "udp6"}

// family is the socket of one family and what its receiver has to know.
type family struct {
	s       *Sockets
	network string
	port    uint16

	mu   sync.Mutex
	sock *socket // the one to use, also while it is broken and holds the port
	err  error   // why the port isn't served; nil while it is
	// halted says that the device doesn't listen and the receiver is to end,
	// released that the port was given back.
	halted, released bool
	// changed is closed, and replaced, when one of the above changed or the next
	// attempt is due now.
	changed chan struct{}
}

// errSilent says that a socket is broken without an error of its own.
var errSilent = errors.New("the system ended the socket")

// Open returns a receiver per family. Sockets that are open already are used
// again when they have the port, whatever happened since; port 0 stands for the
// port of before, or the system's choice.
func (s *Sockets) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.port == 0 || port != 0 && port != s.port {
		fresh, port, err := s.listen(port)
		if err != nil {
			return nil, 0, err
		}
		s.release()
		s.families.Store(&fresh)
		s.port = port
	}
	var fns []conn.ReceiveFunc
	for _, f := range s.list() {
		f.halt(false)
		fns = append(fns, f.receive)
	}
	return fns, s.port, nil
}

// portDraws is how often a port is drawn that the one family has free and the
// other hasn't.
const portDraws = 100

// listen opens both families on one port.
func (s *Sockets) listen(port uint16) (out [2]*family, chosen uint16, err error) {
	for draw := 0; ; draw++ {
		out, chosen, err = s.listenOnce(port)
		if port != 0 || draw == portDraws || !errors.Is(err, syscall.EADDRINUSE) {
			return out, chosen, err
		}
	}
}

func (s *Sockets) listenOnce(port uint16) (out [2]*family, chosen uint16, err error) {
	for i, network := range networks {
		sock, err := s.open(network, port, nil)
		if errors.Is(err, syscall.EAFNOSUPPORT) {
			continue // a host without this family
		}
		if err != nil {
			if out[0] != nil {
				out[0].sock.close()
			}
			return [2]*family{}, 0, err
		}
		port = sock.port()
		out[i] = &family{s: s, network: network, port: port, sock: sock, halted: true, changed: make(chan struct{})}
	}
	if out[0] == nil && out[1] == nil {
		return out, 0, syscall.EAFNOSUPPORT
	}
	return out, port, nil
}

// Close ends the receivers and keeps the port: the device calls it whenever its
// tunnel goes down.
func (s *Sockets) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.list() {
		f.halt(true)
	}
	return nil
}

// Release gives the port back. The next device opens sockets anew.
func (s *Sockets) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.release()
}

func (s *Sockets) release() {
	for _, f := range s.list() {
		f.halt(true)
		f.mu.Lock()
		f.released = true
		f.sock.close()
		f.mu.Unlock()
	}
	s.families.Store(new([2]*family))
	s.port = 0
}

// list returns the families that the host has.
func (s *Sockets) list() []*family {
	var out []*family
	for _, f := range s.families.Load() {
		if f != nil {
			out = append(out, f)
		}
	}
	return out
}

// Listening returns nil while the port is served in each family that the host
// has, else the reason: a socket ended and the port couldn't be bound again so
// far. It is bound as soon as it can be.
func (s *Sockets) Listening() error {
	var errs []error
	for _, f := range s.list() {
		f.mu.Lock()
		if f.err != nil {
			errs = append(errs, fmt.Errorf("bind UDP port: %d over %s: %w", f.port, f.network, f.err))
		}
		f.mu.Unlock()
	}
	return errors.Join(errs...)
}

// Attach implements Underlay.
func (s *Sockets) Attach(loops func(netip.AddrPort) bool, reopened func()) {
	s.attached.Store(&attachment{loops, reopened})
}

// Renew looks whether the sockets are in order, replaces those that aren't, and
// waits until all are or ctx ends. It is forgotten which of the host's addresses each peer
// was answered from.
func (s *Sockets) Renew(ctx context.Context) error {
	s.sources.Add(1)
	for _, f := range s.list() {
		f.examine()
	}
	for {
		if s.Listening() == nil {
			return nil
		}
		for _, f := range s.list() {
			if !f.wait(ctx) {
				return errors.Join(s.Listening(), ctx.Err())
			}
		}
	}
}

// halt ends the receiver, or lets a new one begin.
func (f *family) halt(halted bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.halted = halted
	deadline := time.Time{}
	if halted {
		deadline = time.Unix(1, 0) // a read that waits ends at once
	}
	_ = f.sock.udp.SetReadDeadline(deadline) // fails where it was closed, and then nothing waits
	f.signal()
}

// signal wakes all that wait for a change. The caller holds f.mu.
func (f *family) signal() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// examine has a socket replaced that the system ended, and one that is missing
// tried for at once.
func (f *family) examine() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil && f.sock.usable() {
		return
	}
	f.fail(errSilent)
	f.signal()
}

// fail notes that the socket is of no use, and wakes its receiver. The caller
// holds f.mu.
func (f *family) fail(err error) {
	if f.err == nil {
		f.err = err
		f.s.log.Error("UDP socket ended; opening another", "port", f.port, "network", f.network, "error", err)
	}
	_ = f.sock.udp.SetReadDeadline(time.Unix(1, 0))
}

// wait waits until the family is served or ctx ends, and reports which.
func (f *family) wait(ctx context.Context) bool {
	for {
		f.mu.Lock()
		served, changed := f.err == nil, f.changed
		f.mu.Unlock()
		if served {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

const (
	// readErrors is how many reads in a row may fail, readPause apart, before a
	// socket that still has its port is replaced: a system short of memory recovers,
	// a socket that the system ended doesn't.
	readErrors = 10
	readPause  = time.Second / 3
	// The pauses between the attempts to open a socket, doubled each time.
	openPauseMin = 100 * time.Millisecond
	openPauseMax = 5 * time.Second
)

// receive is a conn.ReceiveFunc. It returns no error but net.ErrClosed, when the
// device is to stop listening: the device ends its receiver for good after any
// other, and nothing would start it again.
func (f *family) receive(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	pause := openPauseMin
	for failures := 0; ; {
		f.mu.Lock()
		sock, broken, halted, changed := f.sock, f.err != nil, f.halted, f.changed
		f.mu.Unlock()
		if halted {
			return 0, net.ErrClosed
		}
		if broken {
			if f.replace(sock) {
				failures, pause = 0, openPauseMin
				continue
			}
			sleep(changed, pause)
			pause = min(2*pause, openPauseMax)
			continue
		}
		n, err := sock.receive(f.s, bufs, sizes, eps)
		switch {
		case err == nil && n > 0:
			return n, nil
		case err == nil:
			failures = 0
			continue // nothing but what is discarded
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue // woken
		}
		if failures++; failures < readErrors && !ended(err) && sock.usable() {
			sleep(changed, readPause)
			continue
		}
		f.mu.Lock()
		if !f.halted {
			f.fail(err)
		}
		f.mu.Unlock()
	}
}

// sleep waits for d, or until changed is closed.
func sleep(changed <-chan struct{}, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-changed:
	case <-t.C:
	}
}

// ended reports whether err is one that a socket never recovers from.
func ended(err error) bool {
	for _, e := range []error{net.ErrClosed, syscall.EBADF, syscall.ENOTSOCK, syscall.ENOTCONN, syscall.EPIPE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// replace opens a socket in the place of old, and reports whether it did. Where
// the system can, the new one has the port before the old one lets go of it.
func (f *family) replace(old *socket) bool {
	sock, err := f.s.open(f.network, f.port, old)
	f.mu.Lock()
	if f.released && err == nil {
		sock.close()
		err = net.ErrClosed
	}
	f.err = err
	if err == nil {
		f.sock = sock
		f.signal()
	}
	f.mu.Unlock()
	if err != nil {
		return false
	}
	old.close()
	f.s.log.Info("UDP socket opened again", "port", f.port, "network", f.network)
	if to := f.s.attached.Load(); to != nil {
		to.reopened()
	}
	return true
}

// Send sends bufs to ep. Nothing is sent to a mesh address, which only a tunnel
// reaches, nor to these sockets; that isn't an error, for the device would log it per
// packet.
func (s *Sockets) Send(bufs [][]byte, ep conn.Endpoint) error {
	e, ok := ep.(*endpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	if s.loops(e.dst) {
		s.looped.Add(uint64(len(bufs)))
		return nil
	}
	f := s.families.Load()[0]
	if e.dst.Addr().Is6() {
		f = s.families.Load()[1]
	}
	if f == nil {
		return syscall.EAFNOSUPPORT
	}
	f.mu.Lock()
	sock, err := f.sock, f.err
	f.mu.Unlock()
	if err != nil {
		return fmt.Errorf("no UDP socket: %w", err)
	}
	err = sock.send(bufs, e, s.sources.Load())
	if err != nil && ended(err) {
		f.mu.Lock()
		if f.sock == sock && !f.halted {
			f.fail(err)
			f.signal()
		}
		f.mu.Unlock()
	}
	return err
}

// loops reports whether the device wants nothing from a place, or for it.
func (s *Sockets) loops(at netip.AddrPort) bool {
	to := s.attached.Load()
	return to != nil && to.loops(at)
}

// Looped returns how many datagrams were discarded because they came from, or were for, a
// mesh address or the host's own place.
func (s *Sockets) Looped() uint64 { return s.looped.Load() }

// SetMark does nothing: the host's WireGuard sockets have no mark.
func (s *Sockets) SetMark(uint32) error { return nil }

// BatchSize returns how many datagrams a receiver takes and Send gives at once.
func (s *Sockets) BatchSize() int { return batchSize }

// ParseEndpoint reads address:port.
func (s *Sockets) ParseEndpoint(text string) (conn.Endpoint, error) {
	dst, err := netip.ParseAddrPort(text)
	if err != nil {
		return nil, err
	}
	return &endpoint{dst: netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())}, nil
}

// endpoint is where a peer is reached, and which address of the host it knows.
type endpoint struct {
	dst netip.AddrPort
	src netip.Addr // of the host: the one that the peer sent to; zero for any
	// way is how src is asked for, where the system lets a sender choose it.
	way                 //lint:ignore U1000 it is empty but on Linux
	cleared atomic.Bool // src didn't work
}

// ClearSrc lets the system choose the source again.
func (e *endpoint) ClearSrc() { e.cleared.Store(true) }

// SrcToString returns the host's address that the peer knows.
func (e *endpoint) SrcToString() string { return e.src.String() }

// DstToString returns the peer's address and port.
func (e *endpoint) DstToString() string { return e.dst.String() }

// DstToBytes returns the peer's address and port for the device's cookies.
func (e *endpoint) DstToBytes() []byte {
	b, _ := e.dst.MarshalBinary()
	return b
}

// DstIP returns the peer's address.
func (e *endpoint) DstIP() netip.Addr { return e.dst.Addr() }

// SrcIP returns the host's address that the peer knows.
func (e *endpoint) SrcIP() netip.Addr { return e.src }

// socketBuffer is the wanted size of a socket's buffers in bytes, the most that
// macOS gives (kern.ipc.maxsockbuf, 8 MiB with its overhead).
const socketBuffer = 7 << 20

// port returns the port that the socket is bound to.
func (s *socket) port() uint16 { return s.udp.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// close ends the socket. Its error says nothing that matters: it is gone.
func (s *socket) close() {
	_ = s.udp.Close()
	s.closeWays()
}

// usable reports whether the socket still has its port, as far as the system
// says.
func (s *socket) usable() bool {
	raw, err := s.udp.SyscallConn()
	if err != nil {
		return false
	}
	usable := false
	err = raw.Control(func(fd uintptr) { usable = bound(fd) })
	return err == nil && usable
}

// listenUDP opens a socket with the wildcard address of a family, which sends no
// broadcast; set may set options before it is bound.
func listenUDP(network string, port uint16, set func(fd uintptr) error) (*net.UDPConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		if err := raw.Control(func(fd uintptr) {
			if failed = noBroadcast(fd); failed == nil && set != nil {
				failed = set(fd)
			}
		}); err != nil {
			return err
		}
		return failed
	}}
	c, err := config.ListenPacket(context.Background(), network, fmt.Sprintf(":%d", port))
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}
