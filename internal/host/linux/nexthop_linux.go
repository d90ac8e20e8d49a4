package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// nhaGroupMember is the size of a group's member in bytes (struct nexthop_grp in
// linux/nexthop.h), which begins with the member's ID.
const nhaGroupMember = 8

// nexthop is a nexthop object, which a route may refer to instead of naming a gateway and
// an interface itself (ip-nexthop(8)).
type nexthop struct {
	id, oif   uint32
	gateway   netip.Addr
	group     []uint32
	blackhole bool
}

// errShort is the error of a netlink message without its whole header.
var errShort = errors.New("the message is too short")

// parseNexthop parses an answer to RTM_GETNEXTHOP.
func parseNexthop(b []byte) (n nexthop, err error) {
	if len(b) < unix.SizeofNhmsg {
		return n, errShort
	}
	ad, err := netlink.NewAttributeDecoder(b[unix.SizeofNhmsg:])
	if err != nil {
		return n, err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.NHA_ID:
			n.id = ad.Uint32()
		case unix.NHA_OIF:
			n.oif = ad.Uint32()
		case unix.NHA_GATEWAY:
			n.gateway, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.NHA_BLACKHOLE:
			n.blackhole = true
		case unix.NHA_GROUP:
			for g := ad.Bytes(); len(g) >= nhaGroupMember; g = g[nhaGroupMember:] {
				n.group = append(n.group, binary.NativeEndian.Uint32(g))
			}
		}
	}
	return n, ad.Err()
}

// namesNexthopOnly reports whether a route refers to a nexthop object and has no
// interface or gateway itself, as the kernel shows it with
// net.ipv4.nexthop_compat_mode=0.
func namesNexthopOnly(r nlconn.Route) bool {
	return r.Kind == unix.RTN_UNICAST && r.Nexthop != 0 && r.OIF == 0 && !r.Multipath && r.Dst.IsValid()
}

// viaNexthops returns the routes of a family that only refer to a nexthop object, by
// table. A group gives one entry per member.
func viaNexthops(conn *nlconn.Conn, family int, names map[int]string) (map[int][]routeEntry, error) {
	routes, err := conn.Routes(uint8(family), namesNexthopOnly)
	if err != nil {
		return nil, fmt.Errorf("list routes by nexthops: %w", err)
	}
	ms, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETNEXTHOP, Flags: netlink.Request | netlink.Dump}, Data: make([]byte, unix.SizeofNhmsg),
	})
	if err != nil {
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
		ids := hops[r.Nexthop].group // members of a group can't be groups
		if ids == nil {
			ids = []uint32{r.Nexthop}
		}
		for _, id := range ids {
			hop := hops[id]
			if name, ok := names[int(hop.oif)]; ok && !hop.blackhole {
				out[int(r.Table)] = append(out[int(r.Table)], routeEntry{r.Dst, name, int(r.Metric), hop.gateway, r.Src})
			}
		}
	}
	return out, nil
}
