package pfconf

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// addrs reads one address, any, or a list of them. any alone is no address at all: nil.
func (p *parser) addrs() []Address {
	if p.accept("any") {
		return nil
	}
	if !p.acceptPunct("{") {
		return []Address{p.address()}
	}
	p.skipNewlines()
	return p.addrItems()
}

// addrItems reads the rest of a list whose opening brace has been read. A list inside a
// list stands for its items. any is kept as an item, so that { any } is printed as it
// was written.
func (p *parser) addrItems() []Address {
	if !p.enter() {
		return nil
	}
	defer p.leave()
	var all []Address
	for {
		switch {
		case p.accept("any"):
			all = append(all, Address{})
		case p.acceptPunct("{"):
			p.skipNewlines()
			all = append(all, p.addrItems()...)
		default:
			all = append(all, p.address())
		}
		p.skipNewlines()
		if p.acceptPunct("}") || p.err != nil {
			return all
		}
		if p.acceptPunct(",") {
			p.skipNewlines()
		}
		if p.tok.kind == tokEOF {
			p.expected("}")
		}
	}
}

// address reads an address of a rule, perhaps negated.
func (p *parser) address() Address {
	not := p.acceptPunct("!")
	var a Address
	switch {
	case p.accept("no-route"):
		a.Kind = AddrNoRoute
	case p.accept("urpf-failed"):
		a.Kind = AddrURPFFailed
	default:
		a = p.host()
	}
	a.Not = not
	return a
}

// anAddress describes an address in an error.
const anAddress = "an address, a table or an interface"

// host reads an address, network, range, table or interface, without negation.
func (p *parser) host() Address {
	t := p.tok
	switch {
	case p.isPunct("("):
		return p.dynamic()
	case p.shown && p.accept("any"):
		// pfctl shows 0.0.0.0/0 as any even where it wouldn't read any; see nameAny.
		return Address{}
	case p.isPunct("<"):
		return Address{Kind: AddrTable, Name: p.tableName()}
	case t.kind == tokNumber:
		p.advance()
		if !p.isPunct("/") {
			p.found(t, anAddress)
			return Address{}
		}
		return p.network(fmt.Sprint(t.num), t)
	case t.kind != tokString:
		p.expected(anAddress)
		return Address{}
	}
	p.advance()
	switch {
	case p.isPunct("/"):
		return p.network(t.text, t)
	case p.acceptPunct("-"):
		return p.addrRange(t)
	}
	return p.single(t)
}

// network reads /bits after a name or address.
func (p *parser) network(text string, t token) Address {
	p.expectPunct("/")
	bits := p.number(0, 128, "prefix length")
	if p.err != nil {
		return Address{}
	}
	return p.networkOf(text, int(bits), t)
}

// networkOf returns the address of a text and a prefix length: a network, or the
// addresses of an interface with that length.
func (p *parser) networkOf(text string, bits int, t token) Address {
	if prefix, zone, ok := parseNetwork(text, bits); ok {
		return Address{Kind: AddrPrefix, Prefix: prefix, Zone: zone}
	}
	a, ok := interfaceAddress(text)
	if !ok {
		p.refuse(t, "%s/%d is no network", clip(text), bits)
	}
	if a.Mod&(ModNetwork|ModBroadcast) != 0 {
		p.refuse(t, "%s takes no prefix length", clip(text))
	}
	a.Bits = new(uint8)
	*a.Bits = uint8(bits)
	return a
}

// parseNetwork reads a network and its zone. Trailing zero bytes of IPv4 may be left out,
// 10/8, as in inet_net_pton(3).
func parseNetwork(text string, bits int) (netip.Prefix, string, bool) {
	if strings.Contains(text, ":") {
		ip, zone, ok := parseIP(text)
		if !ok || bits > 128 {
			return netip.Prefix{}, "", false
		}
		return netip.PrefixFrom(ip, bits).Masked(), zone, true
	}
	parts := strings.Split(text, ".")
	if len(parts) > 4 || bits > 32 {
		return netip.Prefix{}, "", false
	}
	var b [4]byte
	for i, part := range parts {
		n, err := strconv.ParseUint(part, 10, 8)
		if err != nil || !isDigit(int(part[0])) {
			return netip.Prefix{}, "", false
		}
		b[i] = byte(n)
	}
	return netip.PrefixFrom(netip.AddrFrom4(b), bits).Masked(), "", true
}

// parseIP reads an address and returns its zone apart from it.
func parseIP(text string) (netip.Addr, string, bool) {
	ip, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Addr{}, "", false
	}
	return ip.WithZone(""), ip.Zone(), true
}

// addrRange reads the rest of first - last, two addresses of one family.
func (p *parser) addrRange(first token) Address {
	last := p.str("the last address of the range")
	lo, _, ok := parseIP(first.text)
	hi, _, ok2 := parseIP(last)
	if p.err == nil && (!ok || !ok2 || lo.Is4() != hi.Is4()) {
		p.refuse(first, "%s - %s is no range of addresses", clip(first.text), clip(last))
		return Address{}
	}
	return Address{Kind: AddrRange, Prefix: hostPrefix(lo), Last: hi}
}

// hostPrefix returns the prefix that contains ip alone.
func hostPrefix(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }

// single returns the address, network or interface that a word names.
func (p *parser) single(t token) Address {
	if ip, zone, ok := parseIP(t.text); ok {
		return Address{Kind: AddrPrefix, Prefix: hostPrefix(ip), Zone: zone}
	}
	// A quoted network is one word: "10.0.0.0/8".
	if i := strings.LastIndexByte(t.text, '/'); i > 0 {
		if bits, ok := parseUint(t.text[i+1:]); ok && bits <= 128 {
			return p.networkOf(t.text[:i], int(bits), t)
		}
	}
	a, ok := interfaceAddress(t.text)
	if !ok {
		p.found(t, anAddress)
	}
	return a
}

// modifiers are the words after an interface's name, in the order in which pfctl prints
// them (print_addr in pfctl_parser.c).
var modifiers = []struct {
	word string
	mod  AddressModifier
}{{"network", ModNetwork}, {"broadcast", ModBroadcast}, {"peer", ModPeer}, {"0", ModNoAlias}}

// interfaceAddress splits name:modifier:… and reports whether it can be an interface.
func interfaceAddress(text string) (Address, bool) {
	a := Address{Kind: AddrInterface}
	for {
		i := strings.LastIndexByte(text, ':')
		if i < 0 {
			break
		}
		mod, ok := modifier(text[i+1:])
		if !ok {
			return Address{}, false
		}
		a.Mod |= mod
		text = text[:i]
	}
	a.Name = text
	return a, validMods(a.Mod) && looksLikeName(text)
}

// modifier returns the modifier of a word and whether there is one.
func modifier(word string) (AddressModifier, bool) {
	for _, m := range modifiers {
		if m.word == word {
			return m.mod, true
		}
	}
	return 0, false
}

// validMods reports whether at most one of network, broadcast and peer is set.
func validMods(m AddressModifier) bool {
	m &^= ModNoAlias
	return m&(m-1) == 0
}

// looksLikeName reports whether a word can be an interface's name. No such name begins
// with a digit, so a malformed address isn't taken for one.
func looksLikeName(s string) bool {
	return s != "" && !isDigit(int(s[0]))
}

// dynamic reads (interface:modifier)/bits, of which modifier and bits are optional.
func (p *parser) dynamic() Address {
	p.expectPunct("(")
	t := p.tok
	name := p.str("an interface")
	p.expectPunct(")")
	if p.err != nil {
		return Address{}
	}
	if p.counts {
		name = cutCount(name)
	}
	a, ok := interfaceAddress(name)
	if !ok || !isAlnum(int(name[0])) {
		p.found(t, "an interface, perhaps with :network, :broadcast, :peer or :0")
		return Address{}
	}
	a.Kind = AddrDynamic
	if p.acceptPunct("/") {
		b := uint8(p.number(0, 128, "prefix length"))
		a.Bits = &b
	}
	return a
}

// ids reads the comparisons after user or group, what being the word. unknown can only
// be compared for equality, and operators with two operands take numbers only.
func (p *parser) ids(what string) []IDMatch {
	return list(p, func() IDMatch {
		op, hasOp := p.unaryOp()
		m := IDMatch{Op: op}
		first := p.tok
		m.Lo, m.Name, m.Unknown = p.id(what)
		if hasOp || !p.isPunct("<>") && !p.isPunct("><") {
			if m.Unknown && m.Op != Equal && m.Op != NotEqual {
				p.refuse(first, "%s unknown can only be = or !=", what)
			}
			return m
		}
		m.Op = p.binaryOp()
		second := p.tok
		var name string
		var unknown bool
		if m.Hi, name, unknown = p.id(what); unknown || m.Unknown || name != "" || m.Name != "" {
			p.found(second, "two numbers around the operator")
		}
		return m
	})
}

// id reads a user or group: a number, unknown, or a name, which only the host can
// resolve. 2^32-1 is excluded: the kernel uses it for unknown.
func (p *parser) id(what string) (n uint32, name string, unknown bool) {
	if p.tok.kind == tokNumber {
		return uint32(p.number(0, 1<<32-2, what+" id")), "", false
	}
	t := p.tok
	if name = p.str("a " + what); name == "" {
		p.found(t, "a "+what)
	}
	if name == "unknown" {
		return 0, "", true
	}
	return 0, name, false
}

// unaryOp reads an operator before a number and reports whether there was one; Equal is
// what no operator means.
func (p *parser) unaryOp() (CompareOp, bool) {
	switch {
	case p.acceptPunct("="):
		return Equal, true
	case p.acceptPunct("!"):
		p.expectPunct("=")
		return NotEqual, true
	case p.acceptPunct("<"):
		if p.acceptPunct("=") {
			return LessEqual, true
		}
		return Less, true
	case p.acceptPunct(">"):
		if p.acceptPunct("=") {
			return GreaterEqual, true
		}
		return Greater, true
	}
	return Equal, false
}

// binaryOp reads an operator between two numbers.
func (p *parser) binaryOp() CompareOp {
	if p.acceptPunct("<>") {
		return Outside
	}
	p.expectPunct("><")
	return Inside
}

// port reads one comparison of a port: 80, 80:90, >= 1024, 1 >< 5.
func (p *parser) port() Port {
	op, hasOp := p.unaryOp()
	first := p.tok
	port := p.portValue()
	switch {
	case hasOp && port.Op == Range:
		p.refuse(first, "a range takes no other operator")
	case hasOp:
		port.Op = op
	case p.isPunct("<>") || p.isPunct("><"):
		port.Hi = 0
		op = p.binaryOp()
		second := p.portValue()
		if port.Op == Range || second.Op == Range {
			p.refuse(first, "a range takes no other operator")
		}
		port.Op, port.Hi = op, second.Lo
	}
	return port
}

// portValue reads a port or a range lo:hi, which the lexer takes for one word.
func (p *parser) portValue() Port {
	t := p.tok
	if t.kind == tokNumber {
		return Port{Lo: uint16(p.number(0, 65535, "port"))}
	}
	lo, hi, isRange := strings.Cut(p.str("a port"), ":")
	if !isRange {
		return Port{Lo: p.service(lo, t)}
	}
	return Port{Op: Range, Lo: p.service(lo, t), Hi: p.service(hi, t)}
}

// service returns the port that a word names: a service, or a number, which to pfctl may
// be hexadecimal or octal too (getservice and atoul in parse.y).
func (p *parser) service(name string, t token) uint16 {
	if p.err != nil {
		return 0
	}
	if n, ok := parseUint(name); ok {
		if n > 65535 {
			p.refuse(t, "%s is no port: it is from 0 to 65535", clip(name))
		}
		return uint16(n)
	}
	port, ok := services[name]
	if !ok && p.names.Service != nil {
		port, ok = p.names.Service(name)
	}
	if !ok {
		p.found(t, "a port or the name of a service")
	}
	return port
}
