package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Sizes of the headers of routes' and nexthops' messages (struct rtmsg in
// linux/rtnetlink.h, struct nhmsg in linux/nexthop.h), in bytes.
const (
	rtmsgSize = 12
	nhmsgSize = 8
)

// Attributes of a nexthop (linux/nexthop.h). A group is a list of 8 bytes each,
// which begin with the member's number.
const (
	nhaID          = 1
	nhaGroup       = 2
	nhaBlackhole   = 4
	nhaOIF         = 5
	nhaGateway     = 6
	nhaGroupMember = 8
)

// rtaNexthop is RTA_NH_ID of linux/rtnetlink.h, a route's nexthop.
const rtaNexthop = 30

// nexthop is a nexthop object: a route may name one instead of saying by itself
// where it leads (ip-nexthop(8)).
type nexthop struct {
	id, oif   uint32
	gateway   netip.Addr
	group     []uint32
	blackhole bool
}

// viaNexthop is a unicast route that names a nexthop and says nothing else of
// where it leads, as the kernel shows it with net.ipv4.nexthop_compat_mode=0.
type viaNexthop struct {
	table, metric, nexthop uint32
	prefix                 netip.Prefix
	source                 netip.Addr
}

var errShort = errors.New("the message is too short")

// parseNexthop reads an answer to RTM_GETNEXTHOP.
func parseNexthop(b []byte) (n nexthop, err error) {
	if len(b) < nhmsgSize {
		return n, errShort
	}
	ad, err := netlink.NewAttributeDecoder(b[nhmsgSize:])
	if err != nil {
		return n, err
	}
	for ad.Next() {
		switch ad.Type() {
		case nhaID:
			n.id = ad.Uint32()
		case nhaOIF:
			n.oif = ad.Uint32()
		case nhaGateway:
			n.gateway, _ = netip.AddrFromSlice(ad.Bytes())
		case nhaBlackhole:
			n.blackhole = true
		case nhaGroup:
			for g := ad.Bytes(); len(g) >= nhaGroupMember; g = g[nhaGroupMember:] {
				n.group = append(n.group, binary.NativeEndian.Uint32(g))
			}
		}
	}
	return n, ad.Err()
}

// parseViaNexthop reads an answer to RTM_GETROUTE; ok says that it is a unicast
// route which names a nexthop alone.
func parseViaNexthop(b []byte) (r viaNexthop, ok bool, err error) {
	if len(b) < rtmsgSize {
		return r, false, errShort
	}
	family, bits, kind := b[0], int(b[1]), b[7]
	dst := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	r.table = uint32(b[4])
	ad, err := netlink.NewAttributeDecoder(b[rtmsgSize:])
	if err != nil {
		return r, false, err
	}
	said := false // by the route itself
	for ad.Next() {
		switch ad.Type() {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.RTA_TABLE:
			r.table = ad.Uint32()
		case unix.RTA_PRIORITY:
			r.metric = ad.Uint32()
		case unix.RTA_PREFSRC:
			r.source, _ = netip.AddrFromSlice(ad.Bytes())
		case rtaNexthop:
			r.nexthop = ad.Uint32()
		case unix.RTA_OIF, unix.RTA_MULTIPATH:
			said = true
		}
	}
	r.prefix = netip.PrefixFrom(dst, bits)
	return r, r.nexthop != 0 && !said && kind == unix.RTN_UNICAST && r.prefix.IsValid(), ad.Err()
}

// viaNexthops reads the routes of a family that name a nexthop alone, and asks
// the kernel for the nexthops: an entry for each way, by table.
func viaNexthops(conn *netlink.Conn, family int, names map[int]string) (map[int][]routeEntry, error) {
	header := make([]byte, rtmsgSize)
	header[0] = byte(family)
	ms, err := dump(conn, unix.RTM_GETROUTE, header)
	if err != nil {
		return nil, fmt.Errorf("list routes by nexthops: %w", err)
	}
	var routes []viaNexthop
	for _, m := range ms {
		r, ok, err := parseViaNexthop(m.Data)
		if err != nil {
			return nil, fmt.Errorf("list routes by nexthops: %w", err)
		}
		if ok {
			routes = append(routes, r)
		}
	}
	if ms, err = dump(conn, unix.RTM_GETNEXTHOP, make([]byte, nhmsgSize)); err != nil {
		return nil, fmt.Errorf("list nexthops: %w", err)
	}
	hops := map[uint32]nexthop{}
	for _, m := range ms {
		n, err := parseNexthop(m.Data)
		if err != nil {
			return nil, fmt.Errorf("list nexthops: %w", err)
		}
		hops[n.id] = n
	}
	out := map[int][]routeEntry{}
	for _, r := range routes {
		ids := hops[r.nexthop].group // whose members are no groups themselves
		if ids == nil {
			ids = []uint32{r.nexthop}
		}
		for _, id := range ids {
			hop := hops[id]
			if name, ok := names[int(hop.oif)]; ok && !hop.blackhole {
				out[int(r.table)] = append(out[int(r.table)], routeEntry{r.prefix, name, int(r.metric), hop.gateway, r.source})
			}
		}
	}
	return out, nil
}

func dump(conn *netlink.Conn, kind uint16, header []byte) ([]netlink.Message, error) {
	ms, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | netlink.Dump},
		Data:   header,
	})
	if err != nil {
		return nil, err
	}
	return ms, checkWhole(ms)
}
