package pfsim

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/pfconf"
)

// tableName is a table's name together with the anchor that it belongs to.
type tableName struct{ anchor, name string }

// The flags of a table, PFR_TFLAG_* of bsd/net/pfvar.h. A table exists for its
// users while it is active; otherwise it is a name that rules refer to.
const (
	tablePersist = 1 << iota
	tableConst
	tableActive
	tableInactive   // a load has defined it and not yet committed
	tableReferenced // by rules
	tableRefdAnchor // by tables of the same name in anchors, as their fallback

	tableUserFlags = tablePersist | tableConst
	tableSetFlags  = tableActive | tableInactive | tableReferenced | tableRefdAnchor
)

// ktable is a table as the kernel holds it. Its life is that of the kernel's:
//
//   - A rule that names a table makes it, inactive, if there is none.
//   - A load that defines it gives it a shadow and, once the rules are swapped,
//     makes the shadow its contents.
//   - pfctl -T add and replace make it active and persistent.
//   - A table that isn't persistent lasts as long as rules refer to it; those of
//     states whose rule is gone still do. An inactive one that nothing refers to
//     is forgotten.
//
// A table of an anchor refers to the main ruleset's of the same name, its root,
// and so keeps that alive too.
type ktable struct {
	key   tableName
	flags int
	// root is the main ruleset's table of the name, used while this one isn't
	// active.
	root    *ktable
	rules   int // references by rules
	anchors int // references by tables whose root this is
	set     prefixSet
	shadow  *shadowTable
}

// shadowTable is what a load wants a table to be.
type shadowTable struct {
	flags    int
	set      prefixSet
	hasAddrs bool
}

// contains reports whether the table, or the one that stands in for it, holds a.
func (t *ktable) contains(a netip.Addr) bool {
	t = t.effective()
	return t != nil && t.set.contains(a)
}

func (t *ktable) effective() *ktable {
	if t.flags&tableActive == 0 && t.root != nil {
		t = t.root
	}
	if t.flags&tableActive == 0 {
		return nil
	}
	return t
}

// newTable adds the name, and that of its root.
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

// attachTable is a rule's reference.
func (m *Machine) attachTable(key tableName) *ktable {
	t := m.tables[key]
	if t == nil {
		t = m.newTable(key)
	}
	t.rules++
	m.setTableFlags(t, t.flags|tableReferenced)
	return t
}

func (m *Machine) detachTable(t *ktable) {
	if t.rules--; t.rules == 0 {
		m.setTableFlags(t, t.flags&^tableReferenced)
	}
}

// setTableFlags is pfr_setflags_ktable: a table that nothing needs any more is
// emptied, and forgotten.
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

// defineTable is what a load does with a table's statement before it commits.
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

// commitTables makes an anchor's defined tables the real ones. Those that the
// load didn't name stay as they are.
func (m *Machine) commitTables(anchor string) {
	var todo []*ktable
	for k, t := range m.tables {
		if k.anchor == anchor && t.flags&tableInactive != 0 {
			todo = append(todo, t)
		}
	}
	for _, t := range todo {
		// A statement without a list, table <t> persist, leaves the contents.
		sh := t.shadow
		if sh.hasAddrs {
			t.set = sh.set
		}
		m.setTableFlags(t, sh.flags&tableUserFlags|t.flags&(tableSetFlags&^tableInactive)|tableActive)
	}
}

// activeTable returns a table that pfctl -T can work on.
func (m *Machine) activeTable(anchor, name string) (*ktable, error) {
	t := m.tables[tableName{anchor, name}]
	if t == nil || t.flags&tableActive == 0 {
		return nil, ErrNoTable
	}
	return t, nil
}

func (m *Machine) changeableTable(anchor, name string) (*ktable, error) {
	t, err := m.activeTable(anchor, name)
	if err == nil && t.flags&tableConst != 0 {
		return nil, ErrConstTable
	}
	return t, err
}

// makeTable makes a persistent table unless it exists.
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

// AddToTable adds entries to a table and makes it, persistent, if it doesn't
// exist, as pfctl -T add does. An entry that exists stays as it is, also when
// it is negated otherwise. It returns how many were added. Addresses must be of
// the kind AddrPrefix. The all-zero host isn't added, without an error.
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

// DeleteFromTable removes entries and returns how many were there. A negated
// entry is removed only as such. The table must exist.
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

// ReplaceTable makes addrs the whole contents of a table, which it makes if
// need be.
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

// FlushTable removes all entries of a table, which must exist, and returns how
// many there were.
func (m *PF) FlushTable(anchor, table string) (int, error) {
	t, err := m.changeableTable(anchor, table)
	if err != nil {
		return 0, fmt.Errorf("flush table %q: %w", table, err)
	}
	n := t.set.n
	t.set.clear()
	return n, nil
}

// TestTable reports whether an address is in a table, as pfctl -T test does. A
// table of an anchor doesn't fall back to the main one here.
func (m *PF) TestTable(anchor, table string, a netip.Addr) (bool, error) {
	t, err := m.activeTable(anchor, table)
	if err != nil {
		return false, fmt.Errorf("test table %q: %w", table, err)
	}
	return t.set.contains(a.WithZone("")), nil
}

// Table returns a table as it is now, with its entries in ascending order. The
// error is ErrNoTable.
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

// flushTables is pfctl -F tables.
func (m *Machine) flushTables(anchor string) int {
	n := 0
	for _, name := range m.Tables(anchor) {
		t := m.tables[tableName{anchor, name}]
		m.setTableFlags(t, t.flags&^tableActive)
		n++
	}
	return n
}
