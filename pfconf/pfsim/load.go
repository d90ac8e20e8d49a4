package pfsim

import (
	"fmt"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/pfconf"
)

// LoadMain makes r the main ruleset, as pfctl -f does: rules, tables, and options, which
// start from their defaults with each load. It is one transaction: on an error nothing
// changes. States and anchors that were loaded separately stay. It doesn't follow load
// anchor lines; the caller can.
func (m *Machine) LoadMain(r *pfconf.Ruleset) error {
	if err := m.load("", r); err != nil {
		return fmt.Errorf("load main ruleset: %w", err)
	}
	return nil
}

// LoadAnchor replaces the rules of one anchor, as pfctl -a path -f does, and
// defines its tables. Tables that r doesn't define stay while they are persistent
// or used. It is one transaction, as [Machine.LoadMain]. Options in r have no
// effect. An anchor that no rule calls is loaded but never evaluated.
func (m *Machine) LoadAnchor(path string, r *pfconf.Ruleset) error {
	if err := checkAnchorPath(path); err != nil {
		return fmt.Errorf("load anchor: %w", err)
	}
	if err := m.load(path, r); err != nil {
		return fmt.Errorf("load anchor %q: %w", path, err)
	}
	return nil
}

// load expands a ruleset by the machine's interfaces and puts it in force.
func (m *Machine) load(path string, r *pfconf.Ruleset) error {
	l, err := r.Expand(path, m.Interfaces())
	if err != nil {
		return err
	}
	return m.install(path, l)
}

// transaction is a load that isn't in force yet (DIOCXBEGIN to DIOCXCOMMIT in
// pf_ioctl.c).
type transaction struct {
	m      *Machine
	parts  []loadPart
	tables int // entries that it defines
}

// loadPart is the part of a transaction for one anchor.
type loadPart struct {
	path  string
	def   *pfconf.Loaded
	lists [ruleLists][]*crule
}

// install puts an expanded ruleset in force.
func (m *Machine) install(path string, l *pfconf.Loaded) error {
	t := transaction{m: m}
	timeouts, limits, err := m.mainOptions(l.Options)
	if err == nil {
		err = t.prepare(path, l)
	}
	for _, a := range l.Anchors {
		if err == nil {
			err = t.prepare(a.Path, a.Loaded)
		}
	}
	if err != nil {
		t.abandon()
		return err
	}
	t.commit()
	if path == "" {
		m.timeouts, m.limits = timeouts, limits
		m.setSkip(l.Options)
	}
	return nil
}

// prepare compiles the part for one anchor. Its rules take references to tables and
// anchors, which abandon gives back.
func (t *transaction) prepare(path string, l *pfconf.Loaded) error {
	t.parts = append(t.parts, loadPart{path: path, def: l})
	part := &t.parts[len(t.parts)-1]
	c := compiler{m: t.m, anchor: path}
	for list, rules := range [ruleLists][]*pfconf.Rule{scrubList: l.Scrub, natList: l.Nat, binatList: l.Binat, rdrList: l.Rdr, filterList: l.Filter} {
		for _, r := range rules {
			cr, err := c.compile(r)
			if cr != nil {
				part.lists[list] = append(part.lists[list], cr)
			}
			if err != nil {
				return err
			}
		}
	}
	for _, rules := range part.lists {
		setSkips(rules)
	}
	return t.checkTables(l)
}

// checkTables checks the tables that a part defines against the kernel's limits.
func (t *transaction) checkTables(l *pfconf.Loaded) error {
	made := 0
	for _, def := range l.Declared {
		if t.m.tables[tableName{l.Path, def.Name}] == nil {
			made++
		}
		if t.tables += len(def.Addrs); t.tables > maxEntries {
			return fmt.Errorf("table %q: %w: %d entries", def.Name, ErrLimit, maxEntries)
		}
	}
	if made > 0 && len(t.m.tables)+made > maxTables {
		return fmt.Errorf("%w: %d tables", ErrLimit, maxTables)
	}
	return nil
}

// abandon releases the references of the prepared rules.
func (t *transaction) abandon() {
	for _, p := range t.parts {
		for _, l := range p.lists {
			t.m.unload(l)
		}
	}
}

// commit swaps the rules in and then the tables, in the kernel's order.
func (t *transaction) commit() {
	// Tables are defined before the old rules are removed, so that a table that old and
	// new rules use is never without a reference. Their contents change after that.
	for _, p := range t.parts {
		for _, def := range p.def.Declared {
			t.m.defineTable(p.path, def)
		}
	}
	for _, p := range t.parts {
		a := t.m.main.create(p.path)
		a.loaded = true
		for i, rules := range p.lists {
			old := a.lists[i]
			a.lists[i] = rules
			t.m.unload(old)
		}
		t.m.commitTables(p.path)
	}
}

// unload marks rules as no longer in force and releases those without states. The others
// exist until their last state ends.
func (m *Machine) unload(rules []*crule) {
	for _, r := range rules {
		r.loaded = false
		m.releaseRule(r)
	}
}

// setSkip applies set skip. It matches whole names of interfaces that exist now (pfi_skip_if
// in pf_if.c); one that appears later isn't skipped.
func (m *Machine) setSkip(opts []*pfconf.Option) {
	// pfctl clears the flags at each load of the main ruleset.
	for _, k := range m.kifs {
		k.skip = false
	}
	for _, o := range opts {
		if o.Name != "skip" {
			continue
		}
		for _, name := range o.Values {
			if k := m.kifs[name]; k != nil && k.exists {
				k.skip = true
			}
		}
	}
}

// FlushRules removes the filter and scrub rules of an anchor, "" being the main
// ruleset, as pfctl -F rules does. States stay.
func (m *PF) FlushRules(anchor string) { m.flushLists(anchor, scrubList, filterList) }

// FlushNat removes the translation rules of an anchor, as pfctl -F nat does.
// States stay, and keep translating.
func (m *PF) FlushNat(anchor string) { m.flushLists(anchor, natList, binatList, rdrList) }

// FlushTables removes the tables of an anchor, as pfctl -F Tables does, and returns their
// number. For rules that refer to them, the tables are empty from then on.
func (m *PF) FlushTables(anchor string) int { return m.flushTables(anchor) }

// FlushAll removes the rules and tables of an anchor, as pfctl -F all does. For the main
// ruleset it also removes all states and source nodes and ends the skipping of
// interfaces. Anchors stay, but no rule calls them any more.
func (m *PF) FlushAll(anchor string) {
	m.FlushRules(anchor)
	m.FlushNat(anchor)
	m.FlushTables(anchor)
	if anchor == "" {
		m.FlushStates()
		m.clearSources()
		m.setSkip(nil)
	}
}

// flushLists empties some lists of an anchor, if it exists.
func (m *Machine) flushLists(anchor string, lists ...ruleList) {
	a := m.main.find(anchor)
	if a == nil {
		return
	}
	for _, l := range lists {
		old := a.lists[l]
		a.lists[l] = nil
		m.unload(old)
	}
}

// Anchors returns the paths of an anchor's direct children, in the order of
// their evaluation. An anchor stays listed after its rules are flushed, as on
// macOS.
func (m *Machine) Anchors(anchor string) []string {
	a := m.main.find(anchor)
	if a == nil {
		return nil
	}
	var out []string
	for _, c := range a.children {
		out = append(out, c.path)
	}
	return out
}

// Snapshot returns the contents of an anchor, "" being the main ruleset: its
// expanded rules, its tables with their current entries, and its nameless inline
// anchors. [pfconf.Loaded.ShowRules], [pfconf.Loaded.ShowNat] and [pfconf.Table.Entries]
// then return what pfctl shows. The error is [ErrNoAnchor]. The rules are the machine's
// own and must not be changed.
func (m *Machine) Snapshot(anchor string) (*pfconf.Loaded, error) {
	a := m.main.find(anchor)
	if a == nil {
		return nil, fmt.Errorf("anchor %q: %w", anchor, ErrNoAnchor)
	}
	l := &pfconf.Loaded{
		Path: anchor, Anchors: namelessAnchors(a, nil),
		Scrub: rulesOf(a.lists[scrubList]), Nat: rulesOf(a.lists[natList]), Binat: rulesOf(a.lists[binatList]),
		Rdr: rulesOf(a.lists[rdrList]), Filter: rulesOf(a.lists[filterList]),
	}
	for _, name := range m.Tables(anchor) {
		t, err := m.Table(anchor, name)
		if err != nil {
			return nil, err
		}
		l.Tables = append(l.Tables, t)
	}
	return l, nil
}

// namelessAnchors appends the inline anchors below a that pfctl named, _ and a number.
func namelessAnchors(a *anchorNode, out []pfconf.LoadedAnchor) []pfconf.LoadedAnchor {
	for _, c := range a.children {
		if strings.HasPrefix(c.name, "_") {
			out = append(out, pfconf.LoadedAnchor{Path: c.path, Loaded: &pfconf.Loaded{Path: c.path, Filter: rulesOf(c.lists[filterList])}})
			out = namelessAnchors(c, out)
		}
	}
	return out
}

// rulesOf returns the rules that were compiled.
func rulesOf(cs []*crule) []*pfconf.Rule {
	out := make([]*pfconf.Rule, len(cs))
	for i, c := range cs {
		out[i] = c.rule
	}
	return slices.Clip(out)
}
