package pfconf

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Shown is what pfctl -sr or -sn printed, read.
type Shown struct {
	// Rules are the rules in the order shown. Rules of nameless inline anchors
	// are in their anchor's Body.
	Rules []ShownRule
	// Unknown are the lines that weren't understood. Whoever draws conclusions
	// from the rules has to know that there are more.
	Unknown []UnknownLine
}

// A ShownRule is a rule with what pfctl -v tells about it.
type ShownRule struct {
	*Rule
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
}

// ParseShown reads what pfctl -sr or -sn prints, with -v or -vv too. It has no
// errors: a line that it can't read is kept in Unknown.
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
// loaded again: scrub rules, translation rules, filter rules. Either may be nil.
func (s *Shown) Ruleset(nat *Shown) *Ruleset {
	rs := &Ruleset{}
	add := func(from *Shown, stages ...stage) {
		if from == nil {
			return
		}
		for _, r := range from.Rules {
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

// rule reads the line of a rule. Each stands for itself, so that one that isn't
// understood doesn't spoil the others.
func (r *shownReader) rule(nr int, line string) {
	number, text, verbose := shownNumber(line)
	if len(text) > maxPasted {
		r.unknown(nr, line[:maxErrors], fmt.Errorf("a line of %d bytes", len(line)))
		return
	}
	rule, err := r.names.parseShownRule(text, verbose)
	if err != nil {
		r.unknown(nr, line, err)
		return
	}
	if len(r.open) > 0 {
		body := r.open[len(r.open)-1].Body
		body.Statements = append(body.Statements, rule)
	} else {
		r.shown.Rules = append(r.shown.Rules, ShownRule{Rule: rule, Number: number})
	}
	if rule.Body == nil {
		return
	}
	if len(r.open) >= maxNested {
		r.unknown(nr, line, fmt.Errorf("anchors nested more than %d deep", maxNested))
		return
	}
	r.open = append(r.open, rule)
}

// unknown keeps a line.
func (r *shownReader) unknown(nr int, line string, err error) {
	r.shown.Unknown = append(r.shown.Unknown, UnknownLine{Line: nr, Text: line, Err: err})
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
	return r, nil
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
			return nil, fmt.Errorf("read table entry on line %d: %w", i+1, err)
		}
		all = append(all, a)
	}
	return all, nil
}

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
