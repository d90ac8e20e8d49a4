package resolve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/retry"
)

// Interval is how long a peer that moved to another address may be
// looked for at the old one; timeout bounds one look-up.
const (
	Interval = time.Minute
	timeout  = 5 * time.Second
)

// lane is how many names are looked up at once, of those that were found last time, and
// again of the others: names that time out don't keep those that don't waiting.
const lane = 32

// lookup asks the host's resolver.
func lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}

// Options are what New needs.
type Options struct {
	// Names returns the names in peers' endpoints, and the one in this host's own endpoint
	// as peers know it, or "" if that is an address or isn't given.
	Names   func() (peers []string, own string) // required
	Learned *learned.Book                       // required: keeps the addresses

	// Lookup returns the addresses of a name.
	Lookup func(context.Context, string) ([]netip.Addr, error) // optional: the host's resolver
	// Changed hears that a name has another address. It must not wait.
	Changed func() // required
	// Save has what was learned saved. It must not wait.
	Save func() // required
	// Logger must not block.
	Logger *slog.Logger // required
}

// Resolver keeps the addresses of endpoints that are given by name, this host's own
// among them. It is a task of its own, so that a slow name server holds nothing up. A name
// that can't be resolved keeps its last address.
type Resolver struct {
	o       Options
	renamed chan struct{}

	mu sync.Mutex
	// unresolved is why names weren't found at the last attempt.
	unresolved map[string]error

	// What follows is Run's.
	names   map[string]*named
	own     string // this host's own name, as it was published
	begun   bool   // something was published
	answers chan answer
	running [2]int // look-ups, by whether the name failed last time
}

// New returns a resolver that hasn't begun; Run runs it.
func New(o Options) *Resolver {
	if o.Lookup == nil {
		o.Lookup = lookup
	}
	return &Resolver{
		o: o, renamed: make(chan struct{}, 1), unresolved: map[string]error{},
		names: map[string]*named{}, answers: make(chan answer, 2*lane),
	}
}

// Run looks names up until ctx ends. Call it once.
func (r *Resolver) Run(ctx context.Context) error {
	for {
		t := time.NewTimer(r.ask(ctx))
		select {
		case <-ctx.Done():
			t.Stop()
			for r.running[0]+r.running[1] > 0 { // they end with ctx
				r.take(<-r.answers)
			}
			return nil
		case a := <-r.answers:
			r.take(a)
		case <-t.C:
		case <-r.renamed:
		}
		t.Stop()
	}
}

// Renamed has the resolver ask for the names again, for there may be others. It doesn't
// wait.
func (r *Resolver) Renamed() {
	select {
	case r.renamed <- struct{}{}:
	default:
	}
}

// Failure returns why a name wasn't found at the last attempt, and nil where it was, or
// isn't looked up.
func (r *Resolver) Failure(name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.unresolved[name]
}

// named is a name that is looked up.
type named struct {
	addr    netip.Addr
	all     *learned.Answers // of an own name
	left    int              // how many of the last answer have no room in it
	due     time.Time
	again   retry.Backoff // of a name that isn't found
	asked   bool          // a look-up runs
	failing bool
}

// answer is the result of one look-up: the addresses, or why there are none.
type answer struct {
	name    string
	lane    int
	found   []netip.Addr
	failure error
}

// ask begins to look up what is due, as far as there is room, and returns when more is.
// Names that no peer has are forgotten.
func (r *Resolver) ask(ctx context.Context) time.Duration {
	now, wait := time.Now(), Interval
	wanted := map[string]bool{}
	names, own := r.o.Names()
	if own != "" {
		names = append(names, own)
	}
	if n := r.names[own]; own != r.own && n != nil {
		n.due = now // all addresses of this host's own name count, not one as of a peer's
	}
	for _, host := range names {
		wanted[host] = true
		n := r.names[host]
		if n == nil {
			n = &named{
				addr: r.o.Learned.Names()[host], all: r.o.Learned.Outside().Answers(host, now),
				again: retry.Backoff{Min: timeout, Max: 5 * Interval},
			}
			r.names[host] = n
		}
		in := 0
		if n.failing {
			in = 1
		}
		switch left := n.due.Sub(now); {
		case n.asked || left <= 0 && r.running[in] >= lane: // an answer comes before there is room
		case left > 0:
			wait = min(wait, left)
		default:
			n.asked = true
			r.running[in]++
			go r.look(ctx, host, in)
		}
	}
	gone := len(r.names)
	maps.DeleteFunc(r.names, func(host string, n *named) bool { return !wanted[host] && !n.asked })
	changed := len(r.names) != gone || r.own != own
	r.own = own
	if changed || !r.begun { // at first for the names of before that no peer has
		r.publish()
	}
	r.begun = true
	if changed {
		r.o.Changed()
	}
	return wait
}

// look looks one name up. There is room for its answer.
func (r *Resolver) look(ctx context.Context, host string, in int) {
	limit, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	found, err := r.o.Lookup(limit, host)
	if err == nil && len(found) == 0 {
		err = errors.New("it has no address")
	}
	r.answers <- answer{host, in, found, err}
}

// take keeps an answer. Of several addresses the one that is in use stays, for the
// order says nothing, and the peer may have moved to another by itself.
func (r *Resolver) take(a answer) {
	r.running[a.lane]--
	n := r.names[a.name]
	n.asked = false
	r.mu.Lock()
	if delete(r.unresolved, a.name); a.failure != nil {
		r.unresolved[a.name] = a.failure
	}
	r.mu.Unlock()
	if a.failure != nil {
		if !n.failing {
			r.o.Logger.Warn(fmt.Sprintf("resolve endpoint %q: %v", a.name, a.failure))
		}
		n.failing, n.due = true, time.Now().Add(n.again.Next())
		return
	}
	n.failing, n.due = false, time.Now().Add(Interval)
	n.again.Reset()
	found := make([]netip.Addr, 0, len(a.found))
	for _, addr := range a.found {
		found = append(found, addr.Unmap().WithZone(""))
	}
	changed := false
	if !slices.Contains(found, n.addr) {
		n.addr, changed = found[0], true
	}
	if a.name == r.own {
		slices.SortFunc(found, netip.Addr.Compare)
		before, left := n.all.Sorted(), n.left
		n.left = n.all.Add(slices.Compact(found), time.Now())
		changed = changed || n.left != left || !slices.Equal(n.all.Sorted(), before)
	}
	if changed {
		r.publish()
		r.o.Changed()
	}
}

// publish has the tunnel use what was found.
func (r *Resolver) publish() {
	names := make(map[string]netip.Addr, len(r.names))
	for host, n := range r.names {
		if n.addr.IsValid() {
			names[host] = n.addr
		}
	}
	r.o.Learned.SetNames(names)
	r.mu.Lock()
	maps.DeleteFunc(r.unresolved, func(host string, _ error) bool { return r.names[host] == nil })
	r.mu.Unlock()
	o := learned.Outside{}
	if n := r.names[r.own]; n != nil {
		o = learned.Outside{Name: r.own, Addresses: n.all.Sorted(), Left: n.left}
	}
	if r.o.Learned.SetOutside(o) {
		r.o.Save() // before it is forgotten by a crash: it keeps peers from the router
	}
}
