package xnu

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
)

// Order is the byte order of both of Apple's architectures.
var Order = binary.LittleEndian

// RTMVersion is the version of the messages, RTM_VERSION.
const RTMVersion = 5

// Message types, RTM_* of xnu bsd/net/route.h.
const (
	RTMAdd     = 0x1  // a route was added, or is to be
	RTMDelete  = 0x2  // a route was deleted, or is to be
	RTMChange  = 0x3  // a route was changed
	RTMMiss    = 0x7  // there is no route to an address
	RTMNewAddr = 0xc  // an interface has a new address
	RTMDelAddr = 0xd  // an interface lost an address
	RTMIfInfo  = 0xe  // an interface changed
	RTMIfInfo2 = 0x12 // an interface, in a dump
	RTMGet2    = 0x14 // a route, in a dump
)

// Sizes in bytes of the headers, behind which the socket addresses begin, and the offsets
// of fields in them. Length, version and type are at the beginning of each: 2 bytes, 1 and
// 1.
const (
	SizeRt  = 92  // struct rt_msghdr and rt_msghdr2
	SizeIf  = 112 // struct if_msghdr
	SizeIf2 = 160 // struct if_msghdr2
	SizeIfa = 20  // struct ifa_msghdr

	OffRtIndex = 4  // rtm_index, 2 bytes
	OffRtFlags = 8  // rtm_flags, 4 bytes
	OffRtAddrs = 12 // rtm_addrs, 4 bytes
	OffRtSeq   = 20 // rtm_seq, 4 bytes; rt_msghdr only
	OffIfAddrs = 4  // ifm_addrs and ifam_addrs, 4 bytes
	OffIfFlags = 8  // ifm_flags, 4 bytes
	OffIfIndex = 12 // ifm_index and ifam_index, 2 bytes
	OffIf2MTU  = 40 // ifm_data.ifi_mtu of if_msghdr2, 4 bytes

	// MaxRouteMsg is enough for each message of a routing socket.
	MaxRouteMsg = 2048
)

// The socket addresses of a message, RTAX_*, in their order. A message has those whose
// bit, 1<<RTAX…, is set in its field of addresses.
const (
	RTAXDst     = iota // destination
	RTAXGateway        // next router, or a link address
	RTAXNetmask
	RTAXGenmask
	RTAXIfp    // name of the interface
	RTAXIfa    // address of the interface
	RTAXAuthor // author of a redirect
	RTAXBrd    // broadcast address, or remote end of a point-to-point link
	RTAXMax
)

// Address families, AF_* of xnu bsd/sys/socket.h.
const (
	AFInet  = 2
	AFLink  = 18
	AFInet6 = 30
)

// A Route is an entry of the routing table, as far as messages describe it.
type Route struct {
	Dst     netip.Prefix // masked
	Gateway netip.Addr   // invalid if the destination is on the link
	Index   int          // of the interface
	Flags   uint32       // RTF_* of xnu bsd/net/route.h
}

// An Interface is a network interface, as far as messages describe it.
type Interface struct {
	Name  string
	Index int
	Flags uint32 // IFF_* of xnu bsd/net/if.h
	MTU   int    // bytes; messages of type RTMIfInfo2 only
}

// rtfHost is RTF_HOST: the route leads to one host, and its message has no mask.
const rtfHost = 0x4

// EachMessage calls visit with the type and bytes of each message in b until visit fails.
// It fails if b doesn't end where a message does: a caller that had only some of the
// routes would take the networks of the others for the internet.
func EachMessage(b []byte, visit func(typ byte, m []byte) error) error {
	for i := 0; len(b) > 0; i++ {
		n := 0
		if len(b) >= 4 {
			n = int(Order.Uint16(b))
		}
		if n < 4 || n > len(b) {
			return fmt.Errorf("message %d is damaged", i)
		}
		// Messages of another version may have any layout.
		if b[2] == RTMVersion {
			if err := visit(b[3], b[:n]); err != nil {
				return err
			}
		}
		b = b[n:]
	}
	return nil
}

// Sockaddrs splits the socket addresses behind a header of the given size. mask has the
// bits of those that the message has; others are nil. It reports false if an address
// extends beyond the message.
func Sockaddrs(m []byte, header int, mask uint32) (sa [RTAXMax][]byte, ok bool) {
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

// ReadSockaddr returns the address of an IPv4 or IPv6 socket address, and an invalid one
// for any other. The kernel may store the scope of a link-local address in its second
// 16 bits (an inheritance from KAME), which ReadSockaddr clears.
func ReadSockaddr(sa []byte) netip.Addr {
	switch {
	case len(sa) >= 8 && sa[1] == AFInet:
		return netip.AddrFrom4([4]byte(sa[4:8]))
	case len(sa) >= 24 && sa[1] == AFInet6:
		a := [16]byte(sa[8:24])
		if addr := netip.AddrFrom16(a); addr.IsLinkLocalUnicast() || addr.IsLinkLocalMulticast() || addr.IsInterfaceLocalMulticast() {
			a[2], a[3] = 0, 0
		}
		return netip.AddrFrom16(a)
	}
	return netip.Addr{}
}

// MaskBits returns the prefix length of a netmask for addresses of a's family. The kernel
// sends netmasks without trailing zero bytes and without a family. It reports false for a
// netmask whose ones aren't contiguous.
func MaskBits(sa []byte, a netip.Addr) (int, bool) {
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

// LinkName returns the interface's name in a link address (struct sockaddr_dl,
// xnu bsd/net/if_dl.h), "" if it has none.
func LinkName(sa []byte) string {
	if len(sa) < 8 || sa[1] != AFLink || 8+int(sa[5]) > len(sa) {
		return ""
	}
	return string(sa[8 : 8+int(sa[5])])
}

// ParseRoute reads a message about a route. It reports false if the message is damaged or
// isn't about an IPv4 or IPv6 route.
func ParseRoute(m []byte) (Route, bool) {
	if len(m) < SizeRt {
		return Route{}, false
	}
	sa, ok := Sockaddrs(m, SizeRt, Order.Uint32(m[OffRtAddrs:]))
	dst := ReadSockaddr(sa[RTAXDst])
	if !ok || !dst.IsValid() {
		return Route{}, false
	}
	r := Route{
		Gateway: ReadSockaddr(sa[RTAXGateway]),
		Index:   int(Order.Uint16(m[OffRtIndex:])),
		Flags:   Order.Uint32(m[OffRtFlags:]),
	}
	n := dst.BitLen()
	// A route without a mask is one to a host. So is one with the flag, whatever its mask.
	if mask := sa[RTAXNetmask]; mask != nil && r.Flags&rtfHost == 0 {
		if n, ok = MaskBits(mask, dst); !ok {
			return Route{}, false
		}
	}
	r.Dst = netip.PrefixFrom(dst, n)
	return r, r.Dst == r.Dst.Masked()
}

// AppendRoute appends the message that adds or deletes a route, or that announces it. The
// kernel's answer to a request has the same seq.
func AppendRoute(b []byte, typ byte, seq int, r Route) []byte {
	start := len(b)
	b = append(b, make([]byte, SizeRt)...)
	var mask uint32
	add := func(rtax int, sa []byte) {
		mask |= 1 << rtax
		b = AppendSockaddr(b, sa)
	}
	add(RTAXDst, Sockaddr(r.Dst.Addr()))
	if r.Gateway.IsValid() {
		add(RTAXGateway, Sockaddr(r.Gateway))
	} else {
		add(RTAXGateway, SockaddrLink(r.Index, ""))
	}
	if r.Flags&rtfHost == 0 {
		add(RTAXNetmask, SockaddrMask(r.Dst))
	}
	m := b[start:]
	PutHeader(m, typ)
	Order.PutUint16(m[OffRtIndex:], uint16(r.Index))
	Order.PutUint32(m[OffRtFlags:], r.Flags)
	Order.PutUint32(m[OffRtAddrs:], mask)
	Order.PutUint32(m[OffRtSeq:], uint32(seq))
	return b
}

// PutHeader writes length, version and type into a message.
func PutHeader(m []byte, typ byte) {
	Order.PutUint16(m, uint16(len(m)))
	m[2], m[3] = RTMVersion, typ
}

// AppendSockaddr appends a socket address, padded to 4 bytes.
func AppendSockaddr(b, sa []byte) []byte {
	b = append(b, sa...)
	for n := len(sa); n == 0 || n%4 != 0; n++ {
		b = append(b, 0)
	}
	return b
}

// Sockaddr returns a as a struct sockaddr_in or sockaddr_in6, without a zone: no route to
// a link-local destination is added here.
func Sockaddr(a netip.Addr) []byte {
	if a.Is4() {
		b := [16]byte{0: 16, 1: AFInet}
		copy(b[4:], a.AsSlice())
		return b[:]
	}
	b := [28]byte{0: 28, 1: AFInet6}
	copy(b[8:], a.AsSlice())
	return b[:]
}

// SockaddrMask returns the netmask of a prefix, with trailing zeros and with its family.
func SockaddrMask(p netip.Prefix) []byte {
	ones := make([]byte, p.Addr().BitLen()/8)
	for i := range p.Bits() {
		ones[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(ones) // 4 or 16 bytes
	return Sockaddr(a)
}

// SockaddrLink returns a struct sockaddr_dl. As the gateway of a route it means that the
// destination is on the link of that interface.
func SockaddrLink(index int, name string) []byte {
	b := make([]byte, max(20, 8+len(name)))
	b[0], b[1] = byte(len(b)), AFLink
	Order.PutUint16(b[2:], uint16(index))
	b[5] = byte(len(name))
	copy(b[8:], name)
	return b
}

// InterfaceMessage returns a message about an interface: an if_msghdr or if_msghdr2 of
// size SizeIf or SizeIf2, and a link address.
func InterfaceMessage(typ byte, size int, i Interface) []byte {
	b := AppendSockaddr(make([]byte, size), SockaddrLink(i.Index, i.Name))
	PutHeader(b, typ)
	Order.PutUint32(b[OffIfAddrs:], 1<<RTAXIfp)
	Order.PutUint32(b[OffIfFlags:], i.Flags)
	Order.PutUint16(b[OffIfIndex:], uint16(i.Index))
	if size == SizeIf2 {
		Order.PutUint32(b[OffIf2MTU:], uint32(i.MTU))
	}
	return b
}

// AddressMessage returns a message about an address of the interface with that index: an
// ifa_msghdr, the netmask, the address and, if peer is valid, the remote address of a
// point-to-point link.
func AddressMessage(typ byte, index int, a netip.Prefix, peer netip.Addr) []byte {
	b := AppendSockaddr(make([]byte, SizeIfa), trimmedMask(a))
	b = AppendSockaddr(b, Sockaddr(a.Addr()))
	mask := uint32(1<<RTAXNetmask | 1<<RTAXIfa)
	if peer.IsValid() {
		b = AppendSockaddr(b, Sockaddr(peer))
		mask |= 1 << RTAXBrd
	}
	PutHeader(b, typ)
	Order.PutUint32(b[OffIfAddrs:], mask)
	Order.PutUint16(b[OffIfIndex:], uint16(index))
	return b
}

// DumpMessage returns the message for a route in a dump of the routing table: an
// rt_msghdr2, with the netmask as short as the kernel's.
func DumpMessage(r Route) []byte {
	b := AppendSockaddr(make([]byte, SizeRt), Sockaddr(r.Dst.Addr()))
	gateway := SockaddrLink(r.Index, "")
	if r.Gateway.IsValid() {
		gateway = Sockaddr(r.Gateway)
	}
	b = AppendSockaddr(b, gateway)
	mask := uint32(1<<RTAXDst | 1<<RTAXGateway)
	if r.Flags&rtfHost == 0 {
		b = AppendSockaddr(b, trimmedMask(r.Dst))
		mask |= 1 << RTAXNetmask
	}
	PutHeader(b, RTMGet2)
	Order.PutUint16(b[OffRtIndex:], uint16(r.Index))
	Order.PutUint32(b[OffRtFlags:], r.Flags)
	Order.PutUint32(b[OffRtAddrs:], mask)
	return b
}

// trimmedMask returns a netmask as the kernel stores it, without family and trailing
// zero bytes: nil for a default route.
func trimmedMask(p netip.Prefix) []byte {
	b := SockaddrMask(p)
	b[1] = 0
	n := len(b)
	for n > 1 && b[n-1] == 0 {
		n--
	}
	if n <= 1 {
		return nil
	}
	b = b[:n]
	b[0] = byte(n)
	return b
}
