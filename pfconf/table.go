package pfconf

// A Table is a named set of addresses. The longest entry that holds an address
// decides; a negated entry then means that it isn't in the table.
type Table struct {
	Name     string // at most 31 bytes
	Persist  bool   // stays although no rule uses it
	Const    bool   // can't be changed by pfctl -T
	Counters bool
	// Addrs are its entries as written, with HasAddrs telling an empty list
	// { } from none: a loaded table without a list keeps what it held.
	Addrs    []Address
	HasAddrs bool
	Files    []string // file "…"
}
