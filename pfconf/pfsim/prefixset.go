package pfsim

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"
)

// A prefixSet is a set of prefixes, perhaps negated, that finds the longest one that
// contains an address, as the radix tree of a pf table does (xnu bsd/net/radix.c). The
// zero value is an empty set.
type prefixSet struct {
	v4, v6 *prefixNode
	n      int // entries
}

// A prefixEntry is one entry of a table.
type prefixEntry struct {
	prefix netip.Prefix
	not    bool
}

// prefixNode is a node of a path-compressed binary trie. A node without an entry exists
// only to join its two children.
type prefixNode struct {
	key   prefixKey // zero from bits on
	bits  uint8     // length of the prefix, 0 to 128
	has   bool      // the set has this prefix
	not   bool      // negated
	child [2]*prefixNode
}

// prefixKey is an address as a left-aligned 128-bit number: IPv4 in the first
// 32 bits.
type prefixKey struct{ hi, lo uint64 }

// keyOf returns the key of an address.
func keyOf(a netip.Addr) prefixKey {
	if a.Is4() {
		b := a.As4()
		return prefixKey{hi: uint64(binary.BigEndian.Uint32(b[:])) << 32}
	}
	b := a.As16()
	return prefixKey{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

// bit returns bit i, counted from the left.
func (k prefixKey) bit(i uint8) int {
	if i < 64 {
		return int(k.hi >> (63 - i) & 1)
	}
	return int(k.lo >> (127 - i) & 1)
}

// common returns the number of leading bits that k and o share.
func (k prefixKey) common(o prefixKey) int {
	if x := k.hi ^ o.hi; x != 0 {
		return bits.LeadingZeros64(x)
	}
	return 64 + bits.LeadingZeros64(k.lo^o.lo)
}

// mask returns the first n bits of k, the rest zero.
func (k prefixKey) mask(n int) prefixKey {
	if n < 64 {
		return prefixKey{hi: k.hi &^ (^uint64(0) >> n)}
	}
	return prefixKey{k.hi, k.lo &^ (^uint64(0) >> (n - 64))}
}

// root returns the link to the trie of a's family.
func (s *prefixSet) root(a netip.Addr) **prefixNode {
	if a.Is4() {
		return &s.v4
	}
	return &s.v6
}

// lookup reports whether a prefix contains a, and whether the longest that does is
// negated.
func (s *prefixSet) lookup(a netip.Addr) (not, ok bool) {
	n := s.v6
	if a.Is4() {
		n = s.v4
	}
	if n == nil {
		return false, false
	}
	k, length := keyOf(a), uint8(a.BitLen())
	for n != nil && k.common(n.key) >= int(n.bits) {
		if n.has {
			not, ok = n.not, true
		}
		if n.bits == length {
			break
		}
		n = n.child[k.bit(n.bits)]
	}
	return not, ok
}

// contains reports whether a is in the set: a prefix contains it, and the longest that
// does isn't negated.
func (s *prefixSet) contains(a netip.Addr) bool {
	not, ok := s.lookup(a)
	return ok && !not
}

// get returns the entry with exactly this prefix.
func (s *prefixSet) get(p netip.Prefix) (not, ok bool) {
	if n := *s.find(p); n != nil && n.has && n.bits == uint8(p.Bits()) && n.key == keyOf(p.Addr()) {
		return n.not, true
	}
	return false, false
}

// find returns the link to p's node, or the link at which a node for p belongs.
func (s *prefixSet) find(p netip.Prefix) **prefixNode {
	k, length := keyOf(p.Addr()), uint8(p.Bits())
	link := s.root(p.Addr())
	for n := *link; n != nil && n.bits < length && k.common(n.key) >= int(n.bits); n = *link {
		link = &n.child[k.bit(n.bits)]
	}
	return link
}

// set adds p or changes its negation. p must be masked.
func (s *prefixSet) set(p netip.Prefix, not bool) {
	leaf := &prefixNode{key: keyOf(p.Addr()), bits: uint8(p.Bits()), has: true, not: not}
	link := s.find(p)
	n := *link
	if n == nil {
		*link = leaf
		s.n++
		return
	}
	shared := min(leaf.key.common(n.key), int(leaf.bits), int(n.bits))
	switch {
	// n is p's own node, or belongs below p, or both belong below a new node.
	case shared == int(n.bits) && n.bits == leaf.bits:
		if !n.has {
			s.n++
		}
		n.has, n.not = true, not
		return
	case shared == int(leaf.bits):
		leaf.child[n.key.bit(leaf.bits)] = n
		*link = leaf
	default:
		fork := &prefixNode{key: leaf.key.mask(shared), bits: uint8(shared)}
		fork.child[n.key.bit(fork.bits)] = n
		fork.child[leaf.key.bit(fork.bits)] = leaf
		*link = fork
	}
	s.n++
}

// remove removes p and reports whether the set had it.
func (s *prefixSet) remove(p netip.Prefix) bool {
	k, length := keyOf(p.Addr()), uint8(p.Bits())
	var above **prefixNode
	link := s.root(p.Addr())
	for n := *link; n != nil && n.bits < length && k.common(n.key) >= int(n.bits); n = *link {
		above, link = link, &n.child[k.bit(n.bits)]
	}
	n := *link
	if n == nil || !n.has || n.bits != length || n.key != k {
		return false
	}
	n.has = false
	s.n--
	// The node above may have existed only to join this one with another.
	n.splice(link)
	if above != nil {
		(*above).splice(above)
	}
	return true
}

// splice removes n from the trie if it has no entry and at most one child.
func (n *prefixNode) splice(link **prefixNode) {
	switch {
	case n.has || n.child[0] != nil && n.child[1] != nil:
	case n.child[0] != nil:
		*link = n.child[0]
	default:
		*link = n.child[1]
	}
}

// clear empties the set.
func (s *prefixSet) clear() { *s = prefixSet{} }

// entries returns all entries, IPv4 first, in the order of the kernel's rn_walktree:
// ascending addresses, and of one address the longest prefix first. Round-robin follows
// it.
func (s *prefixSet) entries() []prefixEntry {
	out := make([]prefixEntry, 0, s.n)
	out = s.v4.appendTo(out, true)
	v4 := len(out)
	out = s.v6.appendTo(out, false)
	byAddr := func(a, b prefixEntry) int {
		if c := a.prefix.Addr().Compare(b.prefix.Addr()); c != 0 {
			return c
		}
		return b.prefix.Bits() - a.prefix.Bits()
	}
	slices.SortFunc(out[:v4], byAddr)
	slices.SortFunc(out[v4:], byAddr)
	return out
}

// appendTo appends the entries below n.
func (n *prefixNode) appendTo(out []prefixEntry, v4 bool) []prefixEntry {
	if n == nil {
		return out
	}
	if n.has {
		out = append(out, prefixEntry{netip.PrefixFrom(n.key.addr(v4), int(n.bits)), n.not})
	}
	return n.child[1].appendTo(n.child[0].appendTo(out, v4), v4)
}

// addr returns the address of the key.
func (k prefixKey) addr(v4 bool) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], k.hi)
	binary.BigEndian.PutUint64(b[8:], k.lo)
	if v4 {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16(b)
}
