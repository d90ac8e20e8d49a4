// Package flowtest makes IP packets for tests of the code that judges packets: valid
// ones with all checksums, fragments, and malformed ones.
package flowtest

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
)

// Protocol numbers and TCP flags for the functions of this package.
const (
	ICMP   = 1
	TCP    = 6
	UDP    = 17
	ICMPv6 = 58

	FIN = 1
	SYN = 2
	RST = 4
	ACK = 16
)

// IP returns a packet of a protocol with a payload whose checksum, where the
// protocol has one, is still 0 and is set here. Both addresses are of one family.
func IP(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	if src.Is4() {
		b := make([]byte, 20, 20+len(payload))
		b[0], b[8], b[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(b[10:], fold(sum(0, b)))
		return append(b, transport(src, dst, proto, payload)...)
	}
	b := make([]byte, 40, 40+len(payload))
	b[0], b[6], b[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	return append(b, transport(src, dst, proto, payload)...)
}

// transport returns payload with its checksum set.
func transport(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	payload = append([]byte(nil), payload...)
	at, known := map[uint8]int{ICMP: 2, TCP: 16, UDP: 6, ICMPv6: 2}[proto]
	if !known || len(payload) < at+2 {
		return payload
	}
	pseudo := uint32(0)
	if proto != ICMP {
		pseudo = sum(sum(uint32(proto)+uint32(len(payload)), src.AsSlice()), dst.AsSlice())
	}
	binary.BigEndian.PutUint16(payload[at:], fold(sum(pseudo, payload)))
	return payload
}

// TCPSegment returns a TCP segment with size bytes of data.
func TCPSegment(src, dst netip.AddrPort, flags uint8, size int) []byte {
	b := make([]byte, 20+size)
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	b[12], b[13] = 5<<4, flags
	binary.BigEndian.PutUint16(b[14:], 65535)
	return IP(src.Addr(), dst.Addr(), TCP, b)
}

// Datagram returns a UDP datagram with size bytes of data.
func Datagram(src, dst netip.AddrPort, size int) []byte {
	b := make([]byte, 8+size)
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	return IP(src.Addr(), dst.Addr(), UDP, b)
}

// Echo returns an ICMP echo request, or the reply to one.
func Echo(src, dst netip.Addr, id uint16, reply bool, size int) []byte {
	b := make([]byte, 8+size)
	proto := uint8(ICMP)
	switch {
	case src.Is6() && reply:
		proto, b[0] = ICMPv6, 129
	case src.Is6():
		proto, b[0] = ICMPv6, 128
	case !reply:
		b[0] = 8
	}
	binary.BigEndian.PutUint16(b[4:], id)
	return IP(src, dst, proto, b)
}

// ICMPMessage returns an ICMP message of a type and code whose body follows the
// first eight bytes; an error's body is the packet that it quotes.
func ICMPMessage(src, dst netip.Addr, icmpType, code uint8, body []byte) []byte {
	b := append([]byte{icmpType, code, 0, 0, 0, 0, 0, 0}, body...)
	if src.Is6() {
		return IP(src, dst, ICMPv6, b)
	}
	return IP(src, dst, ICMP, b)
}

// Fragments cuts a packet without options or extension headers into fragments
// with at most size bytes of payload, a multiple of 8.
func Fragments(packet []byte, id uint32, size int) [][]byte {
	var out [][]byte
	header := 20
	if packet[0]>>4 == 6 {
		header = 40
	}
	payload := packet[header:]
	for offset := 0; offset < len(payload); offset += size {
		end := min(offset+size, len(payload))
		out = append(out, Fragment(packet, id, offset, end < len(payload), payload[offset:end]))
	}
	return out
}

// Fragment returns one fragment of a packet's datagram, with any payload.
func Fragment(packet []byte, id uint32, offset int, more bool, payload []byte) []byte {
	flag := uint16(0)
	if packet[0]>>4 == 4 {
		b := append([]byte(nil), packet[:20]...)
		if more {
			flag = 0x2000
		}
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
		binary.BigEndian.PutUint16(b[4:], uint16(id))
		binary.BigEndian.PutUint16(b[6:], uint16(offset/8)|flag)
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], fold(sum(0, b)))
		return append(b, payload...)
	}
	b := append([]byte(nil), packet[:40]...)
	if more {
		flag = 1
	}
	ext := make([]byte, 8)
	ext[0] = b[6]
	b[6] = 44
	binary.BigEndian.PutUint16(ext[2:], uint16(offset)|flag)
	binary.BigEndian.PutUint32(ext[4:], id)
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	return append(append(b, ext...), payload...)
}

// Mutate changes a packet as an attacker or a broken link would: bytes, words
// with a meaning, its length, or the length that it claims.
func Mutate(random *rand.Rand, packet []byte) []byte {
	b := append([]byte(nil), packet...)
	for range 1 + random.IntN(3) {
		if len(b) == 0 {
			return b
		}
		switch random.IntN(6) {
		case 0: // anywhere
			b[random.IntN(len(b))] = byte(random.Uint32())
		case 1: // in the headers
			b[random.IntN(min(len(b), 64))] = byte(random.Uint32())
		case 2: // one bit
			b[random.IntN(min(len(b), 64))] ^= 1 << random.IntN(8)
		case 3: // truncated
			b = b[:random.IntN(len(b)+1)]
		case 4: // padded
			b = append(b, make([]byte, random.IntN(32))...)
		case 5: // the claimed length follows what it is now
			if b[0]>>4 == 4 && len(b) >= 20 {
				binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
			} else if len(b) >= 40 {
				binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
			}
		}
	}
	return b
}

// Checksum returns the internet checksum of b, 0 for one that holds its own.
func Checksum(b []byte) uint16 { return fold(sum(0, b)) }

// TransportChecksum returns 0 if the checksum of a packet's TCP, UDP or ICMP
// header is right. The packet has no options or extension headers.
func TransportChecksum(packet []byte) uint16 {
	src, dst, proto, payload := packet[12:16], packet[16:20], packet[9], packet[20:]
	if packet[0]>>4 == 6 {
		src, dst, proto, payload = packet[8:24], packet[24:40], packet[6], packet[40:]
	}
	if proto == ICMP {
		return Checksum(payload)
	}
	return fold(sum(sum(sum(uint32(proto)+uint32(len(payload)), src), dst), payload))
}

func sum(s uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}
