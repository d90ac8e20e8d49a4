package mesh

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
)

// ErrReserved is wrapped by the error for an address that no device may have; see
// Prefixes.Check.
var ErrReserved = errors.New("reserved address")

// ErrMeshFull is wrapped by the error for a mesh prefix without a free address.
var ErrMeshFull = errors.New("no free address in the mesh")

// IsPlain reports whether an address is valid, has no zone and isn't IPv4-mapped, like one
// that a resolver returns. Each such address has one form only.
func IsPlain(a netip.Addr) bool { return a.IsValid() && !a.Is4In6() && a.Zone() == "" }

// Prefixes are the two prefixes that a mesh takes its addresses from. They lie in private
// address space; see Validate. In the smallest ones, a few devices still find an address
// that isn't reserved.
type Prefixes struct {
	V4 netip.Prefix // required: IPv4, /8 to /29
	V6 netip.Prefix // required: IPv6, /7 to /112
}

// DefaultPrefixes returns the prefixes of a mesh that has none configured: the shared
// address space of RFC 6598, which home and office networks rarely use, and a unique local
// prefix of RFC 4193 (its global ID is "mesh" in ASCII and a zero).
func DefaultPrefixes() Prefixes {
	return Prefixes{
		V4: netip.MustParsePrefix("100.64.0.0/10"),
		V6: netip.MustParsePrefix("fd6d:6573:6800::/48"),
	}
}

// allowed lists the address space in which mesh prefixes may lie. Anywhere else, a mesh would
// make addresses on the internet unreachable for its hosts.
var allowed = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),     // RFC 1918
	netip.MustParsePrefix("100.64.0.0/10"),  // RFC 6598, carriers' shared space
	netip.MustParsePrefix("172.16.0.0/12"),  // RFC 1918
	netip.MustParsePrefix("192.168.0.0/16"), // RFC 1918
	netip.MustParsePrefix("198.18.0.0/15"),  // RFC 2544, benchmarks
	netip.MustParsePrefix("fc00::/7"),       // RFC 4193
}

// Validate returns an error unless each prefix is of its family, has no host bits set, is
// no longer than Prefixes allows, and lies in private address space.
func (p Prefixes) Validate() error {
	if err := validatePrefix(p.V4, netip.Addr.Is4, 29); err != nil {
		return fmt.Errorf("IPv4 mesh prefix: %w", err)
	}
	if err := validatePrefix(p.V6, netip.Addr.Is6, 112); err != nil {
		return fmt.Errorf("IPv6 mesh prefix: %w", err)
	}
	return nil
}

// validatePrefix checks one prefix; longest is its greatest number of bits.
func validatePrefix(p netip.Prefix, family func(netip.Addr) bool, longest int) error {
	switch {
	case !p.IsValid() || !family(p.Addr()):
		return fmt.Errorf("%v is not a prefix of that family", p)
	case p != p.Masked():
		return fmt.Errorf("%v has host bits set, the prefix is %v", p, p.Masked())
	case p.Bits() > longest:
		return fmt.Errorf("%v is too small, at most /%d", p, longest)
	}
	for _, a := range allowed {
		if a.Overlaps(p) && a.Bits() <= p.Bits() {
			return nil
		}
	}
	return fmt.Errorf("%v is not in private address space", p)
}

// Addresses are the two addresses of a device in the mesh: one IPv4 and one IPv6, in
// this order.
type Addresses [2]netip.Addr

// List returns both addresses, IPv4 first, in a slice of their own.
func (a Addresses) List() []netip.Addr { return slices.Clone(a[:]) }

// Prefixes returns both addresses as prefixes of one address each, IPv4 first.
func (a Addresses) Prefixes() [2]netip.Prefix {
	return [2]netip.Prefix{netip.PrefixFrom(a[0], a[0].BitLen()), netip.PrefixFrom(a[1], a[1].BitLen())}
}

// Validate returns an error unless a is one IPv4 and one IPv6 address, in this order.
// Whether a mesh may have them is up to Prefixes.Check.
func (a Addresses) Validate() error {
	if v4, v6 := a[0], a[1]; !v4.Is4() || !v6.Is6() || v6.Is4In6() || v6.Zone() != "" {
		return fmt.Errorf("addresses %v and %v aren't one IPv4 and one IPv6", v4, v6)
	}
	return nil
}

// reserved lists parts of the allowed address space that other software or networks use for
// a service. A peer with such an address would be unreachable from there, or would receive
// requests for that service.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("100.100.100.0/24"), // Tailscale's resolver, Alibaba Cloud's metadata
	netip.MustParsePrefix("100.100.2.0/24"),   // Alibaba Cloud's resolvers
	netip.MustParsePrefix("100.115.92.0/23"),  // ChromeOS's virtual machines
}

// Of returns the prefix for the family of an address.
func (p Prefixes) Of(a netip.Addr) netip.Prefix {
	if a.Unmap().Is4() {
		return p.V4
	}
	return p.V6
}

// Check returns an error if no device may have the address a: it lies outside the prefix of
// its family, or is reserved (ErrReserved). The caller checks for collisions, since it knows
// which addresses other devices have.
func (p Prefixes) Check(a netip.Addr) error {
	prefix := p.Of(a)
	if !prefix.Contains(a) || a.Zone() != "" {
		return fmt.Errorf("address %v is outside the mesh prefix %v", a, prefix)
	}
	if reason := reservedReason(prefix, a); reason != "" {
		return fmt.Errorf("address %v: %s: %w", a, reason, ErrReserved)
	}
	return nil
}

// reservedReason returns the reason that a is reserved within prefix, or "" if it isn't.
func reservedReason(prefix netip.Prefix, a netip.Addr) string {
	if a.Is4() {
		return reservedReason4(prefix, a)
	}
	b := a.As16()
	id := binary.BigEndian.Uint64(b[8:])
	switch {
	// RFC 4291 section 2.6.1: all routers of the subnet answer to it. Subnets are /64
	// usually; the second condition is for longer prefixes.
	case id == 0 || a == prefix.Addr():
		return "the subnet's router anycast address"
	// RFC 2526 section 2: the highest 128 interface identifiers, with the universal/local
	// bit of EUI-64 clear, or set as in identifiers of other forms.
	case id|0x7f == 0xfdff_ffff_ffff_ffff || id|0x7f == 0xffff_ffff_ffff_ffff:
		return "a reserved subnet anycast address"
	// RFC 5453 and IANA's registry: 0200:5eff:fe00:0000 to 0200:5eff:feff:ffff, EUI-64
	// identifiers of IANA's own, among them those for Proxy Mobile IPv6.
	case id>>32 == 0x0200_5eff && id&0xff00_0000 == 0xfe00_0000:
		return "an interface identifier reserved by IANA"
	}
	return ""
}

// reservedReason4 is reservedReason for IPv4.
func reservedReason4(prefix netip.Prefix, a netip.Addr) string {
	b := a.As4()
	switch n := binary.BigEndian.Uint32(b[:]); {
	case n&^mask4(prefix) == 0 || n|mask4(prefix) == ^uint32(0):
		return "the prefix's own or broadcast address"
	// Some devices and programs take .0 and .255 for the network and the broadcast address
	// of a /24, whatever the prefix is.
	case b[3] == 0 || b[3] == 255:
		return "ends in .0 or .255"
	}
	for _, r := range reserved {
		if r.Contains(a) {
			return "in use elsewhere (" + r.String() + ")"
		}
	}
	return ""
}

// mask4 returns the network mask of an IPv4 prefix.
func mask4(p netip.Prefix) uint32 { return ^uint32(0) << (32 - p.Bits()) }

// The domains that make the two digests of a key differ from each other and from every
// other use of its hash. The 1 is the version of the derivation: changing any of it gives
// all devices other addresses.
const (
	domain4 = "meshhelper address 1 ipv4"
	domain6 = "meshhelper address 1 ipv6"
)

// Derive returns the addresses that belong to key. The host bits of each are
// the lowest bits of
//
//	SHA-256(domain || 0x00 || key || uint32 big endian attempt)
//
// read as a big endian number, where domain is "meshhelper address 1 ipv4" or
// "… ipv6" and attempt is 0; the other bits are the prefix's. Every device that
// knows the key and the prefixes computes the same addresses, so no server has to
// assign them. The error wraps ErrReserved if one is reserved: generate another key
// or use Propose.
func (p Prefixes) Derive(key PublicKey) (Addresses, error) {
	a := Addresses{derive(p.V4, domain4, key, 0), derive(p.V6, domain6, key, 0)}
	for _, addr := range a.List() {
		if err := p.Check(addr); err != nil {
			return Addresses{}, fmt.Errorf("derive addresses of %v: %w", key, err)
		}
	}
	return a, nil
}

// derive computes one address; see Prefixes.Derive. It may be reserved.
func derive(prefix netip.Prefix, domain string, key PublicKey, attempt uint32) netip.Addr {
	input := make([]byte, 0, 64)
	input = append(input, domain...)
	input = append(input, 0)
	input = append(input, key[:]...)
	input = binary.BigEndian.AppendUint32(input, attempt)
	digest := sha256.Sum256(input)

	network := prefix.Addr().AsSlice()
	host := digest[len(digest)-len(network):]
	for bit := prefix.Bits(); bit < len(network)*8; bit++ {
		network[bit/8] |= host[bit/8] & (0x80 >> (bit % 8))
	}
	addr, _ := netip.AddrFromSlice(network)
	return addr
}

// hashAttempts is how often Propose hashes before it goes through the prefix address by
// address. With half of the prefix in use, that many misses in a row have a probability of
// 2^-64.
const hashAttempts = 64

// Propose returns free addresses for a key. For each family that is the derived one
// (see Derive) if it is neither reserved nor taken, else the one of the next attempt, and
// after hashAttempts the next free one in the prefix. taken reports whether a device already
// has an address. The error wraps ErrMeshFull.
func (p Prefixes) Propose(key PublicKey, taken func(netip.Addr) bool) (a Addresses, err error) {
	if a[0], err = p.propose(p.V4, domain4, key, taken); err != nil {
		return Addresses{}, err
	}
	if a[1], err = p.propose(p.V6, domain6, key, taken); err != nil {
		return Addresses{}, err
	}
	return a, nil
}

// propose is Propose for one family.
func (p Prefixes) propose(prefix netip.Prefix, domain string, key PublicKey, taken func(netip.Addr) bool) (netip.Addr, error) {
	for attempt := range uint32(hashAttempts) {
		a := derive(prefix, domain, key, attempt)
		if p.Check(a) == nil && !taken(a) {
			return a, nil
		}
	}
	start := derive(prefix, domain, key, 0)
	for a, left := start, walkLimit(prefix); left > 0; left-- {
		if a = a.Next(); !prefix.Contains(a) {
			a = prefix.Addr()
		}
		if p.Check(a) == nil && !taken(a) {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("propose an address in %v: %w", prefix, ErrMeshFull)
}

// walkLimit returns how many addresses of prefix propose tries in order: all of an IPv4
// prefix, which has at most 2^24, and as many of an IPv6 prefix.
func walkLimit(prefix netip.Prefix) int {
	return 1 << min(prefix.Addr().BitLen()-prefix.Bits(), 24)
}

// keyDraws is how many keys GenerateFree tries. In a prefix with one free address in a
// thousand, all of them fail with a probability of e^-16.
const keyDraws = 1 << 14

// GenerateFree generates private keys from random, at most keyDraws, until the derived
// addresses of one are neither reserved nor taken. The error wraps ErrMeshFull if no address is free, or
// too few are.
func (p Prefixes) GenerateFree(random io.Reader, taken func(netip.Addr) bool) (PrivateKey, Addresses, error) {
	for draw := range keyDraws {
		key, err := GeneratePrivateKey(random)
		if err != nil {
			return PrivateKey{}, Addresses{}, err
		}
		a, err := p.Derive(key.Public())
		if err == nil && !taken(a[0]) && !taken(a[1]) {
			return key, a, nil
		}
		// Check once, after a few misses, whether the mesh is full: more keys don't help then.
		if draw == hashAttempts {
			if _, err := p.Propose(key.Public(), taken); err != nil {
				return PrivateKey{}, Addresses{}, err
			}
		}
	}
	return PrivateKey{}, Addresses{}, fmt.Errorf("generate a key with free addresses, %d attempts: %w", keyDraws, ErrMeshFull)
}
