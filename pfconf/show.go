package pfconf

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Shown is what pfctl -sr or -sn printed, read.
type Shown struct {
	// Rules are the rules in the order shown, with a stand-in for each that can't
	// be read. Rules of nameless inline anchors are in their anchor's Body.
	Rules []ShownRule
	// Unknown are the lines that can't be read, those of bodies too. Conclusions
	// from the rules have to allow for them.
	Unknown []UnknownLine
}

// A ShownRule is a rule with what pfctl -v tells about it.
type ShownRule struct {
	// Rule is never nil. If Err isn't nil, it stands in for a rule that can't be
	// read: what the first words say, for every packet. pass and block make
	//
	//	pass quick all flags any keep state (floating) allow-opts
	//	block drop quick all
	//
	// with quick if the word is in the line; anchor calls the same anchor; a
	// translation rule has no Pool, so that it can't be loaded.
	*Rule
	// Text is the line as pfctl shows it, without its number.
	Text string
	// Err says why the line can't be read; nil: it was.
	Err error
	// Number is the rule's number in its list with -vv, -1 without.
	Number int
	// Evaluations, Packets, Bytes and States are the counters of -v.
	Evaluations, Packets, Bytes, States uint64
}

// An UnknownLine is a line of pfctl's output that isn't understood.
type UnknownLine struct {
	Line int // from 1
	Text string
	Err  error
	// StandIn is the rule in the place of the line, in Rules or in a Body; nil: there
	// is none.
	StandIn *Rule
}

// ParseShown reads what pfctl -sr or -sn prints, with -v or -vv too. It has no
// errors: a line that it can't read is kept in Unknown and, if it begins as a rule
// does, has a stand-in among the rules. A program that loads rules without pfctl
// can have the kernel hold some that pfctl shows but wouldn't accept; these count
// as lines that can't be read.
func ParseShown(text string) *Shown { return Names{}.ParseShown(text) }

// ParseShown is [ParseShown] with the host's names: pfctl shows ports by the
// names in the host's services file.
func (n Names) ParseShown(text string) *Shown {
	s := &Shown{}
	r := shownReader{names: n, shown: s}
	for i, line := range strings.Split(text, "\n") {
		r.line(i+1, strings.TrimSpace(line))
	}
	return s
}

// Ruleset joins the output of -sr and -sn of one anchor to a ruleset that can be
// loaded again: scrub rules, translation rules, filter rules. Either may be nil. Of
// rules that can't be read it has the stand-ins, except of those that translate.
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

// A shownReader reads lines of rules; open are the anchors whose braces are.
type shownReader struct {
	names Names
	shown *Shown
	open  []*Rule
}

// noise are lines that pfctl writes besides; they go to the standard error, with
// which its output may have been joined.
var noise = set("No ALTQ support in kernel", "ALTQ related functions disabled", "FILTER RULES:", "TRANSLATION RULES:", "DUMMYNET RULES:",
	"pfctl: Use of -f option, could result in flushing of rules",
	"present in the main ruleset added by the system at startup.", "See /etc/pf.conf for further details.")

// line reads one line: of a rule, its counters, or the end of an inline anchor.
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

// rule reads the line of a rule. Each stands for itself, so that one that can't
// be read doesn't spoil the others.
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

// clipLine bounds what is kept of a line.
func clipLine(s string) string { return s[:min(len(s), maxToken)] }

// standIn makes a rule for every packet out of the first words of one that can't
// be read; nil for a line that is no rule.
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

// standInAnchor completes the call of an anchor, whose name is the second word.
// The words of a name with spaces aren't put together again.
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

// standIns are the words with which rules begin.
var standIns = map[string]Action{
	"pass": Pass, "block": Block, "anchor": Anchor, "scrub": Scrub, "no scrub": NoScrub,
	"nat": Nat, "no nat": NoNat, "rdr": Rdr, "no rdr": NoRdr, "binat": Binat, "no binat": NoBinat,
	// nat64 is Apple's, from one family to the other.
	"nat64": Nat, "no nat64": NoNat,
	"nat-anchor": NatAnchor, "rdr-anchor": RdrAnchor, "binat-anchor": BinatAnchor,
	"scrub-anchor": ScrubAnchor, "dummynet-anchor": DummynetAnchor,
}

// translates reports whether the rule is of the kinds that have a pool, with or
// without no in front.
func (r *Rule) translates() bool { return r.Action >= Nat && r.Action <= NoRdr }

// unknown keeps a line.
func (r *shownReader) unknown(nr int, line string, err error) {
	r.shown.Unknown = append(r.shown.Unknown, UnknownLine{Line: nr, Text: clipLine(line), Err: err})
}

// shownNumber separates @12 from a rule. With it pfctl also shows how many
// addresses there are: <t:2>, (en0:1).
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
		return nil, fmt.Errorf("read %q: no rule that is understood", clip(line))
	}
	if err := checkShown(r); err != nil {
		return nil, err
	}
	return r, nil
}

// checkShown reports why a rule that was read can't be loaded again.
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

// counters reads [ Evaluations: 8  Packets: 3  Bytes: 180  States: 0 ] for the
// rule before.
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

// ParseAnchors reads what pfctl -s Anchors prints: the paths of anchors.
func ParseAnchors(text string) []string { return shownWords(text) }

// shownWords returns the lines that aren't empty or noise, without spaces around.
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
	Skip bool // set skip: pf doesn't look at its packets. Told with -v only.
}

// ParseInterfaces reads what pfctl -v -s Interfaces prints.
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

// A ShownTable is a table as pfctl -s Tables tells of it. Anchor and the flags
// are known with -v only.
type ShownTable struct {
	Name       string
	Anchor     string // "" is the main ruleset
	Const      bool
	Persist    bool
	Referenced bool // by a rule of the same ruleset
	Flags      string
}

// ParseTables reads what pfctl -s Tables prints, with -v too.
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

// isTableFlags tells the flags of -v from a name with a tab in it.
func isTableFlags(s string) bool {
	return len(s) >= 6 && strings.Trim(s, "-cpairhC") == ""
}

// ParseTableEntries reads what pfctl -t TABLE -T show prints, with -v too. It
// fails at a line that is no address.
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

// An EntryError is a table's entry that can't be read.
type EntryError struct {
	Line int // from 1
	Err  error
}

func (e *EntryError) Error() string {
	return fmt.Sprintf("read table entry on line %d: %v", e.Line, e.Err)
}

// Unwrap returns what is wrong with the entry.
func (e *EntryError) Unwrap() error { return e.Err }

// parseEntry reads an address or network of a table.
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
