package pfconf

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Expand returns what pfctl loads into the kernel when the ruleset is given to
// it for an anchor ("" is the main ruleset) on a host with these interfaces. The
// result shares memory with the ruleset; neither may be changed afterwards.
//
// It fails if pfctl would: for the reasons of [Ruleset.Validate], and for those that depend
// on the host: a name that isn't an interface's, or an interface without an address of the
// family.
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

// Validate reports the first thing for which pfctl would refuse the ruleset, as
// the main ruleset, on any host: words that are too long, rules out of order,
// options that don't go together, rules that stand for no packet. Then the
// ruleset can be printed, and its text loads wherever the interfaces that it
// names outside parentheses as addresses have some.
func (rs *Ruleset) Validate() error {
	l := &loader{main: true, inline: map[string]bool{}, shared: &loaderShared{order: true}}
	if err := l.load(rs); err != nil {
		return err
	}
	return nil
}

// validate is Validate for a text that may be an anchor's.
func (rs *Ruleset) validate() *ruleError {
	l := &loader{inline: map[string]bool{}, shared: &loaderShared{order: true}}
	return l.load(rs)
}

// Unknown returns the statements that this package keeps as text, without their meaning.
func (rs *Ruleset) Unknown() []*Text {
	var all []*Text
	for _, s := range rs.Statements {
		if t, ok := s.(*Text); ok {
			all = append(all, t)
		}
	}
	return all
}

// A ruleError is a statement's refusal.
type ruleError struct {
	statement Statement
	problem   string
}

// Error names the statement by its text: a ruleset made of types has no lines.
func (e *ruleError) Error() string {
	return fmt.Sprintf("check %q: %s", clip(e.statement.String()), e.problem)
}

// A loader does pfctl's second half: it turns statements into rules. Without
// out and host it only checks, and the names of interfaces stand for unknown
// addresses.
type loader struct {
	path string
	hold string // where pfctl keeps an inline anchor while it is being read
	main bool
	out  *Loaded
	host host

	nr     int             // rules of this ruleset so far, for $nr
	inline map[string]bool // inline anchors of this ruleset
	shared *loaderShared
}

// loaderShared is the state that the loaders of a ruleset and its inline anchors share.
type loaderShared struct {
	order    bool // require-order
	stage    stage
	ifBound  bool
	blockAll bool // block-policy return
	rules    int
	braces   int
	depth    int
	anchors  []LoadedAnchor
}

// A stage is a section of a ruleset; they have to come in this order.
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

// load goes through the statements in their order, as pfctl does: options count for
// what follows them.
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

// enter moves on to a stage.
func (l *loader) enter(to stage) error {
	if l.shared.order && l.shared.stage > to {
		return errors.New("out of order: options come first, then scrub, translation and filter rules")
	}
	l.shared.stage = to
	return nil
}

// loadAnchor notes the file. pfctl reads the files of the main ruleset only, after
// the rest.
func (l *loader) loadAnchor(s *LoadAnchor) error {
	if err := checkString("anchor", s.Anchor, maxPath-1); err != nil {
		return err
	}
	if l.out != nil && l.main {
		l.out.Files = append(l.out.Files, s)
	}
	return checkString("file", s.File, maxPath-1)
}

// text checks the order of kept text too: pfctl would refuse the rest of the ruleset
// otherwise.
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

// option applies an option. Block policy, state policy and order are a matter of
// pfctl's parser and so count in an anchor too; all others don't.
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

// rule checks a rule by itself and loads it by its kind.
func (l *loader) rule(r *Rule) error {
	if err := checkRule(r); err != nil {
		return err
	}
	if (l.main || l.out != nil) && climbs(r.Anchor) > depth(l.path) {
		return errors.New("the anchor would be above the main ruleset")
	}
	at, ok := ruleStages[r.Action]
	if !ok {
		return fmt.Errorf("no action %d", r.Action)
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

// climbs counts the ../ with which a name begins: a call from the anchor above.
func climbs(name string) int {
	n := 0
	for ; strings.HasPrefix(name, "../"); n++ {
		name = name[len("../"):]
	}
	return n
}

// depth returns how many anchors a path is below the main ruleset.
func depth(path string) int {
	if path == "" {
		return 0
	}
	return strings.Count(path, "/") + 1
}

var ruleStages = map[Action]stage{
	Pass: stageFilter, Block: stageFilter, Anchor: stageFilter,
	Scrub: stageScrub, NoScrub: stageScrub, ScrubAnchor: stageScrub,
	Nat: stageNat, NoNat: stageNat, NatAnchor: stageNat,
	Rdr: stageNat, NoRdr: stageNat, RdrAnchor: stageNat,
	Binat: stageNat, NoBinat: stageNat, BinatAnchor: stageNat,
	DummynetAnchor: stageDummynet,
}

// filter loads pass and block.
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

// anchor loads a filter anchor, with the rules in its braces.
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

// body loads an inline anchor and returns the name by which pfctl calls it. That
// is the whole path, although a call is relative: an inline anchor within an
// anchor is loaded in one place and called in another.
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

// joinPath returns the path of an anchor in another.
func joinPath(parent, name string) string {
	if parent == "" {
		return name
	}
	return parent + "/" + name
}

// scrub loads normalisation. Unlike the filter it takes no family from its addresses
// as a whole; each single rule gets that of its own.
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

// translationAnchor loads the anchors of all kinds but the filter's.
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
		// pfctl forgets the interface here.
		r.Interfaces = nil
	}
	if r.Action == ScrubAnchor {
		r.Normalize.Fragment = FragmentReassemble
	}
	decideFamily(src, &r.Family)
	decideFamily(dst, &r.Family)
	return l.combine(&r, src, dst)
}

// translation loads nat and rdr and their no.
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

// binat loads binat, for which pfctl takes the first entry of each list.
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

// binatTarget returns the addresses behind ->.
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

// checkBinat checks what is left once names have become addresses. With names of
// unknown addresses it gives the benefit of the doubt.
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

// fits tells whether all addresses can be of the family.
func fits(addrs []Address, f Family) bool {
	for _, a := range addrs {
		if af := a.family(); af != AnyFamily && f != AnyFamily && af != f {
			return false
		}
	}
	return true
}

// sameMask compares the networks of both sides, which binat maps one to one.
func sameMask(src []Address, target Address, f Family) bool {
	for _, a := range src {
		if n := a.maskBits(f); n != 0 && n != target.maskBits(f) {
			return false
		}
	}
	return true
}

// firstOf drops all but the first, silently, as pfctl does.
func firstOf[T any](s []T) []T {
	if len(s) > 1 {
		return s[:1:1]
	}
	return s
}

// antispoof loads its block rules: what comes from the interface's networks by
// another interface, and what comes from its addresses by any.
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

// antispoofAddrs returns the networks and the addresses of an interface. One that
// doesn't exist has none, and makes no rules.
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

// table loads a table's definition; a later one of the same name replaces it.
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

// settleTables drops the tables that don't come to exist.
func (l *loader) settleTables() {
	used := map[string]bool{}
	for _, rules := range [][]*Rule{l.out.Scrub, l.out.Nat, l.out.Binat, l.out.Rdr, l.out.Filter} {
		for _, r := range rules {
			noteTables(r, used)
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

// noteTables notes the tables that keep themselves alive by a rule. A rule in an inline
// anchor isn't one: its reference is to a table of that anchor.
func noteTables(r *Rule, used map[string]bool) {
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
