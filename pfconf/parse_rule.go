package pfconf

import (
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// filterRule reads a pass or block rule: its parts in this order, of which all but the
// first word may be absent, then options in any order.
func (p *parser) filterRule() *Rule {
	r := &Rule{}
	if p.accept("block") {
		r.Action = Block
		r.Return = p.blockSpec()
	} else {
		p.expect("pass")
	}
	r.Direction = p.direction()
	r.Log, r.Quick = p.logQuick()
	r.Interfaces = p.interfaces()
	r.Route = p.route()
	r.Family = p.family()
	r.Protos = p.protos()
	p.fromTo(r)
	p.filterOptions(r)
	return r
}

// blockSpec reads how a block rule answers.
func (p *parser) blockSpec() Return {
	switch t := p.tok; {
	case p.accept("drop"):
		return Return{Kind: ReturnDrop}
	case p.accept("return"):
		return Return{Kind: ReturnAll}
	case p.accept("return-rst"):
		ret := Return{Kind: ReturnRST}
		if p.acceptPunct("(") {
			p.expect("ttl")
			ret.TTL = *p.byte("time to live")
			p.expectPunct(")")
		}
		return ret
	case p.accept("return-icmp"), p.accept("return-icmp6"):
		return p.returnICMP(t.text == "return-icmp6")
	}
	return Return{}
}

// returnICMP reads the codes after return-icmp, of ICMP and perhaps of ICMPv6, or after
// return-icmp6.
func (p *parser) returnICMP(v6 bool) Return {
	ret := Return{Kind: ReturnICMP}
	if !p.acceptPunct("(") {
		return ret
	}
	if v6 {
		ret.Code6 = p.unreachCode(true)
	} else {
		ret.Code = p.unreachCode(false)
		if !p.isPunct(")") {
			p.acceptPunct(",")
			if p.shown && p.tok.kind == tokNumber && p.tok.num == 3 {
				// This is how pfctl shows that no second code was written.
				p.advance()
			} else {
				ret.Code6 = p.unreachCode(true)
			}
		}
	}
	p.expectPunct(")")
	return ret
}

// unreachCode reads a code of ICMP or ICMPv6 destination unreachable, by name or number.
func (p *parser) unreachCode(v6 bool) *uint8 {
	if p.tok.kind == tokNumber {
		return p.byte("ICMP code")
	}
	t := p.tok
	name := p.str("an ICMP code")
	code, ok := icmpCodeByName(unreachType(v6), name, v6)
	if n, isNumber := parseUint(name); isNumber && n <= 255 {
		code, ok = uint8(n), true
	}
	if !ok {
		p.found(t, "a code of ICMP unreachable")
	}
	return &code
}

// direction reads in or out, or nothing.
func (p *parser) direction() Direction {
	switch {
	case p.accept("in"):
		return In
	case p.accept("out"):
		return Out
	}
	return Both
}

// logQuick reads log and quick in either order.
func (p *parser) logQuick() (*Log, bool) {
	quick := p.accept("quick")
	log := p.log()
	if log != nil && !quick {
		quick = p.accept("quick")
	}
	return log, quick
}

// log reads log with its options; nil if there is no log. pflog0 doesn't replace an
// interface that was named before it: pfctl keeps only a number, and takes 0 for unset.
func (p *parser) log() *Log {
	if !p.accept("log") {
		return nil
	}
	l := &Log{}
	if !p.acceptPunct("(") {
		return l
	}
	for {
		switch t := p.tok; {
		case p.accept("all"):
			l.All = true
		case p.accept("user"), p.accept("group"):
			l.User = true
		case p.accept("to"):
			to := p.strs("a pflog interface")
			n, err := strconv.ParseUint(strings.TrimPrefix(to, "pflog"), 10, 8)
			if err != nil || n > maxPflog || !strings.HasPrefix(to, "pflog") {
				p.found(t, "to and one of pflog0 to pflog15")
			} else if n != 0 || l.To == "" {
				l.To = "pflog" + strconv.FormatUint(n, 10)
			}
		default:
			p.expected("all, user or to")
		}
		if p.acceptPunct(")") || p.err != nil {
			return l
		}
		p.acceptPunct(",")
	}
}

// interfaces reads on and its interfaces; nil if there is no on.
func (p *parser) interfaces() []InterfaceMatch {
	if !p.accept("on") {
		return nil
	}
	return list(p, func() InterfaceMatch {
		not := p.acceptPunct("!")
		return InterfaceMatch{Name: p.str("the name of an interface"), Not: not}
	})
}

var routeKinds = map[string]RouteKind{
	"route-to": RouteTo, "reply-to": ReplyTo, "dup-to": DupTo, "fastroute": Fastroute,
}

// route reads route-to, reply-to, dup-to or fastroute; nil if there is none.
func (p *parser) route() *Route {
	kind, ok := routeKinds[p.tok.text]
	if !ok || p.tok.kind != tokKeyword {
		return nil
	}
	p.advance()
	r := &Route{Kind: kind}
	if kind == Fastroute {
		return r
	}
	r.Hops = list(p, p.hop)
	r.PoolOptions, _ = p.poolOptions()
	return r
}

// hop reads an interface, or (interface address) with the next router's address.
func (p *parser) hop() Hop {
	if !p.acceptPunct("(") {
		return Hop{Interface: p.str("an interface or (interface address)")}
	}
	h := Hop{Interface: p.str("an interface")}
	a := p.host()
	// pfctl shows (utun4 any) for an interface without a router if another program loaded
	// the rule. It wouldn't read that itself.
	if !p.shown || a.Kind != AddrAny {
		h.Addr = &a
	}
	p.expectPunct(")")
	return h
}

// family reads inet or inet6, or nothing.
func (p *parser) family() Family {
	switch {
	case p.accept("inet"):
		return Inet
	case p.accept("inet6"):
		return Inet6
	}
	return AnyFamily
}

// protos reads proto with one or more protocols. 0 is refused, as in pfctl: the kernel
// holds it for any protocol.
func (p *parser) protos() []Proto {
	if !p.accept("proto") {
		return nil
	}
	return list(p, func() Proto {
		t := p.tok
		var n Proto
		if t.kind == tokNumber {
			n = Proto(p.number(0, 255, "protocol"))
		} else {
			n = p.protoName(p.str("a protocol"), t)
		}
		if n == 0 && p.err == nil {
			p.refuse(t, "protocol 0 can't be used")
		}
		return n
	})
}

// protoName returns the number of a protocol's name, from the host if it isn't built in.
func (p *parser) protoName(name string, t token) Proto {
	n, ok := protoNumbers[name]
	if !ok && p.names.Proto != nil {
		var b uint8
		b, ok = p.names.Proto(name)
		n = Proto(b)
	}
	if !ok {
		p.found(t, "a protocol")
	}
	return n
}

// fromTo reads all, or from, os and to, each of them optional.
func (p *parser) fromTo(r *Rule) {
	if p.accept("all") {
		return
	}
	if p.accept("from") {
		r.From = p.endpoint()
	}
	if p.accept("os") {
		r.OS = list(p, func() string { return p.str("the name of an operating system") })
	}
	if p.accept("to") {
		r.To = p.endpoint()
	}
	if p.shown {
		nameAny(r.From.Addrs, r.Family, true)
		nameAny(r.To.Addrs, r.Family, true)
	}
}

// nameAny replaces any by the network of length 0 for which pfctl shows it. Of a rule's
// addresses only negated ones need that, since any matches what the network does, but
// ! any isn't valid; in a pool, any isn't valid at all.
func nameAny(addrs []Address, f Family, negatedOnly bool) {
	for i, a := range addrs {
		if a.Kind != AddrAny || negatedOnly && !a.Not {
			continue
		}
		addrs[i].Kind, addrs[i].Prefix = AddrPrefix, netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if f == Inet6 {
			addrs[i].Prefix = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
}

// endpoint reads addresses, ports, or both.
func (p *parser) endpoint() Endpoint {
	var e Endpoint
	if !p.is("port") {
		e.Addrs = p.addrs()
	}
	if p.accept("port") {
		e.Ports = list(p, p.port)
	}
	return e
}

// filterOptions reads the options behind the addresses, in any order.
func (p *parser) filterOptions(r *Rule) {
	var seen []string
	for p.err == nil {
		t := p.tok
		if once := onceOptions[t.text]; once != "" && t.kind == tokKeyword {
			if slices.Contains(seen, once) {
				p.refuse(t, "%s for the second time", t.text)
				return
			}
			seen = append(seen, once)
		}
		if !p.filterOption(r) {
			return
		}
	}
}

// onceOptions are the options that pfctl refuses when they are given twice, by keyword.
// Keywords with the same value exclude each other.
var onceOptions = map[string]string{
	"flags": "flags", "icmp-type": "icmp", "icmp6-type": "icmp", "tos": "tos", "label": "label",
	"keep": "state", "modulate": "state", "synproxy": "state", "no": "state", "queue": "queue",
}

// filterOption reads one option and reports whether there was one. Where pfctl takes an
// option twice, the last one counts, except that users and groups add up, the later
// ones first.
func (p *parser) filterOption(r *Rule) bool {
	switch t := p.tok; {
	case p.accept("user"):
		r.Users = append(p.ids("user"), r.Users...)
	case p.accept("group"):
		r.Groups = append(p.ids("group"), r.Groups...)
	case p.accept("flags"):
		r.Flags = p.flags()
	case p.accept("icmp-type"), p.accept("icmp6-type"):
		r.ICMP = list(p, func() ICMPMatch { return p.icmp(t.text == "icmp6-type") })
	case p.accept("tos"):
		r.TOS = p.tos()
	case p.is("keep"), p.is("modulate"), p.is("synproxy"), p.is("no"):
		p.state(r)
	case p.accept("fragment"):
		r.Fragment = true
	case p.accept("allow-opts"):
		r.AllowOpts = true
	case p.accept("label"):
		r.Label = p.str("the label")
	case p.accept("queue"):
		r.Queue, r.PriQueue = p.queue()
	case p.accept("tag"):
		r.Tag = p.strs("the tag")
	case p.is("tagged"), p.isPunct("!"):
		p.tagged(r)
	case p.accept("probability"):
		r.Probability = p.probability()
		if p.shown && p.isPunct("(") {
			p.stateOptions(&r.StateOptions)
		}
	case p.accept("rtable"):
		r.RTable = p.byte("routing table")
	default:
		return false
	}
	return true
}

// tagged reads the tag that a packet must have, or with ! must not have.
func (p *parser) tagged(r *Rule) {
	not := p.acceptPunct("!")
	p.expect("tagged")
	r.Tagged = p.strs("the tag")
	r.NotTagged = not && r.Tagged != ""
}

// flags reads set/mask, /mask (none of these flags) or any.
func (p *parser) flags() *Flags {
	if p.accept("any") {
		return &Flags{}
	}
	f := &Flags{}
	if !p.isPunct("/") {
		f.Set = p.flagLetters()
	}
	p.expectPunct("/")
	f.Mask = p.flagLetters()
	return f
}

// flagLetters reads TCP flags as letters, such as SA.
func (p *parser) flagLetters() TCPFlags {
	t := p.tok
	var f TCPFlags
	for _, c := range []byte(p.str("TCP flags, letters out of " + tcpFlagLetters)) {
		i := strings.IndexByte(tcpFlagLetters, c)
		if i < 0 {
			p.found(t, "TCP flags, letters out of "+tcpFlagLetters)
			return 0
		}
		f |= 1 << i
	}
	return f
}

// icmp reads a type and perhaps a code. What a code's name stands for depends on the type.
func (p *parser) icmp(v6 bool) ICMPMatch {
	m := ICMPMatch{V6: v6}
	t := p.tok
	if t.kind == tokNumber {
		m.Type = *p.byte("ICMP type")
	} else {
		var ok bool
		if m.Type, ok = icmpTypeByName(p.str("an ICMP type"), v6); !ok {
			p.found(t, "an ICMP type")
		}
	}
	if !p.accept("code") {
		return m
	}
	if t = p.tok; t.kind == tokNumber {
		m.Code = p.byte("ICMP code")
		return m
	}
	code, ok := icmpCodeByName(m.Type, p.str("an ICMP code"), v6)
	if !ok {
		p.found(t, "a code of that ICMP type")
	}
	m.Code = &code
	return m
}

// tos reads a type of service (RFC 1349) by name or number. 0 can't be written: pfctl
// holds it for no tos.
func (p *parser) tos() *uint8 {
	t := p.tok
	var n int64
	if t.kind == tokNumber {
		n = t.num
		p.advance()
	} else {
		switch s := p.str("a type of service"); s {
		case "lowdelay":
			n = 0x10
		case "throughput":
			n = 0x08
		case "reliability":
			n = 0x04
		default:
			n = leadingHex(s)
		}
	}
	if n < 1 || n > 255 {
		p.found(t, "lowdelay, throughput, reliability or a number from 1 to 255")
	}
	b := uint8(n)
	return &b
}

// leadingHex reads a number such as 0x10. Like pfctl's strtol it ignores what follows
// the digits.
func leadingHex(s string) int64 {
	digits, ok := strings.CutPrefix(s, "0x")
	if !ok {
		return 0
	}
	digits = digits[:len(digits)-len(strings.TrimLeft(digits, "0123456789abcdefABCDEF"))]
	n, _ := strconv.ParseUint(digits, 16, 16)
	return int64(n)
}

// queue reads one queue of ALTQ, or (queue, priority queue).
func (p *parser) queue() (name, priority string) {
	if !p.acceptPunct("(") {
		return p.str("the name of a queue"), ""
	}
	name = p.str("the name of a queue")
	if !p.isPunct(")") {
		p.acceptPunct(",")
		priority = p.str("the name of a queue")
	}
	p.expectPunct(")")
	return name, priority
}

// probability reads a probability, as a number from 0 to 1 or a percentage.
func (p *parser) probability() float64 {
	t := p.tok
	if t.kind != tokNumber && t.kind != tokString {
		p.expected("a probability")
		return 0
	}
	p.advance()
	text, percent := strings.CutSuffix(t.text, "%")
	f, err := strconv.ParseFloat(text, 64)
	if percent {
		f *= 0.01
	}
	if err != nil || math.IsNaN(f) || f < 0 || f > 1 {
		p.found(t, "a probability, from 0 to 1 or with %")
		return 0
	}
	// The kernel holds 32 bits, of which 0 means always, so pfctl makes a written 0 the
	// lowest probability that there is.
	return max(f, 1/float64(math.MaxUint32))
}

var stateKinds = map[string]StateKind{
	"no": NoState, "keep": KeepState, "modulate": ModulateState, "synproxy": SynproxyState,
}

// state reads no state, or keep, modulate or synproxy state with options.
func (p *parser) state(r *Rule) {
	r.State = stateKinds[p.tok.text]
	p.advance()
	p.expect("state")
	if r.State != NoState && p.isPunct("(") {
		p.stateOptions(&r.StateOptions)
	}
}

// stateOptions reads state options in parentheses.
func (p *parser) stateOptions(o *StateOptions) {
	p.expectPunct("(")
	once := map[string]bool{}
	for {
		p.stateOption(o, once)
		if p.acceptPunct(")") || p.err != nil {
			return
		}
		p.acceptPunct(",")
	}
}

// stateOption reads one option. It refuses a second one of the same name unless the first
// was 0, which pfctl takes for unset. once holds the options that are set so far.
func (p *parser) stateOption(o *StateOptions, once map[string]bool) {
	first := p.tok
	setOnce := func(name string, isSet bool) {
		if once[name] {
			p.refuse(first, "%s for the second time", first.text)
		}
		once[name] = isSet
	}
	count := func(n *uint32, name string) {
		*n = uint32(p.number(0, math.MaxUint32, "number for "+name))
		if *n == 0 && name != "max" && p.err == nil {
			p.refuse(first, "%s must be above 0", name)
		}
		setOnce(name, *n != 0)
	}
	switch {
	case p.accept("max"):
		count(&o.Max, "max")
	case p.accept("max-src-states"):
		count(&o.MaxSrcStates, first.text)
	case p.accept("max-src-conn"):
		count(&o.MaxSrcConn, first.text)
	case p.accept("max-src-nodes"):
		count(&o.MaxSrcNodes, first.text)
	case p.accept("max-src-conn-rate"):
		count(&o.MaxSrcConnRate.Count, first.text)
		p.expectPunct("/")
		o.MaxSrcConnRate.Seconds = uint32(p.number(1, math.MaxUint32, "number of seconds"))
	case p.accept("no-sync"):
		setOnce(first.text, true)
		o.NoSync = true
	case p.accept("source-track"):
		setOnce(first.text, true)
		o.SourceTrack = p.sourceTrack()
	case p.accept("overload"):
		setOnce(first.text, true)
		o.Overload, o.Flush = p.tableName(), p.flush()
	case p.accept("if-bound"):
		setOnce("policy", true)
		o.Policy = IfBound
	case p.accept("floating"):
		setOnce("policy", true)
		o.Policy = Floating
	case first.kind == tokString:
		o.Timeouts = append(o.Timeouts, p.stateTimeout(first, setOnce))
	default:
		p.expected("an option of the state")
	}
}

// sourceTrack reads the argument of source-track.
func (p *parser) sourceTrack() SourceTrack {
	switch {
	case p.accept("rule"):
		return SourceTrackRule
	case p.accept("global"):
		return SourceTrackGlobal
	}
	return SourceTrackPlain
}

// flush reads the words behind the table of overload.
func (p *parser) flush() FlushKind {
	switch {
	case !p.accept("flush"):
		return NoFlush
	case p.accept("global"):
		return FlushGlobal
	}
	return Flush
}

// stateTimeout reads a timeout for the rule's states. The timeouts without a dot in their
// name, frag and interval, are of pf as a whole.
func (p *parser) stateTimeout(first token, setOnce func(string, bool)) Timeout {
	t := Timeout{Name: p.str("a timeout")}
	if timeoutIndex(t.Name) < 0 || !strings.Contains(t.Name, ".") {
		p.found(first, "an option of the state")
		return t
	}
	t.Seconds = uint32(p.number(0, math.MaxUint32, "number of seconds"))
	setOnce(t.Name, t.Seconds != 0)
	return t
}

// anchorRule reads the call of a filter anchor, perhaps an inline one with its rules in
// braces.
func (p *parser) anchorRule() *Rule {
	p.advance()
	r := &Rule{Action: Anchor}
	named := p.tok
	if p.tok.kind == tokString {
		r.Anchor = p.str("")
	}
	r.Direction = p.direction()
	r.Quick = p.accept("quick")
	r.Interfaces = p.interfaces()
	r.Family = p.family()
	r.Protos = p.protos()
	p.fromTo(r)
	p.filterOptions(r)
	if p.isPunct("{") {
		r.Body = p.body()
	} else if r.Anchor == "" && p.err == nil {
		p.found(named, "the name of the anchor or its rules in braces")
	}
	return r
}

// body reads the rules of an inline anchor. A newline must follow the opening brace, and
// the last rule.
func (p *parser) body() *Ruleset {
	if !p.enter() {
		return nil
	}
	defer p.leave()
	p.expectPunct("{")
	if p.tok.kind != tokNewline {
		p.expected("a newline after {")
	}
	b := &Ruleset{Statements: p.statements(true)}
	p.expectPunct("}")
	return b
}

// translationAnchor reads the call of an anchor of any other kind. Those take no options.
func (p *parser) translationAnchor(action Action) *Rule {
	p.advance()
	r := &Rule{Action: action, Anchor: p.strs("the name of the anchor")}
	r.Interfaces = p.interfaces()
	r.Family = p.family()
	r.Protos = p.protos()
	p.fromTo(r)
	if p.accept("rtable") {
		r.RTable = p.byte("routing table")
	}
	if p.shown && action == ScrubAnchor {
		// pfctl shows the default scrub options here, though it doesn't read any.
		p.scrubOptions(r)
		r.Normalize = Normalize{}
	}
	return r
}

// noActions are the actions of rules that begin with no.
var noActions = map[Action]Action{Scrub: NoScrub, Nat: NoNat, Rdr: NoRdr, Binat: NoBinat}

// otherRule reads a scrub, nat, rdr or binat rule, perhaps with no in front. A no dummynet
// rule is kept as text.
func (p *parser) otherRule() Statement {
	no := p.accept("no")
	first := p.tok
	r := &Rule{}
	switch {
	case p.accept("scrub"):
		r.Action = Scrub
		p.scrubRule(r)
	case p.accept("nat"):
		r.Action = Nat
		p.natRule(r)
	case p.accept("rdr"):
		r.Action = Rdr
		p.natRule(r)
	case p.accept("binat"):
		r.Action = Binat
		p.binatRule(r)
	case no && first.kind == tokString && first.text == "dummynet":
		return p.text("no")
	default:
		p.expected("scrub, nat, rdr or binat")
	}
	if no {
		if r.Pass {
			p.refuse(first, "pass makes no sense with no")
		}
		r.Action = noActions[r.Action]
	}
	return r
}

// scrubRule reads the rest of a scrub rule.
func (p *parser) scrubRule(r *Rule) {
	r.Direction = p.direction()
	r.Log = p.log()
	r.Interfaces = p.interfaces()
	r.Family = p.family()
	r.Protos = p.protos()
	p.fromTo(r)
	p.scrubOptions(r)
}

// scrubOptions reads scrub options, in any order.
func (p *parser) scrubOptions(r *Rule) {
	var seen []string
	for p.err == nil {
		t := p.tok
		if slices.Contains(onceScrub, t.text) && t.kind == tokKeyword {
			if slices.Contains(seen, t.text) {
				p.refuse(t, "%s for the second time", t.text)
				return
			}
			seen = append(seen, t.text)
		}
		if !p.scrubOption(r) {
			return
		}
	}
}

// onceScrub are the options that pfctl refuses when they are given twice.
var onceScrub = []string{"no-df", "min-ttl", "max-mss", "set-tos", "fragment", "reassemble", "random-id"}

// scrubOption reads one option and reports whether there was one.
func (p *parser) scrubOption(r *Rule) bool {
	n := &r.Normalize
	switch {
	case p.accept("no-df"):
		n.NoDF = true
	case p.accept("min-ttl"):
		n.MinTTL = *p.byte("time to live")
	case p.accept("max-mss"):
		n.MaxMSS = uint16(p.number(0, 65535, "segment size"))
	case p.accept("set-tos"):
		n.SetTOS = p.tos()
	case p.accept("random-id"):
		n.RandomID = true
	case p.accept("fragment"):
		n.Fragment = p.fragmentMode()
	case p.accept("reassemble"):
		if t := p.tok; upper(p.str("tcp")) != "TCP" {
			p.found(t, "tcp")
		}
		n.ReassembleTCP = true
	case p.accept("rtable"):
		r.RTable = p.byte("routing table")
	case p.is("tagged"), p.isPunct("!"):
		p.tagged(r)
	default:
		return false
	}
	return true
}

// fragmentMode reads the argument of fragment.
func (p *parser) fragmentMode() FragmentMode {
	switch p.oneOf("reassemble", "crop", "drop-ovl") {
	case "crop":
		return FragmentCrop
	case "drop-ovl":
		return FragmentDropOvl
	}
	return FragmentReassemble
}

// natRule reads the rest of a nat or rdr rule, whose grammar is the same.
func (p *parser) natRule(r *Rule) {
	r.Pass = p.accept("pass")
	r.Log = p.log()
	r.Interfaces = p.interfaces()
	r.Family = p.family()
	r.Protos = p.protos()
	p.fromTo(r)
	p.translationTags(r)
	if p.isPunct("->") {
		p.advance()
		r.Pool = &Pool{Addrs: list(p, p.host)}
		nameAny(r.Pool.Addrs, r.Family, false)
		p.poolPort(r.Pool)
	}
	if o, some := p.poolOptions(); some {
		if r.Pool == nil {
			r.Pool = &Pool{}
		}
		r.Pool.PoolOptions = o
	}
}

// binatRule reads the rest of a binat rule, which has a grammar of its own: one source
// and one address behind ->, since it maps one to the other in both directions.
func (p *parser) binatRule(r *Rule) {
	r.Pass = p.accept("pass")
	r.Log = p.log()
	r.Interfaces = p.interfaces()
	r.Family = p.family()
	r.Protos = p.protos()
	p.expect("from")
	r.From.Addrs = []Address{p.host()}
	if p.accept("to") {
		r.To.Addrs = p.addrs()
	}
	p.translationTags(r)
	if p.acceptPunct("->") {
		r.Pool = &Pool{Addrs: []Address{p.host()}}
		p.poolPort(r.Pool)
	}
}

// translationTags reads the options before ->, which must have this order.
func (p *parser) translationTags(r *Rule) {
	if p.accept("tag") {
		r.Tag = p.str("the tag")
	}
	if p.is("tagged") || p.isPunct("!") {
		p.tagged(r)
	}
	if p.accept("rtable") {
		r.RTable = p.byte("routing table")
	}
}

// poolPort reads the port behind a pool's addresses: n, n:m or n:*.
func (p *parser) poolPort(pool *Pool) {
	if !p.accept("port") {
		return
	}
	t := p.tok
	if t.kind == tokNumber {
		pool.PortLo = uint16(p.number(0, 65535, "port"))
		return
	}
	lo, hi, isRange := strings.Cut(p.str("a port"), ":")
	pool.PortLo = p.service(lo, t)
	switch {
	case hi == "*":
		pool.PortStar = true
	case isRange:
		if pool.PortHi = p.service(hi, t); pool.PortHi == pool.PortLo {
			pool.PortHi = 0
		}
	}
}

// poolOptions reads the options of a pool, in any order, and reports whether there were
// any.
func (p *parser) poolOptions() (o PoolOptions, some bool) {
	for ; p.err == nil; some = true {
		first := p.tok
		kind, isKind := poolKinds[first.text]
		switch {
		case first.kind == tokKeyword && isKind:
			if o.Kind != PoolDefault {
				p.refuse(first, "a second pool type")
			}
			p.advance()
			if o.Kind = kind; kind == SourceHash && p.tok.kind == tokString {
				o.Key = p.hashKey()
			}
		case p.accept("static-port"):
			if o.StaticPort {
				p.refuse(first, "static-port for the second time")
			}
			o.StaticPort = true
		case p.accept("sticky-address"):
			o.Sticky = true
		case p.accept("extfilter"):
			o.ExtFilter = p.oneOf("ei", "ad", "apd")
		case p.accept("extmap"):
			o.ExtMap = p.oneOf("ei", "ad", "apd")
		default:
			return o, some
		}
	}
	return o, some
}

var poolKinds = map[string]PoolKind{
	"bitmask": Bitmask, "random": Random, "source-hash": SourceHash, "round-robin": RoundRobin,
}

// hashKey reads the key of source-hash: 0x and 32 hexadecimal digits, or any other
// string.
func (p *parser) hashKey() string {
	t := p.tok
	key := p.strs("the key")
	if digits, isHex := strings.CutPrefix(key, "0x"); isHex && !isHexKey(digits) {
		p.found(t, "a key of 0x and 32 hexadecimal digits")
	}
	return key
}

// isHexKey reports whether s has the hexadecimal digits of a 128-bit key, which is the
// size of the kernel's (struct pf_poolhashkey).
func isHexKey(s string) bool {
	return len(s) == 32 && strings.Trim(s, "0123456789abcdefABCDEF") == ""
}
