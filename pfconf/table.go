package pfconf

import (
	"fmt"
	"net/netip"
	"slices"
)

// A Table is a named set of addresses (pf.conf(5), section TABLES). The entry with the
// longest prefix that contains an address decides about it: if that entry is negated,
// the address isn't in the table.
type Table struct {
	Name    string // at most 31 bytes
	Persist bool   // stays even when no rule uses it
	Const   bool   // can't be changed by pfctl -T
	// Addrs are the entries as written. HasAddrs distinguishes an empty list { },
	// which empties the table, from no list, which leaves the entries of a persistent
	// table as they are.
	Addrs    []Address
	HasAddrs bool
	Files    []string // paths of file "…", whose entries pfctl adds
}

// Entries returns the addresses of a loaded table as pfctl -t T -T show prints
// them, sorted as text, negated ones with a leading !. Of a table as written it returns
// what [StoredEntries] does, without the entries for which that fails.
func (t *Table) Entries() []string { return entryStrings(stored(t.Addrs)) }

// StoredEntries returns the entries of [Stored] as pfctl -t T -T show prints them,
// sorted as text. pfctl itself prints them in another order, so sort its output before
// comparing.
func StoredEntries(addrs []Address) ([]string, error) {
	held, err := Stored(addrs)
	if err != nil {
		return nil, err
	}
	return entryStrings(held), nil
}

// Stored returns the entries that the kernel stores for these, in the same order:
//
//   - networks without the bits beyond their length, and addresses without a zone;
//   - of several entries for the same network only the first, negated or not. A network
//     within another is a different one, and both are stored;
//   - no entry for the single addresses 0.0.0.0 and ::, negated or not. The kernel's
//     radix tree (xnu bsd/net/radix.c) doesn't store them, although pfctl reports
//     success. It does store shorter prefixes of zeros, such as ::/127;
//   - IPv4-mapped addresses as IPv6 addresses, as they are written.
//
// It fails for an entry that is no address or network, such as one that stands for the
// addresses of an interface.
func Stored(addrs []Address) ([]Address, error) {
	for _, a := range addrs {
		if a.Kind != AddrPrefix || !a.Prefix.IsValid() {
			return nil, fmt.Errorf("store table entry: kind %d is no network", a.Kind)
		}
	}
	return stored(addrs), nil
}

// stored is Stored that leaves out the entries for which Stored fails.
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

// entryStrings returns entries as pfctl prints them, sorted as text.
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
