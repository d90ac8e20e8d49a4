package macos

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// othersRules is what the others had loaded when it was last looked at.
type othersRules struct {
	key   string
	found []Foreign
	// problems and open are what [Backend.Inspect] says of it: open is what lets
	// transit through, or may do so for all that is known, for which forwarding closes.
	problems, open []host.Problem
}

// maxForeign is how many foreign rules are told of at a time.
const maxForeign = 8

// errNotJudged is the cause when what others have loaded was read and can't be judged.
var errNotJudged = errors.New("they can't be evaluated")

// inspectOthers looks at what others have in the packet filter.
func (p *Backend) inspectOthers(ctx context.Context, n *darwin.Network, r *policy.Ruleset) {
	p.othersDue = false
	if p.loaded == nil {
		p.others.problems, p.others.open = nil, nil
		return
	}
	if err := p.readForeign(ctx, n, r); err != nil {
		// Ours is in force all the same, and what was found last counts, unless the
		// rules were read and it isn't known what they let through.
		problem := host.Problem{Step: StepAnchor, Message: "the rules of other software can't be judged: " + err.Error(),
			Hint: "look at them: sudo pfctl -s rules; sudo pfctl -s nat"}
		p.others.problems = []host.Problem{problem}
		if errors.Is(err, errTooMany) || errors.Is(err, errNotJudged) {
			p.others.open = p.others.problems
		}
	}
}

// readForeign reads what others have loaded and notes what of it stands in our
// way.
func (p *Backend) readForeign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
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
func (p *Backend) checkTransit(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	if err := p.readForeign(ctx, n, r); err != nil {
		return named(StepForwarding, fmt.Errorf("the rules of other software can't be judged: %w", err))
	}
	if len(p.others.open) > 0 {
		return asError(p.others.open[0])
	}
	return nil
}

// foreign says which rules of others win over ours. What they have loaded is read,
// and judged only if it changed, or our anchor did.
func (p *Backend) foreign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) ([]Foreign, error) {
	all, err := p.readOthers(ctx)
	if err != nil {
		return nil, err
	}
	key := fmt.Sprint(all, p.loaded.anchor.text())
	if p.others.key == key {
		return p.others.found, nil
	}
	err = p.guarded(func() error {
		found, err := p.judge(ctx, n, r, all)
		if err == nil {
			p.others.key, p.others.found = key, found
		}
		return err
	})
	return p.others.found, err
}

// guarded runs do, which parses and evaluates rules that other software has loaded. They may
// be anything, and a panic on them mustn't end the helper.
func (p *Backend) guarded(do func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			p.o.Log.Error("judge the rules of other software", "panic", r, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w: %v", errNotJudged, r)
		}
	}()
	return do()
}

// judge says which rules of all win over ours.
func (p *Backend) judge(ctx context.Context, n *darwin.Network, r *policy.Ruleset, all []shownAnchor) ([]Foreign, error) {
	u := unread{}
	rulesets := u.rulesets(all)
	find := func() ([]Foreign, error) {
		m, err := machineWith(n, rulesets, u)
		if err == nil {
			err = m.LoadAnchor(p.path, p.loaded.anchor.Ruleset())
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errNotJudged, err)
		}
		return p.findForeign(ctx, m, p.loaded.anchor, r)
	}
	found, err := find()
	if err != nil {
		return nil, err
	}
	// A block rule that isn't understood may match everything, or so little that it
	// stops none of what a later rule lets through.
	if dropDoubtfulBlocks(rulesets) {
		more, err := find()
		if err != nil {
			return nil, err
		}
		for _, f := range more {
			known := slices.ContainsFunc(found, func(o Foreign) bool { o.Example = f.Example; return o == f })
			if f.Wider && !known {
				found = append(found, f)
			}
		}
		slices.SortFunc(found, compareForeign)
	}
	return u.name(found), nil
}

// maxOthers bounds how many anchors of others are read: each takes a run of pfctl.
const maxOthers = 64

// A shownAnchor is what pfctl shows of an anchor of others, or of the main ruleset.
type shownAnchor struct {
	path       string
	rules, nat string // without counters
	tables     []shownTable
}

// A shownTable is a table of others.
type shownTable struct {
	name    string
	entries string // as [pfconf.Table.Entries] has them; what is wrong with them if unread
	unread  bool   // an entry isn't understood
}

// readOthers reads the main ruleset, which is the first, and the anchors of others.
func (p *Backend) readOthers(ctx context.Context) ([]shownAnchor, error) {
	paths, err := p.anchorsOfOthers(ctx)
	if err != nil {
		return nil, err
	}
	var out []shownAnchor
	for _, path := range append([]string{""}, paths...) {
		if len(out) == maxOthers {
			return nil, fmt.Errorf("%w: more than %d anchors", errTooMany, maxOthers)
		}
		one, err := p.readAnchor(ctx, path)
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	return out, nil
}

// readAnchor reads an anchor by one process, and one more for each of its tables.
func (p *Backend) readAnchor(ctx context.Context, path string) (shownAnchor, error) {
	all, err := p.pf.AllOfAny(ctx, path)
	if err != nil {
		return shownAnchor{}, err
	}
	out := shownAnchor{path: path, rules: withoutCounters(all.Rules), nat: withoutCounters(all.NAT)}
	for _, t := range pfconf.ParseTables(all.Sections["TABLES"]) {
		table, err := p.readTable(ctx, path, t.Name)
		if errors.Is(err, darwin.ErrNoTable) {
			continue // gone meanwhile
		}
		if err != nil {
			return shownAnchor{}, err
		}
		out.tables = append(out.tables, table)
	}
	return out, nil
}

// anchorsOfOthers returns the anchors but ours. Inline ones without a name are left
// out: pfctl shows their rules where they are called. One process lists all, and where
// our own isn't among them that list isn't what it is taken for.
func (p *Backend) anchorsOfOthers(ctx context.Context) ([]string, error) {
	all, err := p.pf.AllAnchors(ctx)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(all, p.path) {
		all = nil
		for next := []string{""}; len(next) > 0; next = next[1:] {
			below, err := p.pf.Anchors(ctx, next[0])
			if err != nil {
				return nil, err
			}
			if next, all = append(next, below...), append(all, below...); len(all) > 2*maxOthers {
				return nil, fmt.Errorf("%w: more than %d anchors", errTooMany, maxOthers)
			}
		}
	}
	return slices.DeleteFunc(all, func(path string) bool {
		return path == p.path || strings.HasPrefix(path, p.path+"/") || path[0] == '_' || strings.Contains(path, "/_")
	}), nil
}

// readTable reads a table of others.
func (p *Backend) readTable(ctx context.Context, anchor, name string) (shownTable, error) {
	entries, err := p.pf.Table(ctx, anchor, name)
	var notUnderstood *pfconf.EntryError
	if errors.As(err, &notUnderstood) {
		return shownTable{name, err.Error(), true}, nil
	}
	return shownTable{name, strings.Join((&pfconf.Table{Addrs: entries}).Entries(), "\n"), false}, err
}

// statement returns the table as it is loaded; one whose entries aren't understood is
// empty.
func (t shownTable) statement() *pfconf.Table {
	out := &pfconf.Table{Name: t.name, Persist: true, HasAddrs: true}
	if !t.unread {
		out.Addrs, _ = pfconf.ParseTableEntries(t.entries) // which were read before
	}
	return out
}

// withoutCounters returns rules without the lines that pfctl -v has below each.
func withoutCounters(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(strings.TrimSpace(line), "[ ") {
			b.WriteString(line)
		}
	}
	return b.String()
}
