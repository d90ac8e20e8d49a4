package pfconf

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Expand returns what pfctl loads into the kernel when it is given the ruleset for an
// anchor ("" is the main ruleset) on a host with these interfaces. The result shares
// memory with the ruleset; neither may be changed afterwards.
//
// It fails if pfctl would: for the reasons of [Ruleset.Validate], and for two that
// depend on the host, a name that is no interface, and an interface without an address
// of the family.
func (rs *Ruleset) Expand(anchor string, interfaces []Interface) (*Loaded, error) {
	l := &loader{path: anchor, hold: anchor, out: &Loaded{Path: anchor}, main: anchor == "",
		host: host(interfaces), inline: map[string]bool{}}
	l.shared = &loaderShared{order: true}
	if err := l.load(rs); err != nil {
		return nil, err
	}
	l.out.Declared = l.out.Tables
	l.settleTables()
	return l.out, nil
}

// Validate reports the first reason for which pfctl would refuse the ruleset as the
// main ruleset on any host: a word that is too long, rules out of order, options that
// don't go together, a rule that can match no packet. A valid ruleset can be printed,
// and its text loads on every host on which the interfaces that it names as addresses,
// outside parentheses, have one.
func (rs *Ruleset) Validate() error {
	l := &loader{main: true, inline: map[string]bool{}, shared: &loaderShared{order: true}}
	if err := l.load(rs); err != nil {
		return err
	}
	return nil
}

// validate is Validate for a ruleset that may be for an anchor.
func (rs *Ruleset) validate() *ruleError {
	l := &loader{inline: map[string]bool{}, shared: &loaderShared{order: true}}
	return l.load(rs)
}

// Unknown returns the statements that this package doesn't understand and keeps as text.
// Conclusions from the ruleset have to allow for them.
func (rs *Ruleset) Unknown() []*Text {
	var all []*Text
	for _, s := range rs.Statements {
		if t, ok := s.(*Text); ok {
			all = append(all, t)
		}
	}
	return all
}

// A ruleError is the reason for which a statement is refused.
type ruleError struct {
	statement Statement
	problem   string
}

// Error quotes the statement: a ruleset that is built from types has no line numbers.
func (e *ruleError) Error() string {
	return fmt.Sprintf("check %q: %s", clip(e.statement.String()), e.problem)
}

// A loader does what pfctl's parser does after it has recognised a statement (expand_rule
// in parse.y): it turns statements into the kernel's rules. Without out and host it only
// checks, and interface names stand for unknown addresses.
type loader struct {
	path string
	hold string  // path under which pfctl keeps an inline anchor while it reads it
	main bool    // the ruleset, or the one with this inline anchor, is the main ruleset
	out  *Loaded // nil: only check
	host host    // nil: unknown

	nr     int             // expanded rules of this ruleset so far: $nr in labels
	inline map[string]bool // names of inline anchors of this ruleset
	shared *loaderShared
}

// loaderShared is the state that the loaders of a ruleset and of its inline anchors
// share: options, and counts against the limits.
type loaderShared struct {
	order    bool           // set require-order; yes unless set
	stage    stage          // of the last statement
	ifBound  bool           // set state-policy if-bound
	blockAll bool           // set block-policy return
	rules    int            // expanded so far, see maxRules
	braces   int            // inline anchors so far, by which pfctl numbers nameless ones
	depth    int            // of the inline anchor that is being read
	anchors  []LoadedAnchor // that have been read
}

// A stage is a section of a ruleset. With require-order they must come in this order
// (PFCTL_STATE_* of pfctl_parser.h).
type stage uint8

const (
	stageNone stage = iota
	stageOption
	stageScrub
	stageQueue
	stageNat
	stageDummynet
	stageFilter
)

// load loads the statements in their order, as pfctl does: an option applies to the
// statements behind it.
func (l *loader) load(rs *Ruleset) *ruleError {
	for _, s := range rs.Statements {
		if err := l.statement(s); err != nil {
			var nested *ruleError
			if errors.As(err, &nested) {
				return nested
			}
			return &ruleError{s, err.Error()}
		}
	}
	if l.out != nil && l.shared.depth == 0 {
		l.out.Anchors = l.shared.anchors
	}
	return nil
}

// statement loads one statement.
func (l *loader) statement(s Statement) error {
	switch s := s.(type) {
	case *Macro:
		return checkMacro(s)
	case *Option:
		return l.option(s)
	case *Table:
		return l.table(s)
	case *Rule:
		return l.rule(s)
	case *Antispoof:
		return l.antispoof(s)
	case *LoadAnchor:
		return l.loadAnchor(s)
	case *Text:
		return l.text(s)
	}
	return fmt.Errorf("statement of type %T", s)
}

// enter moves on to a stage, or fails if that stage is over (check_rulestate in parse.y).
func (l *loader) enter(to stage) error {
	if l.shared.order && l.shared.stage > to {
		return errors.New("out of order: options come first, then scrub, translation and filter rules")
	}
	l.shared.stage = to
	return nil
}

// loadAnchor records the file. pfctl reads the files of the main ruleset only, and after
// the rest of it.
func (l *loader) loadAnchor(s *LoadAnchor) error {
	if err := checkString("anchor", s.Anchor, maxPath-1); err != nil {
		return err
	}
	if l.out != nil && l.main {
		l.out.Files = append(l.out.Files, s)
	}
	return checkString("file", s.File, maxPath-1)
}

// text checks a statement that is kept as text, and counts its stage: pfctl refuses a
// ruleset in which such a statement is out of order.
func (l *loader) text(t *Text) error {
	if err := checkText(t); err != nil {
		return err
	}
	switch first, _, _ := strings.Cut(t.Text, " "); first {
	case "altq", "queue":
		return l.enter(stageQueue)
	case "dummynet", "no":
		return l.enter(stageDummynet)
	}
	return nil
}

// option applies an option. block-policy, state-policy and require-order affect pfctl's
// parser, and so apply in an anchor too; the others don't. Some options may stand
// anywhere, since pfctl doesn't check their order.
func (l *loader) option(o *Option) error {
	if err := l.checkOption(o); err != nil {
		return err
	}
	switch o.Name {
	case "require-order":
		l.shared.order = o.Values[0] == "yes"
	case "state-policy":
		l.shared.ifBound = o.Values[0] == "if-bound"
	case "block-policy":
		l.shared.blockAll = o.Values[0] == "return"
	}
	switch o.Name {
	case "skip", "state-policy", "require-order", "hostid", "ruleset-optimization":
	default:
		if err := l.enter(stageOption); err != nil {
			return err
		}
	}
	if l.out != nil && l.main {
		l.out.Options = append(l.out.Options, o)
	}
	return nil
}

// rule checks a rule as written and loads it by its kind.
func (l *loader) rule(r *Rule) error {
	if err := checkRule(r); err != nil {
		return err
	}
	if (l.main || l.out != nil) && climbs(r.Anchor) > depth(l.path) {
		return errors.New("the anchor would be above the main ruleset")
	}
	at, ok := ruleStages[r.Action]
	if !ok {
		return fmt.Errorf("unknown action %d", r.Action)
	}
	if err := l.enter(at); err != nil {
		return err
	}
	switch r.Action {
	case Pass, Block:
		return l.filter(r)
	case Anchor:
		return l.anchor(r)
	case Scrub, NoScrub:
		return l.scrub(r)
	case Nat, NoNat, Rdr, NoRdr:
		return l.translation(r)
	case Binat, NoBinat:
		return l.binat(r)
	}
	return l.translationAnchor(r)
}

// climbs returns the number of ../ that an anchor's name begins with: each makes the name
// relative to the anchor one level up.
func climbs(name string) int {
	n := 0
	for ; strings.HasPrefix(name, "../"); n++ {
		name = name[len("../"):]
	}
	return n
}

// depth returns how many levels a path is below the main ruleset.
func depth(path string) int {
	if path == "" {
		return 0
	}
	return strings.Count(path, "/") + 1
}

// ruleStages has the stage of each action. Others are no action.
var ruleStages = map[Action]stage{
	Pass: stageFilter, Block: stageFilter, Anchor: stageFilter,
	Scrub: stageScrub, NoScrub: stageScrub, ScrubAnchor: stageScrub,
	Nat: stageNat, NoNat: stageNat, NatAnchor: stageNat,
	Rdr: stageNat, NoRdr: stageNat, RdrAnchor: stageNat,
	Binat: stageNat, NoBinat: stageNat, BinatAnchor: stageNat,
	DummynetAnchor: stageDummynet,
}

// filter loads a pass or block rule, with defaults written out: block-policy, keep state
// and flags S/SA for pass, the state policy.
func (l *loader) filter(written *Rule) error {
	r := *written
	if err := checkFlags(&r); err != nil {
		return err
	}
	if r.Return.Kind == ReturnDefault && r.Action == Block {
		r.Return.Kind = ReturnDrop
		if l.shared.blockAll {
			r.Return.Kind = ReturnAll
		}
	}
	if r.State == StateDefault && r.Action == Pass {
		r.State = KeepState
	}
	if err := l.settleState(&r); err != nil {
		return err
	}
	if r.Flags == nil && r.Action == Pass && !r.Fragment && r.State != NoState {
		r.Flags = &Flags{Set: FlagSYN, Mask: FlagSYN | FlagACK}
	}
	src, dst, err := l.endpoints(&r)
	if err != nil {
		return err
	}
	decideFamily(src, &r.Family)
	decideFamily(dst, &r.Family)
	if err := l.routePool(&r); err != nil {
		return err
	}
	return l.combine(&r, src, dst)
}

// anchor loads the call of a filter anchor, and its rules in braces. The options that
// it drops are those that pfctl reads for an anchor and doesn't hand to the kernel.
func (l *loader) anchor(written *Rule) error {
	r := *written
	r.Body, r.Fragment, r.AllowOpts, r.Queue, r.PriQueue = nil, false, false, "", ""
	if written.Body != nil {
		name, err := l.body(written)
		if err != nil {
			return err
		}
		r.Anchor = name
	}
	if err := checkFlags(&r); err != nil {
		return err
	}
	src, dst, err := l.endpoints(&r)
	if err != nil {
		return err
	}
	decideFamily(src, &r.Family)
	decideFamily(dst, &r.Family)
	return l.combine(&r, src, dst)
}

// body loads an inline anchor and returns the name with which pfctl calls it. That is the
// whole path, although the kernel resolves a name relative to the caller. So an inline
// anchor within an anchor is loaded at one path and called at another, a mistake of
// pfctl's that Expand repeats, since it decides which rules are evaluated.
func (l *loader) body(r *Rule) (string, error) {
	s := l.shared
	if s.depth >= maxNested {
		return "", fmt.Errorf("anchors nested more than %d deep", maxNested)
	}
	s.braces++
	hold := fmt.Sprintf("_%d", s.braces)
	name := r.Anchor[strings.LastIndexByte(r.Anchor, '/')+1:]
	if r.Anchor == "" {
		name = hold
	}
	child := &loader{path: joinPath(l.path, name), hold: hold, host: l.host, main: l.main,
		inline: map[string]bool{}, shared: s}
	if l.out != nil {
		child.out = &Loaded{Path: child.path}
	}
	s.depth++
	err := child.load(r.Body)
	s.depth--
	if err != nil {
		return "", err
	}
	if len(r.Body.Statements) == 0 {
		if r.Anchor == "" {
			return joinPath(l.hold, name), nil
		}
		return joinPath(l.hold, r.Anchor), nil
	}
	if l.inline[name] {
		return "", fmt.Errorf("the inline anchor %s already exists", clip(name))
	}
	l.inline[name] = true
	s.anchors = append(s.anchors, LoadedAnchor{Path: child.path, Loaded: child.out})
	return child.path, nil
}

// joinPath returns the path of the anchor name below parent.
func joinPath(parent, name string) string {
	if parent == "" {
		return name
	}
	return parent + "/" + name
}

// scrub loads a scrub rule. Unlike a filter rule's, its family isn't derived from all of
// its addresses; each expanded rule gets the family of its own address.
func (l *loader) scrub(written *Rule) error {
	r := *written
	if r.Normalize.ReassembleTCP && r.Direction != Both {
		return errors.New("reassemble tcp takes no direction")
	}
	if r.Action == Scrub && r.Normalize.Fragment == FragmentDefault {
		r.Normalize.Fragment = FragmentReassemble
	}
	src, dst, err := l.endpoints(&r)
	if err != nil {
		return err
	}
	return l.combine(&r, src, dst)
}

// translationAnchor loads the call of an anchor of any kind but the filter's.
func (l *loader) translationAnchor(written *Rule) error {
	r := *written
	src, dst, err := l.endpoints(&r)
	if err != nil {
		return err
	}
	switch {
	case r.Action == RdrAnchor && r.From.Ports != nil:
		return errors.New("an rdr-anchor takes no source port")
	case r.Action == RdrAnchor && len(r.To.Ports) > 1:
		return errors.New("an rdr-anchor takes one port")
	case r.Action == RdrAnchor && len(r.To.Ports) == 1 && r.To.Ports[0].Op != Equal:
		return errors.New("an rdr-anchor takes a port without operator")
	case r.Action == BinatAnchor && (src != nil || dst != nil || r.From.Ports != nil || r.To.Ports != nil):
		return errors.New("a binat-anchor takes no addresses")
	case r.Action == BinatAnchor && len(r.Protos) > 1:
		return errors.New("a binat-anchor takes one protocol")
	case r.Action == BinatAnchor:
		// pfctl drops the interface of a binat-anchor.
		r.Interfaces = nil
	}
	if r.Action == ScrubAnchor {
		r.Normalize.Fragment = FragmentReassemble
	}
	decideFamily(src, &r.Family)
	decideFamily(dst, &r.Family)
	return l.combine(&r, src, dst)
}

// translation loads a nat or rdr rule, or one of their No forms.
func (l *loader) translation(written *Rule) error {
	r := *written
	src, dst, err := l.endpoints(&r)
	if err != nil {
		return err
	}
	for _, side := range [][]Address{src, dst} {
		if r.Family == AnyFamily && len(side) > 0 && side[0].Zone == "" {
			r.Family = side[0].family()
		}
	}
	no := r.Action == NoNat || r.Action == NoRdr
	hasTarget := r.Pool != nil && len(r.Pool.Addrs) > 0
	switch {
	case no && hasTarget:
		return errors.New("a rule with no takes no ->")
	case !no && !hasTarget:
		return errors.New("-> and an address are missing")
	case !no:
		if err := l.settlePool(&r); err != nil {
			return err
		}
	case r.Pool != nil && r.Pool.StaticPort:
		return errors.New("static-port is for nat only")
	}
	return l.combine(&r, src, dst)
}

// binat loads a binat rule. Of lists of interfaces and protocols pfctl takes the first
// entry.
func (l *loader) binat(written *Rule) error {
	r := *written
	r.Interfaces, r.Protos = firstOf(r.Interfaces), firstOf(r.Protos)
	src, dst, err := l.endpoints(&r)
	if err != nil {
		return err
	}
	target, err := l.binatTarget(&r)
	if err != nil {
		return err
	}
	for _, side := range [][]Address{src, dst, target} {
		if r.Family == AnyFamily && len(side) > 0 {
			r.Family = side[0].family()
		}
	}
	if err := l.checkBinat(&r, src, dst, target); err != nil {
		return err
	}
	r.From.Addrs, r.To.Addrs = fixMasks(src, r.Family), fixMasks(dst, r.Family)
	if r.Action == Binat {
		r.Pool = &Pool{Addrs: fixMasks(target, r.Family)}
	}
	return l.add(&r)
}

// binatTarget returns the addresses behind ->, with interface names resolved.
func (l *loader) binatTarget(r *Rule) ([]Address, error) {
	switch hasTarget := r.Pool != nil && len(r.Pool.Addrs) > 0; {
	case r.Action == NoBinat && hasTarget:
		return nil, errors.New("a rule with no takes no ->")
	case r.Action == Binat && !hasTarget:
		return nil, errors.New("-> and an address are missing")
	case !hasTarget:
		return nil, nil
	}
	return l.resolve(r.Pool.Addrs)
}

// checkBinat checks a binat rule whose names are resolved. If some couldn't be, because
// the host is unknown, it accepts the rule where that decides.
func (l *loader) checkBinat(r *Rule, src, dst, target []Address) error {
	unsure := anyUnresolved(src) || anyUnresolved(dst) || anyUnresolved(target)
	target, family := matchingFamily(target, r.Family)
	switch {
	case family == AnyFamily && !unsure:
		return errors.New("inet or inet6 is missing")
	case len(src) > 1 || len(dst) > 1:
		return errors.New("binat takes one address a side")
	case slices.ContainsFunc(slices.Concat(src, target), func(a Address) bool { return a.Kind == AddrTable || a.changes() }):
		return errors.New("binat takes no table, and no (interface) but for its first address")
	case family != AnyFamily && !fits(src, family) || !fits(dst, family):
		return errors.New("the addresses of binat are of two families")
	case r.Action == NoBinat:
		return nil
	case len(target) == 0:
		return errors.New("no address behind -> is of the family")
	case len(target) > 1:
		return errors.New("binat takes one address behind ->")
	case !unsure && !sameMask(src, target[0], family):
		return errors.New("the prefix lengths before and behind -> differ")
	}
	return nil
}

// fits reports whether all addresses can be of the family.
func fits(addrs []Address, f Family) bool {
	for _, a := range addrs {
		if af := a.family(); af != AnyFamily && f != AnyFamily && af != f {
			return false
		}
	}
	return true
}

// sameMask reports whether the networks of both sides have the same length: binat maps
// their addresses one to one.
func sameMask(src []Address, target Address, f Family) bool {
	for _, a := range src {
		if n := a.maskBits(f); n != 0 && n != target.maskBits(f) {
			return false
		}
	}
	return true
}

// firstOf returns the list with only its first entry. pfctl drops the others silently.
func firstOf[T any](s []T) []T {
	if len(s) > 1 {
		return s[:1:1]
	}
	return s
}

// antispoof loads the block rules of an antispoof statement: against packets from the
// interface's networks that arrive on another interface, and against packets from its
// own addresses that arrive on any.
func (l *loader) antispoof(a *Antispoof) error {
	if err := checkAntispoof(a); err != nil {
		return err
	}
	if err := l.enter(stageFilter); err != nil {
		return err
	}
	for _, i := range a.Interfaces {
		base := Rule{Action: Block, Return: Return{Kind: ReturnDrop}, Direction: In, Quick: a.Quick, Log: a.Log,
			Family: a.Family, Label: a.Label, RTable: a.RTable}
		networks, addrs := l.antispoofAddrs(i)
		if len(networks) > 0 {
			r := base
			r.Interfaces = []InterfaceMatch{{Name: i.Name, Not: true}}
			if err := l.combine(&r, networks, nil); err != nil {
				return err
			}
		}
		if len(addrs) > 0 && !(Interface{Name: i.Name}).IsLoopback() {
			r := base
			if r.Log != nil && r.Log.To != "" {
				log := *r.Log
				log.To = ""
				r.Log = &log
			}
			if err := l.combine(&r, addrs, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// antispoofAddrs returns the networks and the addresses of an interface. An interface
// that doesn't exist has none, which is no error: the statement then makes no rules.
func (l *loader) antispoofAddrs(i AntispoofInterface) (networks, addrs []Address) {
	if i.Dynamic {
		return []Address{{Kind: AddrDynamic, Name: i.Name, Mod: ModNetwork}},
			[]Address{{Kind: AddrDynamic, Name: i.Name}}
	}
	if l.host == nil {
		return []Address{{Kind: AddrInterface, Name: i.Name, Mod: ModNetwork}},
			[]Address{{Kind: AddrInterface, Name: i.Name}}
	}
	return l.host.lookup(i.Name, ModNetwork), l.host.lookup(i.Name, 0)
}

// table loads a table's definition. A later one of the same name replaces it.
func (l *loader) table(t *Table) error {
	if err := checkTable(t); err != nil {
		return err
	}
	addrs, err := l.resolve(t.Addrs)
	if err != nil {
		return err
	}
	if l.out == nil {
		return nil
	}
	loaded := *t
	loaded.Addrs = stored(addrs)
	for i, old := range l.out.Tables {
		if old.Name == t.Name {
			l.out.Tables[i] = &loaded
			return nil
		}
	}
	l.out.Tables = append(l.out.Tables, &loaded)
	return nil
}

// settleTables drops the tables that the kernel removes at once: those that are neither
// persistent nor used by a rule.
func (l *loader) settleTables() {
	used := map[string]bool{}
	for _, rules := range [][]*Rule{l.out.Scrub, l.out.Nat, l.out.Binat, l.out.Rdr, l.out.Filter} {
		for _, r := range rules {
			addUsedTables(r, used)
		}
	}
	var kept []*Table
	for _, t := range l.out.Tables {
		if t.Persist || used[t.Name] {
			kept = append(kept, t)
		}
	}
	l.out.Tables = kept
}

// addUsedTables adds the tables that a rule uses to used. Rules in inline anchors don't
// count: what they use is a table of that anchor by the same name.
func addUsedTables(r *Rule, used map[string]bool) {
	for _, addrs := range [][]Address{r.From.Addrs, r.To.Addrs, r.poolAddrs()} {
		for _, a := range addrs {
			if a.Kind == AddrTable {
				used[a.Name] = true
			}
		}
	}
	if r.StateOptions.Overload != "" {
		used[r.StateOptions.Overload] = true
	}
}

// poolAddrs returns the addresses of the rule's pool or route.
func (r *Rule) poolAddrs() []Address {
	var addrs []Address
	if r.Pool != nil {
		addrs = r.Pool.Addrs
	}
	if r.Route != nil {
		for _, h := range r.Route.Hops {
			if h.Addr != nil {
				addrs = append(addrs, *h.Addr)
			}
		}
	}
	return addrs
}
