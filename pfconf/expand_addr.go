package pfconf

import (
	"fmt"
	"net/netip"
)

// A host has the interfaces by which names are resolved; nil if they are unknown.
type host []Interface

// resolve replaces interfaces by their addresses, and drops any, which pfctl ignores in a
// list. With an unknown host, interfaces stay as they are.
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

// static returns the addresses that en0, en0:network and so on stand for, nil if there is
// no such interface (host_if in pfctl_parser.c).
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

// has reports whether there is an interface of exactly that name.
func (h host) has(name string) bool {
	for _, i := range h {
		if i.Name == name {
			return true
		}
	}
	return false
}

// lookup returns the addresses of an interface, of all interfaces for self, or of all
// whose name is the given one and a number (ifa_lookup in pfctl_parser.c).
func (h host) lookup(name string, mod AddressModifier) []Address {
	var all []Address
	for _, i := range h {
		if name == "self" || matchesInterface(name, i.Name) {
			all = append(all, i.addrs(mod)...)
		}
	}
	return all
}

// matchesInterface reports whether pattern is the interface's name, or its name without
// the number. pfctl looks up addresses by both; the kernel's on compares whole names.
func matchesInterface(pattern, name string) bool {
	if pattern == name {
		return true
	}
	n := len(pattern)
	return n > 0 && !isDigit(int(pattern[n-1])) && len(name) > n && name[:n] == pattern && isDigit(int(name[n]))
}

// addrs returns an interface's addresses, or those that the modifiers stand for: none
// for peer, since an Interface has no remote addresses. pfctl writes no network for a
// link-local address, and keeps its zone otherwise.
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

// hasBroadcast reports whether there is a broadcast address for an address of the
// interface.
func (i Interface) hasBroadcast(ip netip.Addr) bool {
	return ip.Is4() && !i.IsLoopback() && !i.IsPointToPoint()
}

// lastOf returns the last address of an IPv4 network, its broadcast address.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(b)
}

// family returns the family of an address, AnyFamily for tables, interfaces and others
// that can have both.
func (a *Address) family() Family {
	if a.Kind != AddrPrefix && a.Kind != AddrRange {
		return AnyFamily
	}
	if a.Prefix.Addr().Is4() {
		return Inet
	}
	return Inet6
}

// changes reports whether an address can stand for several: an interface in parentheses,
// unless :0 picks the first address of one interface (disallow_alias in parse.y).
func (a *Address) changes() bool {
	return a.Kind == AddrDynamic && (a.Mod&ModNoAlias == 0 || !isDigit(int(a.Name[len(a.Name)-1])))
}

// isZero reports whether the address is 0.0.0.0/0 or ::/0, which match all addresses.
func (a *Address) isZero() bool {
	return a.Kind == AddrPrefix && a.Prefix.Bits() == 0
}

// maskBits returns the length of the address's prefix in a rule of the family.
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

// fixMasks drops the prefix length of the first address if it is an interface in
// parentheses and the length is that of a whole address of the family: then it says
// nothing, and pfctl doesn't show it.
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

// anyUnresolved reports whether there are interface names that couldn't be resolved,
// because the host is unknown.
func anyUnresolved(addrs []Address) bool {
	for _, a := range addrs {
		if a.Kind == AddrInterface {
			return true
		}
	}
	return false
}
