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

// batchSize is how many datagrams one call of a receiver or of Send carries at most: as
// many as wireguard-go handles at once.
const batchSize = conn.IdealBatchSize

const (
	// readBatch is how many messages one read takes. Each may hold up to 64
	// datagrams that the kernel joined (UDP_GRO, udp(7)), so a few suffice.
	readBatch = 8
	// maxMessage is the largest UDP message in bytes: its length field has 16 bits.
	maxMessage = 1<<16 - 1
	// maxSegments is how many datagrams one outgoing message may carry
	// (UDP_MAX_SEGMENTS in the kernel's include/linux/udp.h; 128 from 6.12 on).
	maxSegments = 64
	// maxPayload is how many bytes one outgoing message may carry: maxMessage less the
	// headers of IPv6 (40) and UDP (8), the longest that the kernel adds.
	maxPayload = maxMessage - 40 - 8
)

// controlSize is the space for the control messages of a read, in bytes: IPV6_PKTINFO,
// which is larger than IP_PKTINFO, and UDP_GRO. Those of a send need less.
var controlSize = unix.CmsgSpace(unix.SizeofInet6Pktinfo) + unix.CmsgSpace(4)

// batchConn is what ipv4.PacketConn and ipv6.PacketConn have in common.
type batchConn interface {
	ReadBatch([]ipv6.Message, int) (int, error)
	WriteBatch([]ipv6.Message, int) (int, error)
}

// socket is an open UDP socket. One receiver reads it, and any number of senders write
// to it concurrently.
type socket struct {
	udp    *net.UDPConn
	batch  batchConn    // recvmmsg(2) and sendmmsg(2) on udp
	v6     bool         // IPv6, else IPv4
	routes *routeLookup // for the interfaces of replies
	// segments is whether the kernel takes several datagrams in a message
	// (UDP_SEGMENT, udp(7)). Cleared once an interface without checksum offload refuses it.
	segments atomic.Bool

	// The fields below belong to the receiver. Of the messages of the last read,
	// [next, got) aren't delivered yet; of the first of them, the bytes from offset on.
	messages  []ipv6.Message
	next, got int
	offset    int
	recent    [64]*endpoint // the latest endpoints by a hash of their address; see endpoint
}

// openSocket opens a socket on a port. With beside, a socket on the same port that the
// new one replaces, beside keeps the port until the caller closes it, so that the port is
// never free.
//
// Only meanwhile both have SO_REUSEPORT, which on Linux lets sockets of one effective user
// share a port (socket(7); inet_rcv_saddr_equal and udp_lib_lport_inuse in net/ipv4/udp.c),
// so no other user can join them. Without beside, the option is off: the socket neither
// joins another program's port nor lets one join.
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
		_ = s.share(false) // bound now, so the option is no longer needed
	}
	s.routes = newRouteLookup(s.port())
	s.segments.Store(s.option(unix.IPPROTO_UDP, unix.UDP_SEGMENT) == nil)
	return s, nil
}

// setOptions sets the options that must be set before a socket is bound. The kernel may
// refuse larger buffers and UDP_GRO, which only make it faster. SO_RCVBUFFORCE and
// SO_SNDBUFFORCE exceed net.core.rmem_max and wmem_max, and need CAP_NET_ADMIN (socket(7));
// the first two options serve a process without it.
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

// share switches SO_REUSEPORT; see openSocket.
func (s *socket) share(on bool) error {
	value := 0
	if on {
		value = 1
	}
	return s.control(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, value) })
}

// option returns an error if the kernel doesn't know an option.
func (s *socket) option(level, name int) error {
	return s.control(func(fd int) error {
		_, err := unix.GetsockoptInt(fd, level, name)
		return err
	})
}

// control calls do with the socket's file descriptor. It fails after close.
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

// bound reports whether fd is a socket with a port and without a pending error. A socket
// that an administrator destroyed (ss --kill, SOCK_DESTROY) has ECONNABORTED pending, and
// no port any more if the system chose it (udp_abort and __udp_disconnect in
// net/ipv4/udp.c).
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

// receive waits for datagrams and delivers as many as fit into bufs; the next call gets
// the rest. It discards datagrams whose source loops, so it may return 0 without an error.
func (s *socket) receive(from *Sockets, bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	if s.next == s.got {
		for i := range s.messages {
			s.messages[i].OOB = s.messages[i].OOB[:controlSize] // the last read shortened it
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
			size = m.N // a single datagram: nothing was joined
		}
		ep := s.endpoint(src, own, in, from.sources.Load())
		for s.offset < m.N && n < len(bufs) {
			sizes[n] = copy(bufs[n], m.Buffers[0][s.offset:min(s.offset+size, m.N)])
			eps[n] = ep
			s.offset += size
			n++
		}
		if s.offset < m.N {
			break // bufs is full
		}
	}
	return n, nil
}

// readControl reads the control messages of a received message: the host's address that
// it was sent to, the index of the IPv4 interface that it arrived on (0 for IPv6, where
// nothing uses it), and the size of each datagram that the kernel joined in it, all but the
// last, or 0 for a single one. What is missing or malformed stays zero.
func readControl(b []byte) (own netip.Addr, in, size int) {
	for len(b) >= unix.SizeofCmsghdr {
		header, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			return own, in, size
		}
		switch {
		case header.Level == unix.IPPROTO_IP && header.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			// struct in_pktinfo (ip(7)): ipi_ifindex, ipi_spec_dst (the local address to
			// reply from), and ipi_addr (the destination in the header, which may be a
			// broadcast address).
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

// endpoint returns the endpoint of a peer that sent from src to own and arrived on the
// interface in. It reuses the one of an earlier datagram if none of these changed, which
// saves an allocation for each datagram and keeps the cached route of replies.
func (s *socket) endpoint(src netip.AddrPort, own netip.Addr, in int, sources uint32) *endpoint {
	last := src.Addr().As16()
	slot := &s.recent[(last[15]^last[14]<<3^byte(src.Port())^byte(src.Port()>>8)<<5)%64]
	if e := *slot; e != nil && e.dst == src && e.src == own && e.in == in && e.sources == sources && !e.cleared.Load() {
		return e
	}
	e := &endpoint{dst: src, src: own, replyPath: replyPath{sources: sources, in: in}}
	// The control message sets the address alone; source adds the interface if needed.
	// With an interface, the kernel would keep sending by it whatever the routes say
	// (ip_route_output_key_hash_rcu in net/ipv4/route.c). A link-local destination has a
	// zone, which selects the interface.
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
	counts   []int       // how many datagrams each message carries
	control  []byte      // the messages' control messages, controlSize bytes each
	to       net.UDPAddr // the destination of all messages
}

// outgoings keeps scratch memory between sends, which come concurrently from wireguard-go's
// workers.
var outgoings = sync.Pool{New: func() any {
	return &outgoing{
		messages: make([]ipv6.Message, batchSize), counts: make([]int, batchSize),
		control: make([]byte, batchSize*controlSize), to: net.UDPAddr{IP: make([]byte, 16)},
	}
}}

// send sends bufs to e, several in a message if the kernel supports that. On an error it
// tries again without what could have caused it: first without the source address, which
// the host may have lost or no route may accept, then without joining, which an interface
// or a smaller path MTU may forbid.
func (s *socket) send(bufs [][]byte, e *endpoint, sources uint32) error {
	o := outgoings.Get().(*outgoing)
	defer func() {
		clear(o.messages) // the pool must not keep the packets alive
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
			// EIO: the interface lacks checksum offload, which doesn't change (udp(7)).
			// EINVAL or EMSGSIZE: a datagram exceeds the path MTU, in this call only.
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

// address sets the destination, in the 16 bytes that o.to already has.
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

// fill builds messages from bufs and returns how many. source is the control message that
// sets their source, or nil. With join, consecutive datagrams of one size go into one
// message, as UDP_SEGMENT demands; only the last may be smaller.
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

// sameSize returns how many of bufs, from the first on, may go into one message.
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

// appendSegmentSize appends the control message UDP_SEGMENT (udp(7)), which tells the
// kernel to cut the payload into datagrams of size bytes, in the layout of struct cmsghdr
// (cmsg(3)): a length of a size_t, level and type of an int each, data, and padding.
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

// replyPath makes replies leave from the address that the peer sent to, by the interface
// that its datagram arrived on.
type replyPath struct {
	control []byte // the control message for the address alone; nil for a configured endpoint
	in      int    // index of the interface that the datagram arrived on; 0 if unknown
	// sources is Sockets.sources at the time of the datagram. The path is valid until that
	// changes: the host may have lost the address since.
	sources uint32
	last    atomic.Pointer[replyRoute] // result of the latest lookup; nil before the first
}

// source returns the control message for the next datagram to e: it sets the source
// address, and the interface if the host's routes would select another. nil leaves both to
// the kernel. sources is the current Sockets.sources.
func (e *endpoint) source(sources uint32, routes *routeLookup) []byte {
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
	oif, known := routes.replyInterface(e.src, e.dst, e.in)
	if !known {
		if last != nil {
			return last.control // out of date, but better than no interface
		}
		return e.control
	}
	a := &replyRoute{control: e.control, until: now.Add(replyRouteTTL)}
	if oif != 0 {
		a.control = unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(oif), Spec_dst: e.src.As4()})
	}
	e.last.Store(a)
	return a.control
}
