package simmac

// The bytes of fragments until pf has reassembled their datagram.

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"

	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// fragments keeps the bytes of fragments until pf has reassembled their datagram. pf
// decides which fragments make one. The datagram continues whole: that the IP stack, or
// pf for IPv6, fragments it again isn't simulated.
type fragments struct {
	mu     sync.Mutex
	pieces map[datagram][]fragment
}

// A datagram identifies the fragments of one datagram.
type datagram struct {
	src, dst netip.Addr
	proto    pfconf.Proto
	id       uint32
}

// A fragment is a fragment with its IP header.
type fragment struct {
	header, payload []byte
	offset          int
}

// maxDatagrams is how many incomplete datagrams are kept.
const maxDatagrams = 256

func datagramOf(p pfsim.Packet) datagram { return datagram{p.Src, p.Dst, p.Proto, p.FragmentID} }

// keep stores a packet if it is a fragment.
func (f *fragments) keep(b []byte, h header, p pfsim.Packet) {
	if !p.Fragment {
		return
	}
	size := 40
	if p.Src.Is4() {
		size = int(b[0]&15) * 4
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pieces == nil || len(f.pieces) >= maxDatagrams {
		f.pieces = map[datagram][]fragment{}
	}
	d := datagramOf(p)
	one := fragment{header: slices.Clone(b[:size]), payload: slices.Clone(b[h.transport:h.end]), offset: int(p.FragmentOffset)}
	f.pieces[d] = append(f.pieces[d], one)
}

// whole returns the datagram that a fragment completed, with total bytes after its IP
// header. Where fragments overlap, the bytes of the first one count. It returns false if
// the result can't be decoded.
func (f *fragments) whole(last pfsim.Packet, total int) ([]byte, header, pfsim.Packet, bool) {
	f.mu.Lock()
	pieces := f.pieces[datagramOf(last)]
	delete(f.pieces, datagramOf(last))
	f.mu.Unlock()
	var head []byte
	body := make([]byte, total)
	for _, one := range slices.Backward(pieces) {
		if one.offset < total {
			copy(body[one.offset:], one.payload)
		}
		if one.offset == 0 || head == nil {
			head = one.header
		}
	}
	if last.Src.Is4() && head != nil {
		binary.BigEndian.PutUint16(head[2:], uint16(len(head)+total))
		head[6], head[7] = 0, 0
	} else if head != nil {
		binary.BigEndian.PutUint16(head[4:], uint16(total))
		head[6] = byte(last.Proto)
	}
	b := append(head, body...)
	p, h, ok := decode(b)
	return b, h, p, ok
}
