package daemon

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

const (
	// maxOutside bounds how many addresses of this host's own name count.
	maxOutside = 64
	// outsideFor is for how long an address counts after it was last found, while others
	// are: names have their addresses in turn, and a router's old one may still be its own.
	outsideFor = 24 * time.Hour
)

// outside are the addresses of the name by which peers find this host: its router's, which
// peers don't reach without lan. They are kept over a restart, for a resolver that is slow
// or silent must not open the router.
type outside struct {
	Name string `json:"name,omitempty"`
	// Addresses are sorted.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// left is how many addresses of the last answer have no room.
	left int
}

// found are an own name's addresses by when they were last found.
type found map[netip.Addr]time.Time

func (f found) sorted() []netip.Addr { return slices.SortedFunc(maps.Keys(f), netip.Addr.Compare) }

// add has the addresses of an answer, which has some, count, those that count already
// first, and forgets those that weren't found for long. It returns how many have no room.
func (f found) add(answer []netip.Addr, now time.Time) (left int) {
	maps.DeleteFunc(f, func(a netip.Addr, seen time.Time) bool {
		return now.Sub(seen) >= outsideFor && !slices.Contains(answer, a)
	})
	for _, a := range answer {
		if _, known := f[a]; !known && len(f) >= maxOutside {
			left++
			continue
		}
		f[a] = now
	}
	return left
}

// setOutside has an own name's addresses count, and be saved.
func (d *Daemon) setOutside(o outside) {
	d.mu.Lock()
	same := d.outside.Name == o.Name && slices.Equal(d.outside.Addresses, o.Addresses)
	d.outside = o
	d.mu.Unlock()
	if !same {
		d.saveLearned()
	}
}

// keptOutside returns what counts of an own name already, as if it was found now.
func (d *Daemon) keptOutside(name string, now time.Time) found {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := found{}
	if d.outside.Name == name {
		f.add(d.outside.Addresses, now)
	}
	return f
}
