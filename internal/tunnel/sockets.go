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

// Sockets is the conn.Bind of the host's WireGuard device: UDP sockets, one for each
// address family, on one port. Once it has the port it keeps it: while the device is down,
// from one device to the next, and over changes of networks, so that no local user can take
// it in between. The sockets have wildcard addresses, so a change of networks doesn't end
// them. If one ends nevertheless, its receiver tries to replace it until it succeeds, and
// Listening returns an error meanwhile.
//
// Sockets implements Underlay. The device that attaches tells it which endpoints loop, and
// Sockets neither accepts a datagram from one nor sends to it:
//
//   - The mesh addresses of the host and of known peers. A datagram from there was inside a
//     tunnel before. Otherwise one packet of a peer that carries WireGuard inside the tunnel
//     would make the host encrypt to itself endlessly. A peer's mesh addresses are its
//     allowed IPs of a single address each.
//   - The sockets' own endpoints: each address of the host with their port. No other device
//     can be there, and a peer that forges one as the source of its datagrams would make
//     the host send that peer's packets to itself. Linux accepts such a datagram from the
//     network over IPv6 (of the host's own sources, ip6_rcv_core in net/ipv6/ip6_input.c
//     refuses only ::1), but not over IPv4 (fib_validate_source in
//     net/ipv4/fib_frontend.c). The host's addresses with other ports belong to other
//     programs, such as a second WireGuard.
//   - The unspecified address and port 0. Linux accepts such a datagram from the same link
//     over IPv6, and sends one for the unspecified address to its own ::1 (udpv6_sendmsg in
//     net/ipv6/udp.c).
//
// The sockets can't send broadcasts, which Go's sockets can by default: with rp_filter 0,
// Linux accepts a directed broadcast address as a source over IPv4, so it could become a
// peer's endpoint.
//
// A Sockets serves one Device at a time. Its methods may be called concurrently.
type Sockets struct {
	log *slog.Logger
	// open is openSocket outside tests.
	open func(network string, port uint16, beside *socket) (*socket, error)

	mu   sync.Mutex // serialises Open, Close and Release
	port uint16     // 0 before the first Open and after Release

	// families are IPv4 and IPv6; each nil before the first Open, after Release, and if the
	// host doesn't have it. Each Send reads them, hence no mutex.
	families atomic.Pointer[[2]*family]

	attached atomic.Pointer[attachment] // the current device's; nil before the first
	looped   atomic.Uint64              // see Looped
	// sources counts calls of Renew, each of which invalidates the source addresses of
	// endpoints; see replyPath.
	sources atomic.Uint32
}

// attachment holds the arguments of Attach.
type attachment struct {
	loops    func(netip.AddrPort) bool
	onReopen func()
}

// NewSockets returns Sockets without a port. The first device opens it, Release closes it.
func NewSockets(log *slog.Logger) *Sockets {
	s := &Sockets{log: log, open: openSocket}
	s.families.Store(new([2]*family))
	return s
}

// networks are the address families as package net names them, in the order of
// Sockets.families.
var networks = [...]string{"udp4", "udp6"}

// family is the socket of one address family, with the state of its receiver.
type family struct {
	s       *Sockets
	network string // see networks
	port    uint16

	mu   sync.Mutex
	sock *socket // the current one; a broken one stays until it is replaced, as it may hold the port
	err  error   // why sock is broken; nil while it works
	// halted is set while the device doesn't listen: the receiver returns.
	halted bool
	// released is set by Release: a replacement that was being opened is closed.
	released bool
	// changed is closed, and replaced by a new channel, when one of the above changed or a
	// broken socket is to be replaced without a further pause.
	changed chan struct{}
}

// errSocketEnded is the reason that a socket is broken if the socket has no error itself.
var errSocketEnded = errors.New("the system ended the socket")

// Open returns a receiver for each address family that the host has. It reuses open sockets
// if they have the port, even broken ones, which their receivers replace. Port 0 stands for
// the current port, or, without one, for the system's choice. It returns the port.
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

// portDraws is how often listen lets the system choose another port when the one that it
// chose for IPv4 is in use for IPv6. One or two do unless nearly all ports are in use.
const portDraws = 100

// listen opens the sockets of both families on one port, and returns it. If port is 0, the
// system chooses one.
func (s *Sockets) listen(port uint16) (out [2]*family, chosen uint16, err error) {
	for draw := 0; ; draw++ {
		out, chosen, err = s.listenOnce(port)
		if port != 0 || draw == portDraws || !errors.Is(err, syscall.EADDRINUSE) {
			return out, chosen, err
		}
	}
}

// listenOnce is one attempt of listen. The error is EADDRINUSE if a family can't have the
// port, and EAFNOSUPPORT if the host has neither family.
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

// Close ends the receivers but keeps the port: wireguard-go calls it whenever the device
// goes down, and before each Open.
func (s *Sockets) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.list() {
		f.halt(true)
	}
	return nil
}

// Release closes the sockets, which frees the port. A device may open them again.
func (s *Sockets) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.release()
}

// release does the work of Release. The caller holds s.mu.
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

// list returns the address families that have a socket.
func (s *Sockets) list() []*family {
	var out []*family
	for _, f := range s.families.Load() {
		if f != nil {
			out = append(out, f)
		}
	}
	return out
}

// Listening returns nil while all sockets work, and otherwise the reasons, joined: a socket
// ended, and its receiver couldn't bind the port again so far. The receiver keeps trying.
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
func (s *Sockets) Attach(loops func(netip.AddrPort) bool, onReopen func()) {
	s.attached.Store(&attachment{loops, onReopen})
}

// Renew implements Underlay: it checks the sockets, has the broken ones replaced, and waits
// until all work or ctx ends. It also invalidates the source addresses of endpoints, which
// the host may have lost; see replyPath.
func (s *Sockets) Renew(ctx context.Context) error {
	s.sources.Add(1)
	for _, f := range s.list() {
		f.check()
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

// halt ends the receiver, or with false lets the next one start.
func (f *family) halt(halted bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.halted = halted
	deadline := time.Time{}
	if halted {
		deadline = time.Unix(1, 0) // in the past: ends a waiting read
	}
	_ = f.sock.udp.SetReadDeadline(deadline) // fails if the socket was closed, and then no read waits
	f.signal()
}

// signal wakes everything that waits for f.changed. The caller holds f.mu.
func (f *family) signal() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// check has the receiver replace the socket if the system ended it. If the receiver already
// is at it, check ends its pause between two attempts.
func (f *family) check() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil && f.sock.usable() {
		return
	}
	f.fail(errSocketEnded)
	f.signal()
}

// fail marks the socket as broken, and ends the receiver's read so that it replaces the
// socket. The caller holds f.mu.
func (f *family) fail(err error) {
	if f.err == nil {
		f.err = err
		f.s.log.Error("UDP socket failed; reopening it", "port", f.port, "network", f.network, "error", err)
	}
	_ = f.sock.udp.SetReadDeadline(time.Unix(1, 0))
}

// wait waits until the socket works, and reports whether it does: false means that ctx ended
// before.
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
	// readErrors is how many reads in a row must fail, readPause apart, before a socket
	// that still has its port is replaced, after 3 s: a system that is short of memory
	// recovers, a socket that the system ended doesn't.
	readErrors = 10
	readPause  = time.Second / 3
	// openPauseMin and openPauseMax bound the pause between two attempts to open a socket,
	// which doubles each time. The first keeps an interruption short, the second a host
	// without a free port from being busy with it.
	openPauseMin = 100 * time.Millisecond
	openPauseMax = 5 * time.Second
)

// receive is a conn.ReceiveFunc. Its only error is net.ErrClosed, when the device stops
// listening: wireguard-go ends a receiver whose errors last some seconds, and nothing starts
// it again (RoutineReceiveIncoming in its device/receive.go).
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
			continue // all discarded
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue // woken by halt or fail
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

// ended reports whether err means that the socket is closed or was ended by the system, so
// that trying again is no use.
func ended(err error) bool {
	for _, e := range []error{net.ErrClosed, syscall.EBADF, syscall.ENOTSOCK, syscall.ENOTCONN, syscall.EPIPE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// replace replaces the socket old by a new one on the same port, and reports whether it
// could. On Linux the new one has the port before old gives it up; see openSocket.
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
	f.s.log.Info("UDP socket reopened", "port", f.port, "network", f.network)
	if to := f.s.attached.Load(); to != nil {
		to.onReopen()
	}
	return true
}

// Send sends bufs to ep. It discards datagrams for an endpoint that loops, and returns nil
// for them: wireguard-go would log an error for every packet.
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

// loops reports whether datagrams from and to at are to be discarded; see Sockets.
func (s *Sockets) loops(at netip.AddrPort) bool {
	to := s.attached.Load()
	return to != nil && to.loops(at)
}

// Looped returns how many datagrams were discarded because their source or destination
// loops; see Sockets.
func (s *Sockets) Looped() uint64 { return s.looped.Load() }

// SetMark does nothing: the host's WireGuard sockets have no firewall mark.
func (s *Sockets) SetMark(uint32) error { return nil }

// BatchSize returns how many datagrams one call of a receiver or of Send carries at most.
func (s *Sockets) BatchSize() int { return batchSize }

// ParseEndpoint parses address:port, with brackets around an IPv6 address. An IPv4-mapped
// address becomes an IPv4 one, as those of received datagrams are.
func (s *Sockets) ParseEndpoint(text string) (conn.Endpoint, error) {
	dst, err := netip.ParseAddrPort(text)
	if err != nil {
		return nil, err
	}
	return &endpoint{dst: netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())}, nil
}

// endpoint is a peer's endpoint, with the host's address that the peer sent to.
type endpoint struct {
	dst netip.AddrPort // the peer's
	src netip.Addr     // the host's; zero for a configured endpoint and where the system doesn't tell
	// replyPath makes replies leave from src.
	replyPath             //lint:ignore U1000 it is empty except on Linux
	cleared   atomic.Bool // a send from src failed, so it isn't used any more
}

// ClearSrc lets the system choose the source address again.
func (e *endpoint) ClearSrc() { e.cleared.Store(true) }

// SrcToString returns the host's address that the peer sent to.
func (e *endpoint) SrcToString() string { return e.src.String() }

// DstToString returns the peer's address and port.
func (e *endpoint) DstToString() string { return e.dst.String() }

// DstToBytes returns the peer's address and port, from which wireguard-go makes the cookies
// of its protection against floods.
func (e *endpoint) DstToBytes() []byte {
	b, _ := e.dst.MarshalBinary()
	return b
}

// DstIP returns the peer's address.
func (e *endpoint) DstIP() netip.Addr { return e.dst.Addr() }

// SrcIP returns the host's address that the peer sent to.
func (e *endpoint) SrcIP() netip.Addr { return e.src }

// socketBuffer is the size in bytes to ask for, for each buffer of a socket: the most that
// macOS gives (kern.ipc.maxsockbuf, 8 MiB including its overhead).
const socketBuffer = 7 << 20

// port returns the port that the socket is bound to.
func (s *socket) port() uint16 { return s.udp.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// close closes the socket. It ignores the error: the descriptor is closed in any case.
func (s *socket) close() {
	_ = s.udp.Close()
	s.closeRoutes()
}

// usable reports whether the socket still has its port, as far as the system tells; see
// bound.
func (s *socket) usable() bool {
	raw, err := s.udp.SyscallConn()
	if err != nil {
		return false
	}
	usable := false
	err = raw.Control(func(fd uintptr) { usable = bound(fd) })
	return err == nil && usable
}

// listenUDP opens a socket on the wildcard address of a family that can't send broadcasts.
// set, unless it is nil, sets further options before the socket is bound.
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
