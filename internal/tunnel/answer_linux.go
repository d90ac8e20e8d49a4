package tunnel

import (
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
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
	conn *nlconn.Conn
	port uint16
	busy atomic.Bool // a question isn't answered yet
}

// newRouteAsker opens the socket for the questions of a UDP socket with a port. Without
// one, answers take the way that the routes give them.
func newRouteAsker(port uint16) *routeAsker {
	conn, err := nlconn.Dial(unix.NETLINK_ROUTE)
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
		oif, ok := r.ask(own, dst, 0, false)
		// Where it isn't a host elsewhere, but a broadcast address of another network, say,
		// the kernel is to refuse it as it would without the interface.
		if !ok || oif == in {
			done <- 0
			return
		}
		// A route must fit: without one, the kernel would take the destination for one on
		// the link (ip_route_output_key_hash_rcu in net/ipv4/route.c).
		if oif, ok = r.ask(own, dst, in, true); !ok || oif != in {
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

// ask asks for the route of a datagram, the one in the table with match, and reports whether
// there is one.
func (r *routeAsker) ask(own netip.Addr, dst netip.AddrPort, oif int, match bool) (by int, ok bool) {
	route, err := r.conn.Route(nlconn.Packet{
		Src: own, Dst: dst.Addr(), OIF: oif, Match: match,
		Proto: unix.IPPROTO_UDP, SrcPort: r.port, DstPort: dst.Port(),
	})
	if err != nil || route.Kind != unix.RTN_UNICAST {
		return 0, false
	}
	if route.OIF == 0 && (route.Multipath || route.Nexthop != 0) {
		return oif, true // the route with several next hops fits because one of them is by oif
	}
	return route.OIF, true
}
