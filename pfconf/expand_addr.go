package pfconf

import (
	"fmt"
	"net/netip"
)

// A host is the interfaces against which names are resolved; nil when they are
// unknown.
type host []Interface

// resolve replaces the interfaces among some addresses by what they have, and
// leaves out any, which in a list means nothing.
func (l *loader) resolve(addrs []Address) ([]Address, error) {
	var all []Address
	for _, a := range addrs {
		if a.Kind == AddrAny {
			continue
		}
		if a.Kind != AddrInterface || l.host == nil {
			all = append(all, a)
			continue
		}
		found := l.host.static(a)
		if len(found) == 0 {
			return nil, fmt.Errorf("%s is no interface with an address", clip(a.Name))
		}
		all = append(all, found...)
	}
	return all, nil
}

// static returns the addresses of en0, en0:network and so on.
func (h host) static(a Address) []Address {
	if a.Name != "self" && !h.has(a.Name) {
		return nil
	}
	found := h.lookup(a.Name, a.Mod)
	for i := range found {
		f := &found[i]
		f.Not = a.Not
		if a.Bits != nil {
			bits := min(int(*a.Bits), f.Prefix.Addr().BitLen())
			f.Prefix = netip.PrefixFrom(f.Prefix.Addr(), bits).Masked()
		}
	}
	return found
}

// has tells whether there is an interface of exactly that name.
func (h host) has(name string) bool {
	for _, i := range h {
		if i.Name == name {
			return true
		}
	}
	return false
}

// lookup returns the addresses of an interface, of all for self, or of all that
// are the name and a number.
func (h host) lookup(name string, mod AddressModifier) []Address {
	var all []Address
	for _, i := range h {
		if name == "self" || matchesInterface(name, i.Name) {
			all = append(all, i.addrs(mod)...)
		}
	}
	return all
}

// matchesInterface knows a family of interfaces by the name without number, which
// pfctl does although the kernel doesn't.
func matchesInterface(pattern, name string) bool {
	if pattern == name {
		return true
	}
	n := len(pattern)
	return n > 0 && !isDigit(int(pattern[n-1])) && len(name) > n && name[:n] == pattern && isDigit(int(name[n]))
}

// addrs returns an interface's addresses, or what the modifier makes of them.
func (i Interface) addrs(mod AddressModifier) []Address {
	var all []Address
	var got4, got6 bool
	for _, p := range i.Addresses {
		ip := p.Addr().WithZone("")
		got := &got6
		if ip.Is4() {
			got = &got4
		}
		zone := ""
		if ip.Is6() && ip.IsLinkLocalUnicast() {
			zone = i.Name
		}
		if mod&ModPeer != 0 || mod&ModBroadcast != 0 && !i.hasBroadcast(ip) || mod&ModNetwork != 0 && zone != "" {
			continue
		}
		if mod&ModNoAlias != 0 && *got {
			continue
		}
		*got = true
		a := Address{Kind: AddrPrefix, Prefix: hostPrefix(ip), Zone: zone}
		switch {
		case mod&ModNetwork != 0:
			a.Prefix = netip.PrefixFrom(ip, p.Bits()).Masked()
		case mod&ModBroadcast != 0:
			a.Prefix = hostPrefix(lastOf(p))
		}
		all = append(all, a)
	}
	return all
}

// hasBroadcast tells whether an address has a broadcast address.
func (i Interface) hasBroadcast(ip netip.Addr) bool {
	return ip.Is4() && !i.IsLoopback() && !i.IsPointToPoint()
}

// lastOf returns the last address of an IPv4 network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(b)
}

// family returns the family of an address, AnyFamily for those that can be of
// both.
func (a *Address) family() Family {
	if a.Kind != AddrPrefix && a.Kind != AddrRange {
		return AnyFamily
	}
	if a.Prefix.Addr().Is4() {
		return Inet
	}
	return Inet6
}

// changes is true for an interface that can have several addresses.
func (a *Address) changes() bool {
	return a.Kind == AddrDynamic && (a.Mod&ModNoAlias == 0 || !isDigit(int(a.Name[len(a.Name)-1])))
}

// isZero is true for 0.0.0.0/0 and ::/0, which are any.
func (a *Address) isZero() bool {
	return a.Kind == AddrPrefix && a.Prefix.Bits() == 0
}

// maskBits returns the length of the address's prefix.
func (a *Address) maskBits(f Family) int {
	switch {
	case a.Kind == AddrPrefix:
		return a.Prefix.Bits()
	case a.Bits != nil:
		return int(*a.Bits)
	case f == Inet:
		return 32
	}
	return 128
}

// fixMasks bounds the prefix length of a dynamic first address by its family.
func fixMasks(addrs []Address, f Family) []Address {
	if len(addrs) == 0 || addrs[0].Kind != AddrDynamic || addrs[0].Bits == nil {
		return addrs
	}
	bits := int(*addrs[0].Bits)
	if f == Inet && bits < 32 || f != Inet && bits < 128 {
		return addrs
	}
	fixed := append([]Address(nil), addrs...)
	fixed[0].Bits = nil
	return fixed
}

// anyUnresolved tells whether there are names that only the host could resolve.
func anyUnresolved(addrs []Address) bool {
	for _, a := range addrs {
		if a.Kind == AddrInterface {
			return true
		}
	}
	return false
}
