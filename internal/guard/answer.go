package guard

import (
	"encoding/binary"
	"net/netip"
	"sync"
)

const (
	header4    = 20 // bytes
	header6    = 40
	headerICMP = 8

	// An error about an IPv4 packet quotes as much of it as fits in 576 bytes
	// (RFC 1812 section 4.3.2.3), one about an IPv6 packet as fits in the minimum
	// MTU (RFC 4443 section 2.4).
	maxAnswer4 = 576
	maxAnswer6 = 1280

	protoICMP   = 1
	protoICMPv6 = 58
	hopLimit    = 64

	// queuedAnswers bounds what waits for Read. Each peer's rate is limited
	// before, so only thousands of refused peers at once fill it.
	queuedAnswers = 64
)

// answers is a bounded queue of ICMP errors on their way to peers. Its buffers
// are made once.
type answers struct {
	mu    sync.Mutex
	ring  [][maxAnswer6]byte
	sizes [queuedAnswers]int
	first int
	len   int
}

// push queues the answer to a packet, from the one of the host's addresses that
// is of its family. It reports false where there is none or the queue is full.
func (a *answers) push(packet []byte, own []netip.Addr) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.len == queuedAnswers {
		return false
	}
	if a.ring == nil {
		a.ring = make([][maxAnswer6]byte, queuedAnswers)
	}
	i := (a.first + a.len) % queuedAnswers
	if a.sizes[i] = writeAnswer(a.ring[i][:], packet, own); a.sizes[i] == 0 {
		return false
	}
	a.len++
	return true
}

// pop moves answers into bufs and returns how many.
func (a *answers) pop(bufs [][]byte, sizes []int, offset int) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for ; n < len(bufs) && a.len > 0; n++ {
		sizes[n] = copy(bufs[n][offset:], a.ring[a.first][:a.sizes[a.first]])
		a.first = (a.first + 1) % queuedAnswers
		a.len--
	}
	return n
}

// writeAnswer writes to b the ICMP error "administratively prohibited" about a
// packet with a whole IP header, and returns its size, or 0 where the host has
// no address of its family.
func writeAnswer(b, packet []byte, own []netip.Addr) int {
	v6 := packet[0]>>4 == 6
	for _, from := range own {
		switch {
		case from.Is6() && v6:
			return writeAnswer6(b, packet, from)
		case from.Is4() && !v6:
			return writeAnswer4(b, packet, from)
		}
	}
	return 0
}

// writeAnswer4 writes type 3 (destination unreachable), code 13 (RFC 1812
// section 5.2.7.1).
func writeAnswer4(b, packet []byte, from netip.Addr) int {
	size := header4 + headerICMP + min(len(packet), maxAnswer4-header4-headerICMP)
	b = b[:size]
	clear(b[:header4+headerICMP])
	b[0] = 0x45
	b[1] = 0xc0 // precedence of internetwork control (RFC 1812 section 4.3.2.5)
	binary.BigEndian.PutUint16(b[2:], uint16(size))
	b[6] = 0x40 // don't fragment, so the identification may be 0 (RFC 6864)
	b[8], b[9] = hopLimit, protoICMP
	source := from.As4()
	copy(b[12:], source[:])
	copy(b[16:20], packet[12:16])
	binary.BigEndian.PutUint16(b[10:], checksum(0, b[:header4]))

	icmp := b[header4:]
	icmp[0], icmp[1] = 3, 13
	copy(icmp[headerICMP:], packet)
	binary.BigEndian.PutUint16(icmp[2:], checksum(0, icmp))
	return size
}

// writeAnswer6 writes type 1 (destination unreachable), code 1 (RFC 4443 section
// 3.1).
func writeAnswer6(b, packet []byte, from netip.Addr) int {
	size := header6 + headerICMP + min(len(packet), maxAnswer6-header6-headerICMP)
	b = b[:size]
	clear(b[:header6+headerICMP])
	b[0] = 0x60
	binary.BigEndian.PutUint16(b[4:], uint16(size-header6))
	b[6], b[7] = protoICMPv6, hopLimit
	source := from.As16()
	copy(b[8:], source[:])
	copy(b[24:40], packet[8:24])

	icmp := b[header6:]
	icmp[0], icmp[1] = 1, 1
	copy(icmp[headerICMP:], packet)
	// The pseudo-header of RFC 8200 section 8.1: addresses, length, protocol.
	pseudo := sum(uint32(len(icmp))+protoICMPv6, b[8:40])
	binary.BigEndian.PutUint16(icmp[2:], checksum(pseudo, icmp))
	return size
}

// sum adds b to s in 16-bit words (RFC 1071).
func sum(s uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

// checksum returns the internet checksum of b on top of the sum s.
func checksum(s uint32, b []byte) uint16 {
	for s = sum(s, b); s > 0xffff; {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}
