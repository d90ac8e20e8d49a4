package tunnel

import (
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// Replies leave from the address that the peer sent to, and, for IPv4, by the interface
// that its datagram arrived on. The first is a control message (IP_PKTINFO, ip(7)); the
// second needs two route lookups, whose result an endpoint keeps for replyRouteTTL.

const (
	// replyRouteTTL is how long the result of a route lookup is used for an endpoint. A
	// change of routes that moves a reply takes effect after at most this long.
	replyRouteTTL = 5 * time.Second
	// replyRouteTimeout bounds how long a reply waits for a lookup. The kernel takes some
	// microseconds, unless another program makes it hold the lock of its routes (rtnl). The
	// reply then leaves as the one before it did.
	replyRouteTimeout = 50 * time.Millisecond
)

// replyRoute is the cached result of a route lookup for an endpoint.
type replyRoute struct {
	control []byte    // the control message that a reply is sent with
	until   time.Time // when it has to be looked up again
}

// routeLookup looks up routes of replies in the kernel, one at a time. The zero value
// knows no route.
type routeLookup struct {
	conn *nlconn.Conn // nil: no lookups
	port uint16       // source port of the replies, which rules (ip-rule(8)) may match
	busy atomic.Bool  // a lookup is running
}

// newRouteLookup opens the netlink socket for the lookups of a UDP socket bound to port. If
// it can't, replies leave by the interface that the host's routes select.
func newRouteLookup(port uint16) *routeLookup {
	conn, err := nlconn.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return &routeLookup{}
	}
	return &routeLookup{conn: conn, port: port}
}

// closeRoutes closes the netlink socket of the lookups, which ends a running one.
func (s *socket) closeRoutes() {
	if s.routes != nil && s.routes.conn != nil {
		_ = s.routes.conn.Close()
	}
}

// replyInterface returns the interface that a reply from own to dst must be bound to in
// order to leave by in, the interface that the peer's datagram arrived on. It returns 0
// if the reply leaves by in anyway, or if no route to dst leads through in. known is false
// if the kernel didn't answer within replyRouteTimeout, or is still busy with another lookup.
//
// Without the binding, a host with two uplinks, or one whose own packets another VPN
// takes, could reply through a network that doesn't know the source address: routers there
// drop such a packet (RFC 2827), or translate it, and the peer sees a reply from an address
// that it never sent to.
//
// IPv6 is left out: for a route lookup there, the interface is only a preference among
// routes of equal metric (ip6_route_output_flags_noref and rt6_score_route in
// net/ipv6/route.c).
func (r *routeLookup) replyInterface(own netip.Addr, dst netip.AddrPort, in int) (oif int, known bool) {
	if r.conn == nil || !r.busy.CompareAndSwap(false, true) {
		return 0, false
	}
	done := make(chan int, 1)
	go func() { // busy allows only one, as the kernel may block it
		defer r.busy.Store(false)
		oif, ok := r.route(own, dst, 0, false)
		// Without a unicast route, to a broadcast address of another network say, the
		// reply isn't bound either, and the kernel refuses it.
		if !ok || oif == in {
			done <- 0
			return
		}
		// Only an entry of a routing table counts. An ordinary lookup with an interface
		// but without a matching route assumes that the destination is on that link
		// (ip_route_output_key_hash_rcu in net/ipv4/route.c).
		if oif, ok = r.route(own, dst, in, true); !ok || oif != in {
			in = 0
		}
		done <- in
	}()
	timeout := time.NewTimer(replyRouteTimeout)
	defer timeout.Stop()
	select {
	case oif := <-done:
		return oif, true
	case <-timeout.C:
		return 0, false
	}
}

// route looks up the unicast route of a datagram, through the interface oif unless that is
// 0, and returns the interface that it leaves by. With match, it must be an entry of a
// routing table (RTM_F_FIB_MATCH). ok is false if there is no such route.
func (r *routeLookup) route(own netip.Addr, dst netip.AddrPort, oif int, match bool) (by int, ok bool) {
	route, err := r.conn.Route(nlconn.Packet{
		Src: own, Dst: dst.Addr(), OIF: oif, Match: match,
		Proto: unix.IPPROTO_UDP, SrcPort: r.port, DstPort: dst.Port(),
	})
	if err != nil || route.Kind != unix.RTN_UNICAST {
		return 0, false
	}
	if route.OIF == 0 && (route.Multipath || route.Nexthop != 0) {
		return oif, true // a route with several next hops matches oif because one of them is through it
	}
	return route.OIF, true
}
