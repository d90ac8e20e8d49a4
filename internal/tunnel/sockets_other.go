//go:build !linux

package tunnel

import (
	"net"
	"net/netip"

	"golang.zx2c4.com/wireguard/conn"
)

// batchSize is how many datagrams one call carries.
const batchSize = 1

// way is empty: the system chooses the address that a datagram is sent from.
//
//lint:ignore U1000 endpoint has it on every system
type way struct{}

func (*socket) closeWays() {}

// socket is an open UDP socket. One receiver reads it, any number of senders
// write.
type socket struct {
	udp   *net.UDPConn
	heard [64]*endpoint // the last endpoints, by a hash of their address
}

// openSocket opens a socket on a port. With beside, the socket that it replaces,
// it closes that one first: macOS lets any user join a port whose sockets have
// the wildcard address and SO_REUSEPORT (in_pcbbind in bsd/netinet/in_pcb.c of
// xnu-11417: both tests of another user's socket are left out for two wildcard
// addresses), so holding the old one while the new one is bound would open the
// port to all. Without the option another user can bind neither the wildcard nor
// a single address there. An old socket is replaced only when the system ended
// it (sosetdefunct, by a content filter or a network policy), which macOS doesn't
// do for sleep or for a change of networks.
func openSocket(network string, port uint16, beside *socket) (*socket, error) {
	if beside != nil {
		beside.close()
	}
	udp, err := listenUDP(network, port, nil)
	if err != nil {
		return nil, err
	}
	// Refused where the system allows less; it is for speed only.
	_, _ = udp.SetReadBuffer(socketBuffer), udp.SetWriteBuffer(socketBuffer)
	return &socket{udp: udp}, nil
}

// receive waits for a datagram. One from the mesh or the host's own place is
// left out, so it may give out none.
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

// endpoint returns the endpoint of a peer that sent from src: the same one for
// the same place.
func (s *socket) endpoint(src netip.AddrPort) *endpoint {
	last := src.Addr().As16()
	slot := &s.heard[(last[15]^last[14]<<3^byte(src.Port())^byte(src.Port()>>8)<<5)%64]
	if *slot == nil || (*slot).dst != src {
		*slot = &endpoint{dst: src}
	}
	return *slot
}

// send sends bufs to e.
func (s *socket) send(bufs [][]byte, e *endpoint, _ uint32) error {
	for _, b := range bufs {
		if _, err := s.udp.WriteToUDPAddrPort(b, e.dst); err != nil {
			return err
		}
	}
	return nil
}
