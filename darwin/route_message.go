package darwin

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
)

// Routing messages of macOS, written and read without a Mac. The layouts are
// those of xnu bsd/net/route.h, bsd/net/if.h and bsd/net/if_var.h; golang.org/x/net/route
// has the same sizes, but only builds on BSDs. Both of Apple's architectures are
// little-endian, and each socket address is padded to 4 bytes (ROUNDUP32 of xnu
// bsd/net/rtsock.c).
var order = binary.LittleEndian

const rtmVersion = 5 // RTM_VERSION

// Message types, RTM_*.
const (
	rtmAdd     = 0x1
	rtmDelete  = 0x2
	rtmChange  = 0x3
	rtmMiss    = 0x7
	rtmNewAddr = 0xc
	rtmDelAddr = 0xd
	rtmIfInfo  = 0xe
	rtmIfInfo2 = 0x12
	rtmGet2    = 0x14
)

// Sizes of the headers that socket addresses follow, and where fields are that
// aren't at the same place everywhere.
const (
	sizeRt      = 92  // struct rt_msghdr and rt_msghdr2
	sizeIf      = 112 // struct if_msghdr
	sizeIf2     = 160 // struct if_msghdr2
	sizeIfa     = 20  // struct ifa_msghdr
	offRtIndex  = 4
	offRtFlags  = 8
	offRtAddrs  = 12
	offRtPID    = 16
	offRtSeq    = 20
	offRtErrno  = 24
	offIfAddrs  = 4
	offIfFlags  = 8
	offIfIndex  = 12
	offIf2Mtu   = 40 // ifm_data.ifi_mtu of if_msghdr2
	maxRouteMsg = 2048
)

// Socket addresses of a message, in this order (RTAX_*), each if its bit is set.
const (
	rtaxDst = iota
	rtaxGateway
	rtaxNetmask
	rtaxGenmask
	rtaxIfp
	rtaxIfa
	rtaxAuthor
	rtaxBrd
	rtaxMax
)

// Address families, AF_* of xnu bsd/sys/socket.h.
const (
	afInet  = 2
	afLink  = 18
	afInet6 = 30
)

// RouteFlags are RTF_*.
type RouteFlags uint32

// The flags that matter here.
const (
	RouteUp        RouteFlags = 0x1
	RouteGateway   RouteFlags = 0x2
	RouteHost      RouteFlags = 0x4
	RouteReject    RouteFlags = 0x8
	RouteLLInfo    RouteFlags = 0x400 // a neighbour's entry
	RouteStatic    RouteFlags = 0x800
	RouteBlackhole RouteFlags = 0x1000
	// RouteProto1 is for routing daemons' own use. Here it marks the routes that a
	// [Router] made, so that they are known after a crash.
	RouteProto1    RouteFlags = 0x8000
	RouteCloned    RouteFlags = 0x20000
	RouteLocal     RouteFlags = 0x200000
	RouteBroadcast RouteFlags = 0x400000
	RouteMulticast RouteFlags = 0x800000
	// RouteScoped routes only serve sockets that are bound to the interface.
	RouteScoped RouteFlags = 0x1000000
)

// InterfaceFlags are IFF_*.
type InterfaceFlags uint32

// The flags that matter here.
const (
	InterfaceUp           InterfaceFlags = 0x1
	InterfaceBroadcast    InterfaceFlags = 0x2
	InterfaceLoopback     InterfaceFlags = 0x8
	InterfacePointToPoint InterfaceFlags = 0x10
	InterfaceRunning      InterfaceFlags = 0x40
	InterfaceMulticast    InterfaceFlags = 0x8000
)

// A Route is one entry of the routing table.
type Route struct {
	Dst netip.Prefix
	// Gateway is the next router. Invalid when the destination is on the link.
	Gateway netip.Addr
	// Index is the number of the interface.
	Index int
	Flags RouteFlags
}

// eachMessage calls visit with type and bytes of each message in b, up to an error. A
// list that doesn't end with a message's end is damaged: with a part of the routes,
// what is behind the others would count as internet.
func eachMessage(b []byte, visit func(typ byte, m []byte) error) error {
	for i := 0; len(b) > 0; i++ {
		n := 0
		if len(b) >= 4 {
			n = int(order.Uint16(b))
		}
		if n < 4 || n > len(b) {
			return fmt.Errorf("message %d is damaged", i)
		}
		// Messages of another version than ours may have any layout.
		if b[2] == rtmVersion {
			if err := visit(b[3], b[:n]); err != nil {
				return err
			}
		}
		b = b[n:]
	}
	return nil
}

// sockaddrs splits what follows a header of the given size. A missing address is
// nil. It reports false when an address reaches over the end.
func sockaddrs(m []byte, header int, mask uint32) (sa [rtaxMax][]byte, ok bool) {
	if len(m) < header {
		return sa, false
	}
	b := m[header:]
	for i := range sa {
		if mask&(1<<i) == 0 {
			continue
		}
		if len(b) == 0 {
			return sa, false
		}
		n := int(b[0])
		if n > len(b) {
			return sa, false
		}
		sa[i] = b[:n:n]
		// A length of 0 is the mask of a default route and takes 4 bytes.
		b = b[min(max(4, (n+3)&^3), len(b)):]
	}
	return sa, true
}

// address reads an IPv4 or IPv6 socket address; anything else is invalid. The
// kernel may write the scope of a link-local address into its second word
// (KAME); it is taken out.
func address(sa []byte) netip.Addr {
	switch {
	case len(sa) >= 8 && sa[1] == afInet:
		return netip.AddrFrom4([4]byte(sa[4:8]))
	case len(sa) >= 24 && sa[1] == afInet6:
		a := [16]byte(sa[8:24])
		if addr := netip.AddrFrom16(a); addr.IsLinkLocalUnicast() || addr.IsLinkLocalMulticast() || addr.IsInterfaceLocalMulticast() {
			a[2], a[3] = 0, 0
		}
		return netip.AddrFrom16(a)
	}
	return netip.Addr{}
}

// maskBits counts the ones of a netmask for addresses of a's family. A mask's
// trailing zeros are cut off, and its family isn't set. It reports false for one
// with holes.
func maskBits(sa []byte, a netip.Addr) (int, bool) {
	off := 4
	if a.Is6() {
		off = 8
	}
	var m [16]byte
	if len(sa) > off {
		copy(m[:a.BitLen()/8], sa[off:])
	}
	ones := 0
	for _, b := range m {
		n := bits.LeadingZeros8(^b)
		ones += n
		if n < 8 {
			break
		}
	}
	var want [16]byte
	for i := range ones {
		want[i/8] |= 0x80 >> (i % 8)
	}
	return ones, m == want
}

// linkName reads the interface's name out of a link address (struct sockaddr_dl,
// xnu bsd/net/if_dl.h).
func linkName(sa []byte) string {
	if len(sa) < 8 || sa[1] != afLink || 8+int(sa[5]) > len(sa) {
		return ""
	}
	return string(sa[8 : 8+int(sa[5])])
}

// parseRoute reads one route. It reports false for what isn't an IPv4 or IPv6
// route, or is damaged.
func parseRoute(m []byte) (Route, bool) {
	if len(m) < sizeRt {
		return Route{}, false
	}
	sa, ok := sockaddrs(m, sizeRt, order.Uint32(m[offRtAddrs:]))
	dst := address(sa[rtaxDst])
	if !ok || !dst.IsValid() {
		return Route{}, false
	}
	r := Route{
		Gateway: address(sa[rtaxGateway]),
		Index:   int(order.Uint16(m[offRtIndex:])),
		Flags:   RouteFlags(order.Uint32(m[offRtFlags:])),
	}
	n := dst.BitLen()
	// A route without a mask is a host route; so is one with the flag, whatever
	// the mask.
	if mask := sa[rtaxNetmask]; mask != nil && r.Flags&RouteHost == 0 {
		if n, ok = maskBits(mask, dst); !ok {
			return Route{}, false
		}
	}
	r.Dst = netip.PrefixFrom(dst, n)
	return r, r.Dst == r.Dst.Masked()
}

// ParseRoutes reads the routing table as sysctl NET_RT_DUMP2 gives it. Messages
// that aren't routes of IPv4 or IPv6 are left out. It fails where the list is cut off.
func ParseRoutes(rib []byte) ([]Route, error) {
	var routes []Route
	err := eachMessage(rib, func(typ byte, m []byte) error {
		if r, ok := parseRoute(m); ok && typ == rtmGet2 {
			routes = append(routes, r)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read routing table: %w", err)
	}
	return routes, nil
}

// ParseInterfaces reads the interfaces and their addresses as sysctl
// NET_RT_IFLIST2 gives them. It fails where an interface can't be read or the list is
// cut off.
func ParseInterfaces(rib []byte) ([]Interface, error) {
	var list []Interface
	err := eachMessage(rib, func(typ byte, m []byte) error {
		switch typ {
		case rtmIfInfo2:
			i, ok := parseInterface(m)
			if !ok {
				return fmt.Errorf("interface %d is damaged", len(list))
			}
			list = append(list, i)
		case rtmNewAddr:
			// The kernel lists an interface and then its addresses.
			index, a, peer := parseAddress(m)
			if last := len(list) - 1; last >= 0 && a.IsValid() && list[last].Index == index {
				list[last].Addresses = append(list[last].Addresses, Address{a, peer})
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read interface list: %w", err)
	}
	return list, nil
}

func parseInterface(m []byte) (Interface, bool) {
	if len(m) < sizeIf2 {
		return Interface{}, false
	}
	sa, ok := sockaddrs(m, sizeIf2, order.Uint32(m[offIfAddrs:]))
	i := Interface{
		Name:  linkName(sa[rtaxIfp]),
		Index: int(order.Uint16(m[offIfIndex:])),
		Flags: InterfaceFlags(order.Uint32(m[offIfFlags:])),
		MTU:   int(order.Uint32(m[offIf2Mtu:])),
	}
	return i, ok && checkInterface(i.Name) == nil && i.Index > 0
}

// parseAddress returns the interface's number, an address with its prefix length,
// and the other end of a point-to-point link. The prefix is invalid when the
// message isn't about an IPv4 or IPv6 address.
func parseAddress(m []byte) (index int, p netip.Prefix, peer netip.Addr) {
	if len(m) < sizeIfa {
		return 0, netip.Prefix{}, peer
	}
	sa, ok := sockaddrs(m, sizeIfa, order.Uint32(m[offIfAddrs:]))
	a := address(sa[rtaxIfa])
	if !ok || !a.IsValid() {
		return 0, netip.Prefix{}, peer
	}
	n, ok := maskBits(sa[rtaxNetmask], a)
	if !ok {
		return 0, netip.Prefix{}, peer
	}
	return int(order.Uint16(m[offIfIndex:])), netip.PrefixFrom(a, n), address(sa[rtaxBrd])
}

// appendRoute appends the message that adds or deletes a route.
func appendRoute(b []byte, typ byte, seq int, r Route) []byte {
	start := len(b)
	b = append(b, make([]byte, sizeRt)...)
	var mask uint32
	add := func(rtax int, sa []byte) {
		mask |= 1 << rtax
		b = appendSockaddr(b, sa)
	}
	add(rtaxDst, sockaddr(r.Dst.Addr()))
	if r.Gateway.IsValid() {
		add(rtaxGateway, sockaddr(r.Gateway))
	} else {
		add(rtaxGateway, sockaddrLink(r.Index, ""))
	}
	if r.Flags&RouteHost == 0 {
		add(rtaxNetmask, sockaddrMask(r.Dst))
	}
	m := b[start:]
	putHeader(m, typ)
	order.PutUint16(m[offRtIndex:], uint16(r.Index))
	order.PutUint32(m[offRtFlags:], uint32(r.Flags))
	order.PutUint32(m[offRtAddrs:], mask)
	order.PutUint32(m[offRtSeq:], uint32(seq))
	return b
}

func putHeader(m []byte, typ byte) {
	order.PutUint16(m, uint16(len(m)))
	m[2], m[3] = rtmVersion, typ
}

func appendSockaddr(b, sa []byte) []byte {
	b = append(b, sa...)
	for n := len(sa); n == 0 || n%4 != 0; n++ {
		b = append(b, 0)
	}
	return b
}

// sockaddr makes a struct sockaddr_in or sockaddr_in6. Without a zone: link-local
// destinations aren't routed here.
func sockaddr(a netip.Addr) []byte {
	if a.Is4() {
		b := [16]byte{0: 16, 1: afInet}
		copy(b[4:], a.AsSlice())
		return b[:]
	}
	b := [28]byte{0: 28, 1: afInet6}
	copy(b[8:], a.AsSlice())
	return b[:]
}

// sockaddrMask makes the netmask of a prefix, in full.
func sockaddrMask(p netip.Prefix) []byte {
	ones := make([]byte, p.Addr().BitLen()/8)
	for i := range p.Bits() {
		ones[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(ones) // 4 or 16 bytes
	return sockaddr(a)
}

// sockaddrLink makes a struct sockaddr_dl, which as a gateway means: directly by
// this interface.
func sockaddrLink(index int, name string) []byte {
	b := make([]byte, max(20, 8+len(name)))
	b[0], b[1] = byte(len(b)), afLink
	order.PutUint16(b[2:], uint16(index))
	b[5] = byte(len(name))
	copy(b[8:], name)
	return b
}
