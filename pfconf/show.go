package pfconf

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Shown is the parsed output of pfctl -sr or -sn.
type Shown struct {
	// Rules are the rules in the order shown, with a stand-in for each that can't
	// be read. Rules of nameless inline anchors are in their anchor's Body.
	Rules []ShownRule
	// Unknown are the lines that can't be read, those in bodies too. Conclusions
	// from the rules have to allow for them.
	Unknown []UnknownLine
}

// A ShownRule is a rule with what pfctl shows about it.
type ShownRule struct {
	// Rule is never nil. If Err isn't nil, the line can't be read and Rule stands in for
	// it: a rule that has the line's action and matches every packet, so that a
	// conclusion from it errs towards a rule that matters. For pass and block it is
	//
	//	pass quick all flags any keep state (floating) allow-opts
	//	block drop quick all
	//
	// with quick only if the line has the word. For the call of an anchor it calls the
	// same anchor. A translation rule has no Pool, so it can't be loaded.
	*Rule
	// Text is the line as pfctl shows it, without its number.
	Text string
	// Err says why the line can't be read; nil: it can.
	Err error
	// Number is the rule's number in its list, from 0, with -vv; -1 without.
	Number int
	// Evaluations, Packets, Bytes and States are the counters that -v shows, 0 without.
	Evaluations, Packets, Bytes, States uint64
}

// An UnknownLine is a line of pfctl's output that can't be read.
type UnknownLine struct {
	Line int // from 1
	Text string
	Err  error // why not
	// StandIn is the rule in place of the line, in Rules or in a Body. nil: there is none,
	// since the line doesn't begin as a rule does.
	StandIn *Rule
}

// ParseShown reads the output of pfctl -sr or -sn, with or without -v or -vv. It never
// fails: a line that it can't read is kept in Unknown and, if it begins as a rule does,
// has a stand-in among the rules. A program that loads rules by /dev/pf without pfctl
// can make the kernel hold some that pfctl shows but wouldn't accept; these count as
// lines that can't be read.
func ParseShown(text string) *Shown { return Names{}.ParseShown(text) }

// ParseShown is [ParseShown] with names of the host, since pfctl shows ports by the names
// of its /etc/services.
func (n Names) ParseShown(text string) *Shown {
	s := &Shown{}
	r := shownReader{names: n, shown: s}
	for i, line := range strings.Split(text, "\n") {
		r.line(i+1, strings.TrimSpace(line))
	}
	return s
}

// Ruleset joins the output of -sr and -sn for one anchor to a ruleset that can be
// loaded: scrub rules, translation rules, filter rules. Either may be nil. It contains the
// stand-ins for rules that can't be read, except those of translation rules.
func (s *Shown) Ruleset(nat *Shown) *Ruleset {
	rs := &Ruleset{}
	add := func(from *Shown, stages ...stage) {
		if from == nil {
			return
		}
		for _, r := range from.Rules {
			if r.Err != nil && r.translates() {
				continue
			}
			if slices.Contains(stages, ruleStages[r.Action]) {
				rs.Statements = append(rs.Statements, r.Rule)
			}
		}
	}
	add(s, stageScrub)
	add(nat, stageScrub)
	add(s, stageNat)
	add(nat, stageNat)
	add(s, stageDummynet)
	add(nat, stageDummynet)
	add(s, stageFilter)
	add(nat, stageFilter)
	return rs
}

// A shownReader reads lines of rules into shown.
type shownReader struct {
	names Names
	shown *Shown
	open  []*Rule // inline anchors whose braces are open, the innermost last
}

// noise are lines that pfctl prints besides its output, mostly on standard error, which
// the caller may have joined with it.
var noise = set("No ALTQ support in kernel", "ALTQ related functions disabled", "FILTER RULES:", "TRANSLATION RULES:", "DUMMYNET RULES:",
	"pfctl: Use of -f option, could result in flushing of rules",
	"present in the main ruleset added by the system at startup.", "See /etc/pf.conf for further details.")

// line reads one line: a rule, the counters of one, or the end of an inline anchor.
func (r *shownReader) line(nr int, line string) {
	switch {
	case line == "" || noise[line]:
	case strings.HasPrefix(line, "[ "):
		r.counters(nr, line)
	case line == "}" && len(r.open) > 0:
		r.open = r.open[:len(r.open)-1]
	default:
		r.rule(nr, line)
	}
}

// rule reads the line of a rule. Each line is parsed by itself, so one that can't be read
// doesn't affect the others.
func (r *shownReader) rule(nr int, line string) {
	number, text, verbose := shownNumber(line)
	rule, err := r.names.parseShownRule(text, verbose)
	if err != nil {
		rule = standIn(text)
		r.unknown(nr, line, err)
		r.shown.Unknown[len(r.shown.Unknown)-1].StandIn = rule
		if rule == nil {
			return
		}
	}
	if len(r.open) > 0 {
		body := r.open[len(r.open)-1].Body
		body.Statements = append(body.Statements, rule)
	} else {
		r.shown.Rules = append(r.shown.Rules, ShownRule{Rule: rule, Text: clipLine(text), Err: err, Number: number})
	}
	if rule.Body == nil {
		return
	}
	if len(r.open) >= maxNested {
		r.unknown(nr, line, fmt.Errorf("anchors nested more than %d deep", maxNested))
		rule.Body = nil
		return
	}
	r.open = append(r.open, rule)
}

// clipLine shortens a line that is kept, so that output of any length needs little memory.
func clipLine(s string) string { return s[:min(len(s), maxToken)] }

// standIn returns a rule that matches every packet, with the action of a line that can't
// be read; nil if the line doesn't begin as a rule does. See ShownRule.
func standIn(line string) *Rule {
	words := strings.Fields(clipLine(line))
	if len(words) == 0 {
		return nil
	}
	first := words[0]
	if first == "no" && len(words) > 1 {
		first += " " + words[1]
	}
	action, ok := standIns[first]
	if !ok {
		return nil
	}
	r := &Rule{Action: action}
	switch action {
	case Pass:
		r.Flags, r.State, r.AllowOpts = &Flags{}, KeepState, true
		r.StateOptions.Policy = Floating
	case Block:
		r.Return.Kind = ReturnDrop
	}
	if action == Pass || action == Block || action == Anchor {
		r.Quick = slices.Contains(words, "quick")
	}
	if _, isAnchor := anchorWords[action]; isAnchor {
		return standInAnchor(r, words)
	}
	return r
}

// standInAnchor completes r for the call of an anchor, whose name is the second word. It
// returns nil if the name isn't valid, as when it has spaces.
func standInAnchor(r *Rule, words []string) *Rule {
	if len(words) > 1 && len(words[1]) > 2 && words[1][0] == '"' {
		r.Anchor = strings.Trim(words[1], `"`)
	}
	if words[len(words)-1] == "{" && r.Action == Anchor {
		r.Body = &Ruleset{}
	}
	if checkShown(r) != nil {
		return nil
	}
	return r
}

// standIns has the actions by the words that a rule begins with.
var standIns = map[string]Action{
	"pass": Pass, "block": Block, "anchor": Anchor, "scrub": Scrub, "no scrub": NoScrub,
	"nat": Nat, "no nat": NoNat, "rdr": Rdr, "no rdr": NoRdr, "binat": Binat, "no binat": NoBinat,
	// nat64 is Apple's translation from IPv6 to IPv4.
	"nat64": Nat, "no nat64": NoNat,
	"nat-anchor": NatAnchor, "rdr-anchor": RdrAnchor, "binat-anchor": BinatAnchor,
	"scrub-anchor": ScrubAnchor, "dummynet-anchor": DummynetAnchor,
}

// translates reports whether the rule is a nat, binat or rdr rule, or one of their No
// forms.
func (r *Rule) translates() bool { return r.Action >= Nat && r.Action <= NoRdr }

// unknown records a line that can't be read.
func (r *shownReader) unknown(nr int, line string, err error) {
	r.shown.Unknown = append(r.shown.Unknown, UnknownLine{Line: nr, Text: clipLine(line), Err: err})
}

// shownNumber splits @12 from a rule, which pfctl -vv puts in front. verbose reports
// whether it was there: then the rule also shows counts of addresses, <t:2>, (en0:1).
func shownNumber(line string) (number int, text string, verbose bool) {
	if at, rest, ok := strings.Cut(line, " "); ok && strings.HasPrefix(at, "@") {
		if n, err := strconv.Atoi(at[1:]); err == nil && n >= 0 {
			return n, rest, true
		}
	}
	return -1, line, false
}

// parseShownRule reads one rule, or the first line of an inline anchor.
func (n Names) parseShownRule(line string, verbose bool) (*Rule, error) {
	if len(line) > maxPasted {
		return nil, fmt.Errorf("a line of %d bytes", len(line))
	}
	text := line
	if strings.HasSuffix(line, "{") {
		text += "\n}"
	}
	p := &parser{lex: newLexer(text), names: n, pos: map[Statement]position{}, shown: true, counts: verbose}
	p.advance()
	all := p.statements(false)
	if p.err != nil {
		return nil, p.err
	}
	if len(all) != 1 {
		return nil, fmt.Errorf("%d statements on a line", len(all))
	}
	r, ok := all[0].(*Rule)
	if !ok {
		return nil, fmt.Errorf("%q isn't a rule that can be read", clip(line))
	}
	if err := checkShown(r); err != nil {
		return nil, err
	}
	return r, nil
}

// checkShown checks that a rule that was read can be loaded: pfctl shows no interface as
// an address, since it resolves them, and what it shows must be valid.
func checkShown(r *Rule) error {
	for _, addrs := range [][]Address{r.From.Addrs, r.To.Addrs, r.poolAddrs()} {
		for _, a := range addrs {
			if a.Kind == AddrInterface {
				return fmt.Errorf("%s is no address", clip(a.Name))
			}
		}
	}
	if err := (&Ruleset{Statements: []Statement{r}}).validate(); err != nil {
		return errors.New(err.problem)
	}
	return nil
}

// counters reads [ Evaluations: 8  Packets: 3  Bytes: 180  States: 0 ], the counters of
// the rule before. It ignores those in inline anchors, and other lines in brackets, such
// as [ Inserted: uid 0 pid 1 ].
func (r *shownReader) counters(nr int, line string) {
	words := strings.Fields(strings.Trim(line, "[]"))
	if len(r.open) > 0 || len(r.shown.Rules) == 0 || len(words) == 0 {
		return
	}
	rule := &r.shown.Rules[len(r.shown.Rules)-1]
	fields := map[string]*uint64{"Evaluations:": &rule.Evaluations, "Packets:": &rule.Packets,
		"Bytes:": &rule.Bytes, "States:": &rule.States}
	if fields[words[0]] == nil {
		return
	}
	for i := 0; i+1 < len(words); i += 2 {
		n, err := strconv.ParseUint(words[i+1], 10, 64)
		if fields[words[i]] == nil || err != nil {
			r.unknown(nr, line, fmt.Errorf("read counter %s: no number", clip(words[i])))
			return
		}
		*fields[words[i]] = n
	}
}

// ParseAnchors reads the output of pfctl -s Anchors, the paths of anchors. An anchor that
// was ever loaded stays listed until the host restarts, even when it is empty.
func ParseAnchors(text string) []string { return shownWords(text) }

// shownWords returns the lines without surrounding spaces, except empty ones and noise.
func shownWords(text string) []string {
	var all []string
	for _, line := range strings.Split(text, "\n") {
		if line = strings.TrimSpace(line); line != "" && !noise[line] {
			all = append(all, line)
		}
	}
	return all
}

// A ShownInterface is an interface as pf knows it.
type ShownInterface struct {
	Name string
	Skip bool // set skip: pf passes its packets unseen; known with -v only
}

// ParseInterfaces reads the output of pfctl -v -s Interfaces. The list also has groups
// and interfaces that rules name but that don't exist.
func ParseInterfaces(text string) []ShownInterface {
	var all []ShownInterface
	for _, line := range strings.Split(text, "\n") {
		// Counters of -vv are indented.
		if line = strings.TrimRight(line, " \r"); line == "" || line[0] == '\t' || line[0] == ' ' || noise[line] {
			continue
		}
		name, skip := strings.CutSuffix(line, " (skip)")
		all = append(all, ShownInterface{Name: name, Skip: skip})
	}
	return all
}

// A ShownTable is a table as pfctl -s Tables shows it. All fields but Name are known with
// -v only.
type ShownTable struct {
	Name       string
	Anchor     string // "" is the main ruleset
	Const      bool
	Persist    bool
	Referenced bool   // by a rule of the same ruleset
	Flags      string // the letters as shown, such as -pa-r-
}

// ParseTables reads the output of pfctl -s Tables, with or without -v.
func ParseTables(text string) []ShownTable {
	var all []ShownTable
	for _, line := range strings.Split(text, "\n") {
		// Statistics of -vv are indented.
		if line = strings.TrimRight(line, " \r"); line == "" || line[0] == '\t' || line[0] == ' ' || noise[line] {
			continue
		}
		fields := strings.Split(line, "\t")
		if len(fields) == 1 || !isTableFlags(fields[0]) {
			all = append(all, ShownTable{Name: fields[0]})
			continue
		}
		flags := fields[0]
		t := ShownTable{Name: fields[1], Flags: flags, Const: strings.Contains(flags, "c"),
			Persist: strings.Contains(flags, "p"), Referenced: strings.Contains(flags, "r")}
		if len(fields) > 2 {
			t.Anchor = fields[2]
		}
		all = append(all, t)
	}
	return all
}

// isTableFlags reports whether s has the flags that -v shows before a tab, and isn't a
// table's name that contains one (print_table in pfctl_table.c).
func isTableFlags(s string) bool {
	return len(s) >= 6 && strings.Trim(s, "-cpairhC") == ""
}

// ParseTableEntries reads the output of pfctl -t TABLE -T show, with or without -v. It
// fails at a line that is no address or network, with an [*EntryError].
func ParseTableEntries(text string) ([]Address, error) {
	var all []Address
	for i, line := range strings.Split(text, "\n") {
		// Counters of -v come after a tab.
		entry, _, _ := strings.Cut(strings.TrimRight(line, " \r"), "\t")
		if entry = strings.TrimSpace(entry); entry == "" || noise[entry] {
			continue
		}
		a, err := parseEntry(entry)
		if err != nil {
			return nil, &EntryError{Line: i + 1, Err: err}
		}
		all = append(all, a)
	}
	return all, nil
}

// An EntryError says that an entry of a table can't be read.
type EntryError struct {
	Line int   // from 1
	Err  error // why not
}

// Error returns the line and the reason.
func (e *EntryError) Error() string {
	return fmt.Sprintf("read table entry on line %d: %v", e.Line, e.Err)
}

// Unwrap returns Err.
func (e *EntryError) Unwrap() error { return e.Err }

// parseEntry reads an entry of a table: an address or network, with ! if it is negated.
func parseEntry(entry string) (Address, error) {
	text, not := strings.CutPrefix(entry, "!")
	ip, bits, hasBits := strings.Cut(strings.TrimSpace(text), "/")
	addr, zone, ok := parseIP(ip)
	if !ok {
		return Address{}, fmt.Errorf("%q is no address", clip(entry))
	}
	a := Address{Kind: AddrPrefix, Not: not, Prefix: hostPrefix(addr), Zone: zone}
	if !hasBits {
		return a, nil
	}
	n, err := strconv.ParseUint(bits, 10, 8)
	if err != nil || int(n) > addr.BitLen() {
		return Address{}, fmt.Errorf("%q is no network", clip(entry))
	}
	a.Prefix, _ = addr.Prefix(int(n))
	return a, nil
}
