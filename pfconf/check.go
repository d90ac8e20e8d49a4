package pfconf

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The longest names in bytes: the kernel's buffers less the final NUL (xnu
// bsd/net/pfvar.h, where no other file is named).
const (
	maxInterface = 15   // IFNAMSIZ, bsd/net/if.h
	maxTable     = 31   // PF_TABLE_NAME_SIZE
	maxLabel     = 63   // PF_RULE_LABEL_SIZE
	maxTag       = 63   // PF_TAG_NAME_SIZE
	maxQueue     = 63   // PF_QNAME_SIZE
	maxAnchor    = 63   // PF_ANCHOR_NAME_SIZE: one component of a path
	maxPath      = 1024 // MAXPATHLEN, with the NUL
	maxPflog     = 15   // number of the last log interface, PFLOGIFS_MAX - 1, bsd/net/if_pflog.h
)

// checkString checks that a string can be written in quotes and has at most so many bytes.
func checkString(what, s string, most int) error {
	if len(s) > most {
		return fmt.Errorf("%s %q is longer than %d bytes", what, clip(s), most)
	}
	if !quotable(s) {
		return fmt.Errorf("%s %q can't be written in pf.conf", what, clip(s))
	}
	return nil
}

// checkName is checkString for a string that can't be empty.
func checkName(what, s string, most int) error {
	if s == "" {
		return fmt.Errorf("the %s has no name", what)
	}
	return checkString(what, s, most)
}

// checkMacro checks that a definition can be printed. It is printed although nothing uses
// it any more, so that people find what they wrote.
func checkMacro(m *Macro) error {
	if err := checkName("macro", m.Name, maxToken); err != nil {
		return err
	}
	for _, part := range macroParts(m.Value) {
		if !quotable(part) {
			return fmt.Errorf("the value of macro %s can't be written in pf.conf", clip(m.Name))
		}
	}
	if len(m.Value) > maxMacro {
		return fmt.Errorf("macro %s is longer than %d bytes", clip(m.Name), maxMacro)
	}
	return nil
}

// checkText checks that a Text is read back as the same Text: otherwise a ruleset built
// from types could smuggle in rules that nothing checks.
func checkText(t *Text) error {
	p := &parser{lex: newLexer(t.Text + "\n"), pos: map[Statement]position{}}
	p.advance()
	if s, ok := p.statement(false).(*Text); p.err != nil || !ok || s.Text != t.Text || p.tok.kind != tokNewline {
		return errors.New("the text isn't a statement of a kind that is kept as text")
	}
	return nil
}

// checkOption checks a set line. pfctl checks most values when it applies them, which it
// does for the main ruleset only; in an anchor it takes them as they are.
func (l *loader) checkOption(o *Option) error {
	if !optionNames[o.Name] {
		return fmt.Errorf("no option %s", clip(o.Name))
	}
	switch o.Name {
	case "timeout", "limit":
		return l.checkPairs(o)
	case "skip":
		for _, v := range o.Values {
			if err := checkName("interface", v, maxInterface); err != nil {
				return err
			}
		}
		return nil
	}
	if len(o.Values) != 1 {
		return fmt.Errorf("set %s takes one value", o.Name)
	}
	return l.checkValue(o.Name, o.Values[0])
}

// checkPairs checks timeouts and limits. In an anchor pfctl doesn't check the names of
// timeouts, because it doesn't set them.
func (l *loader) checkPairs(o *Option) error {
	if len(o.Values) == 0 {
		return fmt.Errorf("set %s takes a name and a number", o.Name)
	}
	for _, v := range o.Values {
		i := strings.LastIndexByte(v, ' ')
		if i < 0 {
			return fmt.Errorf("set %s takes a name and a number", o.Name)
		}
		name := v[:i]
		n, err := strconv.ParseUint(v[i+1:], 10, 32)
		if err != nil || v[i+1:] != strconv.FormatUint(n, 10) {
			return fmt.Errorf("%s isn't a number for %s", clip(v[i+1:]), clip(name))
		}
		if err := checkName(o.Name, name, maxToken); err != nil {
			return err
		}
		known := timeouts
		if o.Name == "limit" {
			known = limits
		}
		if !containsFold(known, name) && (o.Name == "limit" || l.main) {
			return fmt.Errorf("no %s %s", o.Name, clip(name))
		}
		if o.Name == "timeout" && l.main && n > 1<<31-1 {
			return fmt.Errorf("timeout %s is too long", name)
		}
	}
	return nil
}

// The values that pfctl knows, from its tables pf_limits, pf_hints and others in pfctl.c.
var (
	limits        = []string{"states", "app-states", "src-nodes", "frags", "tables", "table-entries"}
	optimizations = []string{"normal", "satellite", "high-latency", "conservative", "aggressive"}
	debugLevels   = []string{"none", "urgent", "misc", "loud"}
	optimizers    = []string{"none", "basic", "profile"}
)

// containsFold reports whether words has w, without regard to case, which is how pfctl
// compares the names of timeouts, limits and optimizations.
func containsFold(words []string, w string) bool {
	return slices.ContainsFunc(words, func(s string) bool { return strings.EqualFold(s, w) })
}

// checkValue checks the value of an option that takes one.
func (l *loader) checkValue(name, v string) error {
	bad := fmt.Errorf("set %s can't be %q", name, clip(v))
	var ok bool
	switch name {
	case "block-policy":
		ok = v == "drop" || v == "return"
	case "state-policy":
		ok = v == "if-bound" || v == "floating"
	case "require-order":
		ok = v == "yes" || v == "no"
	case "ruleset-optimization":
		ok = slices.Contains(optimizers, v)
	case "hostid":
		n, err := strconv.ParseUint(v, 10, 32)
		ok = err == nil && n > 0 && v == strconv.FormatUint(n, 10)
	case "optimization":
		ok = !l.main || containsFold(optimizations, v)
	case "debug":
		ok = !l.main || slices.Contains(debugLevels, v)
	case "loginterface":
		ok = !l.main || len(v) <= maxInterface
	default:
		ok = v != ""
	}
	if !ok {
		return bad
	}
	return checkString("value of "+name, v, maxToken)
}

// checkTable checks a table before the names among its addresses are resolved.
func checkTable(t *Table) error {
	if err := checkName("table", t.Name, maxTable); err != nil {
		return err
	}
	for _, f := range t.Files {
		if err := checkName("file", f, maxToken); err != nil {
			return err
		}
	}
	if len(t.Addrs) > 0 && !t.HasAddrs {
		return errors.New("the table has addresses and HasAddrs is unset")
	}
	for _, a := range t.Addrs {
		if a.Kind != AddrPrefix && a.Kind != AddrInterface && a.Kind != AddrAny {
			return errors.New("a table holds addresses and networks only")
		}
		if err := checkAddress(a); err != nil {
			return err
		}
	}
	return nil
}

// checkAntispoof checks an antispoof statement before it becomes rules.
func checkAntispoof(a *Antispoof) error {
	if len(a.Interfaces) == 0 {
		return errors.New("antispoof needs an interface")
	}
	for _, i := range a.Interfaces {
		if err := checkName("interface", i.Name, maxInterface); err != nil {
			return err
		}
	}
	if err := checkLog(a.Log); err != nil {
		return err
	}
	return checkString("label", a.Label, maxLabel)
}

// checkLog checks the interface to which packets are logged: pflog0 to pflog15, without
// leading zeros, so that the text is read back as the same name.
func checkLog(l *Log) error {
	if l == nil || l.To == "" {
		return nil
	}
	n, isPflog := strings.CutPrefix(l.To, "pflog")
	if v, err := strconv.ParseUint(n, 10, 8); err != nil || !isPflog || v > maxPflog || n != strconv.FormatUint(v, 10) {
		return fmt.Errorf("log can't be to %q", clip(l.To))
	}
	return nil
}

// checkRule checks a rule as far as its lists don't matter. The rest is checked for each
// combination of their entries, see inconsistent.
func checkRule(r *Rule) error {
	for _, check := range []func(*Rule) error{checkFields, checkNames, checkNumbers, checkAnchor, checkState, checkBinat} {
		if err := check(r); err != nil {
			return err
		}
	}
	for _, addrs := range [][]Address{r.From.Addrs, r.To.Addrs} {
		for _, a := range addrs {
			if err := checkAddress(a); err != nil {
				return err
			}
		}
	}
	for _, a := range r.To.Addrs {
		if a.Kind == AddrURPFFailed {
			return errors.New("urpf-failed is no destination")
		}
	}
	return checkPool(r)
}

// A fieldSet is a set of groups of a Rule's fields.
type fieldSet uint16

const (
	hasReturn fieldSet = 1 << iota
	hasNatPass
	hasDirection
	hasLog
	hasQuick
	hasRoute
	hasOptions // filter options other than state
	hasTag
	hasTagged
	hasState
	hasNormalize
	hasPool
	hasBody
	hasAnchor
)

// allowed has the fields that each action takes. Interfaces, family, protocols,
// addresses and rtable aren't among them, since all actions take those.
var allowed = map[Action]fieldSet{
	Pass:        hasDirection | hasLog | hasQuick | hasRoute | hasOptions | hasTag | hasTagged | hasState,
	Block:       hasReturn | hasDirection | hasLog | hasQuick | hasRoute | hasOptions | hasTag | hasTagged | hasState,
	Anchor:      hasDirection | hasQuick | hasOptions | hasTag | hasTagged | hasBody | hasAnchor,
	Scrub:       hasDirection | hasLog | hasNormalize | hasTagged,
	NoScrub:     hasDirection | hasLog | hasNormalize | hasTagged,
	Nat:         hasNatPass | hasLog | hasTag | hasTagged | hasPool,
	NoNat:       hasLog | hasTag | hasTagged | hasPool,
	Rdr:         hasNatPass | hasLog | hasTag | hasTagged | hasPool,
	NoRdr:       hasLog | hasTag | hasTagged | hasPool,
	Binat:       hasNatPass | hasLog | hasTag | hasTagged | hasPool,
	NoBinat:     hasLog | hasTag | hasTagged | hasPool,
	NatAnchor:   hasAnchor,
	RdrAnchor:   hasAnchor,
	BinatAnchor: hasAnchor,
	ScrubAnchor: hasAnchor, DummynetAnchor: hasAnchor,
}

// fieldNames names the bits of a fieldSet in errors.
var fieldNames = []string{"an answer", "pass", "a direction", "log", "quick", "a route", "filter options", "a tag",
	"tagged", "a state", "scrub options", "a pool", "rules in braces", "the name of an anchor"}

// fields returns the groups of fields that are set in a rule.
func (r *Rule) fields() fieldSet {
	var f fieldSet
	for i, set := range []bool{
		r.Return != Return{}, r.Pass, r.Direction != Both, r.Log != nil, r.Quick, r.Route != nil,
		r.Users != nil || r.Groups != nil || r.Flags != nil || r.ICMP != nil || r.TOS != nil || r.Fragment ||
			r.AllowOpts || r.Probability != 0 || r.Label != "" || r.Queue != "",
		r.Tag != "", r.Tagged != "" || r.NotTagged, r.State != StateDefault, r.Normalize != Normalize{},
		r.Pool != nil, r.Body != nil, r.Anchor != "",
	} {
		if set {
			f |= 1 << i
		}
	}
	return f
}

// checkFields refuses fields that the grammar doesn't have for the action. Rule is one
// type for all actions, as in the kernel, so the compiler can't check that.
func checkFields(r *Rule) error {
	extra := r.fields() &^ allowed[r.Action]
	for i, name := range fieldNames {
		if extra&(1<<i) != 0 {
			return fmt.Errorf("%s takes no: %s", r.Action, name)
		}
	}
	if r.OS != nil && (r.Action == Binat || r.Action == NoBinat) {
		return errors.New("binat takes no os")
	}
	return nil
}

// checkNames checks the strings that pfctl copies into the kernel's fixed buffers. It
// refuses those that don't fit rather than truncating them.
func checkNames(r *Rule) error {
	for _, i := range r.Interfaces {
		if err := checkName("interface", i.Name, maxInterface); err != nil {
			return err
		}
	}
	for _, os := range r.OS {
		if err := checkName("operating system", os, maxToken); err != nil {
			return err
		}
	}
	if r.PriQueue != "" && r.Queue == "" || r.NotTagged && r.Tagged == "" {
		return errors.New("a second queue without the first, or ! tagged without a tag")
	}
	return firstError(checkLog(r.Log), checkString("label", r.Label, maxLabel), checkString("tag", r.Tag, maxTag),
		checkString("tag", r.Tagged, maxTag), checkString("queue", r.Queue, maxQueue),
		checkString("queue", r.PriQueue, maxQueue), checkIDs("user", r.Users), checkIDs("group", r.Groups))
}

// checkIDs checks users or groups. The highest id means unknown in the kernel (UID_MAX),
// so it can't be written as a number.
func checkIDs(what string, ids []IDMatch) error {
	for _, m := range ids {
		two := m.Op == Inside || m.Op == Outside
		switch {
		case m.Op > Outside || m.Op == Range:
			return fmt.Errorf("a %s can't be compared with this operator", what)
		case !two && m.Hi != 0 || (m.Unknown || m.Name != "") && (two || m.Lo != 0) || m.Unknown && m.Name != "":
			return fmt.Errorf("a %s is a number, a name or unknown", what)
		case m.Unknown && m.Op != Equal && m.Op != NotEqual:
			return fmt.Errorf("%s unknown can only be = or !=", what)
		case m.Lo == 1<<32-1 || m.Hi == 1<<32-1 || m.Name == "unknown":
			return fmt.Errorf("this %s can't be written in pf.conf", what)
		}
		if err := checkString(what, m.Name, maxToken); err != nil {
			return err
		}
	}
	return nil
}

// checkNumbers checks ranges of numbers, and fields that exclude each other.
func checkNumbers(r *Rule) error {
	if r.Direction > Out || r.Family > Inet6 || r.Return.Kind > ReturnICMP || r.State > SynproxyState {
		return errors.New("a value is out of range")
	}
	for _, p := range slices.Concat(r.From.Ports, r.To.Ports) {
		if p.Op > Outside || p.Op < Range && p.Hi != 0 {
			return errors.New("a port takes one number, two with a range")
		}
	}
	if slices.Contains(r.Protos, 0) {
		return errors.New("protocol 0 can't be used")
	}
	if r.Probability != 0 && !(r.Probability >= minProbability && r.Probability <= 1) {
		return errors.New("a probability is from 0 to 1")
	}
	if tos := r.TOS; tos != nil && *tos == 0 || r.Normalize.SetTOS != nil && *r.Normalize.SetTOS == 0 {
		return errors.New("type of service 0 can't be written")
	}
	for _, m := range r.ICMP {
		if m.V6 != r.ICMP[0].V6 {
			return errors.New("ICMP and ICMPv6 types in one rule")
		}
	}
	ret := r.Return
	if ret.TTL != 0 && ret.Kind != ReturnRST || (ret.Code != nil || ret.Code6 != nil) && ret.Kind != ReturnICMP {
		return errors.New("an answer with a TTL or a code that its kind doesn't take")
	}
	return nil
}

// minProbability is the lowest that the kernel's 32 bits can hold; 0 means always there.
const minProbability = 1 / float64(1<<32-1)

// checkAnchor checks the name of a called anchor, and its rules in braces. pfctl gives
// nameless inline anchors names that begin with an underscore, and so refuses those.
func checkAnchor(r *Rule) error {
	if r.Action == Anchor {
		if r.Anchor == "" && r.Body == nil {
			return errors.New("an anchor without rules needs a name")
		}
		if strings.HasPrefix(r.Anchor, "_") || strings.Contains(r.Anchor, "/_") {
			return errors.New("names of anchors that begin with _ are pf's own")
		}
		return firstError(checkBody(r.Body), checkPath(r.Anchor))
	}
	if _, isAnchor := anchorWords[r.Action]; isAnchor {
		if r.Anchor == "" {
			return errors.New("the anchor has no name")
		}
		return checkPath(r.Anchor)
	}
	return nil
}

// firstError returns the first error that isn't nil.
func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// checkPath checks the name of an anchor, a path of names separated by slashes.
func checkPath(path string) error {
	if path == "" {
		return nil
	}
	// pfctl's buffer for the last name also has to hold the slash before it.
	i := strings.LastIndexByte(path, '/')
	if i >= 0 && len(path)-i > maxAnchor {
		return fmt.Errorf("anchor %q has a name longer than %d bytes", clip(path), maxAnchor-1)
	}
	for _, name := range strings.Split(strings.TrimLeft(path, "/"), "/") {
		if name == "" || len(name) > maxAnchor {
			return fmt.Errorf("anchor %q has a name that is empty or longer than %d bytes", clip(path), maxAnchor)
		}
	}
	return checkString("anchor", path, maxPath-maxAnchor-2)
}

// checkBody checks that an inline anchor has only filter rules and anchors, as the
// production pfa_anchorlist of parse.y has it: neither tables nor translation.
func checkBody(b *Ruleset) error {
	if b == nil {
		return nil
	}
	for _, s := range b.Statements {
		r, ok := s.(*Rule)
		if !ok || r.Action != Pass && r.Action != Block && r.Action != Anchor {
			return errors.New("only filter rules and anchors may stand in braces")
		}
	}
	return nil
}

// checkState checks each of the state options by itself; settleState checks how they go
// together.
func checkState(r *Rule) error {
	o := &r.StateOptions
	if (r.State == StateDefault || r.State == NoState) && !o.isZero() {
		return errors.New("options of a state without keep state")
	}
	if o.SourceTrack > SourceTrackGlobal || o.Flush > FlushGlobal || o.Policy > IfBound {
		return errors.New("a value is out of range")
	}
	if (o.MaxSrcConnRate.Count == 0) != (o.MaxSrcConnRate.Seconds == 0) {
		return errors.New("max-src-conn-rate needs a count and seconds")
	}
	if o.Overload == "" && o.Flush != NoFlush {
		return errors.New("flush without overload")
	}
	if err := checkString("table", o.Overload, maxTable); err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, t := range o.Timeouts {
		if timeoutIndex(t.Name) < 0 || !strings.Contains(t.Name, ".") {
			return fmt.Errorf("no timeout %s of a state", clip(t.Name))
		}
		if seen[t.Name] {
			return fmt.Errorf("timeout %s for the second time", t.Name)
		}
		seen[t.Name] = t.Seconds != 0
	}
	return nil
}

// isZero reports whether no option is set. A Timeouts that is empty but not nil counts as
// not set, so the type can't simply be compared.
func (o *StateOptions) isZero() bool {
	return o.Max == 0 && !o.NoSync && o.SourceTrack == NoSourceTrack && o.MaxSrcStates == 0 && o.MaxSrcConn == 0 &&
		o.MaxSrcConnRate == Rate{} && o.Overload == "" && o.Flush == NoFlush && o.MaxSrcNodes == 0 &&
		o.Policy == PolicyDefault && len(o.Timeouts) == 0
}

// checkFlags checks flags and os of a filter rule or anchor, which only TCP has.
func checkFlags(r *Rule) error {
	if r.Flags != nil && r.Flags.Set&^r.Flags.Mask != 0 {
		return errors.New("the flags can never match: each has to be in the mask too")
	}
	if r.Flags != nil && r.Flags.Mask == 0 && r.Flags.Set == 0 && len(r.OS) == 0 || r.Flags == nil && len(r.OS) == 0 {
		return nil
	}
	if len(r.Protos) > 0 && !slices.Contains(r.Protos, ProtoTCP) {
		return errors.New("flags and os need proto tcp")
	}
	return nil
}

// checkAddress checks that an address has the fields of its kind and no others: printing
// would silently drop those.
func checkAddress(a Address) error {
	if a.Kind > AddrURPFFailed || !validMods(a.Mod) || a.Mod > ModNoAlias<<1-1 {
		return errors.New("an address of an unknown kind")
	}
	named := a.Kind == AddrTable || a.Kind == AddrInterface || a.Kind == AddrDynamic
	numeric := a.Kind == AddrPrefix || a.Kind == AddrRange
	iface := named && a.Kind != AddrTable
	switch {
	case a.Not && a.Kind == AddrAny:
		return errors.New("any can't be negated")
	case named != (a.Name != ""), numeric != a.Prefix.IsValid(), !iface && (a.Mod != 0 || a.Bits != nil),
		(a.Kind == AddrRange) != a.Last.IsValid(), a.Kind != AddrPrefix && a.Zone != "":
		return errors.New("an address with fields that its kind doesn't have")
	case numeric && a.Prefix != a.Prefix.Masked():
		return errors.New("a network with bits set beyond its length")
	case a.Zone != "" && (!a.Prefix.Addr().Is6() || a.Prefix.Addr().Is4In6()):
		return errors.New("a zone without IPv6")
	case a.Kind == AddrRange && (!a.Prefix.IsSingleIP() || a.Last.Is4() != a.Prefix.Addr().Is4() || a.Last.Zone() != ""):
		return errors.New("a range is two addresses of one family")
	case a.Kind == AddrTable:
		return checkString("table", a.Name, maxTable)
	case iface:
		return checkInterfaceAddress(a)
	}
	return checkString("zone", a.Zone, maxInterface)
}

// checkInterfaceAddress checks that a name can be that of an interface. pfctl would also
// take a host name and resolve it when it loads the ruleset, which can't be checked
// here; so a host name passes only if it looks like an interface.
func checkInterfaceAddress(a Address) error {
	if a.Bits != nil && *a.Bits > 128 || a.Kind == AddrInterface && a.Bits != nil && a.Mod&(ModNetwork|ModBroadcast) != 0 {
		return errors.New("an invalid prefix length")
	}
	if !isAlnum(int(a.Name[0])) || isDigit(int(a.Name[0])) || strings.Contains(a.Name, ":") {
		return fmt.Errorf("%q is no name of an interface", clip(a.Name))
	}
	return checkString("interface", a.Name, maxInterface)
}

// checkPool checks the addresses and options of a rule's pool and route.
func checkPool(r *Rule) error {
	var options []PoolOptions
	if r.Route != nil {
		options = append(options, r.Route.PoolOptions)
		if err := checkRoute(r.Route); err != nil {
			return err
		}
	}
	if r.Pool != nil {
		options = append(options, r.Pool.PoolOptions)
		if err := checkTarget(r); err != nil {
			return err
		}
	}
	for _, o := range options {
		if o.Kind > RoundRobin || o.Key != "" && o.Kind != SourceHash {
			return errors.New("a key without source-hash")
		}
		if digits, isHex := strings.CutPrefix(o.Key, "0x"); isHex && !isHexKey(digits) {
			return errors.New("a key is 0x and 32 hexadecimal digits, or a word")
		}
		for _, ext := range []string{o.ExtFilter, o.ExtMap} {
			if ext != "" && ext != "ei" && ext != "ad" && ext != "apd" {
				return fmt.Errorf("no filtering or mapping %q", clip(ext))
			}
		}
		if err := checkString("key", o.Key, maxToken); err != nil {
			return err
		}
	}
	return nil
}

// checkRoute checks the hops of a route.
func checkRoute(route *Route) error {
	if (route.Kind == Fastroute) != (len(route.Hops) == 0) || route.Kind > Fastroute {
		return errors.New("a route needs hops, fastroute has none")
	}
	for _, h := range route.Hops {
		if err := checkName("interface", h.Interface, maxInterface); err != nil {
			return err
		}
		if h.Addr != nil {
			if err := checkPoolAddress(*h.Addr); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkTarget checks the pool of a translation rule. binat has a pool of its own kind: one
// address without options.
func checkTarget(r *Rule) error {
	p := r.Pool
	binat := r.Action == Binat || r.Action == NoBinat
	switch {
	case len(p.Addrs) == 0 && (p.PortLo != 0 || p.PortHi != 0 || p.PortStar || binat):
		return errors.New("a port without an address behind ->")
	case p.PortStar && p.PortHi != 0, p.PortHi != 0 && p.PortHi == p.PortLo:
		return errors.New("a port behind -> is one, two or one and *")
	case len(p.Addrs) == 0 && p.PoolOptions == PoolOptions{}:
		return errors.New("an empty pool")
	case binat && (len(p.Addrs) != 1 || p.PoolOptions != PoolOptions{}):
		return errors.New("binat takes one address behind ->")
	}
	for _, a := range p.Addrs {
		if err := checkPoolAddress(a); err != nil {
			return err
		}
	}
	return nil
}

// checkBinat checks the source of a binat rule, whose grammar is stricter than others'.
func checkBinat(r *Rule) error {
	if r.Action != Binat && r.Action != NoBinat {
		return nil
	}
	if len(r.From.Addrs) != 1 || len(r.From.Ports)+len(r.To.Ports) > 0 {
		return errors.New("binat goes from one address, without ports")
	}
	return checkPoolAddress(r.From.Addrs[0])
}

// checkPoolAddress refuses addresses that the kernel doesn't take into a pool
// (DIOCADDADDR in xnu bsd/net/pf_ioctl.c), even where pfctl's grammar would.
func checkPoolAddress(a Address) error {
	if a.Not || a.Kind == AddrAny || a.Kind == AddrRange || a.Kind == AddrNoRoute || a.Kind == AddrURPFFailed {
		return errors.New("a pool holds addresses, networks, tables and interfaces")
	}
	return checkAddress(a)
}
