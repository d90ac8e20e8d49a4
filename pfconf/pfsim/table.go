package pfsim

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/pfconf"
)

// tableName is a table's name together with the path of its anchor.
type tableName struct{ anchor, name string }

// The flags of a table, PFR_TFLAG_* of xnu bsd/net/pfvar.h. Only an active table exists
// for pfctl; any other is a name that rules refer to.
const (
	tablePersist = 1 << iota
	tableConst
	tableActive
	tableInactive   // a load has defined it, and isn't committed yet
	tableReferenced // by rules
	tableRefdAnchor // by tables of the same name in anchors, as their fallback

	tableUserFlags = tablePersist | tableConst
	tableSetFlags  = tableActive | tableInactive | tableReferenced | tableRefdAnchor
)

// ktable is a table, the kernel's pfr_ktable. It follows the kernel's (pf_table.c) in when
// it comes into existence and ends:
//
//   - A rule that names a table makes an inactive one if there is none.
//   - A load that defines the table gives it a shadow. Once the rules are swapped, the
//     shadow becomes its contents, and it is active.
//   - pfctl -T add and -T replace make it active and persistent.
//   - A table that isn't persistent stays active while rules refer to it, including
//     unloaded rules that still have states.
//   - An inactive table to which nothing refers is removed.
//
// A table of an anchor refers to the table of the same name in the main ruleset, its root,
// and so keeps that too.
type ktable struct {
	key   tableName
	flags int
	// root is the main ruleset's table of the same name, which rules use while this one
	// isn't active; nil in the main ruleset.
	root    *ktable
	rules   int // references by rules
	anchors int // references by tables whose root this is
	set     prefixSet
	shadow  *shadowTable // nil unless tableInactive
}

// shadowTable is the definition of a table by a load that isn't committed yet.
type shadowTable struct {
	flags    int
	set      prefixSet
	hasAddrs bool // the definition has a list, if only an empty one
}

// contains reports whether the table in effect contains a (pfr_match_addr).
func (t *ktable) contains(a netip.Addr) bool {
	t = t.effective()
	return t != nil && t.set.contains(a)
}

// effective returns the table that rules use in place of t: t itself if it is active, else
// its root, else nil. It is never the table of a parent anchor.
func (t *ktable) effective() *ktable {
	if t.flags&tableActive == 0 && t.root != nil {
		t = t.root
	}
	if t.flags&tableActive == 0 {
		return nil
	}
	return t
}

// newTable adds an inactive table, and its root if that doesn't exist.
func (m *Machine) newTable(key tableName) *ktable {
	t := &ktable{key: key}
	if key.anchor != "" {
		rootKey := tableName{name: key.name}
		t.root = m.tables[rootKey]
		if t.root == nil {
			t.root = &ktable{key: rootKey}
			m.tables[rootKey] = t.root
		}
	}
	m.tables[key] = t
	if t.root != nil {
		t.root.anchors++
		m.setTableFlags(t.root, t.root.flags|tableRefdAnchor)
	}
	return t
}

// attachTable returns a table for a rule to refer to, a new one if there is none
// (pfr_attach_table).
func (m *Machine) attachTable(key tableName) *ktable {
	t := m.tables[key]
	if t == nil {
		t = m.newTable(key)
	}
	t.rules++
	m.setTableFlags(t, t.flags|tableReferenced)
	return t
}

// detachTable releases a rule's reference (pfr_detach_table).
func (m *Machine) detachTable(t *ktable) {
	if t.rules--; t.rules == 0 {
		m.setTableFlags(t, t.flags&^tableReferenced)
	}
}

// setTableFlags changes a table's flags (pfr_setflags_ktable). A table that nothing needs
// becomes inactive and empty, and is removed if nothing refers to it.
func (m *Machine) setTableFlags(t *ktable, flags int) {
	if flags&(tableReferenced|tableRefdAnchor|tablePersist) == 0 {
		flags &^= tableActive
	}
	if flags&tableActive == 0 {
		flags &^= tableUserFlags
	}
	if flags&tableSetFlags == 0 {
		delete(m.tables, t.key)
		t.flags = flags
		if r := t.root; r != nil {
			if r.anchors--; r.anchors == 0 {
				m.setTableFlags(r, r.flags&^tableRefdAnchor)
			}
		}
		return
	}
	if flags&tableActive == 0 {
		t.set.clear()
	}
	if flags&tableInactive == 0 {
		t.shadow = nil
	}
	t.flags = flags
}

// defineTable gives a table the shadow by which a load defines it (pfr_ina_define).
func (m *Machine) defineTable(anchor string, def *pfconf.Table) {
	key := tableName{anchor, def.Name}
	t := m.tables[key]
	if t == nil {
		t = m.newTable(key)
	}
	sh := &shadowTable{hasAddrs: def.HasAddrs || len(def.Addrs) > 0}
	if def.Persist {
		sh.flags |= tablePersist
	}
	if def.Const {
		sh.flags |= tableConst
	}
	for _, a := range def.Addrs {
		sh.set.set(a.Prefix, a.Not)
	}
	t.shadow = sh
	t.flags |= tableInactive
}

// commitTables makes the shadows of an anchor's tables their contents
// (pfr_ina_commit). Tables that the load didn't define stay as they are.
func (m *Machine) commitTables(anchor string) {
	var todo []*ktable
	for k, t := range m.tables {
		if k.anchor == anchor && t.flags&tableInactive != 0 {
			todo = append(todo, t)
		}
	}
	for _, t := range todo {
		// A definition without a list, table <t> persist, leaves the entries.
		sh := t.shadow
		if sh.hasAddrs {
			t.set = sh.set
		}
		m.setTableFlags(t, sh.flags&tableUserFlags|t.flags&(tableSetFlags&^tableInactive)|tableActive)
	}
}

// activeTable returns a table that pfctl -T can read. The error is ErrNoTable.
func (m *Machine) activeTable(anchor, name string) (*ktable, error) {
	t := m.tables[tableName{anchor, name}]
	if t == nil || t.flags&tableActive == 0 {
		return nil, ErrNoTable
	}
	return t, nil
}

// changeableTable returns a table that pfctl -T can change. The error is ErrNoTable or
// ErrConstTable.
func (m *Machine) changeableTable(anchor, name string) (*ktable, error) {
	t, err := m.activeTable(anchor, name)
	if err == nil && t.flags&tableConst != 0 {
		return nil, ErrConstTable
	}
	return t, err
}

// makeTable returns a table that pfctl -T can change, and makes a persistent one if there
// is none.
func (m *Machine) makeTable(anchor, name string) (*ktable, error) {
	if name == "" || len(name) > maxTableName {
		return nil, fmt.Errorf("name of %d bytes: must have 1 to %d", len(name), maxTableName)
	}
	if anchor != "" {
		if err := checkAnchorPath(anchor); err != nil {
			return nil, err
		}
	}
	key := tableName{anchor, name}
	t := m.tables[key]
	if t == nil {
		if len(m.tables) >= maxTables {
			return nil, fmt.Errorf("%w: %d tables", ErrLimit, maxTables)
		}
		m.main.create(anchor).loaded = true
		t = m.newTable(key)
	}
	if t.flags&tableActive == 0 {
		m.setTableFlags(t, t.flags&^tableUserFlags|tableActive|tablePersist)
	}
	return m.changeableTable(anchor, name)
}

// AddToTable adds entries to a table, as pfctl -T add does, and returns how many it added.
// If the table doesn't exist, it makes a persistent one. An entry that exists stays as it
// is, even if only its negation differs. Addresses must be of the kind AddrPrefix; the
// all-zero host is silently left out, see [pfconf.Stored].
func (m *PF) AddToTable(anchor, table string, addrs []pfconf.Address) (int, error) {
	ps, err := pfconf.Stored(addrs)
	if err != nil {
		return 0, fmt.Errorf("add to table %q: %w", table, err)
	}
	t, err := m.makeTable(anchor, table)
	if err != nil {
		return 0, fmt.Errorf("add to table %q: %w", table, err)
	}
	if t.set.n+len(ps) > maxEntries {
		return 0, fmt.Errorf("add to table %q: %w: %d entries", table, ErrLimit, maxEntries)
	}
	before := t.set.n
	for _, e := range ps {
		if _, ok := t.set.get(e.Prefix); !ok {
			t.set.set(e.Prefix, e.Not)
		}
	}
	return t.set.n - before, nil
}

// DeleteFromTable removes entries from a table, which must exist, and returns how many it
// removed. A negated entry is removed only by a negated address.
func (m *PF) DeleteFromTable(anchor, table string, addrs []pfconf.Address) (int, error) {
	if _, err := pfconf.Stored(addrs); err != nil {
		return 0, fmt.Errorf("delete from table %q: %w", table, err)
	}
	t, err := m.changeableTable(anchor, table)
	if err != nil {
		return 0, fmt.Errorf("delete from table %q: %w", table, err)
	}
	before := t.set.n
	for _, a := range addrs {
		p := netip.PrefixFrom(a.Prefix.Addr().WithZone(""), a.Prefix.Bits()).Masked()
		if not, ok := t.set.get(p); ok && not == a.Not {
			t.set.remove(p)
		}
	}
	return before - t.set.n, nil
}

// ReplaceTable makes addrs the only entries of a table. If the table doesn't exist, it
// makes a persistent one.
func (m *PF) ReplaceTable(anchor, table string, addrs []pfconf.Address) error {
	ps, err := pfconf.Stored(addrs)
	if err != nil {
		return fmt.Errorf("replace table %q: %w", table, err)
	}
	t, err := m.makeTable(anchor, table)
	if err != nil {
		return fmt.Errorf("replace table %q: %w", table, err)
	}
	if len(ps) > maxEntries {
		return fmt.Errorf("replace table %q: %w: %d entries", table, ErrLimit, maxEntries)
	}
	var set prefixSet
	for _, e := range ps {
		set.set(e.Prefix, e.Not)
	}
	t.set = set
	return nil
}

// FlushTable removes all entries of a table, which must exist, and returns their number.
func (m *PF) FlushTable(anchor, table string) (int, error) {
	t, err := m.changeableTable(anchor, table)
	if err != nil {
		return 0, fmt.Errorf("flush table %q: %w", table, err)
	}
	n := t.set.n
	t.set.clear()
	return n, nil
}

// TestTable reports whether an address is in a table, as pfctl -T test does. Unlike for
// rules, a table of an anchor isn't replaced by the main ruleset's.
func (m *PF) TestTable(anchor, table string, a netip.Addr) (bool, error) {
	t, err := m.activeTable(anchor, table)
	if err != nil {
		return false, fmt.Errorf("test table %q: %w", table, err)
	}
	return t.set.contains(a.WithZone("")), nil
}

// Table returns a table with its current entries, in ascending order. The error is
// [ErrNoTable].
func (m *Machine) Table(anchor, table string) (*pfconf.Table, error) {
	t, err := m.activeTable(anchor, table)
	if err != nil {
		return nil, fmt.Errorf("show table %q: %w", table, err)
	}
	out := &pfconf.Table{
		Name: table, Persist: t.flags&tablePersist != 0, Const: t.flags&tableConst != 0,
		HasAddrs: true,
	}
	for _, e := range t.set.entries() {
		out.Addrs = append(out.Addrs, pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: e.prefix, Not: e.not})
	}
	return out, nil
}

// Tables returns the names of an anchor's tables, sorted.
func (m *Machine) Tables(anchor string) []string {
	var out []string
	for k, t := range m.tables {
		if k.anchor == anchor && t.flags&tableActive != 0 {
			out = append(out, k.name)
		}
	}
	slices.Sort(out)
	return out
}

// flushTables deactivates an anchor's tables and returns their number.
func (m *Machine) flushTables(anchor string) int {
	n := 0
	for _, name := range m.Tables(anchor) {
		t := m.tables[tableName{anchor, name}]
		m.setTableFlags(t, t.flags&^tableActive)
		n++
	}
	return n
}
