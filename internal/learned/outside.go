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
	// maxNew limits how many addresses a single answer adds: a quarter of MaxOutside, so that
	// the one or two addresses that a home's name has outlast three wrong answers.
	maxNew = MaxOutside / 4
)

// Outside has the addresses of the name under which peers reach this host. They are those of
// its router, which a peer may reach only with lan. They are saved, because otherwise the
// router would be open after a restart until the resolver answers.
type Outside struct {
	Name string `json:"name,omitempty"`
	// Addresses are sorted.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Left is the number of known addresses that aren't in Addresses; see [Answers.Add].
	Left int `json:"-"`
}

// Answers has the addresses that answers for this host's own name had, for a limited time.
//
// Answers of the DNS can be forged, and a wrong one does harm in two ways. An address that is
// here without reason is closed to peers that have routing but not lan. The router's address is
// open to them when it isn't here, be it that there was no room for it or that it gave way. So
// there is room for several answers, one answer takes only a part of it, and when there is no
// room left, the newest answer prevails: addresses of one forged answer can't keep the router's
// next address out for a day, and to push the router's address out takes several answers in a
// row that lack it. The next answer that has it brings it back.
type Answers struct {
	// seen has the addresses that count, at most MaxOutside, with the time of the last answer
	// that had each.
	seen map[netip.Addr]time.Time
	// displaced has those that gave way to others, likewise, at most MaxOutside. They serve only
	// to report that some don't count, so it does no harm if there are more.
	displaced map[netip.Addr]time.Time
}

// Answers returns the saved addresses of a name, with now as their time. It is empty for
// another name.
func (o Outside) Answers(name string, now time.Time) *Answers {
	a := &Answers{seen: map[netip.Addr]time.Time{}, displaced: map[netip.Addr]time.Time{}}
	if o.Name == name {
		for _, addr := range o.Addresses[:min(len(o.Addresses), MaxOutside)] {
			a.seen[addr] = now
		}
	}
	return a
}

// Sorted returns the addresses that count, in ascending order.
func (f *Answers) Sorted() []netip.Addr {
	return slices.SortedFunc(maps.Keys(f.seen), netip.Addr.Compare)
}

// Add adds the addresses of an answer that isn't empty, at most maxNew new ones, and drops those
// that no answer had for OutsideFor. Beyond MaxOutside a new address takes the place of the one
// that was seen least recently, but of none in this answer. Add returns how many addresses don't
// count: of this answer, or because they gave way less than OutsideFor after they were seen.
func (f *Answers) Add(answer []netip.Addr, now time.Time) (left int) {
	for _, a := range answer {
		if _, counts := f.seen[a]; counts {
			f.seen[a] = now
		}
	}
	old := func(_ netip.Addr, seen time.Time) bool { return now.Sub(seen) >= OutsideFor }
	maps.DeleteFunc(f.seen, old)
	maps.DeleteFunc(f.displaced, old)
	added := 0
	for _, a := range answer {
		if _, counts := f.seen[a]; counts {
			continue
		}
		if added == maxNew || len(f.seen) >= MaxOutside && !f.displace(answer) {
			if _, counted := f.displaced[a]; !counted {
				left++
			}
			continue
		}
		f.seen[a] = now
		delete(f.displaced, a)
		added++
	}
	return left + len(f.displaced)
}

// displace makes room for one address: the one that was seen least recently gives way, unless
// answer has all of them.
func (f *Answers) displace(answer []netip.Addr) bool {
	var oldest netip.Addr
	for a, seen := range f.seen {
		if slices.Contains(answer, a) {
			continue
		}
		// Of several from one answer it is always the lowest, so that the result doesn't depend
		// on the order of a map.
		if !oldest.IsValid() || seen.Before(f.seen[oldest]) || seen.Equal(f.seen[oldest]) && a.Less(oldest) {
			oldest = a
		}
	}
	if !oldest.IsValid() {
		return false
	}
	if len(f.displaced) < MaxOutside {
		f.displaced[oldest] = f.seen[oldest]
	}
	delete(f.seen, oldest)
	return true
}
