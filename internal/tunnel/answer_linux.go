package tunnel

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// wayAge is for how long the kernel isn't asked again which way an answer takes.
	wayAge = 5 * time.Second
	// wayPatience is how long an answer waits for that. The kernel answers in some
	// microseconds, but not while another program holds its lock of routes (rtnl).
	wayPatience = 50 * time.Millisecond
)

// answer is how a datagram is answered from the address that it was sent to.
type answer struct {
	control []byte
	until   time.Time
}

// routeAsker asks the kernel for the routes of answers. The zero value asks nothing.
type routeAsker struct {
	conn *netlink.Conn
	port uint16
	busy atomic.Bool // a question isn't answered yet
}

// newRouteAsker opens the socket for the questions of a UDP socket with a port. Without
// one, answers take the way that the routes give them.
func newRouteAsker(port uint16) *routeAsker {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return &routeAsker{}
	}
	return &routeAsker{conn: conn, port: port}
}

// closeWays closes what the socket asks for routes with, and ends a question.
func (s *socket) closeWays() {
	if s.routes != nil && s.routes.conn != nil {
		_ = s.routes.conn.Close()
	}
}

// outOf returns the interface by which an answer from own to dst has to be sent, so that
// it leaves where the question came in, by interface in; 0 where it does so by itself, or
// where no route leads there by in. Where the kernel doesn't say so in time, known is false.
//
// A host with two uplinks, or whose own packets another VPN takes, would else answer by
// another network than the one that knows the address: routers there drop the answer
// (RFC 2827) or translate it, so that it comes from an address that the peer didn't ask.
//
// Only for IPv4: of IPv6 the kernel takes the interface for no more than a preference
// among routes of one metric (ip6_route_output_flags_noref and rt6_score_route in
// net/ipv6/route.c).
func (r *routeAsker) outOf(own netip.Addr, dst netip.AddrPort, in int) (oif int, known bool) {
	if r.conn == nil || !r.busy.CompareAndSwap(false, true) {
		return 0, false
	}
	done := make(chan int, 1)
	go func() { // bounded by busy: the kernel may hold it up
		defer r.busy.Store(false)
		oif, ok := r.ask(own, dst, 0, 0)
		// Where it isn't a host elsewhere, but a broadcast address of another network, say,
		// the kernel is to refuse it as it would without the interface.
		if !ok || oif == in {
			done <- 0
			return
		}
		// A route must fit: without one, the kernel would take the destination for one on
		// the link (ip_route_output_key_hash_rcu in net/ipv4/route.c).
		if oif, ok = r.ask(own, dst, in, unix.RTM_F_FIB_MATCH); !ok || oif != in {
			in = 0
		}
		done <- in
	}()
	late := time.NewTimer(wayPatience)
	defer late.Stop()
	select {
	case oif := <-done:
		return oif, true
	case <-late.C:
		return 0, false
	}
}

// ask asks for the route of a datagram (RTM_GETROUTE in rtnetlink(7)), and reports whether
// there is one.
func (r *routeAsker) ask(own netip.Addr, dst netip.AddrPort, oif int, flags uint32) (by int, ok bool) {
	const rtmsgSize, rtaIPProto, rtaSport, rtaDport, rtaNexthop = 12, 27, 28, 29, 30 // linux/rtnetlink.h
	header := make([]byte, rtmsgSize)
	header[0], header[1], header[2] = unix.AF_INET, 32, 32
	binary.NativeEndian.PutUint32(header[8:], flags)
	ae := netlink.NewAttributeEncoder()
	ae.Bytes(unix.RTA_DST, dst.Addr().AsSlice())
	ae.Bytes(unix.RTA_SRC, own.AsSlice())
	ae.Uint8(rtaIPProto, unix.IPPROTO_UDP)
	ae.Bytes(rtaSport, []byte{byte(r.port >> 8), byte(r.port)})
	ae.Bytes(rtaDport, []byte{byte(dst.Port() >> 8), byte(dst.Port())})
	if oif != 0 {
		ae.Uint32(unix.RTA_OIF, uint32(oif))
	}
	attrs, err := ae.Encode()
	if err != nil {
		return 0, false
	}
	ms, err := r.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request}, Data: append(header, attrs...),
	})
	if err != nil || len(ms) != 1 || len(ms[0].Data) < rtmsgSize || ms[0].Data[7] != unix.RTN_UNICAST {
		return 0, false
	}
	ad, err := netlink.NewAttributeDecoder(ms[0].Data[rtmsgSize:])
	if err != nil {
		return 0, false
	}
	multipath := false
	for ad.Next() {
		switch ad.Type() {
		case unix.RTA_OIF:
			by = int(ad.Uint32())
		case unix.RTA_MULTIPATH, rtaNexthop:
			multipath = true
		}
	}
	if by == 0 && multipath {
		by = oif // the route with several next hops fits because one of them is by oif
	}
	return by, ad.Err() == nil
}
