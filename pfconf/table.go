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
// written it returns what [StoredEntries] returns, leaving out those that it refuses.
func (t *Table) Entries() []string { return entryStrings(stored(t.Addrs)) }

// StoredEntries returns the entries of [Stored] as pfctl -t T -T show prints them,
// sorted as text. The order in which pfctl prints is another: compare sorted.
func StoredEntries(addrs []Address) ([]string, error) {
	held, err := Stored(addrs)
	if err != nil {
		return nil, err
	}
	return entryStrings(held), nil
}

// Stored returns what the kernel holds of a table with these entries, in their order:
//
//   - networks without the bits beyond their length, and addresses without a zone;
//   - of several entries for one network only the first, negated or not; a network
//     within another is a different one, and stays;
//   - no entry for the addresses 0.0.0.0 and :: alone, negated or not, which the
//     kernel's radix tree doesn't take (bsd/net/radix.c), while pfctl says that all
//     went well. Shorter prefixes of zeros, such as ::/127, are held;
//   - IPv4-mapped addresses as the IPv6 ones that they are written as.
//
// It fails for an entry that isn't an address or a network but stands for those of
// an interface.
func Stored(addrs []Address) ([]Address, error) {
	for _, a := range addrs {
		if a.Kind != AddrPrefix || !a.Prefix.IsValid() {
			return nil, fmt.Errorf("store table entry: kind %d is no network", a.Kind)
		}
	}
	return stored(addrs), nil
}

// stored is Stored without the entries that it refuses.
func stored(addrs []Address) []Address {
	seen := make(map[netip.Prefix]bool, len(addrs))
	var all []Address
	for _, a := range addrs {
		if a.Kind != AddrPrefix || !a.Prefix.IsValid() {
			continue
		}
		p := netip.PrefixFrom(a.Prefix.Addr().WithZone(""), a.Prefix.Bits()).Masked()
		if allZeroHost := p.IsSingleIP() && p.Addr().IsUnspecified(); !allZeroHost && !seen[p] {
			seen[p] = true
			all = append(all, Address{Kind: AddrPrefix, Prefix: p, Not: a.Not})
		}
	}
	return all
}

// entryStrings prints entries, sorted.
func entryStrings(all []Address) []string {
	out := make([]string, 0, len(all))
	for _, a := range all {
		entry := prefixString(a.Prefix)
		if a.Not {
			entry = "!" + entry
		}
		out = append(out, entry)
	}
	slices.Sort(out)
	return out
}
