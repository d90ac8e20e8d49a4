package netlab

// Packets in bytes: built for probes and forgeries, and read from captures.

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// Proto is the protocol of a probe or a flow.
type Proto uint8

// The protocols that the policy distinguishes. ICMP stands for ICMPv6 too.
const (
	ICMP Proto = iota
	TCP
	UDP
)

// String is the name as the commands write it.
func (p Proto) String() string {
	if p > UDP {
		return fmt.Sprintf("Proto(%d)", uint8(p))
	}
	return [...]string{"icmp", "tcp", "udp"}[p]
}

// IP protocol numbers, and the message types of the two ICMPs that are used here.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58

	echoRequest4, echoReply4, timeExceeded4 = 8, 0, 11
	echoRequest6, echoReply6, timeExceeded6 = 128, 129, 3
)

// Bits of the TCP header's flags.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// Packet is a packet as it was on a host's interface.
type Packet struct {
	Time time.Time // when it was read; monotonic
	Link string    // the interface
	Out  bool      // sent by the host, not received

	Data     []byte // from the IP header on
	Src, Dst netip.Addr
	Proto    uint8  // IP protocol number of the first header that is no IPv6 extension
	TTL      uint8  // or hop limit
	SrcPort  uint16 // of TCP and UDP; the identifier of an echo message
	DstPort  uint16 // of TCP and UDP
	Flags    uint8  // of TCP
	MSS      int    // the segment size that a TCP SYN announces; 0 for none
	Type     uint8  // of ICMP
	Code     uint8  // of ICMP
	Payload  []byte // what follows the TCP, UDP or 8-byte ICMP header
}

// ParsePacket parses an IPv4 or IPv6 packet. Fields whose bytes are missing are zero; ok
// is false if the addresses are missing.
func ParsePacket(data []byte) (p Packet, ok bool) {
	p.Data = data
	if len(data) == 0 {
		return p, false
	}
	var rest []byte
	switch data[0] >> 4 {
	case 4:
		header := int(data[0]&15) * 4
		if header < 20 || len(data) < header {
			return p, false
		}
		p.Src, p.Dst = netip.AddrFrom4([4]byte(data[12:16])), netip.AddrFrom4([4]byte(data[16:20]))
		p.Proto, p.TTL, rest = data[9], data[8], data[header:]
		if binary.BigEndian.Uint16(data[6:])&0x1fff != 0 {
			return p, true // a later fragment has no transport header
		}
	case 6:
		if len(data) < 40 {
			return p, false
		}
		p.Src, p.Dst = netip.AddrFrom16([16]byte(data[8:24])), netip.AddrFrom16([16]byte(data[24:40]))
		p.Proto, p.TTL, rest = data[6], data[7], data[40:]
		p.Proto, rest = skipExtensions(p.Proto, rest)
	default:
		return p, false
	}
	p.transport(rest)
	return p, true
}

// skipExtensions skips the IPv6 extension headers (RFC 8200, 4), including a first
// fragment's fragment header.
func skipExtensions(next uint8, rest []byte) (uint8, []byte) {
	for len(rest) >= 8 {
		size := 8
		switch next {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			size = 8 + int(rest[1])*8
		case 44: // fragment
			if binary.BigEndian.Uint16(rest[2:])&0xfff8 != 0 {
				return rest[0], nil
			}
		default:
			return next, rest
		}
		if len(rest) < size {
			return next, nil
		}
		next, rest = rest[0], rest[size:]
	}
	return next, rest
}

func (p *Packet) transport(rest []byte) {
	switch p.Proto {
	case protoTCP:
		if len(rest) < 20 {
			return
		}
		p.Flags = rest[13]
		if header := int(rest[12]>>4) * 4; header >= 20 && len(rest) >= header {
			p.Payload, p.MSS = rest[header:], announcedMSS(rest[20:header])
		}
	case protoUDP:
		if len(rest) < 8 {
			return
		}
		p.Payload = rest[8:]
	case protoICMP, protoICMPv6:
		if len(rest) < 8 {
			return
		}
		p.Type, p.Code, p.SrcPort, p.Payload = rest[0], rest[1], binary.BigEndian.Uint16(rest[4:]), rest[8:]
		return
	default:
		return
	}
	p.SrcPort, p.DstPort = binary.BigEndian.Uint16(rest), binary.BigEndian.Uint16(rest[2:])
}

// announcedMSS finds the maximum segment size among TCP options (RFC 9293, 3.2).
func announcedMSS(options []byte) int {
	for len(options) >= 2 {
		switch kind, size := options[0], int(options[1]); {
		case kind == 0:
			return 0
		case kind == 1:
			options = options[1:]
		case size < 2 || size > len(options):
			return 0
		case kind == 2 && size == 4:
			return int(binary.BigEndian.Uint16(options[2:]))
		default:
			options = options[size:]
		}
	}
	return 0
}

// Is says whether the packet is of a protocol.
func (p Packet) Is(proto Proto) bool {
	switch p.Proto {
	case protoTCP:
		return proto == TCP
	case protoUDP:
		return proto == UDP
	case protoICMP, protoICMPv6:
		return proto == ICMP
	}
	return false
}

// String is the packet in one line.
func (p Packet) String() string {
	way := "in"
	if p.Out {
		way = "out"
	}
	s := fmt.Sprintf("%s %s: %s > %s", p.Link, way, p.Src, p.Dst)
	switch p.Proto {
	case protoTCP, protoUDP:
		name := "tcp"
		if p.Proto == protoUDP {
			name = "udp"
		}
		return fmt.Sprintf("%s %s %d > %d, flags %#x, %d bytes", s, name, p.SrcPort, p.DstPort, p.Flags, len(p.Payload))
	case protoICMP, protoICMPv6:
		return fmt.Sprintf("%s icmp type %d code %d id %d, %d bytes", s, p.Type, p.Code, p.SrcPort, len(p.Payload))
	}
	return fmt.Sprintf("%s protocol %d, %d bytes", s, p.Proto, len(p.Data))
}

// UDPPacket builds a whole packet with valid checksums.
func UDPPacket(src, dst netip.AddrPort, payload []byte) []byte {
	t := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(t, src.Port())
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	binary.BigEndian.PutUint16(t[4:], uint16(8+len(payload)))
	return IPPacket(src.Addr(), dst.Addr(), protoUDP, append(t, payload...))
}

// TCPPacket builds a whole packet with valid checksums and no TCP options.
func TCPPacket(src, dst netip.AddrPort, flags uint8, seq, ack uint32, payload []byte) []byte {
	t := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(t, src.Port())
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[12], t[13] = 5<<4, flags
	binary.BigEndian.PutUint16(t[14:], 65535)
	return IPPacket(src.Addr(), dst.Addr(), protoTCP, append(t, payload...))
}

// EchoPacket builds an echo request, or a reply, of the family's ICMP.
func EchoPacket(src, dst netip.Addr, reply bool, id, seq uint16, payload []byte) []byte {
	kind := uint8(echoRequest4)
	switch {
	case src.Is4() && reply:
		kind = echoReply4
	case src.Is6() && reply:
		kind = echoReply6
	case src.Is6():
		kind = echoRequest6
	}
	return ICMPPacket(src, dst, kind, 0, uint32(id)<<16|uint32(seq), payload)
}

// ICMPPacket builds a message of the family's ICMP. rest is the four bytes after
// the checksum: an identifier and a sequence number, an MTU, or zero.
func ICMPPacket(src, dst netip.Addr, kind, code uint8, rest uint32, payload []byte) []byte {
	t := make([]byte, 8, 8+len(payload))
	t[0], t[1] = kind, code
	binary.BigEndian.PutUint32(t[4:], rest)
	proto := uint8(protoICMP)
	if src.Is6() {
		proto = protoICMPv6
	}
	return IPPacket(src, dst, proto, append(t, payload...))
}

// IPPacket puts an IP header with a hop limit of 64 before a transport header,
// and fills in the checksums of both.
func IPPacket(src, dst netip.Addr, proto uint8, transport []byte) []byte {
	if at := checksumAt(proto); at >= 0 && len(transport) >= at+2 {
		sum := checksum(transport, pseudoHeader(src, dst, proto, len(transport)))
		binary.BigEndian.PutUint16(transport[at:], sum)
	}
	if src.Is4() {
		h := make([]byte, 20, 20+len(transport))
		h[0], h[8], h[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(transport)))
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(h[10:], checksum(h, 0))
		return append(h, transport...)
	}
	h := make([]byte, 40, 40+len(transport))
	h[0], h[6], h[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(transport)))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return append(h, transport...)
}

// checksumAt returns the offset of the checksum in a transport header; -1 for none.
func checksumAt(proto uint8) int {
	switch proto {
	case protoICMP, protoICMPv6:
		return 2
	case protoUDP:
		return 6
	case protoTCP:
		return 16
	}
	return -1
}

// pseudoHeader returns the sum of the pseudo-header of a transport checksum (RFC 9293,
// 3.1; RFC 8200, 8.1). ICMP for IPv4 has none.
func pseudoHeader(src, dst netip.Addr, proto uint8, size int) uint32 {
	if proto == protoICMP {
		return 0
	}
	return sum(src.AsSlice()) + sum(dst.AsSlice()) + uint32(proto) + uint32(size)
}

func sum(b []byte) (total uint32) {
	for i := 0; i+1 < len(b); i += 2 {
		total += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		total += uint32(b[len(b)-1]) << 8
	}
	return total
}

// checksum is the internet checksum of b and an initial sum (RFC 1071).
func checksum(b []byte, initial uint32) uint16 {
	total := sum(b) + initial
	for total>>16 != 0 {
		total = total>>16 + total&0xffff
	}
	return ^uint16(total)
}
