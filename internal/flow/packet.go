package flow

import (
	"encoding/binary"
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Extension headers of IPv6 (IANA protocol numbers) that are walked through. What
// is behind any other can't be read, or isn't to be.
const (
	protoHopByHop = 0
	protoRouting  = 43
	protoFragment = 44
	protoDestOpts = 60
)

// TCP flags (RFC 9293 section 3.1).
const (
	tcpFIN = 1 << iota
	tcpSYN
	tcpRST
	tcpPSH
	tcpACK
)

const (
	header4     = 20 // bytes, without options
	header6     = 40
	headerTCP   = 20
	headerUDP   = 8
	headerICMP  = 8
	maxDatagram = 65535
)

// address is an IP address as two words; IPv4 is mapped into IPv6.
type address struct{ hi, lo uint64 }

const mapped = 0xffff << 32

func address4(b []byte) address {
	return address{0, mapped | uint64(binary.BigEndian.Uint32(b))}
}

func address6(b []byte) address {
	return address{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

// netip returns a as an address of its family.
func (a address) netip(v6 bool) netip.Addr {
	var b [16]byte
	if !v6 {
		binary.BigEndian.PutUint32(b[:], uint32(a.lo))
		return netip.AddrFrom4([4]byte(b[:]))
	}
	binary.BigEndian.PutUint64(b[:], a.hi)
	binary.BigEndian.PutUint64(b[8:], a.lo)
	return netip.AddrFrom16(b)
}

// tuple holds the fields of a packet that identify its flow, as sent.
type tuple struct {
	from, to         address
	fromPort, toPort uint16
	proto            uint8
	v6               bool
}

// reversed returns the tuple of an answer.
func (t tuple) reversed() tuple {
	t.from, t.to = t.to, t.from
	t.fromPort, t.toPort = t.toPort, t.fromPort
	return t
}

// describe writes the packet that t describes to p, in the policy's words. Of an ICMP
// query or reply the ports hold type, code and identifier; see parseICMP.
func (t *tuple) describe(p *policy.Packet) {
	p.Src, p.Dst = t.from.netip(t.v6), t.to.netip(t.v6)
	p.Proto = t.proto
	p.SrcPort, p.DstPort = t.fromPort, t.toPort
	if t.isICMP() {
		p.ICMPType = uint8(t.toPort >> 8)
		p.DstPort = p.SrcPort
	}
}

func (t *tuple) isICMP() bool {
	if t.v6 {
		return t.proto == policy.ProtoICMPv6
	}
	return t.proto == policy.ProtoICMP
}

// key identifies a flow at the tunnel. far is the end on the peer's side of the tunnel:
// the peer, unless the host routes through it; near is the other end.
type key struct {
	farHi, farLo, nearHi, nearLo uint64
	// ports holds version, protocol and ports: v6<<63 | proto<<32 | far<<16 | near.
	ports uint64
}

const keyV6 = 1 << 63

// keyOf returns the key of the flow of a packet that runs in direction d.
func keyOf(t tuple, d Direction) key {
	if d == ToPeer {
		t = t.reversed()
	}
	k := key{t.from.hi, t.from.lo, t.to.hi, t.to.lo, uint64(t.proto)<<32 | uint64(t.fromPort)<<16 | uint64(t.toPort)}
	if t.v6 {
		k.ports |= keyV6
	}
	return k
}

// tuple returns the tuple of a packet of the flow that runs in direction d.
func (k key) tuple(d Direction) tuple {
	t := tuple{
		from: address{k.farHi, k.farLo}, to: address{k.nearHi, k.nearLo},
		fromPort: uint16(k.ports >> 16), toPort: uint16(k.ports),
		proto: uint8(k.ports >> 32), v6: k.ports&keyV6 != 0,
	}
	if d == ToPeer {
		return t.reversed()
	}
	return t
}

func (k key) proto() uint8 { return uint8(k.ports >> 32) }

// packet is a parsed packet.
type packet struct {
	tuple
	flags     uint8  // of TCP
	icmpType  uint8  // where isICMP
	malformed bool   // malformed, truncated or source-routed
	opens     bool   // whether it may open a flow; errors, answers and resets don't
	isError   bool   // an ICMP error
	quoted    bool   // quote holds the packet that the ICMP error is about
	quote     tuple  // valid if quoted
	fragment  uint8  // whole, first or later
	id        uint32 // of the datagram that the fragment belongs to
	offset    int    // where the fragment's payload starts in the datagram, bytes
	end       int    // and ends
	last      bool   // no fragment comes behind it
	odd       bool   // a fragment whose header a kernel may drop that takes others
	size      int    // of the packet, bytes
}

// What part of a datagram a packet is.
const (
	whole = iota
	first
	later
)

// parse reads an IP packet. It never fails: what it can't make sense of is
// marked as malformed. Addresses are valid also then, if there are any.
func (p *packet) parse(b []byte) {
	p.malformed = true
	p.size = len(b)
	if len(b) == 0 {
		return
	}
	switch b[0] >> 4 {
	case 4:
		p.parse4(b)
	case 6:
		p.parse6(b)
	}
}

// parse4 reads an IPv4 header (RFC 791).
func (p *packet) parse4(b []byte) {
	if len(b) < header4 {
		return
	}
	p.from, p.to, p.proto = address4(b[12:]), address4(b[16:]), b[9]
	size := int(b[0]&15) * 4
	// Padding behind the datagram would be another reading of its length.
	if size < header4 || size > len(b) || int(binary.BigEndian.Uint16(b[2:])) != len(b) {
		return
	}
	if size > header4 && !validOptions4(b[header4:size]) {
		return
	}
	frag := binary.BigEndian.Uint16(b[6:])
	const reserved, more, offset = 0x8000, 0x2000, 0x1fff
	if frag&reserved != 0 {
		return
	}
	p.id = uint32(binary.BigEndian.Uint16(b[4:]))
	if !p.setFragment(int(frag&offset)*8, frag&more != 0, len(b)-size) {
		return
	}
	p.odd = p.fragment != whole && (size > header4 || !sumsUp(b[:size]))
	p.malformed = !p.parseTransport(b[size:])
}

// sumsUp reports whether the checksum of an IPv4 header is right (RFC 1071).
func sumsUp(b []byte) bool {
	sum := uint32(0)
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	return sum&0xffff+sum>>16 == 0xffff
}

// validOptions4 walks through IPv4 options. Source routes are refused (RFC 7126
// sections 4.3 and 4.4).
func validOptions4(b []byte) bool {
	const end, nop, looseRoute, strictRoute = 0, 1, 131, 137
	for len(b) > 0 {
		switch b[0] {
		case end:
			return true
		case nop:
			b = b[1:]
			continue
		case looseRoute, strictRoute:
			return false
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			return false
		}
		b = b[b[1]:]
	}
	return true
}

// setFragment notes the place of a fragment with size bytes of payload and
// reports whether it can be: not empty, within a datagram, and of a multiple of
// 8 bytes unless it is the last.
func (p *packet) setFragment(offset int, more bool, size int) bool {
	p.offset, p.end, p.last = offset, offset+size, !more
	switch {
	case offset == 0 && !more:
		p.fragment = whole
		return true
	case offset == 0:
		p.fragment = first
	default:
		p.fragment = later
	}
	return size > 0 && p.end <= maxDatagram && (!more || size%8 == 0)
}

// maxHeaders bounds the walk through IPv6 extension headers. RFC 8200 section
// 4.1 has at most seven, each once but for one.
const maxHeaders = 8

// parse6 reads an IPv6 header and its extension headers (RFC 8200).
func (p *packet) parse6(b []byte) {
	p.v6 = true
	if len(b) < header6 {
		return
	}
	p.from, p.to = address6(b[8:]), address6(b[24:])
	// A jumbogram (RFC 2675) has length 0 here and so is refused, too.
	if int(binary.BigEndian.Uint16(b[4:])) != len(b)-header6 {
		return
	}
	p.proto = b[6]
	rest, ok := p.skipHeaders(b[header6:])
	p.malformed = !ok || !p.parseTransport(rest)
}

// skipHeaders walks to the transport header, which it returns.
func (p *packet) skipHeaders(b []byte) (rest []byte, ok bool) {
	for n := range maxHeaders {
		size := 0
		switch p.proto {
		case protoHopByHop:
			if n > 0 { // only ever the first
				return nil, false
			}
			size = extensionSize(b)
		case protoDestOpts:
			size = extensionSize(b)
		case protoRouting:
			// Segments left, or the type that RFC 5095 abolished: source routed.
			if size = extensionSize(b); size == 0 || b[2] == 0 || b[3] != 0 {
				return nil, false
			}
		case protoFragment:
			if p.fragment != whole || !p.fragment6(b) {
				return nil, false
			}
			p.odd = n > 0 && p.fragment != whole
			if p.fragment == later {
				return b[8:], true
			}
			size = 8
		default:
			return b, true
		}
		if size == 0 || size > len(b) {
			return nil, false
		}
		p.proto = b[0]
		b = b[size:]
	}
	return nil, false
}

// extensionSize returns the size in bytes of an extension header of the common
// form, or 0 if it is truncated.
func extensionSize(b []byte) int {
	if len(b) < 8 {
		return 0
	}
	return int(b[1])*8 + 8
}

// fragment6 reads a fragment header (RFC 8200 section 4.5). One that holds a
// whole datagram is as if it weren't there (RFC 6946).
func (p *packet) fragment6(b []byte) bool {
	if len(b) < 8 {
		return false
	}
	field := binary.BigEndian.Uint16(b[2:])
	p.id = binary.BigEndian.Uint32(b[4:])
	return p.setFragment(int(field&^7), field&1 != 0, len(b)-8)
}

// parseTransport reads ports, flags and types and reports whether the transport
// header is whole and right. A later fragment has none. Protocols other than TCP,
// UDP and ICMP are addresses and nothing else: they open nothing.
func (p *packet) parseTransport(b []byte) bool {
	if p.fragment == later {
		return true
	}
	switch {
	case p.proto == policy.ProtoTCP:
		return p.parseTCP(b)
	case p.proto == policy.ProtoUDP:
		return p.parseUDP(b)
	case p.isICMP():
		return p.parseICMP(b)
	}
	return true
}

// readPorts reads the ports with which the headers of TCP and UDP begin.
func (p *packet) readPorts(b []byte) {
	p.fromPort, p.toPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
}

func (p *packet) parseTCP(b []byte) bool {
	if len(b) < headerTCP {
		return false
	}
	p.readPorts(b)
	size := int(b[12]>>4) * 4
	p.flags = b[13]
	// An answer or a reset opens nothing: an end that sends it first lost its memory.
	p.opens = p.flags&tcpRST == 0 && p.flags&(tcpSYN|tcpACK) != tcpSYN|tcpACK
	return size >= headerTCP && size <= len(b)
}

func (p *packet) parseUDP(b []byte) bool {
	if len(b) < headerUDP {
		return false
	}
	p.readPorts(b)
	p.opens = true
	size := int(binary.BigEndian.Uint16(b[4:]))
	if p.fragment == first {
		return size > len(b)
	}
	return size >= headerUDP && size <= len(b)
}

// parseICMP reads type, code and identifier. A query has its identifier as the port of
// the asking end, its type and code as the other's, an answer the reverse, so that the
// answer to a query and to nothing else is the reverse of it. Queries of different codes
// are different flows because they are to Linux (icmp_pkt_to_tuple in
// net/netfilter/nf_conntrack_proto_icmp.c): what is counted here is what is held there.
func (p *packet) parseICMP(b []byte) bool {
	if len(b) < headerICMP {
		return false
	}
	p.icmpType = b[0]
	p.setQuery(b)
	if p.isError = isError(p.icmpType, p.v6); !p.isError {
		return true
	}
	// No host fragments an error; in pieces its quote can't be judged.
	if p.fragment != whole {
		return false
	}
	p.quote, p.quoted = parseQuote(b[headerICMP:], p.v6)
	return true
}

// setQuery sets the ports of an ICMP query or answer.
func (p *packet) setQuery(b []byte) {
	id, code := binary.BigEndian.Uint16(b[4:]), uint16(b[1])
	if query, ok := queryOf(p.icmpType, p.v6); ok {
		p.fromPort, p.toPort = uint16(query)<<8|code, id
	} else if isQuery(p.icmpType, p.v6) {
		p.fromPort, p.toPort, p.opens = id, uint16(p.icmpType)<<8|code, true
	}
}

// isError reports whether an ICMP type is an error that quotes a packet; see
// policy.Packet's IsICMPError.
func isError(icmpType uint8, v6 bool) bool {
	if v6 {
		return icmpType >= 1 && icmpType <= 4
	}
	return icmpType == 3 || icmpType == 11 || icmpType == 12
}

// isQuery reports whether an ICMP type asks for an answer: echo, timestamp,
// information and address mask (RFC 792, RFC 950), and echo (RFC 4443).
func isQuery(icmpType uint8, v6 bool) bool {
	if v6 {
		return icmpType == 128
	}
	return icmpType == 8 || icmpType == 13 || icmpType == 15 || icmpType == 17
}

// queryOf returns the type of the query that an ICMP type answers.
func queryOf(icmpType uint8, v6 bool) (query uint8, ok bool) {
	switch {
	case v6:
		return 128, icmpType == 129
	case icmpType == 0:
		return 8, true
	case icmpType == 14 || icmpType == 16 || icmpType == 18:
		return icmpType - 1, true
	}
	return 0, false
}

// describe is tuple.describe for a packet whose ICMP type was read.
func (p *packet) describe(out *policy.Packet) {
	p.tuple.describe(out)
	out.Malformed = p.malformed
	if p.isICMP() && p.fragment != later {
		out.ICMPType = p.icmpType
		if _, ok := queryOf(p.icmpType, p.v6); ok {
			out.SrcPort, out.DstPort = p.toPort, p.toPort
		}
	}
}

// parseQuote reads the start of the packet that an ICMP error quotes, which is
// cut somewhere behind its ports. ok is false where the ports are missing, and
// for a quoted error, which no host may answer (RFC 1122 section 3.2.2).
func parseQuote(b []byte, v6 bool) (t tuple, ok bool) {
	var q packet
	if v6 {
		ok = q.quote6(b)
		b = b[min(len(b), q.end):]
	} else {
		ok = q.quote4(b)
		b = b[min(len(b), q.end):]
	}
	if !ok || q.fragment == later || len(b) < 8 {
		return tuple{}, false
	}
	if q.isICMP() {
		q.icmpType = b[0]
		q.setQuery(b)
		_, isAnswer := queryOf(q.icmpType, v6)
		return q.tuple, q.opens || isAnswer
	}
	q.readPorts(b)
	return q.tuple, q.proto == policy.ProtoTCP || q.proto == policy.ProtoUDP
}

// quote4 reads a quoted IPv4 header; q.end is its size.
func (p *packet) quote4(b []byte) bool {
	if len(b) < header4 || b[0]>>4 != 4 {
		return false
	}
	p.from, p.to, p.proto = address4(b[12:]), address4(b[16:]), b[9]
	if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
		p.fragment = later
	}
	p.end = int(b[0]&15) * 4
	return p.end >= header4
}

// quote6 reads a quoted IPv6 header and those behind it; q.end is their size.
func (p *packet) quote6(b []byte) bool {
	p.v6 = true
	if len(b) < header6 || b[0]>>4 != 6 {
		return false
	}
	p.from, p.to, p.proto = address6(b[8:]), address6(b[24:]), b[6]
	rest, ok := p.skipHeaders(b[header6:])
	p.end = len(b) - len(rest)
	return ok
}

// plainKey reads the key of the packet that nearly all packets are: no options,
// no fragment, UDP, or TCP that neither opens nor ends anything. It reports false
// for every other, also for malformed ones; parse then says more.
func plainKey(b []byte, d Direction, k *key) bool {
	if len(b) < header4+headerUDP {
		return false
	}
	var transport []byte
	var proto uint8
	ports := uint64(0)
	switch {
	case b[0] == 0x45:
		if int(binary.BigEndian.Uint16(b[2:])) != len(b) || binary.BigEndian.Uint16(b[6:])&0xbfff != 0 {
			return false
		}
		proto, transport = b[9], b[header4:]
		k.farLo = mapped | uint64(binary.BigEndian.Uint32(b[12:]))
		k.nearLo = mapped | uint64(binary.BigEndian.Uint32(b[16:]))
	case b[0]>>4 == 6 && len(b) >= header6+headerUDP:
		if int(binary.BigEndian.Uint16(b[4:])) != len(b)-header6 {
			return false
		}
		proto, transport, ports = b[6], b[header6:], keyV6
		k.farHi, k.farLo = binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])
		k.nearHi, k.nearLo = binary.BigEndian.Uint64(b[24:]), binary.BigEndian.Uint64(b[32:])
	default:
		return false
	}
	if !plainTransport(proto, transport) {
		return false
	}
	both := binary.BigEndian.Uint32(transport)
	if d == ToPeer {
		k.farHi, k.farLo, k.nearHi, k.nearLo = k.nearHi, k.nearLo, k.farHi, k.farLo
		both = both>>16 | both<<16
	}
	k.ports = ports | uint64(proto)<<32 | uint64(both)
	return true
}

// plainTransport reports whether a transport header of at least 8 bytes is whole
// and changes nothing in what is known of its flow.
func plainTransport(proto uint8, b []byte) bool {
	switch proto {
	case policy.ProtoUDP:
		return int(binary.BigEndian.Uint16(b[4:])) == len(b)
	case policy.ProtoTCP:
		return len(b) >= headerTCP && b[13]&(tcpSYN|tcpFIN|tcpRST) == 0 && b[12] >= 5<<4 && int(b[12]>>4)*4 <= len(b)
	}
	return false
}
