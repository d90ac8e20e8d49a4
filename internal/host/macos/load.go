package macos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// loadedAnchor is the anchor that pf was given.
type loadedAnchor struct {
	anchor *Anchor
	rules  string // the text of anchor without its tables
	// want is the anchor as pf expands it, to compare with what pfctl shows.
	want *pfconf.Loaded
}

// tables returns the anchor's tables by name.
func (a *Anchor) tables() map[string]*pfconf.Table {
	out := map[string]*pfconf.Table{}
	for _, l := range a.Lines {
		if t, ok := l.Statement.(*pfconf.Table); ok {
			out[t.Name] = t
		}
	}
	return out
}

// rulesText returns the text of the anchor without its tables.
func (a *Anchor) rulesText() string {
	rs := &pfconf.Ruleset{}
	for _, l := range a.Lines {
		if _, ok := l.Statement.(*pfconf.Table); !ok {
			rs.Statements = append(rs.Statements, l.Statement)
		}
	}
	return rs.String()
}

// enforceFilter makes pf enforce r: it loads the anchor, or changes its tables if only
// they differ, enables pf, and checks that the main ruleset calls the anchor.
func (b *Backend) enforceFilter(ctx context.Context, r *policy.Ruleset) error {
	b.recordEgress(r)
	with := b.options()
	a, err := Compile(r, with)
	if err != nil {
		return err
	}
	if err := b.ensureAnchor(ctx, a); err != nil {
		return err
	}
	b.render = func(r *policy.Ruleset) (anchor, text string, err error) { return render(r, with) }
	on, err := b.isOn(ctx)
	if err == nil && !on {
		err = b.enable(ctx)
	}
	if err != nil {
		return asStepError(StepEnable, err)
	}
	obstacles, err := b.obstacles(ctx)
	if err != nil {
		return asStepError(StepAnchor, err)
	}
	if len(obstacles) > 0 {
		return problemError(obstacles[0])
	}
	return nil
}

// problemError returns a problem as an error.
func problemError(o host.Problem) error {
	return &host.StepError{Step: o.Step, Hint: o.Hint, Kind: o.Kind, Err: errors.New(o.Message)}
}

// maxPastEgress is for how many interfaces rules are kept after they disappeared.
const maxPastEgress = 64

// recordEgress adds the interfaces by which peers' packets can leave to pastEgress, and
// drops the oldest of those that are gone.
func (b *Backend) recordEgress(r *policy.Ruleset) {
	h, now := r.Host(), egressOf(r.Host())
	for _, e := range now {
		if e.name != h.Uplink4 && e.name != h.Uplink6 && !slices.Contains(b.pastEgress, e) {
			b.pastEgress = append(b.pastEgress, e)
		}
	}
	surplus := len(b.pastEgress) - maxPastEgress
	b.pastEgress = slices.DeleteFunc(b.pastEgress, func(e Egress) bool {
		if surplus <= 0 || slices.Contains(now, e) {
			return false
		}
		surplus--
		return true
	})
}

// compile returns the anchor for r with the current options.
func (b *Backend) compile(r *policy.Ruleset) (*Anchor, error) {
	return Compile(r, b.options())
}

// Renderer implements [host.Renderer].
func (b *Backend) Renderer() func(*policy.Ruleset) (anchor, text string, err error) {
	if b.loaded == nil {
		return nil
	}
	return b.render
}

// render returns the path and the text of the anchor for r.
func render(r *policy.Ruleset, o AnchorOptions) (anchor, text string, err error) {
	a, err := Compile(r, o)
	if err != nil {
		return "", "", err
	}
	return a.Path, a.Ruleset().String(), nil
}

// Text returns the path of the anchor that enforces r and its text in pf.conf(5)'s
// language, on any platform. If o.Ports isn't set the text has macOS's default range,
// and a comment that says so.
func Text(r *policy.Ruleset, o AnchorOptions) (anchor, text string, err error) {
	anchor, text, err = render(r, o)
	if err == nil && o.Ports == (darwin.PortRange{}) {
		text = fmt.Sprintf("# Peers' flows are translated to ports %d:%d by default; a helper on a Mac chooses a range without sockets of its own.\n", defaultPorts.First, defaultPorts.Last) + text
	}
	return anchor, text, err
}

// options returns what the anchor depends on now besides the ruleset.
func (b *Backend) options() AnchorOptions {
	return AnchorOptions{
		Label: b.o.Label, MTU: b.cfg.MTU, Cut: b.cuts.addresses(), PastEgress: b.pastEgress,
		Ports: b.ports.nat, NoPorts: b.ports.none, IKE: b.ports.ike(b.o.Now()),
	}
}

// ensureAnchor makes pf hold a with the least change: none if it is loaded already,
// tables if only they differ, otherwise a load of the whole anchor.
func (b *Backend) ensureAnchor(ctx context.Context, a *Anchor) error {
	l := b.loaded
	if l == nil || b.drifted || l.rules != a.rulesText() || !slices.Equal(slices.Sorted(maps.Keys(l.anchor.tables())), slices.Sorted(maps.Keys(a.tables()))) {
		return b.loadAnchor(ctx, a)
	}
	changed := changedTables(l.anchor.tables(), a.tables())
	if len(changed) == 0 {
		if b.driftAnchor(ctx) == nil {
			return nil
		}
		return b.loadAnchor(ctx, a)
	}
	return b.step(StepTables, func() error {
		b.drifted = true // until all tables are changed
		for _, c := range changed {
			if err := b.pf.ReplaceTable(ctx, a.Path, c.Name, c.Addrs); err != nil {
				return err
			}
		}
		l.anchor = a
		if err := b.driftTables(ctx, changed...); err != nil {
			return err
		}
		b.drifted = false
		return nil
	})
}

// The tables by the effect of more entries. A destination's class is that of the first
// of classTables that has it. Entries in openingTables let more packets pass, entries
// in closingTables fewer.
var (
	classTables   = []string{tableMartians, tableSelf, tableMesh, tableLooped, tableNetworks}
	openingTables = append(serviceTables(), tableIncoming, tableLAN, tableRouting, tableLocal)
	closingTables = []string{tableAway, tableUnassigned, tableOutside, tableCut}
)

// changedTables returns the replacements that lead from one content of the tables to
// another. pfctl replaces one table at a time, and between any two replacements a
// packet must pass only if it passes before the first or after the last.
//
// What narrows comes first: opening tables shrink to the entries that they have before
// and after. Then the classes change. A destination that moves to another class is in
// both for a while, and the earlier class decides; so all class tables first get their
// new entries, from the first class to the last, and then lose their old ones, from
// the last to the first. What widens comes last.
func changedTables(old, next map[string]*pfconf.Table) []*pfconf.Table {
	now := maps.Clone(old)
	var out []*pfconf.Table
	become := func(name string, t *pfconf.Table) {
		if !slices.Equal(now[name].Entries(), t.Entries()) {
			now[name] = t
			out = append(out, t)
		}
	}
	each := func(names []string, f func(a, b *pfconf.Table) *pfconf.Table) {
		for _, name := range names {
			if next[name] != nil {
				become(name, f(old[name], next[name]))
			}
		}
	}
	final := func(_, t *pfconf.Table) *pfconf.Table { return t }
	each(openingTables, intersection)
	each(closingTables, union)
	each([]string{tablePeers, tableHost}, final)
	fromLast := slices.Clone(classTables)
	slices.Reverse(fromLast)
	each(classTables, union)
	each(fromLast, final)
	each(closingTables, final)
	each(openingTables, final)
	return out
}

// union returns a table with the entries of both; of two for one prefix, b's.
func union(a, b *pfconf.Table) *pfconf.Table {
	out := *b
	out.Addrs = slices.Concat(b.Addrs, entriesNotIn(a, b))
	return &out
}

// intersection returns the entries of b for whose prefix a has one.
func intersection(a, b *pfconf.Table) *pfconf.Table {
	out, gone := *b, entriesNotIn(b, a)
	out.Addrs = slices.DeleteFunc(slices.Clone(b.Addrs), func(x pfconf.Address) bool { return slices.Contains(gone, x) })
	return &out
}

// entriesNotIn returns the entries of a for whose prefix b has none.
func entriesNotIn(a, b *pfconf.Table) []pfconf.Address {
	in := map[netip.Prefix]bool{}
	for _, x := range b.Addrs {
		in[x.Prefix] = true
	}
	return slices.DeleteFunc(slices.Clone(a.Addrs), func(x pfconf.Address) bool { return in[x.Prefix] })
}

// maxBusy is how often a load is tried again while pfctl reports that a table is in
// use ("cannot define table X: Resource busy").
const maxBusy = 5

// loadAnchor loads the anchor and checks what pf holds afterwards. A load is one
// transaction (DIOCXCOMMIT): if it fails, pf keeps the old rules.
func (b *Backend) loadAnchor(ctx context.Context, a *Anchor) error {
	if b.j.Anchor != a.Path {
		err := b.step(StepJournal, func() error {
			b.j.Anchor = a.Path
			return b.j.write(b.o.StateDir)
		})
		if err != nil {
			return err
		}
	}
	return b.step(StepAnchor, func() error {
		b.loaded = nil
		want, err := a.Ruleset().Expand(a.Path, nil)
		if err != nil {
			return err
		}
		text := a.text()
		err = b.pf.Load(ctx, a.Path, text)
		for range maxBusy {
			if !errors.Is(err, darwin.ErrBusy) {
				break
			}
			err = b.pf.Load(ctx, a.Path, text)
		}
		if err != nil {
			return err
		}
		b.unwantedStates = true
		b.loaded, b.drifted = &loadedAnchor{anchor: a, rules: a.rulesText(), want: want}, true
		if err := b.driftAnchor(ctx); err != nil {
			return err
		}
		b.drifted = false
		return nil
	})
}

// showAnchor returns the filter and the translation rules of an anchor as pfctl shows
// them; both are empty if it doesn't exist, since pfctl then exits with 0.
func (b *Backend) showAnchor(ctx context.Context, anchor string) (rules, nat string, err error) {
	if rules, err = b.pf.Rules(ctx, anchor); err == nil {
		nat, err = b.pf.NAT(ctx, anchor)
	}
	return rules, nat, err
}

// driftAnchor returns an error that says how pf's anchor differs from what was loaded;
// nil if it doesn't.
func (b *Backend) driftAnchor(ctx context.Context) error {
	rules, nat, err := b.showAnchor(ctx, b.path)
	if err != nil {
		return err
	}
	if err := b.driftRules(rules, nat); err != nil {
		return err
	}
	return b.driftTables(ctx, slices.Collect(maps.Values(b.loaded.anchor.tables()))...)
}

// driftRules compares the anchor's rules as pfctl shows them with what it should show.
// pfctl normalises rules: it adds defaults (flags S/SA, extfilter ei) and changes the
// order of options. So both texts are parsed and compared as values.
func (b *Backend) driftRules(rules, nat string) error {
	if strings.TrimSpace(rules+nat) == "" {
		return errors.New("the anchor is empty")
	}
	if err := pfconf.EqualShown(b.loaded.want.ShowRules(), rules); err != nil {
		return fmt.Errorf("the anchor's filter rules aren't those that were loaded: %w", err)
	}
	if err := pfconf.EqualShown(b.loaded.want.ShowNat(), nat); err != nil {
		return fmt.Errorf("the anchor's translation rules aren't those that were loaded: %w", err)
	}
	return nil
}

// driftTables compares the contents of tables, which the rules don't show. Of several
// tables with one name the last counts.
func (b *Backend) driftTables(ctx context.Context, tables ...*pfconf.Table) error {
	last := map[string]*pfconf.Table{}
	for _, t := range tables {
		last[t.Name] = t
	}
	for _, name := range slices.Sorted(maps.Keys(last)) {
		got, err := b.pf.Table(ctx, b.path, name)
		if err != nil {
			return err
		}
		if !slices.Equal((&pfconf.Table{Addrs: got}).Entries(), last[name].Entries()) {
			return fmt.Errorf("the table <%s> doesn't hold what was written", name)
		}
	}
	return nil
}

// isOn reports whether pf is enabled and our token keeps it so. Any pfctl -d disables
// pf and invalidates all tokens (DIOCSTOP in xnu bsd/net/pf_ioctl.c).
func (b *Backend) isOn(ctx context.Context) (bool, error) {
	info, err := b.pf.Info(ctx)
	if err != nil {
		return false, err
	}
	tokens, err := b.tokens(ctx)
	return info.Enabled && b.j.Token != 0 && slices.Contains(tokens, b.j.Token), err
}

// enable acquires a token (pfctl -E). The journal gets the existing tokens first, so
// that a helper which is killed before it records the new one can identify it. Tokens
// outlive the process that acquired them, and end with the boot.
func (b *Backend) enable(ctx context.Context) error {
	return b.step(StepEnable, func() (err error) {
		b.unwantedStates = true
		if b.j.Enabling {
			// A pfctl that failed or was killed may have acquired one.
			if b.j.Token, err = b.unrecordedToken(ctx); err != nil {
				return err
			}
			if b.j.Token != 0 {
				b.j.Enabling, b.j.Others = false, nil
				return b.j.write(b.o.StateDir)
			}
		}
		if b.j.Others, err = b.tokens(ctx); err != nil {
			return err
		}
		b.j.Token, b.j.Enabling = 0, true
		if err := b.j.write(b.o.StateDir); err != nil {
			return err
		}
		token, err := b.pf.Enable(ctx)
		if err != nil {
			return err
		}
		b.j.Token, b.j.Enabling, b.j.Others = uint64(token), false, nil
		return b.j.write(b.o.StateDir)
	})
}
