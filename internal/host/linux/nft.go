package linux

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// The types in this file are nftables as data, as far as this package needs it. They
// don't depend on netlink, so the ruleset can be printed and tested on any machine;
// exprs_linux.go converts them for the kernel.

// field is a property of a packet or its flow that a rule can match.
type field uint8

const (
	// Names of the input and output interface; empty where the packet has none.
	iifname field = iota
	oifname
	// Family (NFPROTO_IPV4, NFPROTO_IPV6) and protocol behind IPv6's extension headers.
	nfproto
	l4proto
	// Addresses and ports of this packet, translated or not as it is at the hook.
	saddr4
	daddr4
	saddr6
	daddr6
	sport
	dport
	icmpType
	icmp6Type
	tcpFlags
	// Source routes, as IP options (RFC 791) or as an extension header (RFC 8200).
	lsrr
	ssrr
	routingHeader
	// State, direction, status (IPS_*), protocol and opener's destination port of the flow.
	ctState
	ctDirection
	ctStatus
	ctProtocol
	ctOrigDport
	// skuid is the user of the socket that sends a packet. A forwarded packet has no
	// socket, so no match on it holds.
	skuid
	// quotedDst4 and quotedDst6 are the destination in the header that an ICMP error
	// quotes, which follows the error's own 8 bytes (RFC 792, RFC 4443 3). nft has no
	// name for it, so it is printed as an offset and a length in bits.
	quotedDst4
	quotedDst6
	// returnPath is the input interface if the host would answer the packet's source by
	// it, else 0 (reverse path check, "fib saddr . iif oif" in nft(8)).
	returnPath
	// rtIPsec is 1 if an IPsec policy applies to the packet on its current route.
	rtIPsec
	// mark is the packet's mark (SO_MARK, meta mark), which only other software sets.
	mark
	// destinationType is the kind of the destination: the host's own address, broadcast,
	// multicast, anycast, or another host's ("fib daddr type").
	destinationType
)

// fieldTexts are the fields in nft's language.
var fieldTexts = [...]string{
	iifname: "iifname", oifname: "oifname", nfproto: "meta nfproto", l4proto: "meta l4proto",
	saddr4: "ip saddr", daddr4: "ip daddr", saddr6: "ip6 saddr", daddr6: "ip6 daddr",
	sport: "th sport", dport: "th dport",
	icmpType: "icmp type", icmp6Type: "icmpv6 type",
	tcpFlags: "tcp flags", lsrr: "ip option lsrr", ssrr: "ip option ssrr", routingHeader: "exthdr rt",
	ctState: "ct state", ctDirection: "ct direction", ctStatus: "ct status", ctProtocol: "ct protocol",
	quotedDst4: "@th,192,32", quotedDst6: "@th,256,128",
	ctOrigDport: "ct original proto-dst", skuid: "meta skuid", returnPath: "fib saddr . iif oif",
	rtIPsec: "rt ipsec", mark: "meta mark", destinationType: "fib daddr type",
}

// op is how a match compares a field.
type op uint8

const (
	equal op = iota
	unequal
	inSet
	notInSet
	hasBits    // any of the value's bits is set
	noBits     // none of the value's bits is set
	inPrefix   // the address has the prefix of value and mask
	notInRange // not in the range from value to mask, inclusive
	overCount  // the set counts more than count flows for the key of field and flow part
	present    // the packet has the header or option
	found      // for returnPath: it isn't 0
	addToSet   // the fields are in the set or were just added to it, with a timeout; doesn't hold if the set is full
	overRate   // the fields occur more often than the limit allows
)

// match is one condition of a rule. If a field can't be read (the IPv4 address of an IPv6
// packet, the flow of an untracked packet), the match doesn't hold, whatever its op.
type match struct {
	fields []field // several fields are a concatenated key of a set
	op     op
	value  []byte // in the kernel's encoding
	count  uint32 // for overCount
	mask   []byte // for inPrefix the mask, for notInRange the last value
	text   string // the value, or the name of the set, in nft's language
	limit  limit  // for addToSet and overRate
}

// limit is a token bucket per element, and how long an element lasts.
type limit struct {
	rate, burst uint32 // events per second, and how many at once
	lasts       time.Duration
}

// String returns the match in nft's language.
func (m match) String() string {
	texts := make([]string, len(m.fields))
	for i, f := range m.fields {
		texts[i] = fieldTexts[f]
	}
	left := strings.Join(texts, " . ")
	switch m.op {
	case equal, hasBits, inPrefix:
		return left + " " + m.text
	case noBits:
		return left + " ! " + m.text
	case unequal, notInRange:
		return left + " != " + m.text
	case inSet:
		return left + " @" + m.text
	case notInSet:
		return left + " != @" + m.text
	case overCount:
		return fmt.Sprintf("add @%s { %s . jhash %s . @th,0,32 mod %d ct count over %d }", m.text, texts[0], texts[1], flowParts, m.count)
	case present, found:
		return left + " exists"
	case addToSet:
		return fmt.Sprintf("add @%s { %s timeout %v }", m.text, left, m.limit.lasts)
	case overRate:
		return fmt.Sprintf("update @%s { %s timeout %v limit rate over %d/second burst %d packets }",
			m.text, left, m.limit.lasts, m.limit.rate, m.limit.burst)
	}
	return left
}

// The constructors of matches follow, one per op. is matches a field that equals v.
func is(f field, v value) match {
	return match{fields: []field{f}, op: equal, value: v.bytes, text: v.text}
}

// isNot matches a field that differs from v.
func isNot(f field, v value) match {
	return match{fields: []field{f}, op: unequal, value: v.bytes, text: v.text}
}

// has matches a field that has any of v's bits.
func has(f field, v value) match {
	return match{fields: []field{f}, op: hasBits, value: v.bytes, text: v.text}
}

// lacks matches a field that has none of v's bits.
func lacks(f field, v value) match {
	return match{fields: []field{f}, op: noBits, value: v.bytes, text: v.text}
}

// within matches an address in p.
func within(f field, p netip.Prefix) match {
	p = p.Masked()
	mask := make([]byte, p.Addr().BitLen()/8)
	for bit := range p.Bits() {
		mask[bit/8] |= 0x80 >> (bit % 8)
	}
	return match{fields: []field{f}, op: inPrefix, value: p.Addr().AsSlice(), mask: mask, text: p.String()}
}

// notInPorts matches a port outside of r.
func notInPorts(f field, r portRange) match {
	return match{fields: []field{f}, op: notInRange, value: port(r.first), mask: port(r.last), text: r.String()}
}

// flowParts is into how many parts the flows of a peer are divided for counting, by a
// hash of destination and ports. For each new flow the kernel walks all counted flows of
// one part (2 ms for 4,000 of them), so fewer flows per part are faster.
const flowParts = 16

// exceeds counts a new flow in a set of counters, by its source and its part, and matches
// if the part has more than its share of the limit. It must be the last match of a rule:
// only what the others let through is counted.
func exceeds(counters string, src, dst field, than uint32) match {
	return match{fields: []field{src, dst}, op: overCount, count: max(1, than/flowParts), text: counters}
}

// port returns a port in network byte order.
func port(p uint16) []byte { return []byte{byte(p >> 8), byte(p)} }

// addTo adds the fields to a set until they expire.
func addTo(set string, l limit, fs ...field) match {
	return match{fields: fs, op: addToSet, text: set, limit: l}
}

// fasterThan matches if the field's value occurs more often than l allows.
func fasterThan(set string, l limit, f field) match {
	return match{fields: []field{f}, op: overRate, text: set, limit: l}
}

// exists matches if the packet has the header or option.
func exists(f field) match { return match{fields: []field{f}, op: present} }

// in matches if the set has the fields.
func in(set string, fs ...field) match {
	return match{fields: fs, op: inSet, text: set}
}

// notIn matches if the set doesn't have the fields.
func notIn(set string, fs ...field) match {
	return match{fields: fs, op: notInSet, text: set}
}

// value is a constant in nft's language and in the kernel's encoding.
type value struct {
	text  string
	bytes []byte
}

// ifnameSize is IFNAMSIZ of linux/if.h, in bytes.
const ifnameSize = 16

// name returns an interface's name, padded to ifnameSize.
func name(s string) value {
	b := make([]byte, ifnameSize)
	copy(b, s)
	return value{fmt.Sprintf("%q", s), b}
}

// number returns a value with these bytes.
func number(text string, b ...byte) value { return value{text, b} }

// bits returns a 32-bit value in host byte order, as nftables keeps marks and states.
func bits(text string, v uint32) value {
	return value{text, binary.NativeEndian.AppendUint32(nil, v)}
}

// action is what a rule does if all its matches hold.
type action struct {
	verb    verb
	chain   string     // of jump and goto
	mss     uint16     // of clamp, in bytes
	ports   portRange  // of masquerade and snat
	source  netip.Addr // of snat
	timeout string     // of expire
}

// verb is the kind of an action. branch is nft's goto and ret its return, which are
// keywords of Go.
type verb uint8

const (
	accept verb = iota
	drop
	ret
	jump
	branch
	masquerade
	snat
	clamp
	expire // assigns timeouts to a new flow; the chain continues
)

// verbTexts are the verbs in nft's language.
var verbTexts = [...]string{"accept", "drop", "return", "jump", "goto", "masquerade", "snat", "tcp option maxseg size set", "ct timeout set"}

// String returns the action in nft's language.
func (a action) String() string {
	switch a.verb {
	case jump, branch:
		return verbTexts[a.verb] + " " + a.chain
	case clamp:
		return fmt.Sprintf("%s %d", verbTexts[a.verb], a.mss)
	case expire:
		return fmt.Sprintf("%s %q", verbTexts[a.verb], a.timeout)
	case masquerade:
		return fmt.Sprintf("%s to :%v fully-random", verbTexts[a.verb], a.ports)
	case snat:
		if a.source.Is4() {
			return fmt.Sprintf("%s ip to %v:%v fully-random", verbTexts[a.verb], a.source, a.ports)
		}
		return fmt.Sprintf("%s ip6 to [%v]:%v fully-random", verbTexts[a.verb], a.source, a.ports)
	}
	return verbTexts[a.verb]
}

// rule is one rule of a chain.
type rule struct {
	matches []match
	action  action
	comment string
}

// String returns the rule in nft's language, with its comment.
func (r rule) String() string {
	var b strings.Builder
	for _, m := range r.matches {
		b.WriteString(m.String() + " ")
	}
	b.WriteString(r.action.String())
	if r.comment != "" {
		fmt.Fprintf(&b, " comment %q", r.comment)
	}
	return b.String()
}

// chain is a list of rules. A base chain has a hook and is called by the kernel, a
// regular one by other chains. The policy of a base chain is always accept: in a
// transaction the kernel activates a new chain with its policy before its rules, so a
// policy of drop would interrupt the host's traffic at every load.
type chain struct {
	name     string
	kind     string // "filter" or "nat"; empty without a hook
	hook     string
	priority int
	rules    []rule
}

// add appends a rule.
func (c *chain) add(a action, comment string, ms ...match) {
	c.rules = append(c.rules, rule{matches: ms, action: a, comment: comment})
}

// The shorthands for add: accept, drop, ret (return), jump and branch (goto). A jump
// comes back after the other chain's last rule, a branch doesn't.
func (c *chain) accept(comment string, ms ...match) { c.add(action{verb: accept}, comment, ms...) }
func (c *chain) drop(comment string, ms ...match)   { c.add(action{verb: drop}, comment, ms...) }
func (c *chain) ret(comment string, ms ...match)    { c.add(action{verb: ret}, comment, ms...) }
func (c *chain) jump(to string, ms ...match)        { c.add(action{verb: jump, chain: to}, "", ms...) }
func (c *chain) branch(to string, ms ...match)      { c.add(action{verb: branch, chain: to}, "", ms...) }

// set is a named set. An interval set contains ranges of addresses, others single values.
type set struct {
	name     string
	types    []string // nft's type names of the key's parts
	interval bool
	timeout  bool // elements are added after the load and expire
	size     int  // maximum number of elements of a set that rules fill; 0 for others
	elements []element
}

// element is a key. In an interval set, key is the first address of a range and after the
// one behind its last, nil at the end of the address space.
type element struct {
	key, after []byte
	text       string // printed instead of the key; see String
}

// String returns the text or, without one, the addresses in the key. So large sets
// needn't store texts.
func (e element) String() string {
	if e.text != "" {
		return e.text
	}
	var parts []string
	size := 4
	if len(e.key)%16 == 0 {
		size = 16
	}
	for part := range slices.Chunk(e.key, size) {
		a, _ := netip.AddrFromSlice(part)
		parts = append(parts, a.String())
	}
	return strings.Join(parts, " . ")
}

// addresses returns a set of the prefixes' addresses.
func addresses(name, typ string, ps []netip.Prefix) set {
	s := set{name: name, types: []string{typ}}
	for _, p := range ps {
		s.elements = append(s.elements, element{key: p.Addr().AsSlice()})
	}
	return s
}

// without returns an interval set of the addresses in a but not in b.
func without(name, typ string, a, b []netip.Prefix) set {
	s := set{name: name, types: []string{typ}, interval: true}
	holes := ranges("", typ, b).elements
	for _, e := range ranges("", typ, a).elements {
		s.elements = append(s.elements, e.without(holes)...)
	}
	return s
}

// without returns what remains of a range without the holes, which must be sorted.
func (e element) without(holes []element) []element {
	var out []element
	for _, h := range holes {
		switch {
		case h.after != nil && bytes.Compare(h.after, e.key) <= 0:
			continue // the hole is before the range
		case e.after != nil && bytes.Compare(h.key, e.after) >= 0:
			return append(out, e) // it and all later holes are behind the range
		}
		if bytes.Compare(h.key, e.key) > 0 {
			out = append(out, rangeOf(e.key, h.key))
		}
		if h.after == nil || e.after != nil && bytes.Compare(h.after, e.after) >= 0 {
			return out
		}
		e = rangeOf(h.after, e.after)
	}
	return append(out, e)
}

// rangeOf returns the element for the addresses from key up to the one before after, or
// to the last one of the family if after is nil.
func rangeOf(key, after []byte) element {
	first, _ := netip.AddrFromSlice(key)
	last := netip.MustParseAddr("255.255.255.255")
	if first.Is6() {
		last = netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
	}
	if after != nil {
		next, _ := netip.AddrFromSlice(after)
		last = next.Prev()
	}
	if first == last {
		return element{key, after, first.String()}
	}
	return element{key, after, first.String() + "-" + last.String()}
}

// ranges returns an interval set. It drops prefixes inside others and duplicates, because
// the kernel refuses overlapping ranges.
func ranges(name, typ string, ps []netip.Prefix) set {
	s := set{name: name, types: []string{typ}, interval: true}
	sorted := slices.Clone(ps)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		if c := a.Masked().Addr().Compare(b.Masked().Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var last netip.Prefix
	for _, p := range sorted {
		p = p.Masked()
		if last.IsValid() && last.Contains(p.Addr()) {
			continue
		}
		last = p
		s.elements = append(s.elements, element{p.Addr().AsSlice(), after(p), p.String()})
	}
	return s
}

// after returns the first address behind a prefix, or nil at the end of the address
// space.
func after(p netip.Prefix) []byte {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	if next := last.Next(); next.IsValid() {
		return next.AsSlice()
	}
	return nil
}

// maxCounters is how many keys a set of counters may have. The kernel removes keys
// without flows.
const maxCounters = 1 << 20

// constants returns a set of values that never change.
func constants(name, typ string, vs ...value) set {
	s := set{name: name, types: []string{typ}}
	for _, v := range vs {
		s.elements = append(s.elements, element{text: v.text, key: v.bytes})
	}
	return s
}

// table is our whole ruleset.
type table struct {
	timeouts []timeouts
	sets     []set
	chains   []*chain
}

// timeouts are how long flows of a protocol may be idle in conntrack, by the names and
// numbers of its states (linux/netfilter/nfnetlink_cttimeout.h). States that aren't
// listed keep the host's timeouts.
type timeouts struct {
	name    string
	nfproto value
	proto   value
	states  []stateTimeout
}

// stateTimeout is the timeout of one conntrack state.
type stateTimeout struct {
	name   string
	number uint16
	idle   time.Duration // in whole seconds
}

// chain appends a regular chain.
func (t *table) chain(name string) *chain {
	c := &chain{name: name}
	t.chains = append(t.chains, c)
	return c
}

// hook appends a base chain.
func (t *table) hook(name, kind, hook string, priority int) *chain {
	c := t.chain(name)
	c.kind, c.hook, c.priority = kind, hook, priority
	return c
}

// String returns the table in nft's language.
func (t *table) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", tableName)
	for _, o := range t.timeouts {
		o.write(&b)
	}
	for _, s := range t.sets {
		s.write(&b)
	}
	for _, c := range t.chains {
		c.write(&b)
	}
	b.WriteString("}\n")
	return b.String()
}

// write prints the object as "ct timeout" in nft(8).
func (o timeouts) write(b *strings.Builder) {
	states := make([]string, len(o.states))
	for i, s := range o.states {
		states[i] = fmt.Sprintf("%s : %d", s.name, int(s.idle.Seconds()))
	}
	l3 := map[string]string{ipv4.text: "ip", ipv6.text: "ip6"}[o.nfproto.text]
	fmt.Fprintf(b, "\tct timeout %s {\n\t\tprotocol %s\n\t\tl3proto %s\n\t\tpolicy = { %s }\n\t}\n", o.name, o.proto.text, l3, strings.Join(states, ", "))
}

// write prints the set as in nft(8).
func (s set) write(b *strings.Builder) {
	fmt.Fprintf(b, "\tset %s {\n\t\ttype %s\n", s.name, strings.Join(s.types, " . "))
	switch {
	case s.interval:
		b.WriteString("\t\tflags interval\n")
	case s.size > 0:
		flags := "dynamic"
		if s.timeout {
			flags += ",timeout"
		}
		fmt.Fprintf(b, "\t\tsize %d\n\t\tflags %s\n", s.size, flags)
	case s.timeout:
		b.WriteString("\t\tflags timeout\n")
	}
	if len(s.elements) > 0 {
		texts := make([]string, len(s.elements))
		for i, e := range s.elements {
			texts[i] = e.String()
		}
		fmt.Fprintf(b, "\t\telements = { %s }\n", strings.Join(texts, ", "))
	}
	b.WriteString("\t}\n")
}

// write prints the chain as in nft(8).
func (c *chain) write(b *strings.Builder) {
	fmt.Fprintf(b, "\tchain %s {\n", c.name)
	if c.hook != "" {
		fmt.Fprintf(b, "\t\ttype %s hook %s priority %d; policy accept;\n", c.kind, c.hook, c.priority)
	}
	for _, r := range c.rules {
		fmt.Fprintf(b, "\t\t%s\n", r)
	}
	b.WriteString("\t}\n")
}
