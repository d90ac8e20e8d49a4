package pfconf

import (
	"net/netip"
	"strconv"
	"strings"
)

// String returns the ruleset as text that [Parse] and pfctl -f read, one
// statement a line. Rules of an inline anchor are indented. It can't fail; whether pfctl
// accepts the text, [Ruleset.Validate] says.
func (rs *Ruleset) String() string {
	p := &printer{}
	p.ruleset(rs, 0)
	return string(p.b)
}

// String returns the definition, the value in quotes.
func (m *Macro) String() string { return statementText(m) }

// String returns the set line.
func (o *Option) String() string { return statementText(o) }

// String returns the definition of the table.
func (t *Table) String() string { return statementText(t) }

// String returns the rule as it would be written, on one line but for an inline anchor's
// rules. [Loaded.ShowRules] returns it as pfctl shows it.
func (r *Rule) String() string { return statementText(r) }

// String returns the antispoof statement.
func (a *Antispoof) String() string { return statementText(a) }

// String returns the load anchor line.
func (l *LoadAnchor) String() string { return statementText(l) }

// String returns the statement as it was read, with single spaces between its words.
func (t *Text) String() string { return t.Text }

// statementText returns the text of one statement.
func statementText(s Statement) string {
	p := &printer{}
	p.statement(s, 0)
	return string(p.b)
}

// ShowRules returns the lines that pfctl -sr prints after the ruleset is loaded
// (print_rule in pfctl_parser.c): scrub rules, then filter rules, with the rules of
// nameless inline anchors in place.
func (ld *Loaded) ShowRules() []string {
	return append(showLines(ld.Scrub), ld.showFilter(ld.Path, ld.Filter, 0)...)
}

// ShowNat returns the lines that pfctl -sn prints: nat, then rdr, then binat rules.
func (ld *Loaded) ShowNat() []string {
	return append(append(showLines(ld.Nat), showLines(ld.Rdr)...), showLines(ld.Binat)...)
}

// showLines returns rules as pfctl shows them.
func showLines(rules []*Rule) []string {
	lines := make([]string, 0, len(rules))
	for _, r := range rules {
		lines = append(lines, shown(r, r.Anchor))
	}
	return lines
}

// showFilter returns filter rules as pfctl shows them. Where the name of a called anchor
// ends in one that pfctl chose, _ and a number, the rules of the anchor follow in braces
// (pfctl_show_rules in pfctl.c).
func (ld *Loaded) showFilter(path string, rules []*Rule, depth int) []string {
	indent := strings.Repeat("  ", depth)
	var lines []string
	for _, r := range rules {
		name := r.Anchor[strings.LastIndexByte(r.Anchor, '/')+1:]
		if r.Action != Anchor || !strings.HasPrefix(name, "_") || strings.Count(name, "_") > 1 {
			lines = append(lines, indent+shown(r, r.Anchor))
			continue
		}
		lines = append(lines, indent+shown(r, name)+" {")
		inner := joinPath(path, name)
		for _, a := range ld.Anchors {
			if a.Path == inner && depth < maxNested {
				lines = append(lines, ld.showFilter(inner, a.Loaded.Filter, depth+1)...)
			}
		}
		lines = append(lines, indent+"}")
	}
	return lines
}

// shown returns a rule as pfctl shows it, as the call of anchor if it calls one.
func shown(r *Rule, anchor string) string {
	p := &printer{shown: true}
	p.rule(r, anchor)
	return string(p.b)
}

// A printer appends the text of rules. By default it writes text that pfctl reads; with
// shown it writes an expanded rule as pfctl shows it, which differs in details: no quotes
// around names, = before a port, options in another order.
type printer struct {
	b     []byte
	shown bool
}

// add appends words.
func (p *printer) add(words ...string) {
	for _, w := range words {
		p.b = append(p.b, w...)
	}
}

// num appends before and a number.
func (p *printer) num(before string, n int) {
	p.b = append(p.b, before...)
	p.b = strconv.AppendInt(p.b, int64(n), 10)
}

// when appends words if cond is true.
func (p *printer) when(cond bool, words ...string) {
	if cond {
		p.add(words...)
	}
}

// ruleset prints statements, one a line, indented by four spaces for each level.
func (p *printer) ruleset(rs *Ruleset, depth int) {
	for _, s := range rs.Statements {
		p.add(strings.Repeat("    ", depth))
		p.statement(s, depth)
		p.add("\n")
	}
}

// statement prints a statement; the rules of an inline anchor are a level deeper.
func (p *printer) statement(s Statement, depth int) {
	switch s := s.(type) {
	case *Macro:
		p.macro(s)
	case *Option:
		p.option(s)
	case *Table:
		p.table(s)
	case *Rule:
		p.rule(s, s.Anchor)
		if s.Body != nil {
			p.add(" {\n")
			p.ruleset(s.Body, depth+1)
			p.add(strings.Repeat("    ", depth), "}")
		}
	case *Antispoof:
		p.antispoof(s)
	case *LoadAnchor:
		p.add("load anchor ", quote(s.Anchor), " from ", quote(s.File))
	case *Text:
		p.add(s.Text)
	}
}

// macro prints a definition. The value is always quoted, since a quoted number is read
// back as the same text.
func (p *printer) macro(m *Macro) {
	p.add(word(m.Name), " =")
	for _, part := range macroParts(m.Value) {
		p.add(" ", quote(part))
	}
}

// macroParts splits a long value at spaces into strings that pfctl's buffer can hold, each
// with room for escapes. pfctl joins them by spaces when it reads them.
func macroParts(value string) []string {
	var parts []string
	for len(value) > maxToken/2 {
		i := strings.LastIndexByte(value[:maxToken/2], ' ')
		if i < 0 {
			break
		}
		parts, value = append(parts, value[:i]), value[i+1:]
	}
	return append(parts, value)
}

// option prints a set line.
func (p *printer) option(o *Option) {
	p.add("set ", o.Name)
	values := make([]string, len(o.Values))
	for i, v := range o.Values {
		values[i] = optionValue(o.Name, v)
	}
	p.when(o.Name == "skip" && len(values) > 0, " on")
	if len(values) > 0 {
		p.add(" ")
		items(p, values, func(s string) { p.add(s) })
	}
}

// optionValue returns a value as it can be written, without quotes where the grammar
// expects a keyword or a number.
func optionValue(name, v string) string {
	switch name {
	case "block-policy", "state-policy", "require-order", "hostid":
		return v
	case "timeout", "limit":
		if i := strings.LastIndexByte(v, ' '); i >= 0 {
			return word(v[:i]) + v[i:]
		}
	}
	return word(v)
}

// table prints a table's definition.
func (p *printer) table(t *Table) {
	p.add("table <", word(t.Name), ">")
	p.when(t.Persist, " persist")
	p.when(t.Const, " const")
	if t.HasAddrs {
		p.add(" {")
		for i, a := range t.Addrs {
			p.when(i > 0, ",")
			p.add(" ")
			p.address(a, AnyFamily)
		}
		p.add(" }")
	}
	for _, f := range t.Files {
		p.add(" file ", quote(f))
	}
}

// antispoof prints an antispoof statement.
func (p *printer) antispoof(a *Antispoof) {
	p.add("antispoof")
	p.log(a.Log)
	p.when(a.Quick, " quick")
	p.add(" for ")
	items(p, a.Interfaces, func(i AntispoofInterface) {
		if i.Dynamic {
			p.add("(", word(i.Name), ")")
		} else {
			p.add(word(i.Name))
		}
	})
	p.when(a.Family != AnyFamily, " ", a.Family.String())
	p.when(a.Label != "", " label ", quote(a.Label))
	if a.RTable != nil {
		p.num(" rtable ", int(*a.RTable))
	}
}

// items prints one item, or several in braces.
func items[T any](p *printer, all []T, item func(T)) {
	if len(all) == 1 {
		item(all[0])
		return
	}
	p.add("{ ")
	for i, one := range all {
		p.when(i > 0, ", ")
		item(one)
	}
	p.add(" }")
}

// rule prints a rule, or the call of anchor. The order of the parts is that of
// print_rule in pfctl_parser.c, which its grammar accepts.
func (p *printer) rule(r *Rule, anchor string) {
	p.head(r, anchor)
	p.fromTo(r)
	p.matches(r)
	p.state(r)
	p.normalize(r)
	p.marks(r)
	p.pool(r)
}

// head prints the parts before the addresses.
func (p *printer) head(r *Rule, anchor string) {
	p.add(r.Action.String())
	p.when(anchor != "" && !(p.shown && anchor[0] == '_'), " ", quote(anchor))
	p.when(r.Pass, " pass")
	p.answer(r)
	p.when(r.Direction != Both, " ", r.Direction.String())
	p.log(r.Log)
	p.when(r.Quick, " quick")
	if len(r.Interfaces) > 0 {
		p.add(" on ")
		items(p, r.Interfaces, func(i InterfaceMatch) {
			p.when(i.Not, "! ")
			p.name(i.Name)
		})
	}
	p.route(r)
	p.when(r.Family != AnyFamily, " ", r.Family.String())
	if len(r.Protos) > 0 {
		p.add(" proto ")
		items(p, r.Protos, func(proto Proto) { p.add(proto.String()) })
	}
}

// name prints a name. pfctl shows names without quotes, whatever they contain.
func (p *printer) name(s string) {
	if p.shown {
		p.add(s)
	} else {
		p.add(word(s))
	}
}

// answer prints how a block rule answers.
func (p *printer) answer(r *Rule) {
	switch r.Return.Kind {
	case ReturnDrop:
		p.add(" drop")
	case ReturnAll:
		p.add(" return")
	case ReturnRST:
		p.add(" return-rst")
		if r.Return.TTL != 0 {
			p.num("(ttl ", int(r.Return.TTL))
			p.add(")")
		}
	case ReturnICMP:
		if p.shown {
			p.shownReturnICMP(r)
		} else {
			p.returnICMP(r.Return)
		}
	}
}

// returnICMP prints return-icmp or return-icmp6 with the codes that are set.
func (p *printer) returnICMP(ret Return) {
	switch {
	case ret.Code == nil && ret.Code6 == nil:
		p.add(" return-icmp")
	case ret.Code == nil:
		p.add(" return-icmp6(", icmpCodeName(unreachType(true), *ret.Code6, true), ")")
	case ret.Code6 == nil:
		p.add(" return-icmp(", icmpCodeName(unreachType(false), *ret.Code, false), ")")
	default:
		p.add(" return-icmp(", icmpCodeName(unreachType(false), *ret.Code, false), ", ",
			icmpCodeName(unreachType(true), *ret.Code6, true), ")")
	}
}

// shownReturnICMP prints the codes for the rule's family. If only the ICMP code was
// written, pfctl's parser uses the default of ICMP, type 3 and code 3, for ICMPv6 too,
// where type 3 is time exceeded, which has no name for code 3.
func (p *printer) shownReturnICMP(r *Rule) {
	code, code6 := "port-unr", "port-unr"
	if c := r.Return.Code; c != nil {
		code, code6 = icmpCodeName(unreachType(false), *c, false), "3"
	}
	if c := r.Return.Code6; c != nil {
		code6 = icmpCodeName(unreachType(true), *c, true)
	}
	switch r.Family {
	case Inet:
		p.add(" return-icmp(", code, ")")
	case Inet6:
		p.add(" return-icmp6(", code6, ")")
	default:
		p.add(" return-icmp(", code, ", ", code6, ")")
	}
}

// log prints log and its options. pfctl doesn't show pflog0, the default.
func (p *printer) log(l *Log) {
	if l == nil {
		return
	}
	p.add(" log")
	var words []string
	if l.All {
		words = append(words, "all")
	}
	if l.User {
		words = append(words, "user")
	}
	if l.To != "" && !(p.shown && l.To == "pflog0") {
		words = append(words, "to "+l.To)
	}
	p.when(words != nil, " (", strings.Join(words, ", "), ")")
}

// route prints a rule's route: its kind, hops and options.
func (p *printer) route(r *Rule) {
	if r.Route == nil {
		return
	}
	p.add(" ", r.Route.Kind.String())
	if r.Route.Kind == Fastroute {
		return
	}
	p.add(" ")
	items(p, r.Route.Hops, func(h Hop) {
		if h.Addr == nil {
			p.name(h.Interface)
			return
		}
		p.add("(")
		p.name(h.Interface)
		p.add(" ")
		p.address(*h.Addr, r.Family)
		p.add(")")
	})
	p.poolOptions(r.Route.PoolOptions)
}

// fromTo prints both sides, or all if both are any. pfctl shows all for binat too, whose
// grammar doesn't have it.
func (p *printer) fromTo(r *Rule) {
	if p.any(r.From) && p.any(r.To) && len(r.OS) == 0 && r.Action != Binat && r.Action != NoBinat {
		p.add(" all")
		return
	}
	if p.shown && p.any(r.From) && p.any(r.To) && len(r.OS) == 0 {
		p.add(" all")
		return
	}
	p.add(" from ")
	p.endpoint(r.From, r.Family)
	if len(r.OS) > 0 {
		p.add(" os ")
		items(p, r.OS, func(os string) { p.add(quote(os)) })
	}
	p.add(" to ")
	p.endpoint(r.To, r.Family)
}

// any reports whether a side matches everything. In shown rules a network of length 0
// does: pfctl can't tell it from any.
func (p *printer) any(e Endpoint) bool {
	if len(e.Ports) > 0 {
		return false
	}
	return len(e.Addrs) == 0 || p.shown && e.Addrs[0].isZero() && !e.Addrs[0].Not
}

// endpoint prints one side. { any } keeps its braces: in a list any is an entry of its
// own.
func (p *printer) endpoint(e Endpoint, f Family) {
	switch {
	case len(e.Addrs) == 0:
		p.add("any")
	case len(e.Addrs) == 1 && e.Addrs[0].Kind == AddrAny:
		p.add("{ any }")
	default:
		items(p, e.Addrs, func(a Address) { p.address(a, f) })
	}
	if len(e.Ports) > 0 {
		p.add(" port ")
		items(p, e.Ports, p.port)
	}
}

// port prints a port as a number, since names differ between hosts.
func (p *printer) port(port Port) { p.compare(port.Op, uint32(port.Lo), uint32(port.Hi), "") }

// compare prints a comparison. If name isn't empty it is printed instead of lo.
func (p *printer) compare(op CompareOp, lo, hi uint32, name string) {
	if name == "" {
		name = strconv.Itoa(int(lo))
	}
	switch op {
	case Range:
		p.num(name+":", int(hi))
	case Inside, Outside:
		p.num(name+" "+op.String()+" ", int(hi))
	case Equal:
		p.when(p.shown, "= ")
		p.add(name)
	default:
		p.add(op.String(), " ", name)
	}
}

// ids prints users or groups.
func (p *printer) ids(what string, ids []IDMatch) {
	if len(ids) == 0 {
		return
	}
	p.add(" ", what, " ")
	items(p, ids, func(m IDMatch) {
		name := ""
		if m.Unknown {
			name = "unknown"
		} else if m.Name != "" {
			name = word(m.Name)
		}
		p.compare(m.Op, m.Lo, m.Hi, name)
	})
}

// address prints an address in a rule of family f. pfctl doesn't show the length of an
// interface in parentheses if it is that of a whole address of the family.
func (p *printer) address(a Address, f Family) {
	p.when(a.Not, "! ")
	switch a.Kind {
	case AddrAny:
		p.add("any")
	case AddrPrefix:
		p.prefix(a)
	case AddrRange:
		p.add(ipString(a.Prefix.Addr()), " - ", ipString(a.Last))
	case AddrTable:
		p.add("<")
		p.name(a.Name)
		p.add(">")
	case AddrInterface:
		p.name(a.Name + modString(a.Mod))
	case AddrDynamic:
		p.add("(")
		p.name(a.Name + modString(a.Mod))
		p.add(")")
	case AddrNoRoute:
		p.add("no-route")
	case AddrURPFFailed:
		p.add("urpf-failed")
	}
	whole := Address{Kind: AddrDynamic}
	if a.Bits != nil && !(p.shown && int(*a.Bits) == whole.maskBits(f)) {
		p.num("/", int(*a.Bits))
	}
}

// prefix prints an address or network. pfctl shows no zone, since the loaded rule is bound
// to its interface instead.
func (p *printer) prefix(a Address) {
	switch {
	case p.shown && a.isZero():
		p.add("any")
	case p.shown || a.Zone == "":
		p.add(prefixString(a.Prefix))
	default:
		p.add(word(ipString(a.Prefix.Addr()) + "%" + a.Zone))
		if !a.Prefix.IsSingleIP() {
			p.num("/", a.Prefix.Bits())
		}
	}
}

// modString returns modifiers in pfctl's order.
func modString(m AddressModifier) string {
	var s string
	for _, mod := range modifiers {
		if m&mod.mod != 0 {
			s += ":" + mod.word
		}
	}
	return s
}

// prefixString returns a network as pfctl prints it, without the length if it is a single
// address.
func prefixString(n netip.Prefix) string {
	if n.IsSingleIP() {
		return ipString(n.Addr())
	}
	return ipString(n.Addr()) + "/" + strconv.Itoa(n.Bits())
}

// ipString returns an address as inet_ntop(3) does, which differs from netip for
// IPv4-compatible addresses, ::10.0.0.1 (RFC 4291, section 2.5.5.1).
func ipString(ip netip.Addr) string {
	ip = ip.WithZone("")
	if ip.Is6() {
		if b := ip.As16(); [12]byte(b[:12]) == [12]byte{} && (b[12] != 0 || b[13] != 0) {
			return "::" + netip.AddrFrom4([4]byte(b[12:])).String()
		}
	}
	return ip.String()
}

// matches prints the criteria besides the addresses: owner, flags, ICMP type, type of
// service.
func (p *printer) matches(r *Rule) {
	p.ids("user", r.Users)
	p.ids("group", r.Groups)
	switch f := r.Flags; {
	case f != nil && f.Mask != 0:
		p.add(" flags ", f.Set.String(), "/", f.Mask.String())
	case f != nil && !p.shown, p.shown && r.showsFlagsAny():
		p.add(" flags any")
	}
	if len(r.ICMP) > 0 {
		v6 := r.ICMP[0].V6
		p.add(" icmp")
		p.when(v6, "6")
		p.add("-type ")
		items(p, r.ICMP, func(m ICMPMatch) {
			p.add(icmpTypeName(m.Type, v6))
			if m.Code != nil {
				p.add(" code ", icmpCodeName(m.Type, *m.Code, v6))
			}
		})
	}
	if r.TOS != nil {
		p.add(" tos ", hexByte(*r.TOS))
	}
}

// showsFlagsAny reports whether pfctl shows flags any for a rule without flags: it does
// for pass rules that keep state, where no flags at all would be read as S/SA.
func (r *Rule) showsFlagsAny() bool {
	tcp := len(r.Protos) == 0 || r.Protos[0] == ProtoTCP
	return r.Action == Pass && tcp && !r.Fragment && r.State != NoState
}

// hexByte returns a type of service as pfctl prints it, 0x10.
func hexByte(b uint8) string {
	const digits = "0123456789abcdef"
	return "0x" + string([]byte{digits[b>>4], digits[b&15]})
}

// state prints state and probability. pfctl shows the probability between keep state and
// its options, an order that it doesn't read.
func (p *printer) state(r *Rule) {
	p.when(r.State != StateDefault, " ", r.State.String())
	if p.shown {
		p.probability(r)
		p.stateOptions(&r.StateOptions)
	} else {
		p.stateOptions(&r.StateOptions)
		p.probability(r)
	}
	p.when(r.Fragment, " fragment")
}

// probability prints a probability. pfctl shows it in percent, with the rounding of the
// kernel's 32 bits, and divides by 2^32 although it multiplied by 2^32-1.
func (p *printer) probability(r *Rule) {
	switch {
	case r.Probability == 0:
	case p.shown:
		n := float64(uint32(r.Probability*(1<<32-1) + 0.5))
		s := strconv.FormatFloat(n*100/(1<<32), 'f', 6, 64)
		p.add(" probability ", strings.TrimSuffix(strings.TrimRight(s, "0"), "."), "%")
	default:
		p.add(" probability ", strconv.FormatFloat(r.Probability, 'f', -1, 64))
	}
}

// stateOptions prints state options in the order in which pfctl shows them. pfctl doesn't
// show floating, which the kernel holds as the absence of if-bound.
func (p *printer) stateOptions(o *StateOptions) {
	var words []string
	count := func(name string, n uint32) {
		if n != 0 {
			words = append(words, name+" "+strconv.Itoa(int(n)))
		}
	}
	count("max", o.Max)
	if o.NoSync {
		words = append(words, "no-sync")
	}
	if o.SourceTrack != NoSourceTrack {
		words = append(words, o.SourceTrack.String())
	}
	count("max-src-states", o.MaxSrcStates)
	count("max-src-conn", o.MaxSrcConn)
	if rate := o.MaxSrcConnRate; rate.Count != 0 {
		count("max-src-conn-rate", rate.Count)
		words[len(words)-1] += "/" + strconv.Itoa(int(rate.Seconds))
	}
	count("max-src-nodes", o.MaxSrcNodes)
	if o.Overload != "" {
		q := &printer{shown: p.shown}
		q.address(Address{Kind: AddrTable, Name: o.Overload}, AnyFamily)
		words = append(words, "overload "+string(q.b)+o.Flush.String())
	}
	if o.Policy == IfBound || o.Policy == Floating && !p.shown {
		words = append(words, o.Policy.String())
	}
	for _, t := range o.Timeouts {
		words = append(words, t.Name+" "+strconv.Itoa(int(t.Seconds)))
	}
	p.when(words != nil, " (", strings.Join(words, ", "), ")")
}

// normalize prints scrub options, and allow-opts, which pfctl shows among them.
func (p *printer) normalize(r *Rule) {
	n := r.Normalize
	p.when(n.NoDF, " no-df")
	p.when(n.RandomID, " random-id")
	if n.MinTTL != 0 {
		p.num(" min-ttl ", int(n.MinTTL))
	}
	if n.MaxMSS != 0 {
		p.num(" max-mss ", int(n.MaxMSS))
	}
	if n.SetTOS != nil {
		p.add(" set-tos ", hexByte(*n.SetTOS))
	}
	p.when(r.AllowOpts, " allow-opts")
	p.when(n.ReassembleTCP && (!p.shown || r.Action == Scrub), " reassemble tcp")
	p.when(n.Fragment != FragmentDefault && (!p.shown || r.Action != NoScrub), " fragment ", n.Fragment.String())
}

// marks prints label, queue, tags and routing table.
func (p *printer) marks(r *Rule) {
	if r.Label != "" && p.shown {
		p.add(` label "`, r.Label, `"`)
	} else {
		p.when(r.Label != "", " label ", quote(r.Label))
	}
	switch {
	case r.PriQueue != "":
		p.add(" queue")
		p.when(!p.shown, " ")
		p.add("(")
		p.name(r.Queue)
		p.add(", ")
		p.name(r.PriQueue)
		p.add(")")
	case r.Queue != "":
		p.add(" queue ")
		p.name(r.Queue)
	}
	if r.Tag != "" {
		p.add(" tag ")
		p.name(r.Tag)
	}
	if r.Tagged != "" {
		p.when(r.NotTagged, " !")
		p.add(" tagged ")
		p.name(r.Tagged)
	}
	if r.RTable != nil {
		p.num(" rtable ", int(*r.RTable))
	}
}

// pool prints the addresses, ports and options behind ->.
func (p *printer) pool(r *Rule) {
	if r.Pool == nil {
		return
	}
	if len(r.Pool.Addrs) > 0 {
		p.add(" -> ")
		items(p, r.Pool.Addrs, func(a Address) { p.address(a, r.Family) })
		p.poolPort(r)
	} else if p.shown {
		return
	}
	p.poolOptions(r.Pool.PoolOptions)
}

// poolPort prints the ports behind ->. pfctl shows no range that is the default.
func (p *printer) poolPort(r *Rule) {
	pool := r.Pool
	if pool.PortLo == 0 && pool.PortHi == 0 && !pool.PortStar {
		return
	}
	if p.shown && r.Action == Nat && pool.PortLo == natPortLow && pool.PortHi == natPortHigh {
		return
	}
	p.num(" port ", int(pool.PortLo))
	if pool.PortHi != 0 && !(p.shown && pool.PortHi == pool.PortLo) {
		p.num(":", int(pool.PortHi))
	}
	p.when(pool.PortStar, ":*")
}

// poolOptions prints the options of a pool, in pfctl's order.
func (p *printer) poolOptions(o PoolOptions) {
	p.when(o.Kind != PoolDefault, " ", o.Kind.String())
	if o.Key != "" {
		p.add(" ")
		p.name(o.Key)
	}
	p.when(o.Sticky, " sticky-address")
	p.when(o.StaticPort, " static-port")
	p.when(o.ExtFilter != "", " extfilter ", o.ExtFilter)
	p.when(o.ExtMap != "", " extmap ", o.ExtMap)
}
