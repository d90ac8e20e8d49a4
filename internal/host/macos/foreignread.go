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
type foreignResult struct {
	key   string
	found []Foreign
	// problems and open are what [Backend.Inspect] says of it: open is what lets
	// transit through, or may do so for all that is known, for which forwarding closes.
	problems, open []host.Problem
}

// maxForeign is how many foreign rules are told of at a time.
const maxForeignProblems = 8

// errNotJudged is the cause when what others have loaded was read and can't be judged.
var errNotEvaluated = errors.New("they can't be evaluated")

// inspectOthers looks at what others have in the packet filter.
func (b *Backend) inspectForeign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) {
	b.foreignDue = false
	if b.loaded == nil {
		b.foreign.problems, b.foreign.open = nil, nil
		return
	}
	if err := b.updateForeign(ctx, n, r); err != nil {
		// Ours is in force all the same, and what was found last counts, unless the
		// rules were read and it isn't known what they let through.
		problem := host.Problem{Step: StepAnchor, Message: "the rules of other software can't be judged: " + err.Error(),
			Hint: "look at them: sudo pfctl -s rules; sudo pfctl -s nat"}
		b.foreign.problems = []host.Problem{problem}
		if errors.Is(err, errTooManyRules) || errors.Is(err, errNotEvaluated) {
			b.foreign.open = b.foreign.problems
		}
	}
}

// readForeign reads what others have loaded and notes what of it stands in our
// way.
func (b *Backend) updateForeign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	found, err := b.evaluateForeign(ctx, n, r)
	if err != nil {
		return err
	}
	b.foreign.problems, b.foreign.open = nil, nil
	for _, f := range found[:min(len(found), maxForeignProblems)] {
		problem := f.problem()
		b.foreign.problems = append(b.foreign.problems, problem)
		if f.Transit {
			b.foreign.open = append(b.foreign.open, problem)
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
func (b *Backend) checkTransit(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	if err := b.updateForeign(ctx, n, r); err != nil {
		return asStepError(StepForwarding, fmt.Errorf("the rules of other software can't be judged: %w", err))
	}
	if len(b.foreign.open) > 0 {
		return problemError(b.foreign.open[0])
	}
	return nil
}

// foreign says which rules of others win over ours. What they have loaded is read,
// and judged only if it changed, or our anchor did.
func (b *Backend) evaluateForeign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) ([]Foreign, error) {
	all, err := b.readForeignAnchors(ctx)
	if err != nil {
		return nil, err
	}
	key := fmt.Sprint(all, b.loaded.anchor.text())
	if b.foreign.key == key {
		return b.foreign.found, nil
	}
	err = b.withRecover(func() error {
		found, err := b.judgeForeign(ctx, n, r, all)
		if err == nil {
			b.foreign.key, b.foreign.found = key, found
		}
		return err
	})
	return b.foreign.found, err
}

// guarded runs do, which parses and evaluates rules that other software has loaded. They may
// be anything, and a panic on them mustn't end the helper.
func (b *Backend) withRecover(do func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			b.o.Log.Error("judge the rules of other software", "panic", r, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w: %v", errNotEvaluated, r)
		}
	}()
	return do()
}

// judge says which rules of all win over ours.
func (b *Backend) judgeForeign(ctx context.Context, n *darwin.Network, r *policy.Ruleset, all []shownAnchor) ([]Foreign, error) {
	u := unparsed{}
	rulesets := u.rulesets(all)
	find := func() ([]Foreign, error) {
		m, err := machineWith(n, rulesets, u)
		if err == nil {
			err = m.LoadAnchor(b.path, b.loaded.anchor.Ruleset())
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errNotEvaluated, err)
		}
		return b.findForeign(ctx, m, b.loaded.anchor, r)
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
	return u.resolve(found), nil
}

// maxOthers bounds how many anchors of others are read: each takes a run of pfctl.
const maxForeignAnchors = 64

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
	unparsed  bool   // an entry isn't understood
}

// readOthers reads the main ruleset, which is the first, and the anchors of others.
func (b *Backend) readForeignAnchors(ctx context.Context) ([]shownAnchor, error) {
	paths, err := b.foreignAnchors(ctx)
	if err != nil {
		return nil, err
	}
	var out []shownAnchor
	for _, path := range append([]string{""}, paths...) {
		if len(out) == maxForeignAnchors {
			return nil, fmt.Errorf("%w: more than %d anchors", errTooManyRules, maxForeignAnchors)
		}
		one, err := b.readAnchor(ctx, path)
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	return out, nil
}

// readAnchor reads an anchor by one process, and one more for each of its tables.
func (b *Backend) readAnchor(ctx context.Context, path string) (shownAnchor, error) {
	all, err := b.pf.AllOfAny(ctx, path)
	if err != nil {
		return shownAnchor{}, err
	}
	out := shownAnchor{path: path, rules: withoutCounters(all.Rules), nat: withoutCounters(all.NAT)}
	for _, t := range pfconf.ParseTables(all.Sections["TABLES"]) {
		table, err := b.readTable(ctx, path, t.Name)
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
func (b *Backend) foreignAnchors(ctx context.Context) ([]string, error) {
	all, err := b.pf.AllAnchors(ctx)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(all, b.path) {
		all = nil
		for next := []string{""}; len(next) > 0; next = next[1:] {
			below, err := b.pf.Anchors(ctx, next[0])
			if err != nil {
				return nil, err
			}
			if next, all = append(next, below...), append(all, below...); len(all) > 2*maxForeignAnchors {
				return nil, fmt.Errorf("%w: more than %d anchors", errTooManyRules, maxForeignAnchors)
			}
		}
	}
	return slices.DeleteFunc(all, func(path string) bool {
		return path == b.path || strings.HasPrefix(path, b.path+"/") || path[0] == '_' || strings.Contains(path, "/_")
	}), nil
}

// readTable reads a table of others.
func (b *Backend) readTable(ctx context.Context, anchor, name string) (shownTable, error) {
	entries, err := b.pf.Table(ctx, anchor, name)
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
	if !t.unparsed {
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
