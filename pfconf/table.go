package pfconf

import (
	"fmt"
	"net/netip"
	"slices"
)

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
// them, sorted as text, negated ones with a leading !. Of the entries of a table as
// written it returns what [StoredEntries] does, leaving out those that it refuses.
func (t *Table) Entries() []string { return entryStrings(storedEntries(t.Addrs)) }

// StoredEntries returns what the kernel holds of a table with these entries, as
// pfctl -t T -T show prints it, sorted as text:
//
//   - networks without the bits beyond their length, and addresses without /32 or
//     /128;
//   - of several entries for one network only the first, negated or not; a network
//     within another is a different one, and stays;
//   - no entry for the addresses 0.0.0.0 and :: alone, negated or not, which the
//     kernel's radix tree doesn't take (bsd/net/radix.c), while pfctl says that all
//     went well. Shorter prefixes of zeros, such as ::/127, are held;
//   - IPv4-mapped addresses as the IPv6 ones that they are written as.
//
// The order in which pfctl prints is another: compare sorted. It fails for an entry
// that isn't an address or a network but stands for those of an interface.
func StoredEntries(addrs []Address) ([]string, error) {
	for _, a := range addrs {
		if a.Kind != AddrPrefix || !a.Prefix.IsValid() {
			return nil, fmt.Errorf("store table entry: kind %d is no network", a.Kind)
		}
	}
	return entryStrings(storedEntries(addrs)), nil
}

// storedEntries returns the entries that the kernel holds, in the order of the
// list.
func storedEntries(addrs []Address) []prefixEntry {
	seen := make(map[netip.Prefix]bool, len(addrs))
	all := make([]prefixEntry, 0, len(addrs))
	for _, a := range addrs {
		if p, ok := tablePrefix(a); ok && storable(p) && !seen[p] {
			seen[p] = true
			all = append(all, prefixEntry{p, a.Not})
		}
	}
	return all
}

// storable is false for the all-zero host, which a table never holds.
func storable(p netip.Prefix) bool { return !p.IsSingleIP() || !p.Addr().IsUnspecified() }

// entryStrings prints entries, sorted.
func entryStrings(all []prefixEntry) []string {
	out := make([]string, 0, len(all))
	for _, e := range all {
		entry := prefixString(e.prefix)
		if e.not {
			entry = "!" + entry
		}
		out = append(out, entry)
	}
	slices.Sort(out)
	return out
}
