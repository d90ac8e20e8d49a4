package nlconn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// rtaNexthop is RTA_NH_ID of linux/rtnetlink.h, which x/sys lacks: a route's nexthop object.
const rtaNexthop = 30

// A Packet describes a packet whose route the kernel looks up. Zero fields are left out of
// the request.
type Packet struct {
	Src, Dst netip.Addr // Dst is required
	// IIF is the index of the interface on which the packet arrives, 0 for a packet that the
	// host itself sends. OIF is the index of the interface by which it must leave.
	IIF, OIF int
	Mark     uint32
	Proto    uint8
	// The ports are sent for TCP and UDP only: with other protocols the kernel refuses them
	// (rtm_getroute_parse_ip_proto in net/ipv4/netlink.c).
	SrcPort, DstPort uint16
	// Match asks for the matching route as the table has it, instead of the result of the
	// lookup (RTM_F_FIB_MATCH).
	Match bool
}

// A Route is an entry of a routing table, or the result of a lookup.
type Route struct {
	Kind   uint8 // unix.RTN_UNICAST and so on
	Table  uint32
	Dst    netip.Prefix
	Metric uint32
	OIF    int        // index of the interface; 0 if a nexthop object or several hops name it
	Router netip.Addr // the gateway; not valid if the destination is on the link
	Src    netip.Addr // preferred source address of the host's own packets
	// Nexthop is the ID of the nexthop object that says where the route leads; 0: none.
	Nexthop uint32
	// Multipath says that the route has several next hops (RTA_MULTIPATH).
	Multipath bool
}

// Route looks up the route of a packet (RTM_GETROUTE in rtnetlink(7)). If there is none, or
// one that drops the packet, it returns the kernel's error: ENETUNREACH, EHOSTUNREACH,
// EACCES or EINVAL (fib_props in net/ipv4/fib_semantics.c).
func (c *Conn) Route(p Packet) (Route, error) {
	data, err := p.encode()
	if err != nil {
		return Route{}, err
	}
	ms, err := whole(func() ([]netlink.Message, error) {
		return c.Execute(netlink.Message{Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request}, Data: data})
	})
	if err != nil {
		return Route{}, err
	}
	if len(ms) != 1 {
		return Route{}, fmt.Errorf("look up route: %d answers instead of one", len(ms))
	}
	return parseRoute(ms[0].Data)
}

// Routes returns all routes of a family, unix.AF_INET or AF_INET6, for which keep is true.
func (c *Conn) Routes(family uint8, keep func(Route) bool) ([]Route, error) {
	header := make([]byte, unix.SizeofRtMsg)
	header[0] = family
	ms, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request | netlink.Dump}, Data: header,
	})
	if err != nil {
		return nil, err
	}
	var out []Route
	for _, m := range ms {
		r, err := parseRoute(m.Data)
		if err != nil {
			return nil, err
		}
		if keep(r) {
			out = append(out, r)
		}
	}
	return out, nil
}

// encode returns the request: a struct rtmsg and its attributes.
func (p Packet) encode() ([]byte, error) {
	header := make([]byte, unix.SizeofRtMsg)
	header[0], header[1] = unix.AF_INET6, byte(p.Dst.BitLen())
	if p.Dst.Is4() {
		header[0] = unix.AF_INET
	}
	if p.Match {
		binary.NativeEndian.PutUint32(header[8:], unix.RTM_F_FIB_MATCH)
	}
	ae := netlink.NewAttributeEncoder()
	ae.Bytes(unix.RTA_DST, p.Dst.WithZone("").AsSlice())
	if p.Src.IsValid() {
		header[2] = byte(p.Src.BitLen())
		ae.Bytes(unix.RTA_SRC, p.Src.WithZone("").AsSlice())
	}
	number := func(kind uint16, n uint32) {
		if n != 0 {
			ae.Uint32(kind, n)
		}
	}
	number(unix.RTA_IIF, uint32(p.IIF))
	number(unix.RTA_OIF, uint32(p.OIF))
	number(unix.RTA_MARK, p.Mark)
	port := func(kind, port uint16) {
		if port != 0 {
			ae.Bytes(kind, binary.BigEndian.AppendUint16(nil, port))
		}
	}
	switch p.Proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		ae.Uint8(unix.RTA_IP_PROTO, p.Proto)
		port(unix.RTA_SPORT, p.SrcPort)
		port(unix.RTA_DPORT, p.DstPort)
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		ae.Uint8(unix.RTA_IP_PROTO, p.Proto)
	}
	attributes, err := ae.Encode()
	return append(header, attributes...), err
}

var errShort = errors.New("parse route: message is too short")

// parseRoute reads a struct rtmsg and its attributes.
func parseRoute(b []byte) (r Route, err error) {
	if len(b) < unix.SizeofRtMsg {
		return r, errShort
	}
	family, bits := b[0], int(b[1])
	dst := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	r.Table, r.Kind = uint32(b[4]), b[7]
	ad, err := netlink.NewAttributeDecoder(b[unix.SizeofRtMsg:])
	if err != nil {
		return Route{}, err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.RTA_TABLE:
			r.Table = ad.Uint32()
		case unix.RTA_PRIORITY:
			r.Metric = ad.Uint32()
		case unix.RTA_OIF:
			r.OIF = int(ad.Uint32())
		case unix.RTA_GATEWAY:
			r.Router, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.RTA_VIA: // struct rtvia: a family of 2 bytes, and an address of it
			if via := ad.Bytes(); len(via) > 2 {
				r.Router, _ = netip.AddrFromSlice(via[2:])
			}
		case unix.RTA_PREFSRC:
			r.Src, _ = netip.AddrFromSlice(ad.Bytes())
		case rtaNexthop:
			r.Nexthop = ad.Uint32()
		case unix.RTA_MULTIPATH:
			r.Multipath = true
		}
	}
	r.Dst = netip.PrefixFrom(dst, bits)
	return r, ad.Err()
}
