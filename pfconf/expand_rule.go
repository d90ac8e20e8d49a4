package pfconf

import (
	"crypto/md5"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// settleState completes the state options as pfctl hands them to the kernel: the state
// policy, timeouts and the way of counting sources that follow from other options.
func (l *loader) settleState(r *Rule) error {
	o := &r.StateOptions
	stateful := r.State != NoState && r.State != StateDefault
	if !stateful {
		return nil
	}
	if o.Policy == PolicyDefault {
		o.Policy = Floating
		if l.shared.ifBound {
			o.Policy = IfBound
		}
	}
	settleTimeouts(o)
	perRule := o.MaxSrcConn != 0 || o.MaxSrcConnRate.Count != 0 || o.MaxSrcNodes != 0
	switch {
	case o.SourceTrack == SourceTrackGlobal && perRule:
		return errors.New("source-track global goes with max-src-states only")
	case o.SourceTrack == SourceTrackRule || perRule:
		o.SourceTrack = SourceTrackRule
	case o.SourceTrack != NoSourceTrack || o.MaxSrcStates != 0:
		o.SourceTrack = SourceTrackGlobal
	}
	if o.MaxSrcConnRate.Count > (1<<32-1)/1000 {
		return errors.New("max-src-conn-rate is too high")
	}
	return nil
}

// settleTimeouts sorts the timeouts as the kernel does and adds those that follow from
// other options: with a limit on states, adaptive timeouts from 6/10 of it on, which
// would reach 0 at 12/10, and a source is remembered for as long as its rate is measured.
func settleTimeouts(o *StateOptions) {
	var t [32]uint32
	adaptive := false
	for _, written := range o.Timeouts {
		t[timeoutIndex(written.Name)] = written.Seconds
		adaptive = adaptive || strings.HasPrefix(written.Name, "adaptive.")
	}
	if !adaptive {
		t[timeoutIndex("adaptive.start")] = o.Max / 10 * 6
		t[timeoutIndex("adaptive.end")] = o.Max / 10 * 12
	}
	src := timeoutIndex("src.track")
	t[src] = max(t[src], o.MaxSrcConnRate.Seconds)
	o.Timeouts = nil
	for i, name := range timeouts {
		if t[i] != 0 {
			o.Timeouts = append(o.Timeouts, Timeout{Name: name, Seconds: t[i]})
		}
	}
}

// routePool completes the hops of a route and derives the rule's family from them.
func (l *loader) routePool(r *Rule) error {
	if r.Route == nil {
		return nil
	}
	if r.Direction == Both {
		return errors.New("a rule that routes needs in or out")
	}
	if r.Route.Kind == Fastroute {
		return nil
	}
	route := *r.Route
	var hops []Hop
	for _, h := range route.Hops {
		more, err := l.hop(h)
		if err != nil {
			return err
		}
		hops = append(hops, more...)
	}
	families := hopFamilies(hops)
	if families[0] == AnyFamily && len(families) > 1 {
		families[0] = families[1]
	}
	for _, f := range families {
		if f != families[0] && len(route.Hops) > 1 {
			return errors.New("the hops are of two families")
		}
	}
	if r.Family == AnyFamily && slices.IndexFunc(families, func(f Family) bool { return f != families[0] }) < 0 {
		r.Family = families[0]
	}
	route.Hops = nil
	for i, h := range hops {
		if f := families[i]; f == AnyFamily || r.Family == AnyFamily || f == r.Family {
			route.Hops = append(route.Hops, h)
		}
	}
	r.Route = &route
	return settleKind(&route.PoolOptions, route.addrs())
}

// hop resolves one hop. If its router is given as an interface, each of the interface's
// addresses makes a hop.
func (l *loader) hop(h Hop) ([]Hop, error) {
	if h.Addr == nil {
		return []Hop{h}, nil
	}
	addrs, err := l.resolve([]Address{*h.Addr})
	if err != nil {
		return nil, err
	}
	var hops []Hop
	for _, a := range addrs {
		hops = append(hops, Hop{Interface: h.Interface, Addr: &a})
	}
	return hops, nil
}

// hopFamilies returns the families of the hops' routers, AnyFamily for a bare interface.
func hopFamilies(hops []Hop) []Family {
	f := make([]Family, len(hops))
	for i, h := range hops {
		if h.Addr != nil {
			f[i] = h.Addr.family()
		}
	}
	return f
}

// addrs returns the address of each hop's router, any for a bare interface.
func (r *Route) addrs() []Address {
	all := make([]Address, len(r.Hops))
	for i, h := range r.Hops {
		if h.Addr != nil {
			all[i] = *h.Addr
		}
	}
	return all
}

// settlePool completes the pool of a nat or rdr rule and derives the rule's family from
// it.
func (l *loader) settlePool(r *Rule) error {
	pool := *r.Pool
	addrs, err := l.resolve(pool.Addrs)
	if err != nil {
		return err
	}
	if r.Family == AnyFamily && addrs[0].Zone == "" {
		r.Family = addrs[0].family()
	}
	addrs, r.Family = matchingFamily(addrs, r.Family)
	if len(addrs) == 0 {
		return errors.New("no address behind -> is of the family")
	}
	pool.Addrs = fixMasks(addrs, r.Family)
	if err := settleKind(&pool.PoolOptions, pool.Addrs); err != nil {
		return err
	}
	if err := settlePorts(r, &pool); err != nil {
		return err
	}
	r.Pool = &pool
	return nil
}

// matchingFamily drops the addresses that aren't of the family. If the rule has none, the
// first address that has one decides (remove_invalid_hosts in parse.y).
func matchingFamily(addrs []Address, f Family) ([]Address, Family) {
	var all []Address
	for _, a := range addrs {
		af := a.family()
		if f != AnyFamily && af != AnyFamily && af != f {
			continue
		}
		if f == AnyFamily {
			f = af
		}
		all = append(all, a)
	}
	return all, f
}

// settleKind decides the type of a pool and checks it: several addresses, also those
// that a table or an interface may have, need round-robin.
func settleKind(o *PoolOptions, addrs []Address) error {
	if len(addrs) == 0 {
		return errors.New("no address is of the family")
	}
	if o.Kind == SourceHash && o.Key != "" {
		o.Key = hashKeyHex(o.Key)
	}
	if o.Kind == PoolDefault && (len(addrs) > 1 || addrs[0].Kind == AddrTable || addrs[0].changes()) {
		o.Kind = RoundRobin
	}
	if o.Kind == RoundRobin {
		return nil
	}
	for _, a := range addrs {
		if a.Kind == AddrTable || a.changes() {
			return errors.New("a table or (interface) goes with round-robin only")
		}
	}
	if len(addrs) > 1 {
		return errors.New("several addresses go with round-robin only")
	}
	return nil
}

// hashKeyHex returns a key of source-hash as pfctl shows it. A string is hashed to one.
func hashKeyHex(key string) string {
	if strings.HasPrefix(key, "0x") {
		return strings.ToLower(key)
	}
	// pfctl uses MD5 (the production hashkey of parse.y). The key only spreads addresses,
	// so nothing depends on its strength.
	return fmt.Sprintf("0x%x", md5.Sum([]byte(key)))
}

// The ports from which nat chooses if a rule names none: PF_NAT_PROXY_PORT_LOW and _HIGH
// of pfctl_parser.h. On macOS they lie within the ephemeral ports of the host's own
// sockets, 49152 to 65535.
const (
	natPortLow  = 50001
	natPortHigh = 65535
)

// settlePorts completes the ports of a pool. nat without ports, which takes natPortLow to
// natPortHigh, keeps 0 and 0; so does static-port, which the flag tells apart.
func settlePorts(r *Rule, p *Pool) error {
	if r.Action == Rdr {
		if p.StaticPort {
			return errors.New("static-port is for nat only")
		}
		if p.PortStar && len(r.To.Ports) > 0 {
			port := r.To.Ports[0]
			p.PortHi = p.PortLo + port.Hi - port.Lo
		}
		p.PortStar = false
		return nil
	}
	p.PortStar = false
	if p.PortHi == 0 {
		p.PortHi = p.PortLo
	}
	if !p.StaticPort {
		return nil
	}
	if p.PortHi != 0 && p.PortLo != natPortLow && p.PortHi != natPortHigh {
		return errors.New("static-port doesn't go with a port")
	}
	p.PortLo, p.PortHi = 0, 0
	return nil
}

// endpoints returns the addresses of both sides, with interface names resolved; nil is
// any.
func (l *loader) endpoints(r *Rule) (src, dst []Address, err error) {
	if src, err = l.resolve(r.From.Addrs); err != nil {
		return nil, nil, err
	}
	dst, err = l.resolve(r.To.Addrs)
	return src, dst, err
}

// decideFamily sets the rule's family, if it has none, to the one that all addresses have
// in common (decide_address_family in parse.y).
func decideFamily(addrs []Address, f *Family) {
	if *f != AnyFamily || len(addrs) == 0 {
		return
	}
	first := addrs[0].family()
	for _, a := range addrs[1:] {
		if a.family() != first {
			return
		}
	}
	*f = first
}

// combine adds one rule for each combination of the lists' entries (expand_rule in
// parse.y). pfctl silently skips combinations that no packet can match, and refuses the
// rule if none is left.
func (l *loader) combine(r *Rule, src, dst []Address) error {
	c := combination{rule: r, src: src, dst: dst}
	added := 0
	one := new(Rule)
	for ok := true; ok; ok = c.next() {
		*one = c.current()
		if !settleOne(one) {
			continue
		}
		if err := expandLabels(one, l.nr); err != nil {
			return err
		}
		one.From.Addrs = fixMasks(one.From.Addrs, one.Family)
		one.To.Addrs = fixMasks(one.To.Addrs, one.Family)
		if problem := inconsistent(one); problem != "" {
			return errors.New(problem)
		}
		l.nr++
		added++
		if err := l.add(one); err != nil {
			return err
		}
		if l.out != nil {
			one = new(Rule)
		}
	}
	if added == 0 {
		return errors.New("the rule stands for no packet: its address families exclude each other")
	}
	return nil
}

// A combination goes through the combinations of a rule's lists. The last list of sizes
// changes fastest.
type combination struct {
	rule     *Rule
	src, dst []Address
	at       [10]int // index in each list
}

// sizes returns the lengths of the lists, in the order of pfctl's nested loops, since the
// order of the expanded rules follows from it.
func (c *combination) sizes() [10]int {
	r := c.rule
	return [10]int{len(r.Interfaces), len(r.Protos), len(r.ICMP), len(c.src), len(r.From.Ports), len(r.OS),
		len(c.dst), len(r.To.Ports), len(r.Users), len(r.Groups)}
}

// next moves to the next combination and reports whether there is one.
func (c *combination) next() bool {
	sizes := c.sizes()
	for i := len(sizes) - 1; i >= 0; i-- {
		if c.at[i]++; c.at[i] < sizes[i] {
			return true
		}
		c.at[i] = 0
	}
	return false
}

// current returns the rule with one entry of each list.
func (c *combination) current() Rule {
	r := *c.rule
	r.Interfaces = one(r.Interfaces, c.at[0])
	r.Protos = one(r.Protos, c.at[1])
	r.ICMP = one(r.ICMP, c.at[2])
	r.From = Endpoint{Addrs: one(c.src, c.at[3]), Ports: one(r.From.Ports, c.at[4])}
	r.OS = one(r.OS, c.at[5])
	r.To = Endpoint{Addrs: one(c.dst, c.at[6]), Ports: one(r.To.Ports, c.at[7])}
	r.Users = one(r.Users, c.at[8])
	r.Groups = one(r.Groups, c.at[9])
	return r
}

// one returns a list with only entry i of s, sharing its memory; nil if s is empty.
func one[T any](s []T, i int) []T {
	if len(s) == 0 {
		return nil
	}
	return s[i : i+1 : i+1]
}

// settleOne completes the rule of one combination: its family and interface follow from
// its addresses, flags and state from its protocol. It reports whether a packet can match
// it.
func settleOne(r *Rule) bool {
	var zone string
	for _, addrs := range [][]Address{r.From.Addrs, r.To.Addrs} {
		if len(addrs) == 0 {
			continue
		}
		f := addrs[0].family()
		if f != AnyFamily && r.Family != AnyFamily && f != r.Family {
			return false
		}
		if f != AnyFamily {
			r.Family = f
		}
		if z := addrs[0].Zone; z != "" {
			if zone != "" && z != zone || len(r.Interfaces) > 0 && r.Interfaces[0].Name != z {
				return false
			}
			zone = z
		}
	}
	if len(r.Interfaces) == 0 && zone != "" {
		r.Interfaces = []InterfaceMatch{{Name: zone}}
	}
	if len(r.Protos) > 0 && r.Protos[0] != ProtoTCP {
		r.Flags = nil
		if r.State == ModulateState || r.State == SynproxyState {
			r.State = KeepState
		}
	}
	return true
}

// inconsistent returns why pfctl refuses the rule of one combination, or "" if it
// doesn't (rule_consistent in parse.y).
func inconsistent(r *Rule) string {
	switch r.Action {
	case Pass, Block, Scrub, NoScrub, Anchor, ScrubAnchor:
		return inconsistentFilter(r)
	case Rdr, NoRdr, RdrAnchor:
		return inconsistentRdr(r)
	}
	return ""
}

// inconsistentFilter checks filter and scrub rules (filter_consistent in parse.y). A list
// may have a protocol that fits and one that doesn't: one bad combination is enough for
// pfctl to refuse the rule.
func inconsistentFilter(r *Rule) string {
	tcpUDP, icmp, icmp6 := r.proto() == ProtoTCP || r.proto() == ProtoUDP, r.proto() == ProtoICMP, r.proto() == ProtoICMPv6
	ports := len(r.From.Ports)+len(r.To.Ports) > 0
	o := &r.StateOptions
	switch {
	case ports && !tcpUDP:
		return "a port needs proto tcp or udp"
	case len(r.ICMP) > 0 && (r.ICMP[0].V6 && !icmp6 || !r.ICMP[0].V6 && !icmp):
		return "an ICMP type needs proto icmp or icmp6"
	case len(r.ICMP) > 0 && r.Family == AnyFamily:
		return "an ICMP type needs inet or inet6"
	case o.Overload != "" && o.MaxSrcConn == 0 && o.MaxSrcConnRate.Count == 0:
		return "overload needs max-src-conn or max-src-conn-rate"
	case icmp && r.Family == Inet6 || icmp6 && r.Family == Inet:
		return "ICMP and ICMPv6 each have their own address family"
	case r.AllowOpts && r.Action != Pass:
		return "allow-opts is for pass only"
	case r.Fragment && (ports || r.Flags != nil && r.Flags.Mask != 0 || len(r.ICMP) > 0):
		return "a fragment has no ports, flags or ICMP type"
	case r.Return.Kind == ReturnRST && r.proto() != ProtoTCP:
		return "return-rst needs proto tcp"
	case r.Action == Block && r.State != StateDefault && r.State != NoState:
		return "a block rule keeps no state"
	}
	return ""
}

// inconsistentRdr checks redirections (rdr_consistent in parse.y).
func inconsistentRdr(r *Rule) string {
	if r.proto() != ProtoTCP && r.proto() != ProtoUDP {
		if len(r.From.Ports)+len(r.To.Ports) > 0 || r.Pool != nil && r.Pool.PortLo != 0 {
			return "a port needs proto tcp or udp"
		}
	}
	if len(r.To.Ports) > 0 && r.To.Ports[0].Op != Equal && r.To.Ports[0].Op != Range {
		return "the port of rdr takes no operator"
	}
	return ""
}

// proto returns the protocol of an expanded rule, 0 for any.
func (r *Rule) proto() Proto {
	if len(r.Protos) == 0 {
		return 0
	}
	return r.Protos[0]
}

// add appends an expanded rule to the kernel's list for its kind. If the loader only
// checks, it only counts it.
func (l *loader) add(r *Rule) error {
	if l.shared.rules++; l.shared.rules > maxRules {
		return fmt.Errorf("more than %d rules", maxRules)
	}
	if l.out == nil {
		return nil
	}
	switch r.Action {
	case Scrub, NoScrub, ScrubAnchor:
		l.out.Scrub = append(l.out.Scrub, r)
	case Nat, NoNat, NatAnchor:
		l.out.Nat = append(l.out.Nat, r)
	case Binat, NoBinat, BinatAnchor:
		l.out.Binat = append(l.out.Binat, r)
	case Rdr, NoRdr, RdrAnchor:
		l.out.Rdr = append(l.out.Rdr, r)
	case DummynetAnchor:
		l.out.Dummynet = append(l.out.Dummynet, r)
	default:
		l.out.Filter = append(l.out.Filter, r)
	}
	return nil
}

// expandLabels replaces the macros in labels and tags that stand for parts of the rule:
// $if, $srcaddr, $dstaddr, $srcport, $dstport, $proto and $nr, its number (expand_label in
// parse.y). They get here in quotes, in which the lexer expands nothing.
func expandLabels(r *Rule, nr int) error {
	for _, s := range []*string{&r.Label, &r.Tag, &r.Tagged} {
		if !strings.Contains(*s, "$") {
			continue
		}
		iface := "any"
		if len(r.Interfaces) > 0 {
			iface = r.Interfaces[0].Name
		}
		text := *s
		for _, v := range [][2]string{
			{"$if", iface},
			{"$srcaddr", labelAddr(r.From.Addrs, r.Family)}, {"$dstaddr", labelAddr(r.To.Addrs, r.Family)},
			{"$srcport", labelPort(r.From.Ports)}, {"$dstport", labelPort(r.To.Ports)},
			{"$proto", r.proto().String()}, {"$nr", fmt.Sprint(nr)},
		} {
			if text = strings.ReplaceAll(text, v[0], v[1]); len(text) > maxLabel {
				return fmt.Errorf("%s is longer than %d bytes once it is filled in", clip(*s), maxLabel)
			}
		}
		*s = text
	}
	return nil
}

// labelAddr returns an address as labels have it (expand_label_addr in parse.y): unlike
// in rules, without modifiers, and ? for what it has no form for.
func labelAddr(addrs []Address, f Family) string {
	if len(addrs) == 0 {
		return "any"
	}
	a := addrs[0]
	text := "?"
	switch a.Kind {
	case AddrDynamic:
		text = "(" + a.Name + ")"
	case AddrTable:
		text = "<" + a.Name + ">"
	case AddrNoRoute:
		text = "no-route"
	case AddrURPFFailed:
		text = "urpf-failed"
	case AddrPrefix:
		text = "any"
		if f != AnyFamily && !a.isZero() {
			text = prefixString(a.Prefix)
		}
	}
	if a.Not {
		return "! " + text
	}
	return text
}

// labelPort returns a port as labels have it (expand_label_port in parse.y), nothing for
// a range.
func labelPort(ports []Port) string {
	if len(ports) == 0 || ports[0].Op == Range {
		return ""
	}
	p := ports[0]
	switch p.Op {
	case Equal:
		return fmt.Sprint(p.Lo)
	case Inside, Outside:
		return fmt.Sprintf("%d%s%d", p.Lo, p.Op, p.Hi)
	}
	return fmt.Sprintf("%s%d", p.Op, p.Lo)
}
