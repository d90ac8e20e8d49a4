package tunnel

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// batchSize is how many datagrams one call carries.
const batchSize = conn.IdealBatchSize

const (
	// readBatch is how many messages one read takes. Each may hold up to 64
	// datagrams that the kernel joined (UDP_GRO, udp(7)).
	readBatch = 8
	// maxMessage is the largest UDP message in bytes.
	maxMessage = 1<<16 - 1
	// maxSegments is how many datagrams one message may carry out
	// (UDP_MAX_SEGMENTS of the kernel's include/linux/udp.h before 6.12, which
	// allows 128), and maxPayload how many bytes, less the longest headers.
	maxSegments = 64
	maxPayload  = maxMessage - 40 - 8
)

// controlSize holds the control messages of a read: IPV6_PKTINFO and UDP_GRO.
var controlSize = unix.CmsgSpace(unix.SizeofInet6Pktinfo) + unix.CmsgSpace(4)

// batchConn is what ipv4.PacketConn and ipv6.PacketConn have in common.
type batchConn interface {
	ReadBatch([]ipv6.Message, int) (int, error)
	WriteBatch([]ipv6.Message, int) (int, error)
}

// socket is an open UDP socket. One receiver reads it, any number of senders
// write.
type socket struct {
	udp    *net.UDPConn
	batch  batchConn
	v6     bool
	routes *routeAsker
	// segments says that the kernel takes several datagrams in a message
	// (UDP_SEGMENT, udp(7)). An interface without checksum offload refuses it.
	segments atomic.Bool

	// The receiver's: messages [next, got) are still to be given out, the first
	// from offset on.
	messages  []ipv6.Message
	next, got int
	offset    int
	heard     [64]*endpoint // the last endpoints, by a hash of their address
}

// openSocket opens a socket on a port. With beside, a socket of the same
// port, it takes the place of that one, which keeps the port until it is closed.
//
// For that moment alone both have SO_REUSEPORT, which on Linux only sockets of
// the same effective user may share (socket(7); inet_rcv_saddr_equal and
// udp_lib_lport_inuse in net/ipv4/udp.c), so no other user can join them. At any
// other time nobody can, and the first one doesn't join another program's.
func openSocket(network string, port uint16, beside *socket) (*socket, error) {
	shared := beside != nil && beside.share(true) == nil
	udp, err := listenUDP(network, port, func(fd uintptr) error { return setOptions(int(fd), network, shared) })
	if err != nil {
		if shared {
			_ = beside.share(false)
		}
		return nil, err
	}
	s := &socket{udp: udp, v6: network == "udp6", messages: make([]ipv6.Message, readBatch)}
	s.batch = ipv4.NewPacketConn(udp)
	if s.v6 {
		s.batch = ipv6.NewPacketConn(udp)
	}
	for i := range s.messages {
		s.messages[i].Buffers = [][]byte{make([]byte, maxMessage)}
		s.messages[i].OOB = make([]byte, controlSize)
	}
	if shared {
		_ = s.share(false)
	}
	s.routes = newRouteAsker(s.port())
	s.segments.Store(s.option(unix.IPPROTO_UDP, unix.UDP_SEGMENT) == nil)
	return s, nil
}

// setOptions sets what has to be set before a socket is bound. Larger buffers
// and UDP_GRO are for speed only, so they may be refused.
func setOptions(fd int, network string, shared bool) error {
	for _, o := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF, unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, socketBuffer)
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	if shared {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			return err
		}
	}
	if network == "udp4" {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
}

// share allows or forbids other sockets of this user on the port.
func (s *socket) share(on bool) error {
	value := 0
	if on {
		value = 1
	}
	return s.control(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, value) })
}

// option returns an error where the kernel doesn't know an option.
func (s *socket) option(level, name int) error {
	return s.control(func(fd int) error {
		_, err := unix.GetsockoptInt(fd, level, name)
		return err
	})
}

func (s *socket) control(do func(fd int) error) error {
	raw, err := s.udp.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// bound reports whether fd is a socket with a port and without an error.
func bound(fd uintptr) bool {
	pending, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil || pending != 0 {
		return false
	}
	name, err := unix.Getsockname(int(fd))
	if err != nil {
		return false
	}
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		return a.Port != 0
	case *unix.SockaddrInet6:
		return a.Port != 0
	}
	return false
}

// receive waits for datagrams and gives out as many as fit. Those from the mesh
// or the host's own place are left out, so it may give out none.
func (s *socket) receive(from *Sockets, bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	if s.next == s.got {
		for i := range s.messages {
			s.messages[i].OOB = s.messages[i].OOB[:controlSize]
		}
		got, err := s.batch.ReadBatch(s.messages, 0)
		if err != nil {
			return 0, err
		}
		s.next, s.got, s.offset = 0, got, 0
	}
	n := 0
	for ; s.next < s.got && n < len(bufs); s.next, s.offset = s.next+1, 0 {
		m := &s.messages[s.next]
		src := m.Addr.(*net.UDPAddr).AddrPort()
		if from.loops(src) {
			from.looped.Add(1)
			continue
		}
		own, in, size := readControl(m.OOB[:m.NN])
		if size <= 0 {
			size = m.N
		}
		ep := s.endpoint(src, own, in, from.sources.Load())
		for s.offset < m.N && n < len(bufs) {
			sizes[n] = copy(bufs[n], m.Buffers[0][s.offset:min(s.offset+size, m.N)])
			eps[n] = ep
			s.offset += size
			n++
		}
		if s.offset < m.N {
			break // the rest with the next call
		}
	}
	return n, nil
}

// readControl returns the host's address that a message was sent to, the number of the
// interface that it came in by, and the size of the datagrams that the kernel joined in it.
func readControl(b []byte) (own netip.Addr, in, size int) {
	for len(b) >= unix.SizeofCmsghdr {
		header, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			return own, in, size
		}
		switch {
		case header.Level == unix.IPPROTO_IP && header.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			// struct in_pktinfo (ip(7)): the interface, then the address to answer
			// from, then the one in the header.
			in, own = int(int32(binary.NativeEndian.Uint32(data))), netip.AddrFrom4([4]byte(data[4:8]))
		case header.Level == unix.IPPROTO_IPV6 && header.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			own = netip.AddrFrom16([16]byte(data[:16]))
		case header.Level == unix.SOL_UDP && header.Type == unix.UDP_GRO && len(data) >= 4:
			size = int(int32(binary.NativeEndian.Uint32(data)))
		}
		b = rest
	}
	return own, in, size
}

// endpoint returns the endpoint of a peer that sent from src to own, by the interface in:
// the same one as long as none of these changes.
func (s *socket) endpoint(src netip.AddrPort, own netip.Addr, in int, sources uint32) *endpoint {
	last := src.Addr().As16()
	slot := &s.heard[(last[15]^last[14]<<3^byte(src.Port())^byte(src.Port()>>8)<<5)%64]
	if e := *slot; e != nil && e.dst == src && e.src == own && e.in == in && e.sources == sources && !e.cleared.Load() {
		return e
	}
	e := &endpoint{dst: src, src: own, way: way{sources: sources, in: in}}
	// Only the address, unless the answer would take another way: with the interface, the
	// kernel goes on sending by it, whatever the routes say (ip_route_output_key_hash_rcu
	// in net/ipv4/route.c). A link-local destination has its zone.
	switch {
	case own.Is4():
		e.control = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: own.As4()})
	case own.Is6():
		e.control = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: own.As16()})
	}
	*slot = e
	return e
}

// outgoing is the scratch memory of one send.
type outgoing struct {
	messages []ipv6.Message
	counts   []int // of datagrams, by message
	control  []byte
	to       net.UDPAddr
}

var outgoings = sync.Pool{New: func() any {
	return &outgoing{
		messages: make([]ipv6.Message, batchSize), counts: make([]int, batchSize),
		control: make([]byte, batchSize*controlSize), to: net.UDPAddr{IP: make([]byte, 16)},
	}
}}

// send sends bufs to e, several in a message where the kernel takes that. A
// source that the host no longer has, or that no route takes, is given up, and
// so is joining where an interface or a smaller MTU on the way forbids it.
func (s *socket) send(bufs [][]byte, e *endpoint, sources uint32) error {
	o := outgoings.Get().(*outgoing)
	defer func() {
		clear(o.messages) // hold on to no packet
		outgoings.Put(o)
	}()
	o.address(e.dst)
	source, join := e.source(sources, s.routes), s.segments.Load()
	for len(bufs) > 0 {
		n := o.fill(bufs, source, join)
		sent, err := s.batch.WriteBatch(o.messages[:n], 0)
		for _, count := range o.counts[:max(sent, 0)] {
			bufs = bufs[count:]
		}
		switch {
		case err == nil && sent > 0:
		case source != nil:
			e.ClearSrc()
			source = nil
		case join && len(bufs) > 1:
			// EIO: an interface without checksum offload, for good (udp(7)).
			// EINVAL and EMSGSIZE: a datagram is larger than the path's MTU.
			if errors.Is(err, unix.EIO) {
				s.segments.Store(false)
			}
			join = false
		default:
			return err
		}
	}
	return nil
}

// address sets the destination.
func (o *outgoing) address(dst netip.AddrPort) {
	o.to.IP, o.to.Port, o.to.Zone = o.to.IP[:0], int(dst.Port()), dst.Addr().Zone()
	if a := dst.Addr(); a.Is4() {
		b := a.As4()
		o.to.IP = append(o.to.IP, b[:]...)
	} else {
		b := a.As16()
		o.to.IP = append(o.to.IP, b[:]...)
	}
}

// fill makes messages of bufs and returns how many: datagrams of one size, of
// which the last may be smaller, go into one message.
func (o *outgoing) fill(bufs [][]byte, source []byte, join bool) int {
	n := 0
	for len(bufs) > 0 && n < len(o.messages) {
		count := 1
		if join {
			count = sameSize(bufs)
		}
		control := o.control[n*controlSize : n*controlSize : (n+1)*controlSize]
		control = append(control, source...)
		if count > 1 {
			control = appendSegmentSize(control, len(bufs[0]))
		}
		o.messages[n] = ipv6.Message{Buffers: bufs[:count], OOB: control, Addr: &o.to}
		o.counts[n] = count
		bufs = bufs[count:]
		n++
	}
	return n
}

// sameSize returns how many of bufs may go into one message.
func sameSize(bufs [][]byte) int {
	size, total, n := len(bufs[0]), len(bufs[0]), 1
	for n < len(bufs) && n < maxSegments && len(bufs[n]) <= size && total+len(bufs[n]) <= maxPayload {
		total += len(bufs[n])
		n++
		if len(bufs[n-1]) < size {
			break
		}
	}
	return n
}

// appendSegmentSize appends the control message UDP_SEGMENT (udp(7)), in the
// layout of struct cmsghdr (cmsg(3)).
func appendSegmentSize(b []byte, size int) []byte {
	start := len(b)
	if unix.SizeofPtr == 8 {
		b = binary.NativeEndian.AppendUint64(b, uint64(unix.CmsgLen(2)))
	} else {
		b = binary.NativeEndian.AppendUint32(b, uint32(unix.CmsgLen(2)))
	}
	b = binary.NativeEndian.AppendUint32(b, unix.SOL_UDP)
	b = binary.NativeEndian.AppendUint32(b, unix.UDP_SEGMENT)
	b = binary.NativeEndian.AppendUint16(b, uint16(size))
	for len(b) < start+unix.CmsgSpace(2) {
		b = append(b, 0)
	}
	return b
}

// way is how a datagram is sent from the address that its peer knows.
type way struct {
	control []byte // that address as a control message; nil for any
	in      int    // the interface by which it was asked; 0 where that isn't known
	// sources is Sockets.sources when the endpoint was heard: the address counts while
	// nothing changed in the host's networks.
	sources uint32
	last    atomic.Pointer[answer] // nil before the first
}

// source returns the control message that sets the source, and the interface where the
// routes would lead an answer elsewhere, or nil for none.
func (e *endpoint) source(sources uint32, routes *routeAsker) []byte {
	if e.sources != sources || e.cleared.Load() {
		return nil
	}
	if e.in == 0 || !e.src.Is4() || e.src.IsLoopback() {
		return e.control
	}
	last, now := e.last.Load(), time.Now()
	if last != nil && now.Before(last.until) {
		return last.control
	}
	oif, known := routes.outOf(e.src, e.dst, e.in)
	if !known {
		if last != nil {
			return last.control
		}
		return e.control
	}
	a := &answer{control: e.control, until: now.Add(wayAge)}
	if oif != 0 {
		a.control = unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(oif), Spec_dst: e.src.As4()})
	}
	e.last.Store(a)
	return a.control
}
