package guard

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// own are the host's mesh addresses as they stand in packets.
type own struct {
	v4 [][4]byte
	v6 [][16]byte
}

func newOwn(addresses []netip.Addr) *own {
	o := &own{}
	for _, a := range addresses {
		if a.Is4() {
			o.v4 = append(o.v4, a.As4())
		} else {
			o.v6 = append(o.v6, a.As16())
		}
	}
	return o
}

// toSelf reports whether a packet is from and to the host's mesh addresses. A
// header that can't be the host's is not.
func (o *own) toSelf(p []byte) bool {
	switch {
	case len(p) >= header4 && p[0]>>4 == 4:
		header := int(p[0]&15) * 4
		return slices.Contains(o.v4, [4]byte(p[16:])) && slices.Contains(o.v4, [4]byte(p[12:])) &&
			header >= header4 && header <= len(p) && int(binary.BigEndian.Uint16(p[2:])) == len(p)
	case len(p) >= header6 && p[0]>>4 == 6:
		return slices.Contains(o.v6, [16]byte(p[24:])) && slices.Contains(o.v6, [16]byte(p[8:])) &&
			int(binary.BigEndian.Uint16(p[4:])) == len(p)-header6
	}
	return false
}
