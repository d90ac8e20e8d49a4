package simmac

// Packets in bytes: decoded for pf, and written back after translation.

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// A header has the offsets of the parts of a packet in bytes.
type header struct {
	transport int   // where the transport header begins
	end       int   // where the packet ends
	proto     uint8 // the protocol number
	fragment  bool  // not the first fragment, so without a transport header
}

const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoESP    = 50
	protoICMPv6 = 58
)

// decode decodes a packet in bytes into pf's form. It returns false for packets that the
// IP stack drops before pf sees them.
func decode(b []byte) (p pfsim.Packet, h header, ok bool) {
	if len(b) == 0 {
		return p, h, false
	}
	switch b[0] >> 4 {
	case 4:
		ok = decode4(b, &p, &h)
	case 6:
		ok = decode6(b, &p, &h)
	}
	if ok && !h.fragment {
		p.Proto = pfconf.Proto(h.proto)
		ok = decodeTransport(b[h.transport:h.end], h.proto, &p)
	}
	p.Proto = pfconf.Proto(h.proto)
	return p, h, ok
}

func decode4(b []byte, p *pfsim.Packet, h *header) bool {
	if len(b) < 20 {
		return false
	}
	h.transport, h.end = int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if h.transport < 20 || h.end < h.transport || h.end > len(b) {
		return false
	}
	flags := binary.BigEndian.Uint16(b[6:])
	p.Src, p.Dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	p.TOS, p.Options, p.DontFragment = b[1], h.transport > 20, flags&0x4000 != 0
	p.Fragment, h.fragment = flags&0x3fff != 0, flags&0x1fff != 0
	if p.Fragment {
		p.FragmentID, p.FragmentOffset = uint32(binary.BigEndian.Uint16(b[4:])), flags&0x1fff*8
		p.FragmentLen, p.MoreFragments = uint16(h.end-h.transport), flags&0x2000 != 0
	}
	h.proto = b[9]
	return true
}

func decode6(b []byte, p *pfsim.Packet, h *header) bool {
	if len(b) < 40 {
		return false
	}
	h.transport, h.end, h.proto = 40, 40+int(binary.BigEndian.Uint16(b[4:])), b[6]
	if h.end > len(b) {
		return false
	}
	p.Src, p.Dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	for h.proto == 0 || h.proto == 43 || h.proto == 44 || h.proto == 60 {
		if h.transport+8 > h.end {
			return false
		}
		e := b[h.transport:]
		size := 8 + int(e[1])*8
		switch h.proto {
		case 43:
			p.Options = true
		case 44:
			size = 8
			at := binary.BigEndian.Uint16(e[2:])
			p.Fragment, h.fragment = true, at&0xfff8 != 0
			p.FragmentID, p.FragmentOffset, p.MoreFragments = binary.BigEndian.Uint32(e[4:]), at&0xfff8, at&1 != 0
			p.FragmentLen = uint16(h.end - h.transport - 8)
		}
		h.proto = e[0]
		if h.transport += size; h.transport > h.end {
			return false
		}
		if h.fragment {
			break
		}
	}
	return true
}

// decodeTransport reads the transport header.
func decodeTransport(t []byte, proto uint8, p *pfsim.Packet) bool {
	switch proto {
	case protoTCP:
		if len(t) < 20 || len(t) < int(t[12]>>4)*4 || t[12]>>4 < 5 {
			return false
		}
		p.Seq, p.Ack = binary.BigEndian.Uint32(t[4:]), binary.BigEndian.Uint32(t[8:])
		p.Flags, p.Window = pfconf.TCPFlags(t[13]), binary.BigEndian.Uint16(t[14:])
		p.Len = uint32(len(t) - int(t[12]>>4)*4)
		p.Scale, p.HasScale = windowScale(t[20 : int(t[12]>>4)*4])
	case protoUDP:
		if len(t) < 8 {
			return false
		}
		p.Len = uint32(len(t) - 8)
	case protoICMP, protoICMPv6:
		if len(t) < 8 {
			return false
		}
		p.ICMPType, p.ICMPCode, p.ICMPID = t[0], t[1], binary.BigEndian.Uint16(t[4:])
		if isError(proto, t[0]) {
			p.Quoted = decodeQuoted(t[8:])
		}
		return true
	case protoESP:
		if len(t) >= 4 {
			p.SPI = binary.BigEndian.Uint32(t)
		}
		return true
	default:
		return true
	}
	p.SrcPort, p.DstPort = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
	return true
}

// windowScale finds the window scale among TCP options (RFC 7323, 2).
func windowScale(options []byte) (shift uint8, ok bool) {
	for len(options) >= 3 && options[0] != 0 {
		if options[0] == 1 {
			options = options[1:]
			continue
		}
		if options[0] == 3 {
			return options[2], true
		}
		size := int(options[1])
		if size < 2 || size > len(options) {
			return 0, false
		}
		options = options[size:]
	}
	return 0, false
}

// isError reports whether an ICMP message quotes a packet (RFC 792, RFC 4443).
func isError(proto, kind uint8) bool {
	if proto == protoICMPv6 {
		return kind >= 1 && kind <= 4
	}
	return slices.Contains([]uint8{3, 4, 5, 11, 12}, kind)
}

// decodeQuoted decodes the packet that an ICMP error quotes, which may be truncated.
func decodeQuoted(b []byte) *pfsim.Quoted {
	var p pfsim.Packet
	h, ok := quotedHeader(b, &p)
	if !ok {
		return nil
	}
	q := &pfsim.Quoted{Src: p.Src, Dst: p.Dst, Proto: pfconf.Proto(h.proto), Later: h.fragment}
	if t := b[h.transport:]; !h.fragment && len(t) >= 8 {
		switch h.proto {
		case protoTCP, protoUDP:
			q.SrcPort, q.DstPort = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
			q.Seq = binary.BigEndian.Uint32(t[4:])
		case protoICMP, protoICMPv6:
			q.ICMPID = binary.BigEndian.Uint16(t[4:])
		}
	}
	return q
}

// quotedHeader decodes an IP header whose packet may be truncated.
func quotedHeader(b []byte, p *pfsim.Packet) (h header, ok bool) {
	if len(b) < 20 {
		return h, false
	}
	whole := slices.Clone(b)
	if b[0]>>4 == 4 {
		binary.BigEndian.PutUint16(whole[2:], uint16(len(b)))
		ok = decode4(whole, p, &h)
	} else if b[0]>>4 == 6 && len(b) >= 40 {
		binary.BigEndian.PutUint16(whole[4:], uint16(len(b)-40))
		ok = decode6(whole, p, &h)
	}
	return h, ok
}

// encode returns a copy of the packet with the changes that translation made.
func encode(b []byte, h header, was, is pfsim.Packet) []byte {
	b = slices.Clone(b)
	putAddresses(b, is.Src, is.Dst)
	t := b[h.transport:h.end]
	// pf doesn't translate fragments, and a first one's checksum covers the whole datagram.
	if !is.Fragment {
		putPorts(t, h.proto, is.SrcPort, is.DstPort, is.ICMPID, isError(h.proto, is.ICMPType))
		if was.Quoted != nil && is.Quoted != nil {
			putQuoted(t[8:], *is.Quoted)
		}
		putChecksum(t, h.proto, is.Src, is.Dst)
	}
	return b
}

// putAddresses writes addresses into an IP header, and its checksum.
func putAddresses(b []byte, src, dst netip.Addr) {
	if src.Is6() {
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
		return
	}
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], checksum(b[:int(b[0]&15)*4], 0))
}

func putPorts(t []byte, proto uint8, src, dst, id uint16, isErr bool) {
	switch {
	case len(t) < 8:
	case proto == protoTCP, proto == protoUDP:
		binary.BigEndian.PutUint16(t, src)
		binary.BigEndian.PutUint16(t[2:], dst)
	case (proto == protoICMP || proto == protoICMPv6) && !isErr:
		binary.BigEndian.PutUint16(t[4:], id)
	}
}

// putQuoted writes a translated quote. It leaves the transport checksum, which can't be
// verified on a truncated packet.
func putQuoted(b []byte, q pfsim.Quoted) {
	var p pfsim.Packet
	h, ok := quotedHeader(b, &p)
	if !ok {
		return
	}
	putAddresses(b, q.Src, q.Dst)
	if !h.fragment {
		putPorts(b[h.transport:], h.proto, q.SrcPort, q.DstPort, q.ICMPID, false)
	}
}

// putChecksum fills in the transport checksum (RFC 1071). A UDP checksum of 0
// means none, over IPv4.
func putChecksum(t []byte, proto uint8, src, dst netip.Addr) {
	at := map[uint8]int{protoICMP: 2, protoICMPv6: 2, protoUDP: 6, protoTCP: 16}
	i, ok := at[proto]
	if !ok || len(t) < i+2 || proto == protoUDP && src.Is4() && t[i] == 0 && t[i+1] == 0 {
		return
	}
	t[i], t[i+1] = 0, 0
	pseudo := uint32(0)
	if proto != protoICMP {
		pseudo = sum(src.AsSlice()) + sum(dst.AsSlice()) + uint32(proto) + uint32(len(t))
	}
	c := checksum(t, pseudo)
	if c == 0 && proto == protoUDP {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(t[i:], c)
}

func sum(b []byte) (total uint32) {
	for i, c := range b {
		total += uint32(c) << (8 * (1 - i%2))
	}
	return total
}

func checksum(b []byte, initial uint32) uint16 {
	total := sum(b) + initial
	for total>>16 != 0 {
		total = total>>16 + total&0xffff
	}
	return ^uint16(total)
}
