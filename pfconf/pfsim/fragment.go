package pfsim

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/pfconf"
)

// Limits of reassembly.
const (
	// defaultFragmentLimit is the default of set limit frags, the number of fragments kept
	// (PFFRAG_FRENT_HIWAT of xnu bsd/net/pfvar.h).
	defaultFragmentLimit = 5000
	// maxDatagram is the length in bytes that the header of an IP packet can express.
	maxDatagram = 65535
)

// Lengths of headers in bytes.
const (
	ipv4Header     = 20
	ipv4Option     = 4 // Router Alert, the only one that Packet.Options can stand for
	ipv6Header     = 40
	fragmentHeader = 8
	tcpHeader      = 20
	udpHeader      = 8 // also of ICMP and ICMPv6
)

// fragmentKey identifies the datagram to which a fragment belongs. As in the kernel it has
// neither interface nor direction.
type fragmentKey struct {
	src, dst netip.Addr
	proto    pfconf.Proto
	id       uint32
}

// datagram is a datagram that is being reassembled, the kernel's pf_fragment.
type datagram struct {
	key      fragmentKey
	created  int64   // second at which the first piece arrived
	pieces   []piece // in order of their offsets
	seenLast bool    // the piece without more fragments has arrived
	end      int     // highest end of a piece, in bytes
}

// piece is a fragment that waits for others, the kernel's pf_frent. Its offset and length
// are those that the kernel stores, including its mistakes in trimming overlaps.
type piece struct {
	packet Packet
	off    int // bytes
	length int // bytes behind the IP header
}

// reassembly is the outcome for a fragment that scrub reassembles.
type reassembly uint8

const (
	reassemblyWaits reassembly = iota // for others; also a piece that adds nothing
	reassemblyBad                     // the fragment is malformed
	reassemblyDone                    // the datagram is complete
)

// reassemble adds a fragment to its datagram. If that completes it, e.p becomes the whole
// datagram. It follows pf_reassemble and pf_reassemble6 of xnu bsd/net/pf_norm.c.
func (e *evaluation) reassemble() reassembly {
	m, p := e.m, &e.p
	off, length := int(p.FragmentOffset), int(p.FragmentLen)
	key := fragmentKey{p.Src, p.Dst, p.Proto, p.FragmentID}
	d := m.fragments[key]
	if e.family == pfconf.Inet && p.MoreFragments && length%8 != 0 || off+length > maxDatagram ||
		e.family == pfconf.Inet6 && off+length < ipv6Header {
		// For IPv6 the kernel subtracts a header too many here; a result below zero wraps
		// around and is refused as too long.
		return reassemblyBad
	}
	if d != nil && d.seenLast && off+length > d.end {
		m.dropDatagram(d)
		return reassemblyBad
	}
	if m.pieces > m.limits.fragments {
		m.totals[countMemory]++
		return reassemblyWaits
	}
	fresh := d == nil
	if fresh {
		d = &datagram{key: key, created: m.seconds()}
		m.fragments[key] = d
	}
	before := len(d.pieces)
	add := d.add4
	if e.family == pfconf.Inet6 {
		add = d.add6
	}
	added := add(piece{packet: *p, off: off, length: length})
	m.pieces += len(d.pieces) - before
	if !added {
		return reassemblyWaits
	}
	d.end = max(d.end, off+length)
	d.seenLast = d.seenLast || !p.MoreFragments
	total, ok := d.complete()
	if !ok {
		return reassemblyWaits
	}
	whole, single := d.pieces[0].packet, len(d.pieces) == 1
	m.dropDatagram(d)
	if e.family == pfconf.Inet && ipv4Header+total > maxDatagram || e.family == pfconf.Inet6 && (single || ipv6Header+fragmentHeader+total > maxDatagram) {
		// An IPv6 fragment that is a whole packet has to go alone (RFC 8200
		// section 4.5); pf drops it.
		return reassemblyWaits
	}
	e.takeWhole(whole, total)
	return reassemblyDone
}

// takeWhole replaces the fragment by the whole datagram, whose header is that of its first
// piece p and whose payload has total bytes.
func (e *evaluation) takeWhole(p Packet, total int) {
	p.Fragment, p.MoreFragments, p.FragmentID, p.FragmentOffset, p.FragmentLen = false, false, 0, 0, 0
	header := 0
	switch p.Proto {
	case pfconf.ProtoTCP:
		header = tcpHeader
	case pfconf.ProtoUDP, pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		header = udpHeader
	}
	p.Len = uint32(max(total-header, 0))
	e.p, e.bytes = p, total
	e.setTag(p.Tag)
}

// add4 inserts a piece of an IPv4 datagram, trims overlaps and reports whether the piece
// added anything. A piece that overlaps the end of an earlier one gets a wrong length, so
// the datagram never becomes complete; overlapping the beginning of a later one is fine.
func (d *datagram) add4(p piece) bool {
	at, _ := slices.BinarySearchFunc(d.pieces, p.off+1, func(q piece, off int) int { return q.off - off })
	kept := p.length
	if at > 0 {
		prev := &d.pieces[at-1]
		if cut := prev.off + prev.length - p.off; cut > 0 {
			if cut >= p.length {
				return false
			}
			p.off += cut / 8 * 8
			p.length -= cut
			// The kernel stores the length field of the IP header, and forgets here that it
			// includes the header.
			kept = p.length - p.header()
		}
	}
	end := p.off + p.length
	for at < len(d.pieces) && end > d.pieces[at].off {
		next := &d.pieces[at]
		cut := end - next.off
		if cut < next.length {
			next.length -= cut
			next.off += cut / 8 * 8
			break
		}
		d.pieces = slices.Delete(d.pieces, at, at+1)
	}
	p.length = kept
	d.pieces = slices.Insert(d.pieces, at, p)
	return true
}

// header returns the length of the piece's IPv4 header in bytes.
func (p *piece) header() int {
	if p.packet.Options {
		return ipv4Header + ipv4Option
	}
	return ipv4Header
}

// add6 inserts a piece of an IPv6 datagram and reports whether the piece added anything.
// The kernel confuses lengths with and without headers, so only pieces that arrive in
// order, without duplicates or overlaps, are reassembled.
func (d *datagram) add6(p piece) bool {
	at, _ := slices.BinarySearchFunc(d.pieces, p.off+1, func(q piece, off int) int { return q.off&^7 - off })
	// plen is the payload length in the IPv6 header, which includes the fragment header.
	// The lowest bit of the offset's field is the flag for more fragments (RFC 8200,
	// section 4.5), which the kernel doesn't mask.
	plen := p.length + fragmentHeader
	if p.packet.MoreFragments {
		p.off |= 1
	}
	if at > 0 {
		prev := &d.pieces[at-1]
		if cut := prev.off&^7 + prev.length - ipv6Header - p.off&^7; cut > 0 {
			if cut >= plen {
				return false
			}
			// The kernel shifts as for IPv4, whose header counts offsets in units of 8.
			// Here the field's low bits are flags, so a few bytes don't move the piece.
			p.off += cut >> 3
			plen -= cut
		}
	}
	for at < len(d.pieces) && plen+p.off&^7 > d.pieces[at].off&^7 {
		next := &d.pieces[at]
		cut := plen + p.off&^7 - next.off&^7
		if cut < next.length-ipv6Header {
			next.length -= cut
			next.off += cut >> 3
			break
		}
		d.pieces = slices.Delete(d.pieces, at, at+1)
	}
	p.length = plen - fragmentHeader
	d.pieces = slices.Insert(d.pieces, at, p)
	return true
}

// complete returns the length of the datagram's payload in bytes, and whether all of its
// pieces have arrived.
func (d *datagram) complete() (int, bool) {
	if !d.seenLast {
		return 0, false
	}
	total := 0
	for i, p := range d.pieces {
		total += p.length
		if total < d.end && (i+1 == len(d.pieces) || d.pieces[i+1].off&^7 != total) {
			return 0, false
		}
	}
	return total, total >= d.end
}

// dropDatagram removes a datagram with its pieces.
func (m *Machine) dropDatagram(d *datagram) {
	m.pieces -= len(d.pieces)
	delete(m.fragments, d.key)
}

// purgeFragments removes datagrams that weren't complete within the timeout frag of their
// first piece (pf_purge_expired_fragments).
func (m *Machine) purgeFragments() {
	for _, d := range m.fragments {
		if d.created+int64(m.timeouts[fragTimeout]) <= m.seconds() {
			m.dropDatagram(d)
		}
	}
}
