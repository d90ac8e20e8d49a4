package learned

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

const (
	// MaxOutside limits how many addresses of this host's own name are kept.
	MaxOutside = 64
	// OutsideFor is how long an address is kept after the last answer that had it. Some names
	// return their addresses in turn, and a router may still have its old address.
	OutsideFor = 24 * time.Hour
)

// Outside has the addresses of the name under which peers reach this host. They are those of
// its router, which a peer may reach only with lan. They are saved, because otherwise the
// router would be open after a restart until the resolver answers.
type Outside struct {
	Name string `json:"name,omitempty"`
	// Addresses are sorted.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Left is the number of addresses in the last answer beyond MaxOutside.
	Left int `json:"-"`
}

// Answers has the addresses of this host's own name, with the time of the last answer that had
// each.
type Answers map[netip.Addr]time.Time

// Answers returns the saved addresses of a name, with now as their time. It is empty for
// another name.
func (o Outside) Answers(name string, now time.Time) Answers {
	a := Answers{}
	if o.Name == name {
		a.Add(o.Addresses, now)
	}
	return a
}

// Sorted returns the addresses in ascending order.
func (f Answers) Sorted() []netip.Addr { return slices.SortedFunc(maps.Keys(f), netip.Addr.Compare) }

// Add adds the addresses of an answer that isn't empty, and drops those that no answer had for
// OutsideFor. It returns how many new addresses were beyond MaxOutside.
func (f Answers) Add(answer []netip.Addr, now time.Time) (left int) {
	maps.DeleteFunc(f, func(a netip.Addr, seen time.Time) bool {
		return now.Sub(seen) >= OutsideFor && !slices.Contains(answer, a)
	})
	for _, a := range answer {
		if _, known := f[a]; !known && len(f) >= MaxOutside {
			left++
			continue
		}
		f[a] = now
	}
	return left
}
