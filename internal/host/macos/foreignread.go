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

// foreignResult is the last evaluation of foreign rules.
type foreignResult struct {
	// key is the text of the foreign rules and of our anchor that found is for.
	key   string
	found []Foreign
	// problems and open are for [Backend.Inspect]. open has what passes transit, or may
	// pass it as far as is known: forwarding is disabled because of it.
	problems, open []host.Problem
}

// maxForeignProblems is how many foreign rules are reported at a time.
const maxForeignProblems = 8

// errNotEvaluated means that foreign rules were read but couldn't be evaluated.
var errNotEvaluated = errors.New("they can't be evaluated")

// inspectForeign evaluates the foreign rules that pf holds now.
func (b *Backend) inspectForeign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) {
	b.foreignDue = false
	if b.loaded == nil {
		b.foreign.problems, b.foreign.open = nil, nil
		return
	}
	if err := b.updateForeign(ctx, n, r); err != nil {
		// Our anchor is in force in any case. If the rules couldn't be read, the last
		// result stays; if they couldn't be evaluated, they may pass transit.
		problem := host.Problem{Step: StepAnchor, Message: "the rules of other software can't be judged: " + err.Error(),
			Hint: "list them: sudo pfctl -s rules; sudo pfctl -s nat", Kind: host.KindOtherFilters}
		b.foreign.problems = []host.Problem{problem}
		if errors.Is(err, errTooManyRules) || errors.Is(err, errNotEvaluated) {
			b.foreign.open = b.foreign.problems
		}
	}
}

// neverExamined is what this host never looks for: FindForeign compares only packets that
// our anchor has rules about, which WireGuard's own aren't, and pf doesn't know what the
// Application Firewall drops.
var neverExamined = map[host.ProblemKind]string{
	host.KindHostFirewall: "neither rules of pf that stop WireGuard's own packets nor the Application Firewall",
}

// unexamined returns what an Inspect didn't look for: foreign rules are evaluated against
// an anchor of ours, and not by the first Inspect after Enforce.
func (b *Backend) unexamined() map[host.ProblemKind]string {
	switch {
	case b.loaded == nil:
		return map[host.ProblemKind]string{host.KindOtherFilters: "the helper has no rules in pf, as it needs none now"}
	case b.foreign.key == "" && len(b.foreign.problems) == 0:
		return map[host.ProblemKind]string{host.KindOtherFilters: "our rules were only just loaded"}
	}
	return nil
}

// updateForeign evaluates the foreign rules and updates problems and open.
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

// problem returns what a foreign rule does, with a hint about how to resolve it.
func (f Foreign) problem() host.Problem {
	hint := "see what software loads it, and whether you want it to"
	switch {
	case f.Transit:
		hint = "forwarding stays off as long as the rule is loaded: remove it, or the software that loads it"
	case f.Wider:
		hint = "the helper blocks such packets at the tunnel; on other interfaces, remove the rule or the software that loads it"
	}
	return host.Problem{Step: StepAnchor, Message: f.String(), Hint: hint, Kind: host.KindOtherFilters}
}

// checkTransit returns an error if a foreign rule would pass transit that our anchor
// blocks, once forwarding is enabled.
func (b *Backend) checkTransit(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	if err := b.updateForeign(ctx, n, r); err != nil {
		return &host.StepError{Step: StepForwarding, Kind: host.KindOtherFilters, Err: fmt.Errorf("the rules of other software can't be judged: %w", err)}
	}
	if len(b.foreign.open) > 0 {
		return problemError(b.foreign.open[0])
	}
	return nil
}

// evaluateForeign reads the foreign rules and returns those that override ours. It
// evaluates them only if they or our anchor changed, since that takes thousands of
// probes.
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

// withRecover runs do, which parses or evaluates rules that other software loaded, and
// returns a panic as an error with errNotEvaluated: unexpected rules must not end the
// helper, which would take the tunnel down.
func (b *Backend) withRecover(do func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			b.o.Log.Error("judge the rules of other software", "panic", r, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w: %v", errNotEvaluated, r)
		}
	}()
	return do()
}

// judgeForeign returns which rules of all override ours.
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
	// A block rule that isn't understood was evaluated as matching everything, which
	// hides what later rules pass. It may as well match nothing: evaluate again without
	// such rules.
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

// maxForeignAnchors is how many foreign anchors are read; each takes a run of pfctl.
const maxForeignAnchors = 64

// A shownAnchor is an anchor, or the main ruleset, as pfctl shows it.
type shownAnchor struct {
	path       string // empty for the main ruleset
	rules, nat string // without counters, so that equal rules compare equal
	tables     []shownTable
}

// A shownTable is a table as pfctl shows it.
type shownTable struct {
	name     string
	entries  string // the text of [pfconf.Table.Entries]; if unparsed, the parser's error
	unparsed bool   // an entry isn't understood
}

// A pfReader reads anchors as pfctl shows them.
type pfReader struct {
	pf   *darwin.PF // runs one command at a time
	path string     // our anchor's
}

// readForeignAnchors reads the main ruleset, which comes first, and the foreign anchors.
func (p pfReader) readForeignAnchors(ctx context.Context) ([]shownAnchor, error) {
	paths, err := p.foreignAnchors(ctx)
	if err != nil {
		return nil, err
	}
	var out []shownAnchor
	for _, path := range append([]string{""}, paths...) {
		if len(out) == maxForeignAnchors {
			return nil, fmt.Errorf("%w: more than %d anchors", errTooManyRules, maxForeignAnchors)
		}
		one, err := p.readAnchor(ctx, path)
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	return out, nil
}

// readAnchor reads an anchor with one process, and one more for each of its tables.
func (p pfReader) readAnchor(ctx context.Context, path string) (shownAnchor, error) {
	all, err := p.pf.AllOfAny(ctx, path)
	if err != nil {
		return shownAnchor{}, err
	}
	out := shownAnchor{path: path, rules: withoutCounters(all.Rules), nat: withoutCounters(all.NAT)}
	for _, t := range pfconf.ParseTables(all.Sections["TABLES"]) {
		table, err := p.readTable(ctx, path, t.Name)
		if errors.Is(err, darwin.ErrNoTable) {
			continue // removed meanwhile
		}
		if err != nil {
			return shownAnchor{}, err
		}
		out.tables = append(out.tables, table)
	}
	return out, nil
}

// foreignAnchors returns the paths of all anchors but ours. It leaves out inline
// anchors without a name (pfctl calls them "_1" and so on), whose rules pfctl shows where
// they are called. One pfctl process lists all anchors; if ours isn't among them that
// list is incomplete, and the anchors are listed level by level.
func (p pfReader) foreignAnchors(ctx context.Context) ([]string, error) {
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
			if next, all = append(next, below...), append(all, below...); len(all) > 2*maxForeignAnchors {
				return nil, fmt.Errorf("%w: more than %d anchors", errTooManyRules, maxForeignAnchors)
			}
		}
	}
	return slices.DeleteFunc(all, func(path string) bool {
		return path == p.path || strings.HasPrefix(path, p.path+"/") || path[0] == '_' || strings.Contains(path, "/_")
	}), nil
}

// readTable reads a table of a foreign anchor.
func (p pfReader) readTable(ctx context.Context, anchor, name string) (shownTable, error) {
	entries, err := p.pf.Table(ctx, anchor, name)
	var notUnderstood *pfconf.EntryError
	if errors.As(err, &notUnderstood) {
		return shownTable{name, err.Error(), true}, nil
	}
	return shownTable{name, strings.Join((&pfconf.Table{Addrs: entries}).Entries(), "\n"), false}, err
}

// statement returns the table for the simulated pf; it is empty if its entries aren't
// understood, and widen changes the rules that refer to it.
func (t shownTable) statement() *pfconf.Table {
	out := &pfconf.Table{Name: t.name, Persist: true, HasAddrs: true}
	if !t.unparsed {
		out.Addrs, _ = pfconf.ParseTableEntries(t.entries) // parsed once by readTable
	}
	return out
}

// withoutCounters returns rules without the lines that pfctl -v prints below each:
// "  [ Evaluations: ... ]" and "  [ Inserted: ... ]".
func withoutCounters(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(strings.TrimSpace(line), "[ ") {
			b.WriteString(line)
		}
	}
	return b.String()
}
