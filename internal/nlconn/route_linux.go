package nlconn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// rtaNexthop is RTA_NH_ID of linux/rtnetlink.h, a route's nexthop.
const rtaNexthop = 30

// A Packet is what the kernel is asked the route of. What is zero isn't said.
type Packet struct {
	Src, Dst netip.Addr // Dst is required
	// IIF is the number of the interface that the packet comes in by, 0 for a packet of the
	// host's own, and OIF the one that it is to leave by.
	IIF, OIF int
	Mark     uint32
	Proto    uint8
	// The ports count for TCP and UDP alone: with others the kernel refuses them
	// (rtm_getroute_parse_ip_proto in net/ipv4/netlink.c).
	SrcPort, DstPort uint16
	// Match asks for the route in the table instead of what it comes to (RTM_F_FIB_MATCH).
	Match bool
}

// A Route is one of the kernel's, or the answer to a question for a packet's.
type Route struct {
	Kind   uint8 // unix.RTN_UNICAST and so on
	Table  uint32
	Dst    netip.Prefix
	Metric uint32
	OIF    int        // 0 where the route doesn't say it by itself
	Router netip.Addr // not valid for what is on the link
	Src    netip.Addr // that the host's own packets have
	// Nexthop is the number of the nexthop object that says where the route leads.
	Nexthop uint32
	// Multipath says that the route has several ways.
	Multipath bool
}

// Route asks which route a packet takes (RTM_GETROUTE in rtnetlink(7)). Where there is none,
// or one that leads nowhere, the kernel's error is returned: ENETUNREACH, EHOSTUNREACH,
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
		return Route{}, fmt.Errorf("%d routes instead of one", len(ms))
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

// encode writes the question behind a struct rtmsg.
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

var errShort = errors.New("a route's message is too short")

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
