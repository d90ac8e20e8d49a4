package macos

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// Foreign rules that can't be parsed are evaluated as if they matched every packet,
// since a rule that isn't known to be narrow must be taken as wide. Each is replaced by
// a stand-in with a label, by which it is found again when the stand-in decides.

// unparsedLabel is the prefix of a stand-in's label.
const unparsedLabel = "unparsed-"

// unparsed has the foreign rules that couldn't be parsed, by their stand-ins' labels.
type unparsed map[string]unparsedRule

// An unparsedRule is a rule that couldn't be parsed.
type unparsedRule struct {
	Foreign
	// translates means that the rule may translate addresses, which no stand-in can do.
	translates bool
	// wide means that it may pass every packet before the filter rules are evaluated
	// (as rdr pass does). Its stand-in passes every packet, before all other rules.
	wide bool
}

// A foreignRuleset is a foreign anchor, or the main ruleset.
type foreignRuleset struct {
	path  string // empty for the main ruleset
	rules *pfconf.Ruleset
}

// rulesets parses what pfctl showed, adds the stand-ins, and gives inline anchors names.
// The first element is the main ruleset.
func (u unparsed) rulesets(all []shownAnchor) []foreignRuleset {
	var read []foreignRuleset
	for _, a := range all {
		rs := u.parse(a.path, a.rules).Ruleset(u.parse(a.path, a.nat))
		tables := make([]pfconf.Statement, 0, len(a.tables))
		for _, t := range a.tables {
			tables = append(tables, t.statement())
		}
		rs.Statements = append(tables, rs.Statements...)
		read = append(read, foreignRuleset{a.path, rs})
	}
	for _, a := range all {
		for _, t := range a.tables {
			if t.unparsed {
				u.widen(read, a.path, t)
			}
		}
	}
	var ahead []pfconf.Statement
	for _, label := range slices.Sorted(maps.Keys(u)) {
		if u[label].wide {
			ahead = append(ahead, passAll(label))
		}
	}
	if len(ahead) > 0 && len(read) > 0 {
		main := read[0].rules
		first := slices.IndexFunc(main.Statements, isFilter)
		if first < 0 {
			first = len(main.Statements)
		}
		main.Statements = slices.Insert(main.Statements, first, ahead...)
	}
	var out []foreignRuleset
	for _, rs := range read {
		out = append(out, nameInline(rs)...)
	}
	return out
}

// passAll returns a rule that passes every packet and ends the evaluation.
func passAll(label string) *pfconf.Rule {
	return &pfconf.Rule{Action: pfconf.Pass, Quick: true, State: pfconf.NoState, Flags: &pfconf.Flags{}, AllowOpts: true, Label: label}
}

// isFilter reports whether a statement is a filter rule or an anchor call.
func isFilter(s pfconf.Statement) bool {
	r, ok := s.(*pfconf.Rule)
	return ok && (r.Action == pfconf.Pass || r.Action == pfconf.Block || r.Action == pfconf.Anchor)
}

// parse parses what pfctl shows of an anchor. The stand-in of a filter rule, also of
// one in braces, has the same action and matches every packet.
func (u unparsed) parse(path, text string) *pfconf.Shown {
	shown := pfconf.ParseShown(text)
	for _, line := range shown.Unknown {
		passes := slices.Contains(strings.Fields(line.Text), "pass")
		switch r := line.StandIn; {
		case r == nil: // a statement of an unknown kind
			u.add(path, line.Text, unparsedRule{translates: true, wide: true})
		case translates(r):
			u.add(path, line.Text, unparsedRule{translates: true, wide: passes})
		default:
			if label := u.add(path, line.Text, unparsedRule{}); r.Action == pfconf.Pass || r.Action == pfconf.Block {
				r.Label = label
			}
		}
	}
	return shown
}

// translates reports whether a rule belongs to a translation ruleset.
func translates(r *pfconf.Rule) bool {
	switch r.Action {
	case pfconf.Nat, pfconf.NoNat, pfconf.Rdr, pfconf.NoRdr, pfconf.Binat, pfconf.NoBinat:
		return true
	}
	return false
}

// widen makes the rules that refer to a table whose entries couldn't be parsed match
// every address instead. A table of the main ruleset is also used by anchors that have
// none with its name.
func (u unparsed) widen(rulesets []foreignRuleset, anchor string, t shownTable) {
	refers := func(a pfconf.Address) bool { return a.Kind == pfconf.AddrTable && a.Name == t.name }
	var visit func(path string, rs *pfconf.Ruleset)
	visit = func(path string, rs *pfconf.Ruleset) {
		rs.Statements = slices.DeleteFunc(rs.Statements, func(s pfconf.Statement) bool {
			r, ok := s.(*pfconf.Rule)
			if !ok {
				return false
			}
			if r.Body != nil {
				visit(path, r.Body)
			}
			from, to := slices.ContainsFunc(r.From.Addrs, refers), slices.ContainsFunc(r.To.Addrs, refers)
			pool := r.Pool != nil && slices.ContainsFunc(r.Pool.Addrs, refers)
			if !from && !to && !pool {
				return false
			}
			if translates(r) {
				u.add(path, r.String(), unparsedRule{translates: true, wide: r.Pass})
				return true
			}
			text := r.String()
			if from {
				r.From.Addrs = nil
			}
			if to {
				r.To.Addrs = nil
			}
			if r.Action == pfconf.Pass || r.Action == pfconf.Block {
				r.Label = u.add(path, text, unparsedRule{})
			}
			return false
		})
	}
	for _, rs := range rulesets {
		if rs.path == anchor || anchor == "" {
			visit(rs.path, rs.rules)
		}
	}
}

// inlineName is the prefix of the names that inline anchors get here. No other anchor
// has such a name, as pfctl prints braces only around the rules of inline anchors.
const inlineName = "{"

// nameInline gives the inline anchors below a ruleset names, and returns the ruleset
// followed by them. pfctl loads an inline anchor outside the main ruleset under a
// path that the rule doesn't call, so it has no effect. A program that loads rules by
// ioctl may make one that has, and pfctl shows both the same.
func nameInline(rs foreignRuleset) []foreignRuleset {
	out := []foreignRuleset{rs}
	for i, s := range rs.rules.Statements {
		r, ok := s.(*pfconf.Rule)
		if !ok || r.Body == nil {
			continue
		}
		call := *r
		call.Anchor, call.Body = fmt.Sprintf("%s%d}", inlineName, i), nil
		rs.rules.Statements[i] = &call
		path := call.Anchor
		if rs.path != "" {
			path = rs.path + "/" + path
		}
		out = append(out, nameInline(foreignRuleset{path, r.Body})...)
	}
	return out
}

// dropDoubtfulBlocks removes the block rules that may block nothing: stand-ins, and
// those of inline anchors that may not be called. It reports whether there were any.
func dropDoubtfulBlocks(rulesets []foreignRuleset) (dropped bool) {
	for _, rs := range rulesets {
		uncalled := strings.Contains(rs.path, "/"+inlineName)
		rs.rules.Statements = slices.DeleteFunc(rs.rules.Statements, func(s pfconf.Statement) bool {
			r, ok := s.(*pfconf.Rule)
			drop := ok && r.Action == pfconf.Block && (uncalled || strings.HasPrefix(r.Label, unparsedLabel))
			dropped = dropped || drop
			return drop
		})
	}
	return dropped
}

// add adds a rule that couldn't be parsed and returns the label for its stand-in, which
// is the same for the same rule.
func (u unparsed) add(path, rule string, as unparsedRule) string {
	as.Foreign = Foreign{Anchor: path, Rule: strings.TrimSpace(rule), Unparsed: true}
	for label, known := range u {
		if known == as {
			return label
		}
	}
	label := fmt.Sprint(unparsedLabel, len(u))
	u[label] = as
	return label
}

// resolve replaces stand-ins by the rules that couldn't be parsed, and adds those whose
// stand-ins decided nothing. It replaces an inline anchor by the one that contains it.
func (u unparsed) resolve(found []Foreign) []Foreign {
	resolved := map[string]bool{}
	for i, f := range found {
		if inline := strings.Index("/"+f.Anchor, "/"+inlineName); inline >= 0 {
			found[i].Anchor = f.Anchor[:max(inline-1, 0)]
		}
		for label, original := range u {
			if strings.Contains(f.Rule, fmt.Sprintf("label %q", label)) {
				found[i].Anchor, found[i].Rule, found[i].Unparsed, resolved[label] = original.Anchor, original.Rule, true, true
			}
		}
	}
	for _, label := range slices.Sorted(maps.Keys(u)) {
		if !resolved[label] {
			found = append(found, u[label].Foreign)
		}
	}
	return found
}

// translation returns a rule that couldn't be parsed and may translate any packet; false
// if there is none.
func (u unparsed) translation() (Foreign, bool) {
	for _, label := range slices.Sorted(maps.Keys(u)) {
		if u[label].translates {
			return u[label].Foreign, true
		}
	}
	return Foreign{}, false
}

// machineWith returns an enabled machine with this host's interfaces and the rulesets.
// A ruleset that the machine refuses is replaced by one that passes everything.
func machineWith(n *darwin.Network, rulesets []foreignRuleset, u unparsed) (*pfsim.Machine, error) {
	m := pfsim.New(pfsim.Options{})
	for _, i := range n.Interfaces {
		one := pfconf.Interface{Name: i.Name}
		for _, a := range i.Addresses {
			one.Addresses = append(one.Addresses, a.Prefix)
		}
		m.AddInterface(one)
	}
	for _, rs := range rulesets {
		load := func(r *pfconf.Ruleset) error {
			if rs.path == "" {
				return m.LoadMain(r)
			}
			return m.LoadAnchor(rs.path, r)
		}
		err := load(rs.rules)
		if err == nil {
			continue
		}
		wide := passAll(u.add(rs.path, err.Error(), unparsedRule{translates: true}))
		if err := load(&pfconf.Ruleset{Statements: []pfconf.Statement{wide}}); err != nil {
			return nil, fmt.Errorf("understand the rules of others: %w", err)
		}
	}
	return m, m.Enable()
}
