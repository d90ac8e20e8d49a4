//go:build !linux

package tunnel

import (
	"net"
	"net/netip"

	"golang.zx2c4.com/wireguard/conn"
)

// batchSize is how many datagrams one call carries: these systems have no recvmmsg(2).
const batchSize = 1

// replyPath is empty: the system chooses the source address of a datagram.
//
//lint:ignore U1000 endpoint has it on every system
type replyPath struct{}

// closeRoutes does nothing: only Linux looks up routes of replies.
func (*socket) closeRoutes() {}

// socket is an open UDP socket. One receiver reads it, and any number of senders write
// to it concurrently.
type socket struct {
	udp    *net.UDPConn
	recent [64]*endpoint // the receiver's latest endpoints, by a hash of their address
}

// openSocket opens a socket on a port. If it replaces another socket, beside, it closes
// that one first, which leaves the port free for a moment.
//
// Keeping it meanwhile would need SO_REUSEPORT, and macOS lets any user join a port whose
// sockets have that option and the wildcard address (in_pcbbind in bsd/netinet/in_pcb.c
// of xnu-11417 skips both checks for another user's socket if both addresses are
// wildcards). Without the option, another user can bind neither the wildcard nor a single
// address there. A socket needs replacing only after the system made it defunct
// (sosetdefunct, by a content filter or a network policy), which macOS doesn't do on sleep
// or on a change of networks.
func openSocket(network string, port uint16, beside *socket) (*socket, error) {
	if beside != nil {
		beside.close()
	}
	udp, err := listenUDP(network, port, nil)
	if err != nil {
		return nil, err
	}
	// Larger buffers only make it faster, so a refusal doesn't matter.
	_, _ = udp.SetReadBuffer(socketBuffer), udp.SetWriteBuffer(socketBuffer)
	return &socket{udp: udp}, nil
}

// receive waits for a datagram. It discards one whose source loops, and then returns 0
// without an error.
func (s *socket) receive(from *Sockets, bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	n, src, err := s.udp.ReadFromUDPAddrPort(bufs[0])
	if err != nil {
		return 0, err
	}
	src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	if from.loops(src) {
		from.looped.Add(1)
		return 0, nil
	}
	sizes[0], eps[0] = n, s.endpoint(src)
	return 1, nil
}

// endpoint returns the endpoint of a peer that sent from src. It reuses the one of an
// earlier datagram from there, which saves an allocation for each datagram.
func (s *socket) endpoint(src netip.AddrPort) *endpoint {
	last := src.Addr().As16()
	slot := &s.recent[(last[15]^last[14]<<3^byte(src.Port())^byte(src.Port()>>8)<<5)%64]
	if *slot == nil || (*slot).dst != src {
		*slot = &endpoint{dst: src}
	}
	return *slot
}

// send sends bufs to e, one datagram each, up to the first error.
func (s *socket) send(bufs [][]byte, e *endpoint, _ uint32) error {
	for _, b := range bufs {
		if _, err := s.udp.WriteToUDPAddrPort(b, e.dst); err != nil {
			return err
		}
	}
	return nil
}
