package learned

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

const (
	// MaxOutside bounds how many addresses of this host's own name count.
	MaxOutside = 64
	// OutsideFor is for how long an address counts after it was last found, while others
	// are: names have their addresses in turn, and a router's old one may still be its own.
	OutsideFor = 24 * time.Hour
)

// Outside are the addresses of the name by which peers find this host: its router's, which
// peers don't reach without lan. They are kept over a restart, for a resolver that is slow
// or silent must not open the router.
type Outside struct {
	Name string `json:"name,omitempty"`
	// Addresses are sorted.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Left is how many addresses of the last answer have no room.
	Left int `json:"-"`
}

// Answers are an own name's addresses by when they were last found.
type Answers map[netip.Addr]time.Time

// Answers returns what counts of an own name already, as if it was found now.
func (o Outside) Answers(name string, now time.Time) Answers {
	a := Answers{}
	if o.Name == name {
		a.Add(o.Addresses, now)
	}
	return a
}

// Sorted returns the addresses, in their order.
func (f Answers) Sorted() []netip.Addr { return slices.SortedFunc(maps.Keys(f), netip.Addr.Compare) }

// Add has the addresses of an answer, which has some, count, those that count already
// first, and forgets those that weren't found for long. It returns how many have no room.
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
