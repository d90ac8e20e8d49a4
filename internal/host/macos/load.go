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

// loadedAnchor is what we have put in force.
type loadedAnchor struct {
	anchor *Anchor
	rules  string // the text of all but the tables
	want   *pfconf.Loaded
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

// enforceFilter puts the anchor in force: loaded or, where only tables differ,
// changed in place, the packet filter on, and called by the main ruleset.
func (p *Backend) enforceFilter(ctx context.Context, r *policy.Ruleset) error {
	p.noteEgress(r)
	with := p.options()
	a, err := Compile(r, with)
	if err != nil {
		return err
	}
	if err := p.putAnchor(ctx, a); err != nil {
		return err
	}
	p.render = func(r *policy.Ruleset) (anchor, text string, err error) { return render(r, with) }
	on, err := p.isOn(ctx)
	if err == nil && !on {
		err = p.enable(ctx)
	}
	if err != nil {
		return named(StepEnable, err)
	}
	obstacles, err := p.obstacles(ctx)
	if err != nil {
		return named(StepAnchor, err)
	}
	if len(obstacles) > 0 {
		return asError(obstacles[0])
	}
	return nil
}

// asError makes an error of a problem.
func asError(o host.Problem) error {
	return &host.StepError{Step: o.Step, Hint: o.Hint, Err: errors.New(o.Message)}
}

// maxBefore bounds for how many interfaces that are gone rules are kept.
const maxBefore = 64

// noteEgress remembers by which interfaces peers' packets can leave, and forgets
// those that went first of those that are gone.
func (p *Backend) noteEgress(r *policy.Ruleset) {
	h, now := r.Host(), egressOf(r.Host())
	for _, e := range now {
		if e.name != h.Uplink4 && e.name != h.Uplink6 && !slices.Contains(p.before, e) {
			p.before = append(p.before, e)
		}
	}
	surplus := len(p.before) - maxBefore
	p.before = slices.DeleteFunc(p.before, func(e Egress) bool {
		if surplus <= 0 || slices.Contains(now, e) {
			return false
		}
		surplus--
		return true
	})
}

// compile makes the anchor for r, with the rules for interfaces that were there
// before.
func (p *Backend) compile(r *policy.Ruleset) (*Anchor, error) {
	return Compile(r, p.options())
}

// Renderer implements [host.Renderer].
func (p *Backend) Renderer() func(*policy.Ruleset) (anchor, text string, err error) {
	if p.loaded == nil {
		return nil
	}
	return p.render
}

// render returns the path and the text of the anchor for r.
func render(r *policy.Ruleset, o AnchorOptions) (anchor, text string, err error) {
	a, err := Compile(r, o)
	if err != nil {
		return "", "", err
	}
	return a.Path, a.Ruleset().String(), nil
}

// Text returns the path of the anchor that enforces r and its text, in pf's language,
// for reading on any machine: o.Ports is that of a Mac with macOS's defaults where it
// isn't given, and a comment says so.
func Text(r *policy.Ruleset, o AnchorOptions) (anchor, text string, err error) {
	anchor, text, err = render(r, o)
	if err == nil && o.Ports == (darwin.PortRange{}) {
		text = fmt.Sprintf("# Peers' flows are translated to ports %d:%d by default; a helper on a Mac chooses those that its sockets leave.\n", defaultPorts.First, defaultPorts.Last) + text
	}
	return anchor, text, err
}

// options are what the anchor depends on now, besides the ruleset.
func (p *Backend) options() AnchorOptions {
	return AnchorOptions{
		Label: p.o.Label, MTU: p.cfg.MTU, Cut: p.cuts.addresses(), Before: p.before,
		Ports: p.ports.nat, NoPorts: p.ports.none, IKE: p.ports.ike(p.o.Now()),
	}
}

// putAnchor makes a what is loaded, in the gentlest way: nothing, where it is
// loaded already; by changing tables, where only they differ; else by loading it.
func (p *Backend) putAnchor(ctx context.Context, a *Anchor) error {
	l := p.loaded
	if l == nil || p.drifted || l.rules != a.rulesText() || !slices.Equal(slices.Sorted(maps.Keys(l.anchor.tables())), slices.Sorted(maps.Keys(a.tables()))) {
		return p.load(ctx, a)
	}
	changed := changedTables(l.anchor.tables(), a.tables())
	if len(changed) == 0 {
		if p.driftAnchor(ctx) == nil {
			return nil
		}
		return p.load(ctx, a)
	}
	return p.step(StepTables, func() error {
		p.drifted = true // until all of it is changed
		for _, c := range changed {
			if err := p.pf.ReplaceTable(ctx, a.Path, c.Name, c.Addrs); err != nil {
				return err
			}
		}
		l.anchor = a
		if err := p.driftTables(ctx, changed...); err != nil {
			return err
		}
		p.drifted = false
		return nil
	})
}

// The tables by what more entries do: classes say what class a destination has,
// the first class first; by opening tables more passes, by closing ones less.
var (
	classTables   = []string{tableMartians, tableSelf, tableMesh, tableLooped, tableNetworks}
	openingTables = []string{tableIncoming, tableDNS, tableLAN, tableRouting, tableLocal}
	closingTables = []string{tableAway, tableUnassigned, tableOutside, tableCut}
)

// changedTables returns the steps that lead from one content of tables to another,
// so that between any two a packet passes only if it passes before the first or
// after the last. What narrows comes first: no permission is there that isn't there
// before and after. Then classes change: a destination that gets into another one
// is in both first, of which the earlier decides. So all get their new entries, from
// the first class to the last, before any loses an old one, from the last to the
// first: what a class shadows never shows. What widens comes last.
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

// union returns a table with the entries of both.
func union(a, b *pfconf.Table) *pfconf.Table {
	out := *b
	out.Addrs = slices.Concat(b.Addrs, entriesNotIn(a, b))
	return &out
}

// intersection returns a table with the entries that are in both.
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

// maxBusy is how often a load is tried while pfctl finds a table in use.
const maxBusy = 5

// load loads the anchor in one transaction, reads it back, and checks that it is
// all there.
func (p *Backend) load(ctx context.Context, a *Anchor) error {
	if p.j.Anchor != a.Path {
		err := p.step(StepJournal, func() error {
			p.j.Anchor = a.Path
			return p.j.write(p.o.StateDir)
		})
		if err != nil {
			return err
		}
	}
	return p.step(StepAnchor, func() error {
		p.loaded = nil
		want, err := a.Ruleset().Expand(a.Path, nil)
		if err != nil {
			return err
		}
		text := a.text()
		err = p.pf.Load(ctx, a.Path, text)
		for range maxBusy {
			if !errors.Is(err, darwin.ErrBusy) {
				break
			}
			err = p.pf.Load(ctx, a.Path, text)
		}
		if err != nil {
			return err
		}
		p.strays = true
		p.loaded, p.drifted = &loadedAnchor{anchor: a, rules: a.rulesText(), want: want}, true
		if err := p.driftAnchor(ctx); err != nil {
			return err
		}
		p.drifted = false
		return nil
	})
}

func (p *Backend) show(ctx context.Context, anchor string) (rules, nat string, err error) {
	if rules, err = p.pf.Rules(ctx, anchor); err == nil {
		nat, err = p.pf.NAT(ctx, anchor)
	}
	return rules, nat, err
}

// driftAnchor says how what pf holds differs from what we loaded; nil: not at all.
func (p *Backend) driftAnchor(ctx context.Context) error {
	rules, nat, err := p.show(ctx, p.path)
	if err != nil {
		return err
	}
	if err := p.driftRules(rules, nat); err != nil {
		return err
	}
	return p.driftTables(ctx, slices.Collect(maps.Values(p.loaded.anchor.tables()))...)
}

// driftRules compares what pfctl prints of the anchor with what it has to print.
// A Mac's pfctl may print more than is written, and in another order, so both are
// compared as read.
func (p *Backend) driftRules(rules, nat string) error {
	if strings.TrimSpace(rules+nat) == "" {
		return errors.New("the anchor is empty")
	}
	if err := pfconf.EqualShown(p.loaded.want.ShowRules(), rules); err != nil {
		return fmt.Errorf("the anchor's filter rules aren't those that were loaded: %w", err)
	}
	if err := pfconf.EqualShown(p.loaded.want.ShowNat(), nat); err != nil {
		return fmt.Errorf("the anchor's translation rules aren't those that were loaded: %w", err)
	}
	return nil
}

// driftTables compares tables' contents, which rules don't show. Of several of one
// name the last counts.
func (p *Backend) driftTables(ctx context.Context, tables ...*pfconf.Table) error {
	last := map[string]*pfconf.Table{}
	for _, t := range tables {
		last[t.Name] = t
	}
	for _, name := range slices.Sorted(maps.Keys(last)) {
		got, err := p.pf.Table(ctx, p.path, name)
		if err != nil {
			return err
		}
		if !slices.Equal((&pfconf.Table{Addrs: got}).Entries(), last[name].Entries()) {
			return fmt.Errorf("the table <%s> holds something else than was written", name)
		}
	}
	return nil
}

// isOn reports whether the packet filter is on and our token keeps it so.
func (p *Backend) isOn(ctx context.Context) (bool, error) {
	info, err := p.pf.Info(ctx)
	if err != nil {
		return false, err
	}
	tokens, err := p.tokens(ctx)
	return info.Enabled && p.j.Token != 0 && slices.Contains(tokens, p.j.Token), err
}

// enable takes a token. Which others there are is written down first, so that one
// that we don't live to write down can be told.
func (p *Backend) enable(ctx context.Context) error {
	return p.step(StepEnable, func() (err error) {
		p.strays = true
		if p.j.Enabling {
			// A run that failed may have taken one all the same.
			if p.j.Token, err = p.unwrittenToken(ctx); err != nil {
				return err
			}
			if p.j.Token != 0 {
				p.j.Enabling, p.j.Others = false, nil
				return p.j.write(p.o.StateDir)
			}
		}
		if p.j.Others, err = p.tokens(ctx); err != nil {
			return err
		}
		p.j.Token, p.j.Enabling = 0, true
		if err := p.j.write(p.o.StateDir); err != nil {
			return err
		}
		token, err := p.pf.Enable(ctx)
		if err != nil {
			return err
		}
		p.j.Token, p.j.Enabling, p.j.Others = uint64(token), false, nil
		return p.j.write(p.o.StateDir)
	})
}
