package pfsim

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/pfconf"
)

// Bounds of reassembly: the default of set limit frags (PFFRAG_FRENT_HIWAT), and
// what a packet can hold.
const (
	defaultFragmentLimit = 5000
	maxDatagram          = 65535
)

// Lengths of headers in bytes.
const (
	ipv4Header     = 20
	ipv4Option     = 4 // Router Alert, the only one that a Packet can stand for
	ipv6Header     = 40
	fragmentHeader = 8
	tcpHeader      = 20
	udpHeader      = 8 // also of ICMP and ICMPv6
)

// fragmentKey is by what pieces of one datagram are found. Neither interface nor
// direction counts.
type fragmentKey struct {
	src, dst netip.Addr
	proto    pfconf.Proto
	id       uint32
}

// datagram is one that is being put together, the kernel's pf_fragment.
type datagram struct {
	key      fragmentKey
	created  int64 // second of the first piece
	pieces   []piece
	seenLast bool
	end      int // the highest end of a piece
}

// piece is a fragment that waits, the kernel's pf_frent. Its offset and length are
// kept as the kernel keeps them, with its mistakes in cutting overlaps.
type piece struct {
	packet Packet
	off    int // bytes
	length int // bytes behind the IP header
}

// reassembly is what becomes of a fragment that scrub takes.
type reassembly uint8

const (
	reassemblyWaits reassembly = iota // or the piece was nothing new
	reassemblyBad
	reassemblyDone
)

// reassemble adds a fragment to its datagram. When that is complete, e.p is the
// whole. All of it is from bsd/net/pf_norm.c.
func (e *evaluation) reassemble() reassembly {
	m, p := e.m, &e.p
	off, length := int(p.FragmentOffset), int(p.FragmentLen)
	key := fragmentKey{p.Src, p.Dst, p.Proto, p.FragmentID}
	d := m.fragments[key]
	if e.family == pfconf.Inet && p.MoreFragments && length%8 != 0 || off+length > maxDatagram ||
		e.family == pfconf.Inet6 && off+length < ipv6Header {
		// Of IPv6 the kernel subtracts a header too much here, and takes what is
		// below zero for too long.
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

// takeWhole goes on with the datagram, whose header is that of its first piece.
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

// add4 inserts a piece of an IPv4 datagram. It is false for one that is nothing
// new.
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
			// The length in a header counts the header, which the kernel forgets.
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

// header is the length of the piece's IPv4 header.
func (p *piece) header() int {
	if p.packet.Options {
		return ipv4Header + ipv4Option
	}
	return ipv4Header
}

// add6 inserts a piece of an IPv6 datagram. The kernel mixes up lengths with and
// without headers, so that only pieces in order, each as it should be, are put
// together right.
func (d *datagram) add6(p piece) bool {
	at, _ := slices.BinarySearchFunc(d.pieces, p.off+1, func(q piece, off int) int { return q.off&^7 - off })
	// plen is the length in the IPv6 header, which counts the fragment header. The
	// field of the offset has the flag for more fragments in its lowest bit.
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
			// The offset is counted in eights in IPv4's header only: here the
			// low bits are others, and few bytes don't move the piece at all.
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

// complete returns the length of the datagram if all of it is there.
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

// dropDatagram forgets a datagram with its pieces.
func (m *Machine) dropDatagram(d *datagram) {
	m.pieces -= len(d.pieces)
	delete(m.fragments, d.key)
}

// purgeFragments forgets datagrams of which pieces have been missing for long.
func (m *Machine) purgeFragments() {
	for _, d := range m.fragments {
		if d.created+int64(m.timeouts[fragTimeout]) <= m.seconds() {
			m.dropDatagram(d)
		}
	}
}
