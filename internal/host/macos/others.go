package macos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// othersRules is what the others had loaded when it was last looked at.
type othersRules struct {
	key   string
	found []Foreign
	// problems and open are what [Platform.Inspect] says of it: open is what lets
	// transit through, for which forwarding closes.
	problems, open []host.Problem
}

// maxForeign is how many foreign rules are told of at a time.
const maxForeign = 8

// inspectOthers looks at what others have in the packet filter.
func (p *Platform) inspectOthers(ctx context.Context, n *darwin.Network, r *policy.Ruleset) {
	p.othersDue = false
	if p.loaded == nil {
		p.others.problems, p.others.open = nil, nil
		return
	}
	if err := p.readForeign(ctx, n, r); err != nil {
		// Ours is in force all the same, and what was found last counts, unless there
		// is more than can be judged.
		problem := host.Problem{Step: StepAnchor, Message: "the rules of other software can't be judged: " + err.Error(),
			Hint: "look at them: sudo pfctl -s rules; sudo pfctl -s nat"}
		p.others.problems = []host.Problem{problem}
		if errors.Is(err, errTooMany) {
			p.others.open = p.others.problems
		}
	}
}

// readForeign reads what others have loaded and notes what of it stands in our
// way.
func (p *Platform) readForeign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	found, err := p.foreign(ctx, n, r)
	if err != nil {
		return err
	}
	p.others.problems, p.others.open = nil, nil
	for _, f := range found[:min(len(found), maxForeign)] {
		problem := f.problem()
		p.others.problems = append(p.others.problems, problem)
		if f.Transit {
			p.others.open = append(p.others.open, problem)
		}
	}
	return nil
}

// problem says what a foreign rule does, and what to do about it.
func (f Foreign) problem() host.Problem {
	hint := "see what software loads it, and whether you want it to"
	switch {
	case f.Transit:
		hint = "forwarding stays off as long as the rule is loaded: remove it, or the software that loads it"
	case f.Wider:
		hint = "the helper holds it off at the tunnel; for the rest, remove the rule or the software that loads it"
	}
	return host.Problem{Step: StepAnchor, Message: f.String(), Hint: hint}
}

// checkTransit fails where another product's rule would let transit through in
// our anchor's place once forwarding is on.
func (p *Platform) checkTransit(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	if err := p.readForeign(ctx, n, r); err != nil {
		return named(StepForwarding, fmt.Errorf("the rules of other software can't be judged: %w", err))
	}
	if len(p.others.open) > 0 {
		return asError(p.others.open[0])
	}
	return nil
}

// foreign says which rules of others win over ours. All that they have loaded is
// read; the probing is done again only if it changed, or our anchor did.
func (p *Platform) foreign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) ([]Foreign, error) {
	var key strings.Builder
	u := unread{}
	rulesets, err := p.readOthers(ctx, u, &key)
	if err != nil {
		return nil, err
	}
	key.WriteString(p.loaded.anchor.text())
	if p.others.key == key.String() {
		return p.others.found, nil
	}
	m, err := machineWith(n, rulesets, u)
	if err != nil {
		return nil, err
	}
	if err := m.LoadAnchor(p.path, p.loaded.anchor.Ruleset()); err != nil {
		return nil, err
	}
	found, err := FindForeign(ctx, m, p.loaded.anchor, r)
	if err != nil {
		return nil, err
	}
	p.others.key, p.others.found = key.String(), u.name(found)
	return p.others.found, nil
}

// maxOthers bounds how many anchors of others are read: each takes some runs of
// pfctl.
const maxOthers = 64

// a foreignRuleset is an anchor of others, or the main ruleset.
type foreignRuleset struct {
	path  string
	rules *pfconf.Ruleset
}

// readOthers reads the main ruleset and the anchors below it, ours excepted.
func (p *Platform) readOthers(ctx context.Context, u unread, key *strings.Builder) (out []foreignRuleset, err error) {
	next := []string{""}
	for len(next) > 0 {
		if len(out) == maxOthers {
			return nil, fmt.Errorf("%w: more than %d anchors", errTooMany, maxOthers)
		}
		path := next[0]
		next = next[1:]
		rules, nat, err := p.show(ctx, path)
		if err != nil {
			return nil, err
		}
		rs := u.readable(path, rules).Ruleset(u.readable(path, nat))
		tables, err := p.readTables(ctx, path)
		if err != nil {
			return nil, err
		}
		rs.Statements = append(tables, rs.Statements...)
		out = append(out, foreignRuleset{path, rs})
		fmt.Fprintf(key, "%s\n%s\n%s%s\n", path, rs, rules, nat)
		children, err := p.pf.Anchors(ctx, path)
		if err != nil {
			return nil, err
		}
		next = append(next, slices.DeleteFunc(children, func(child string) bool { return child == p.path })...)
	}
	return out, nil
}

func (p *Platform) readTables(ctx context.Context, anchor string) ([]pfconf.Statement, error) {
	names, err := p.pf.Tables(ctx, anchor)
	if err != nil {
		return nil, err
	}
	var out []pfconf.Statement
	for _, name := range names {
		t := &pfconf.Table{Name: name, Persist: true, HasAddrs: true}
		t.Addrs, err = p.pf.Table(ctx, anchor, name)
		if errors.Is(err, darwin.ErrNoTable) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

// unreadLabel begins the label of a rule that stands for one that isn't
// understood.
const unreadLabel = "unread-"

// unread are rules of others that aren't understood, by the labels of those that
// stand for them.
type unread map[string]Foreign

// readable reads what pfctl printed of an anchor. For a filter rule that isn't
// understood stands one that matches everything, with the same action: what isn't
// known to be narrow must be taken for wide.
func (u unread) readable(path, text string) *pfconf.Shown {
	shown := pfconf.ParseShown(text)
	named := map[string]bool{}
	for _, r := range shown.Rules {
		if r.Err == nil {
			continue
		}
		named[r.Text] = true
		if label := u.note(path, r.Text); r.Action == pfconf.Pass || r.Action == pfconf.Block {
			r.Label = label
		}
	}
	for _, line := range shown.Unknown { // those in inline anchors have stand-ins there
		if !named[line.Text] {
			u.note(path, line.Text)
		}
	}
	return shown
}

// note remembers a rule that isn't understood and returns the label of the one that
// stands for it.
func (u unread) note(path, rule string) string {
	label := fmt.Sprint(unreadLabel, len(u))
	u[label] = Foreign{Anchor: path, Rule: strings.TrimSpace(rule), Unread: true}
	return label
}

// name puts the rules that aren't understood in the place of those that stood for
// them, and adds those that decided nothing.
func (u unread) name(found []Foreign) []Foreign {
	seen := map[string]bool{}
	for i, f := range found {
		for label, original := range u {
			if strings.Contains(f.Rule, fmt.Sprintf("label %q", label)) {
				found[i].Rule, found[i].Unread, seen[label] = original.Rule, true, true
			}
		}
	}
	for _, label := range slices.Sorted(maps.Keys(u)) {
		if !seen[label] {
			found = append(found, u[label])
		}
	}
	return found
}

// machineWith returns a machine with this host's interfaces that holds the
// rulesets. One that it refuses counts as passing everything.
func machineWith(n *darwin.Network, rulesets []foreignRuleset, u unread) (*pfsim.Machine, error) {
	m := newMachine(n)
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
		wide := &pfconf.Rule{Action: pfconf.Pass, Quick: true, State: pfconf.NoState, Flags: &pfconf.Flags{}}
		wide.Label = u.note(rs.path, err.Error())
		if err := load(&pfconf.Ruleset{Statements: []pfconf.Statement{wide}}); err != nil {
			return nil, fmt.Errorf("understand the rules of others: %w", err)
		}
	}
	return m, m.Enable()
}

func newMachine(n *darwin.Network) *pfsim.Machine {
	m := pfsim.New(pfsim.Options{})
	for _, i := range n.Interfaces {
		one := pfconf.Interface{Name: i.Name}
		for _, a := range i.Addresses {
			one.Addresses = append(one.Addresses, a.Prefix)
		}
		m.AddInterface(one)
	}
	return m
}
