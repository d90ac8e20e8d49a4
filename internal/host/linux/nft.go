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

// The types in this file are nftables as data, as far as this package needs it.
// They know nothing of netlink, so that the ruleset can be printed and tested on
// any machine; exprs_linux.go turns them into what the kernel takes.

// field is something that a rule can match on.
type field uint8

const (
	iifname field = iota
	oifname
	nfproto
	l4proto
	saddr4
	daddr4
	saddr6
	daddr6
	sport
	dport
	icmpType
	icmp6Type
	tcpFlags
	lsrr
	ssrr
	routingHeader
	ctState
	ctDirection
	ctStatus
	ctProtocol
	ctOrigDport
	// skuid is the user of the socket that sends a packet of the host's own. What
	// the host forwards has none, so that no match on it holds.
	skuid
	// quotedDst4 and quotedDst6 are the destination in the header that an ICMP
	// error quotes: behind its own 8 bytes (RFC 792, RFC 4443). nft has no name for
	// it, so it is an offset and a length in bits.
	quotedDst4
	quotedDst6
	// returnPath is the interface by which the host would answer the packet's
	// source, asked for its input interface only: 0 where it wouldn't.
	returnPath
	// rtIPsec is whether an IPsec policy takes the packet by the route it has now.
	rtIPsec
	// mark is what other software marked the packet with.
	mark
	// destinationType is what the destination is to the host: its own address, a
	// broadcast or multicast one, or another host's.
	destinationType
)

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

// op is how a field is compared.
type op uint8

const (
	equal op = iota
	unequal
	inSet
	notInSet
	hasBits    // one of the value's bits is set
	noBits     // none of them is
	inPrefix   // the value is an address, and the mask's bits of it are the same
	notInRange // not from the value to the mask, both included
	overCount  // more flows than count are counted in the set, by the field and flowPart
	present    // the header or option is in the packet
	found      // for returnPath: there is one
	addToSet   // the fields are in the set, or are added to it for a while: not when it is full
	overRate   // the set counts the fields, and they came more often than its limit says
)

// match is one condition of a rule. A match whose field can't be read (an IPv6
// packet's IPv4 address, the flow of an untracked packet) doesn't hold, whatever
// its op.
type match struct {
	fields []field // more than one: their concatenation, looked up in a set
	op     op
	value  []byte // as the kernel wants it
	count  uint32 // for over
	mask   []byte // for inside; for outside the last value
	text   string // the value or set as printed
	limit  limit  // for noted and tooFast
}

// limit bounds what comes new.
type limit struct {
	rate, burst uint32 // a second, and at once
	lasts       time.Duration
}

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

func is(f field, v value) match {
	return match{fields: []field{f}, op: equal, value: v.bytes, text: v.text}
}
func isNot(f field, v value) match {
	return match{fields: []field{f}, op: unequal, value: v.bytes, text: v.text}
}
func has(f field, v value) match {
	return match{fields: []field{f}, op: hasBits, value: v.bytes, text: v.text}
}
func lacks(f field, v value) match {
	return match{fields: []field{f}, op: noBits, value: v.bytes, text: v.text}
}
func within(f field, p netip.Prefix) match {
	p = p.Masked()
	mask := make([]byte, p.Addr().BitLen()/8)
	for bit := range p.Bits() {
		mask[bit/8] |= 0x80 >> (bit % 8)
	}
	return match{fields: []field{f}, op: inPrefix, value: p.Addr().AsSlice(), mask: mask, text: p.String()}
}
func notInPorts(f field, r portRange) match {
	return match{fields: []field{f}, op: notInRange, value: port(r.first), mask: port(r.last), text: r.String()}
}

// flowParts is in how many parts the flows of a peer are counted, drawn by their
// destination and ports. The kernel goes through all flows of a part when a new one comes (2 ms for
// 4000 of them), and through those of one part only.
const flowParts = 16

// more counts a new flow in a set of counters, by its source and its part, and
// matches where the part has as many flows as it may: than, divided by the parts. It
// is the last match of a rule: what it counts is what the others let through to it.
func exceeds(counters string, src, dst field, than uint32) match {
	return match{fields: []field{src, dst}, op: overCount, count: max(1, than/flowParts), text: counters}
}

// port is a port as packets have it.
func port(p uint16) []byte { return []byte{byte(p >> 8), byte(p)} }

func addTo(set string, l limit, fs ...field) match {
	return match{fields: fs, op: addToSet, text: set, limit: l}
}
func fasterThan(set string, l limit, f field) match {
	return match{fields: []field{f}, op: overRate, text: set, limit: l}
}
func exists(f field) match { return match{fields: []field{f}, op: present} }
func in(set string, fs ...field) match {
	return match{fields: fs, op: inSet, text: set}
}
func notIn(set string, fs ...field) match {
	return match{fields: fs, op: notInSet, text: set}
}

// value is a constant: how it is printed, and its bytes.
type value struct {
	text  string
	bytes []byte
}

// ifnameSize is IFNAMSIZ of linux/if.h.
const ifnameSize = 16

func name(s string) value {
	b := make([]byte, ifnameSize)
	copy(b, s)
	return value{fmt.Sprintf("%q", s), b}
}

func number(text string, b ...byte) value { return value{text, b} }

// bits makes a value of four bytes, which nftables keeps in the host's order.
func bits(text string, v uint32) value {
	return value{text, binary.NativeEndian.AppendUint32(nil, v)}
}

// action is what a rule does when all its matches hold.
type action struct {
	verb    verb
	chain   string     // of jump and goto
	mss     uint16     // of clamp, in bytes
	ports   portRange  // of masquerade and snat
	source  netip.Addr // of snat
	timeout string     // of expire
}

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
	expire // gives a new flow timeouts, and goes on to the next rule
)

var verbTexts = [...]string{"accept", "drop", "return", "jump", "goto", "masquerade", "snat", "tcp option maxseg size set", "ct timeout set"}

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

// rule is a line of a chain.
type rule struct {
	matches []match
	action  action
	comment string
}

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

// chain is a list of rules; with a hook the kernel calls it, without one other
// chains do. The policy of a hooked chain is always accept: the kernel runs a
// chain with its policy before its rules are committed, so that a policy of drop
// would interrupt the whole host at every load.
type chain struct {
	name     string
	kind     string // "filter" or "nat"; empty without a hook
	hook     string
	priority int
	rules    []rule
}

// add appends a rule; the matches come before the action, as they are printed.
func (c *chain) add(a action, comment string, ms ...match) {
	c.rules = append(c.rules, rule{matches: ms, action: a, comment: comment})
}

func (c *chain) accept(comment string, ms ...match) { c.add(action{verb: accept}, comment, ms...) }
func (c *chain) drop(comment string, ms ...match)   { c.add(action{verb: drop}, comment, ms...) }
func (c *chain) ret(comment string, ms ...match)    { c.add(action{verb: ret}, comment, ms...) }
func (c *chain) jump(to string, ms ...match)        { c.add(action{verb: jump, chain: to}, "", ms...) }
func (c *chain) branch(to string, ms ...match)      { c.add(action{verb: branch, chain: to}, "", ms...) }

// set is a named set. The keys of an interval set are ranges of addresses; those
// of the others single values.
type set struct {
	name     string
	types    []string // nft's names of the key's parts
	interval bool
	timeout  bool // filled while it is loaded; elements end by themselves
	size     int  // of a set that rules fill, at most; 0 for the others
	elements []element
}

// element is a key, or for interval sets the first key of a range and the first
// one behind it, which is nil at the end of the address space.
type element struct {
	key, after []byte
	text       string // where the key doesn't say it
}

// String prints an element whose key is made of addresses from them, so that
// large sets needn't carry their texts.
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

// addresses makes a set of single addresses out of full-length prefixes or any
// prefixes' addresses.
func addresses(name, typ string, ps []netip.Prefix) set {
	s := set{name: name, types: []string{typ}}
	for _, p := range ps {
		s.elements = append(s.elements, element{key: p.Addr().AsSlice()})
	}
	return s
}

// without makes an interval set of what is in a and not in b. Its elements are
// ranges, and so are printed as such.
func without(name, typ string, a, b []netip.Prefix) set {
	s := set{name: name, types: []string{typ}, interval: true}
	holes := ranges("", typ, b).elements
	for _, e := range ranges("", typ, a).elements {
		s.elements = append(s.elements, e.without(holes)...)
	}
	return s
}

// without returns what the holes, which are in order, leave of a range.
func (e element) without(holes []element) []element {
	var out []element
	for _, h := range holes {
		switch {
		case h.after != nil && bytes.Compare(h.after, e.key) <= 0:
			continue // before it
		case e.after != nil && bytes.Compare(h.key, e.after) >= 0:
			return append(out, e) // behind it, like all that follow
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

// rangeOf makes the element of the addresses from key to the last one before
// after, or to the family's last where after is nil.
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

// ranges makes an interval set. Prefixes inside others, and what occurs twice,
// are left out, because the kernel refuses ranges that overlap.
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

// after returns the first address behind a prefix, or nil at the end.
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

// maxCounters is how many keys a set of counters may have; one without flows is
// taken away by the kernel.
const maxCounters = 1 << 20

// constants makes a set of values that never change.
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

// timeouts are how long flows of a protocol may be silent, by the names and numbers
// of states that conntrack has (linux/netfilter/nfnetlink_cttimeout.h). States that
// aren't listed have the host's own.
type timeouts struct {
	name    string
	nfproto value
	proto   value
	states  []stateTimeout
}

type stateTimeout struct {
	name   string
	number uint16
	idle   time.Duration // in whole seconds
}

func (t *table) chain(name string) *chain {
	c := &chain{name: name}
	t.chains = append(t.chains, c)
	return c
}

func (t *table) hook(name, kind, hook string, priority int) *chain {
	c := t.chain(name)
	c.kind, c.hook, c.priority = kind, hook, priority
	return c
}

// String returns the table as nft takes it.
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

func (o timeouts) write(b *strings.Builder) {
	states := make([]string, len(o.states))
	for i, s := range o.states {
		states[i] = fmt.Sprintf("%s : %d", s.name, int(s.idle.Seconds()))
	}
	l3 := map[string]string{ipv4.text: "ip", ipv6.text: "ip6"}[o.nfproto.text]
	fmt.Fprintf(b, "\tct timeout %s {\n\t\tprotocol %s\n\t\tl3proto %s\n\t\tpolicy = { %s }\n\t}\n", o.name, o.proto.text, l3, strings.Join(states, ", "))
}

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
