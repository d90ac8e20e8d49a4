package resolve

import (
	"container/heap"
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
	"github.com/meshhelper/meshhelper/internal/mesh"
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

// A publication takes time in proportion to the number of names, and so does the round of the
// loop that follows. So new addresses of peers are gathered for gatherPerName a name before
// the next publication, which bounds the share of the time that publications take. The first
// one after a pause is published at once. Even in the largest mesh a peer isn't looked for at
// its old address for more than gatherMost longer.
const (
	gatherPerName = time.Millisecond
	gatherMost    = time.Second
)

// lookup asks the host's resolver.
func lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}

// Options are what New needs.
type Options struct {
	// Names returns the names in peers' endpoints, which may repeat, and the one in this host's
	// own endpoint as peers know it, or "" if that is an address or isn't given. It is called
	// when Run begins, and after Renamed.
	Names   func() (peers []string, own string) // required
	Learned *learned.Book                       // required: keeps the addresses
	// Mesh has the mesh prefixes, and Device reports whether this host or a peer has an address
	// in them. Such an address is reached only through the tunnel, and so is no endpoint of it.
	Mesh   mesh.Prefixes         // required
	Device func(netip.Addr) bool // required

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
	due     queue       // names that wait until they are due
	ready   [2][]*named // names that are due and wait for room, by lane
	running [2]int      // look-ups, by lane
	own     string      // this host's own name, as it was published
	answers chan answer
	// publishAt is when to publish the new addresses, or zero if there are none.
	publishAt time.Time
	// published is when Changed was last called.
	published time.Time
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
	if !r.rename() {
		r.publish() // without names that were saved and that no peer has now
	}
	for {
		t := time.NewTimer(r.work(ctx))
		select {
		case <-ctx.Done():
			t.Stop()
			for r.running[0]+r.running[1] > 0 { // they end with ctx
				r.take(<-r.answers)
			}
			if !r.publishAt.IsZero() {
				r.announce()
			}
			return nil
		case a := <-r.answers:
			r.take(a)
		case <-t.C:
		case <-r.renamed:
			r.rename()
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

// named is a name that is looked up. It is in Resolver.due or Resolver.ready, or its look-up
// runs.
type named struct {
	host    string
	addr    netip.Addr
	all     *learned.Answers // of an own name
	left    int              // how many known addresses don't count in it
	due     time.Time
	index   int           // in Resolver.due, or negative if it isn't there
	again   retry.Backoff // of a name that isn't found
	failing bool
}

// lane returns the lane in which the name is looked up.
func (n *named) lane() int {
	if n.failing {
		return 1
	}
	return 0
}

// queue is a heap of names, of which the first is due first. See container/heap.
type queue []*named

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push implements heap.Interface.
func (q *queue) Push(x any) {
	n := x.(*named)
	n.index = len(*q)
	*q = append(*q, n)
}

// Pop implements heap.Interface.
func (q *queue) Pop() any {
	last := len(*q) - 1
	n := (*q)[last]
	(*q)[last], *q = nil, (*q)[:last]
	n.index = -1
	return n
}

// answer is the result of one look-up: the addresses, or why there are none.
type answer struct {
	name    *named
	lane    int
	found   []netip.Addr
	failure error
}

// rename asks for the names. New ones are due at once, and those that nobody has any more are
// forgotten. It reports whether it published that.
func (r *Resolver) rename() bool {
	now := time.Now()
	names, own := r.o.Names()
	if own != "" {
		names = append([]string{own}, names...)
	}
	if n := r.names[own]; own != r.own && n != nil && n.index >= 0 {
		n.due = now // all addresses of this host's own name count, not one as of a peer's
		heap.Fix(&r.due, n.index)
	}
	saved, wanted := r.o.Learned.Names(), make(map[string]bool, len(names))
	for _, host := range names {
		wanted[host] = true
		if r.names[host] != nil {
			continue
		}
		n := &named{
			host: host, all: r.o.Learned.Outside().Answers(host, now), due: now, index: -1,
			again: retry.Backoff{Min: timeout, Max: 5 * Interval},
		}
		if a, known := saved[host]; known && r.refuse(a) == nil {
			n.addr = a
		}
		r.names[host] = n
		r.ready[0] = append(r.ready[0], n)
	}
	gone := false
	for host, n := range r.names {
		if wanted[host] {
			continue
		}
		gone = true
		delete(r.names, host)
		if n.index >= 0 {
			heap.Remove(&r.due, n.index)
		}
	}
	if gone {
		for i := range r.ready {
			r.ready[i] = slices.DeleteFunc(r.ready[i], func(n *named) bool { return r.names[n.host] != n })
		}
		r.mu.Lock()
		maps.DeleteFunc(r.unresolved, func(host string, _ error) bool { return r.names[host] == nil })
		r.mu.Unlock()
	}
	if !gone && r.own == own {
		return false
	}
	r.own = own
	r.announce()
	return true
}

// work begins to look up what is due, as far as there is room, and publishes new addresses when
// it is time to. It returns after how long there is more to do; an answer may come before.
func (r *Resolver) work(ctx context.Context) time.Duration {
	now := time.Now()
	for len(r.due) > 0 && !r.due[0].due.After(now) {
		n := heap.Pop(&r.due).(*named)
		r.ready[n.lane()] = append(r.ready[n.lane()], n)
	}
	for in := range r.ready {
		for len(r.ready[in]) > 0 && r.running[in] < lane {
			n := r.ready[in][0]
			r.ready[in] = r.ready[in][1:]
			r.running[in]++
			go r.look(ctx, n, in)
		}
	}
	if !r.publishAt.IsZero() && !r.publishAt.After(now) {
		r.announce()
	}
	wait := Interval
	if len(r.due) > 0 {
		wait = min(wait, r.due[0].due.Sub(now))
	}
	if !r.publishAt.IsZero() {
		wait = min(wait, r.publishAt.Sub(now))
	}
	return wait
}

// look looks one name up. There is room for its answer.
func (r *Resolver) look(ctx context.Context, n *named, in int) {
	limit, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	found, err := r.o.Lookup(limit, n.host)
	if err == nil && len(found) == 0 {
		err = errors.New("it has no address")
	}
	r.answers <- answer{n, in, found, err}
}

// refuse returns why a can't be an endpoint's address, or nil if it can. As for an endpoint that
// is given as an address, it must lead to another host (checkRemote of package wanted). Link-local IPv6
// addresses need a zone, which differs from host to host.
//
// For this host's own name nothing is lost with what is refused: to peers all of it is of class
// martian, self or mesh (see package policy), and so closed without being known.
func (r *Resolver) refuse(a netip.Addr) error {
	switch err := (mesh.Endpoint{Host: a.String(), Port: 1}).Validate(); {
	case err != nil:
		return err
	case a.IsLoopback():
		return fmt.Errorf("%v is a loopback address", a)
	case a.Is6() && a.IsLinkLocalUnicast():
		return fmt.Errorf("%v is a link-local address", a)
	case r.inMesh(a) && r.o.Device(a):
		return fmt.Errorf("%v is an address in the mesh, inside the tunnel", a)
	}
	return nil
}

// inMesh reports whether an address is in a mesh prefix.
func (r *Resolver) inMesh(a netip.Addr) bool {
	return r.o.Mesh.V4.Contains(a) || r.o.Mesh.V6.Contains(a)
}

// usable returns the addresses of an answer that can be an endpoint's, and an error if there are
// none. Those outside the mesh prefixes come first: an address within, such as a
// carrier's (RFC 6598), is reached only where the host has a route to it beside the mesh's.
func (r *Resolver) usable(answer []netip.Addr) (out []netip.Addr, err error) {
	for _, a := range answer {
		a = a.Unmap().WithZone("")
		if refused := r.refuse(a); refused == nil {
			out = append(out, a)
		} else if err == nil {
			err = fmt.Errorf("it has no address of use: %w", refused)
		}
	}
	if len(out) > 0 {
		err = nil
	}
	slices.SortStableFunc(out, func(a, b netip.Addr) int {
		switch in := r.inMesh(a); {
		case in == r.inMesh(b):
			return 0
		case in:
			return 1
		}
		return -1
	})
	return out, err
}

// take keeps an answer. Of several addresses the one that is in use stays, for the
// order says nothing, and the peer may have moved to another by itself.
func (r *Resolver) take(a answer) {
	r.running[a.lane]--
	n := a.name
	if r.names[n.host] != n { // forgotten meanwhile
		return
	}
	found, failure := a.found, a.failure
	if failure == nil {
		found, failure = r.usable(found)
	}
	r.mu.Lock()
	if delete(r.unresolved, n.host); failure != nil {
		r.unresolved[n.host] = failure
	}
	r.mu.Unlock()
	now := time.Now()
	if failure != nil {
		if !n.failing {
			r.o.Logger.Warn(fmt.Sprintf("resolve endpoint %q: %v", n.host, failure))
		}
		n.failing, n.due = true, now.Add(n.again.Next())
		heap.Push(&r.due, n)
		return
	}
	n.failing, n.due = false, now.Add(Interval)
	n.again.Reset()
	heap.Push(&r.due, n)
	if !slices.Contains(found, n.addr) {
		n.addr = found[0]
		if r.publishAt.IsZero() {
			r.publishAt = now
			next := r.published.Add(min(gatherMost, time.Duration(len(r.names))*gatherPerName))
			if next.After(now) {
				r.publishAt = next
			}
		}
	}
	if n.host == r.own {
		slices.SortFunc(found, netip.Addr.Compare)
		before, left := n.all.Sorted(), n.left
		n.left = n.all.Add(slices.Compact(found), now)
		if n.left != left || !slices.Equal(n.all.Sorted(), before) {
			r.publishAt = now // until it is known, the router is open
		}
	}
}

// announce publishes the addresses, and has the loop act on them.
func (r *Resolver) announce() {
	r.publish()
	r.publishAt, r.published = time.Time{}, time.Now()
	r.o.Changed()
}

// publish has the tunnel and the policy use what was found.
func (r *Resolver) publish() {
	names := make(map[string]netip.Addr, len(r.names))
	for host, n := range r.names {
		if n.addr.IsValid() {
			names[host] = n.addr
		}
	}
	r.o.Learned.SetNames(names)
	o := learned.Outside{}
	if n := r.names[r.own]; n != nil {
		o = learned.Outside{Name: r.own, Addresses: n.all.Sorted(), Left: n.left}
	}
	if r.o.Learned.SetOutside(o) {
		r.o.Save() // before it is forgotten by a crash: it keeps peers from the router
	}
}
