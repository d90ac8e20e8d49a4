package pfconf

import "slices"

// A Table is a named set of addresses. The longest entry that holds an address
// decides; a negated entry then means that it isn't in the table.
type Table struct {
	Name    string // at most 31 bytes
	Persist bool   // stays although no rule uses it
	Const   bool   // can't be changed by pfctl -T
	// Addrs are its entries as written, with HasAddrs telling an empty list
	// { } from none: a persistent table without a list keeps what it held.
	Addrs    []Address
	HasAddrs bool
	Files    []string // file "…"
}

// Entries returns the addresses of a loaded table as pfctl -t T -T show prints
// them, sorted as text, negated ones with a leading !.
func (t *Table) Entries() []string {
	entries := make([]string, 0, len(t.Addrs))
	for _, a := range t.Addrs {
		entry := prefixString(a.Prefix)
		if a.Not {
			entry = "!" + entry
		}
		entries = append(entries, entry)
	}
	slices.Sort(entries)
	return entries
}
