package policy

import (
	"net/netip"

	"github.com/gaissmai/bart"
)

// Class says what a destination is, as seen by a peer. Lower classes come
// first: the first that fits counts.
type Class uint8

// The classes of docs/policy.md in their order.
const (
	Martian Class = iota + 1
	Self
	InMesh
	OnLAN
	Internet
	// Spoofed is no class of destination: the packet's source isn't one of its
	// sender's addresses. It is here because refusals are counted by class.
	Spoofed
)

// NumClasses is one more than the largest Class, for arrays indexed by class.
const NumClasses = int(Spoofed) + 1

// String returns the name that status and metrics use.
func (c Class) String() string {
	switch c {
	case Martian:
		return "martian"
	case Self:
		return "self"
	case InMesh:
		return "mesh"
	case OnLAN:
		return "lan"
	case Internet:
		return "internet"
	case Spoofed:
		return "spoofed"
	}
	return "none"
}

func prefixes(texts ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(texts))
	for i, t := range texts {
		out[i] = netip.MustParsePrefix(t)
	}
	return out
}

// Destinations that are never valid for a packet that is to be forwarded or
// received by unicast: RFC 1122 3.2.1.3 and RFC 6890 for IPv4, RFC 4291 for
// IPv6 (unspecified, loopback, mapped, link-local, multicast).
var martians = prefixes(
	"0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4",
	"::/128", "::1/128", "::ffff:0:0/96", "fe80::/10", "ff00::/8",
)

// Private address space: RFC 1918, RFC 3927, RFC 6598, RFC 4193.
var private = prefixes(
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16",
	"100.64.0.0/10", "fc00::/7",
)

// noPeer marks a destination that is no peer's address.
const noPeer = -1

// dest is what is known of a destination address.
type dest struct {
	class Class
	peer  int32 // index in Ruleset.peers, or noPeer
}

// classes finds the class of an address by one longest-prefix match: where
// prefixes of several classes nest, each entry already carries the first class
// of all the prefixes around it.
type classes struct {
	table bart.Fast[dest]
}

// add enters a prefix; where it was entered before the first class counts.
func (c *classes) add(class Class, peer int32, ps ...netip.Prefix) {
	for _, p := range ps {
		p = p.Masked()
		if old, ok := c.table.Get(p); ok && old.class <= class {
			continue
		}
		c.table.Insert(p, dest{class, peer})
	}
}

// settle makes each entry carry the first class of those that contain it. It is
// called once, after the last add.
func (c *classes) settle() {
	type entry struct {
		p netip.Prefix
		d dest
	}
	var changed []entry
	for p, d := range c.table.All() {
		first := d
		for _, outer := range c.table.Supernets(p) {
			if outer.class < first.class {
				first.class = outer.class
			}
		}
		if first != d {
			changed = append(changed, entry{p, first})
		}
	}
	for _, e := range changed {
		c.table.Insert(e.p, e.d)
	}
}

// of returns what is known of an address; what is in no prefix is internet.
func (c *classes) of(a netip.Addr) dest {
	if d, ok := c.table.Lookup(a); ok {
		return d
	}
	return dest{Internet, noPeer}
}

// broadcasts returns the network and the directed broadcast address of an IPv4
// prefix; /31 and /32 have neither (RFC 3021).
func broadcasts(p netip.Prefix) []netip.Prefix {
	if !p.Addr().Is4() || p.Bits() > 30 {
		return nil
	}
	first := p.Masked().Addr()
	b := first.As4()
	for bit := p.Bits(); bit < 32; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	return []netip.Prefix{netip.PrefixFrom(first, 32), netip.PrefixFrom(netip.AddrFrom4(b), 32)}
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func singles(as []netip.Addr) []netip.Prefix {
	out := make([]netip.Prefix, len(as))
	for i, a := range as {
		out[i] = single(a)
	}
	return out
}
