package policy

import (
	"net/netip"

	"github.com/gaissmai/bart"
)

// Class is the kind of a destination as a peer sees it. Lower classes come first: the
// first that fits counts.
type Class uint8

// The classes of docs/policy.md in their order.
const (
	Martian Class = iota + 1
	Self
	InMesh
	OnLAN
	Internet
	// Spoofed isn't a class of destination: the packet's source isn't one of its
	// sender's addresses. It is listed here because refusals are counted by class.
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

// local are destinations to which a host never forwards packets; it receives or drops
// them: RFC 1122 3.2.1.3 and RFC 6890 for IPv4, RFC 4291 for IPv6
// (unspecified, loopback, mapped, link-local, multicast).
var local = prefixes(
	"0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4",
	"::/128", "::1/128", "::ffff:0:0/96", "fe80::/10", "ff00::/8",
)

// martians are the destinations that are never valid for a peer on any host. Besides
// the local ones they are
//
//   - 192.0.0.0/24, for the protocols of the IETF (RFC 6890), such as the addresses
//     between a host and its own translator (RFC 7335),
//   - ::/96, IPv4-compatible addresses, which carry an IPv4 destination into a tunnel
//     that each host would make by itself (deprecated by RFC 4291 2.5.5.1),
//   - 100::/64, discarded (RFC 6666), and fec0::/10, site-local (deprecated by RFC 3879),
//   - Teredo (RFC 4380): the client's IPv4 address is in the last 32 bits, inverted,
//     behind bits that may be anything, so no prefix tells its class, and there is no
//     relay left that would carry such a packet.
var martians = append(prefixes("192.0.0.0/24", "::/96", "100::/64", "fec0::/10", "2001::/32"), local...)

// private is address space of class lan on every host: RFC 1918, RFC 3927, RFC 6598,
// RFC 4193, networks for benchmarks (RFC 2544), and translators of a network's own
// (RFC 8215), which carry an IPv4 address wherever their operator chose to.
var private = prefixes(
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16",
	"100.64.0.0/10", "198.18.0.0/15", "fc00::/7", "64:ff9b:1::/48",
)

// carriers are the IPv6 prefixes that an IPv4 address follows immediately:
// translators (RFC 6052 2.1) and 6to4 (RFC 3056 section 2).
var carriers = prefixes("64:ff9b::/96", "2002::/16")

// carried returns the IPv6 prefixes whose addresses carry an IPv4 address of the
// prefixes; IPv6 ones carry none.
func carried(ps []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range ps {
		if !p.Addr().Is4() {
			continue
		}
		a := p.Masked().Addr().As4()
		for _, c := range carriers {
			b := c.Addr().As16()
			copy(b[c.Bits()/8:], a[:])
			out = append(out, netip.PrefixFrom(netip.AddrFrom16(b), c.Bits()+p.Bits()))
		}
	}
	return out
}

// noPeer marks a destination that is no peer's address.
const noPeer = -1

// dest is the class of a destination address, and the peer that has it.
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

// inherit gives each entry the first class of the prefixes that contain it. It is
// called once, after the last add.
func (c *classes) inherit() {
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

// of returns the class and the peer of an address. An address in no prefix is of class
// internet.
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
