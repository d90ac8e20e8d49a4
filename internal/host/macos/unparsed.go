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

// What of others' rules isn't understood counts as matching everything: what isn't
// known to be narrow must be taken for wide. For each such rule stands another, by
// whose label it is known when it decides something.

// unreadLabel begins the label of a rule that stands for one that isn't
// understood.
const unparsedLabel = "unread-"

// unread are rules of others that aren't understood, by the labels of those that
// stand for them.
type unparsed map[string]unparsedRule

// An unreadRule is one that isn't understood.
type unparsedRule struct {
	Foreign
	// translates says that it may change addresses, which nothing can stand for.
	translates bool
	// wide says that all may pass by it, whatever filter rules say. A rule that lets
	// everything through stands for it, ahead of all others.
	wide bool
}

// a foreignRuleset is an anchor of others, or the main ruleset.
type foreignRuleset struct {
	path  string
	rules *pfconf.Ruleset
}

// rulesets parses what was shown. The first is the main ruleset.
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

// passAll is a rule that lets everything through, ahead of what follows it.
func passAll(label string) *pfconf.Rule {
	return &pfconf.Rule{Action: pfconf.Pass, Quick: true, State: pfconf.NoState, Flags: &pfconf.Flags{}, AllowOpts: true, Label: label}
}

func isFilter(s pfconf.Statement) bool {
	r, ok := s.(*pfconf.Rule)
	return ok && (r.Action == pfconf.Pass || r.Action == pfconf.Block || r.Action == pfconf.Anchor)
}

// readable reads what pfctl printed of an anchor. For a filter rule that isn't
// understood, in braces or not, stands one that matches everything, with the same
// action.
func (u unparsed) parse(path, text string) *pfconf.Shown {
	shown := pfconf.ParseShown(text)
	for _, line := range shown.Unknown {
		passes := slices.Contains(strings.Fields(line.Text), "pass")
		switch r := line.StandIn; {
		case r == nil: // of a kind that isn't known
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

func translates(r *pfconf.Rule) bool {
	switch r.Action {
	case pfconf.Nat, pfconf.NoNat, pfconf.Rdr, pfconf.NoRdr, pfconf.Binat, pfconf.NoBinat:
		return true
	}
	return false
}

// widen lets the rules that ask for a table whose entries aren't understood match
// every address in its place. A table of the main ruleset is that of each anchor
// without one of its name.
func (u unparsed) widen(rulesets []foreignRuleset, anchor string, t shownTable) {
	asks := func(a pfconf.Address) bool { return a.Kind == pfconf.AddrTable && a.Name == t.name }
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
			from, to := slices.ContainsFunc(r.From.Addrs, asks), slices.ContainsFunc(r.To.Addrs, asks)
			pool := r.Pool != nil && slices.ContainsFunc(r.Pool.Addrs, asks)
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

// inlineName begins the names that inline anchors get here. None is called so: pfctl
// writes braces for blocks of rules only.
const inlineName = "{"

// nameInline gives the inline anchors below a ruleset names, and returns them behind it.
// pfctl loads one that isn't in the main ruleset in one place and calls it in another,
// so that it does nothing; a program that loads rules without pfctl may have it do
// something, and what is shown is the same.
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

// dropDoubtfulBlocks takes out the block rules that may stop nothing: those that stand
// for one which isn't understood, and those of inline anchors that may not be called.
// It reports whether there were any.
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

// note remembers a rule that isn't understood and returns the label of the one that
// stands for it, which is the same for the same rule.
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

// name puts the rules that aren't understood in the place of those that stood for
// them, and adds those that decided nothing. Of an inline anchor it names the one that
// it is in.
func (u unparsed) resolve(found []Foreign) []Foreign {
	seen := map[string]bool{}
	for i, f := range found {
		if inline := strings.Index("/"+f.Anchor, "/"+inlineName); inline >= 0 {
			found[i].Anchor = f.Anchor[:max(inline-1, 0)]
		}
		for label, original := range u {
			if strings.Contains(f.Rule, fmt.Sprintf("label %q", label)) {
				found[i].Anchor, found[i].Rule, found[i].Unparsed, seen[label] = original.Anchor, original.Rule, true, true
			}
		}
	}
	for _, label := range slices.Sorted(maps.Keys(u)) {
		if !seen[label] {
			found = append(found, u[label].Foreign)
		}
	}
	return found
}

// translation returns a rule that isn't understood and may change any packet's
// addresses.
func (u unparsed) translation() (Foreign, bool) {
	for _, label := range slices.Sorted(maps.Keys(u)) {
		if u[label].translates {
			return u[label].Foreign, true
		}
	}
	return Foreign{}, false
}

// machineWith returns a machine with this host's interfaces that holds the
// rulesets. One that it refuses counts as passing everything.
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
