package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/retry"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// resolveInterval is how long a peer that moved to another address may be
// looked for at the old one; resolveTimeout bounds one look-up.
const (
	resolveInterval = time.Minute
	resolveTimeout  = 5 * time.Second
)

// lane is how many names are looked up at once, of those that were found last time, and
// again of the others: names that time out don't keep those that don't waiting.
const lane = 32

// lookup asks the host's resolver.
func lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}

// resolve keeps the addresses of endpoints that are given by name, this host's own
// among them. It is a task
// of its own, so that a slow resolver holds nothing up; a name that can't be
// resolved keeps its last address.
func (d *Daemon) resolve(ctx context.Context) error {
	r := resolver{d: d, names: map[string]*named{}, answers: make(chan answer, 2*lane)}
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
		case <-d.renamed:
		}
		t.Stop()
	}
}

// resolver is the state of resolve.
type resolver struct {
	d       *Daemon
	names   map[string]*named
	own     []string // this host's own name, as it was published
	begun   bool     // something was published
	answers chan answer
	running [2]int // look-ups, by whether the name failed last time
}

// named is a name that is looked up.
type named struct {
	addr    netip.Addr
	all     learned.Answers // of an own name
	left    int             // how many of the last answer have no room in it
	due     time.Time
	again   retry.Backoff // of a name that isn't found
	asked   bool          // a look-up runs
	failing bool
}

type answer struct {
	name    string
	lane    int
	found   []netip.Addr
	failure error
}

// ask begins to look up what is due, as far as there is room, and returns when more is.
// Names that no peer has are forgotten.
func (r *resolver) ask(ctx context.Context) time.Duration {
	now, wait := time.Now(), resolveInterval
	wanted := map[string]bool{}
	own := r.d.ownName()
	for _, host := range append(endpointNames(r.d.wanted.Document()), own...) {
		wanted[host] = true
		n := r.names[host]
		if n == nil {
			n = &named{
				addr: r.d.learned.Names()[host], all: r.d.learned.Outside().Answers(host, now),
				again: retry.Backoff{Min: resolveTimeout, Max: 5 * resolveInterval},
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
	changed := len(r.names) != gone || !slices.Equal(r.own, own)
	r.own = own
	if changed || !r.begun { // at first for the names of before that no peer has
		r.publish()
	}
	r.begun = true
	if changed {
		poke(r.d.moved)
	}
	return wait
}

// look looks one name up. There is room for its answer.
func (r *resolver) look(ctx context.Context, host string, in int) {
	limit, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	found, err := r.d.opts.Resolve(limit, host)
	if err == nil && len(found) == 0 {
		err = errors.New("it has no address")
	}
	r.answers <- answer{host, in, found, err}
}

// take keeps an answer. Of several addresses the one that is in use stays, for the
// order says nothing, and the peer may have moved to another by itself.
func (r *resolver) take(a answer) {
	r.running[a.lane]--
	n := r.names[a.name]
	n.asked = false
	r.d.mu.Lock()
	if delete(r.d.unresolved, a.name); a.failure != nil {
		r.d.unresolved[a.name] = a.failure
	}
	r.d.mu.Unlock()
	if a.failure != nil {
		if !n.failing {
			r.d.opts.Logger.Warn(fmt.Sprintf("resolve endpoint %q: %v", a.name, a.failure))
		}
		n.failing, n.due = true, time.Now().Add(n.again.Next())
		return
	}
	n.failing, n.due = false, time.Now().Add(resolveInterval)
	n.again.Reset()
	found := make([]netip.Addr, 0, len(a.found))
	for _, addr := range a.found {
		found = append(found, addr.Unmap().WithZone(""))
	}
	changed := false
	if !slices.Contains(found, n.addr) {
		n.addr, changed = found[0], true
	}
	if slices.Contains(r.d.ownName(), a.name) {
		slices.SortFunc(found, netip.Addr.Compare)
		before, left := n.all.Sorted(), n.left
		n.left = n.all.Add(slices.Compact(found), time.Now())
		changed = changed || n.left != left || !slices.Equal(n.all.Sorted(), before)
	}
	if changed {
		r.publish()
		poke(r.d.moved)
	}
}

// ownName returns the name in this host's own endpoint, or none where that is an
// address, or not given.
func (d *Daemon) ownName() []string {
	host := d.wanted.Settings().Endpoint.Host
	if _, err := netip.ParseAddr(host); err == nil || host == "" {
		return nil
	}
	return []string{host}
}

// publish has the tunnel use what was found.
func (r *resolver) publish() {
	names := make(map[string]netip.Addr, len(r.names))
	for host, n := range r.names {
		if n.addr.IsValid() {
			names[host] = n.addr
		}
	}
	r.d.learned.SetNames(names)
	r.d.mu.Lock()
	maps.DeleteFunc(r.d.unresolved, func(host string, _ error) bool { return r.names[host] == nil })
	r.d.mu.Unlock()
	o := learned.Outside{}
	for _, host := range r.own {
		if n := r.names[host]; n != nil {
			o = learned.Outside{Name: host, Addresses: n.all.Sorted(), Left: n.left}
		}
	}
	if r.d.learned.SetOutside(o) {
		r.d.saveLearned() // before it is forgotten by a crash: it keeps peers from the router
	}
}

// namesChanged reports whether the second document has endpoints by name that the first
// one hasn't, or the other way round.
func namesChanged(a, b *wanted.Document) bool {
	return !slices.Equal(endpointNames(a), endpointNames(b))
}

// endpointNames returns the hosts of endpoints that aren't addresses.
func endpointNames(doc *wanted.Document) []string {
	var out []string
	for i := range doc.Peers {
		if doc.Peers[i].Endpoint == "" {
			continue
		}
		e, err := mesh.ParseEndpoint(doc.Peers[i].Endpoint, 0)
		if err != nil {
			continue
		}
		if _, err := netip.ParseAddr(e.Host); err != nil {
			out = append(out, e.Host)
		}
	}
	return out
}

// tunnelPeers returns doc's peers as the tunnel takes them.
func (d *Daemon) tunnelPeers(doc *wanted.Document) []tunnel.Peer {
	names, now := d.learned.Names(), d.opts.Wall()
	out := make([]tunnel.Peer, len(doc.Peers))
	allowed := make([]netip.Prefix, 0, 2*len(doc.Peers))
	for i := range doc.Peers {
		p := &doc.Peers[i]
		own := p.Addresses.Prefixes()
		allowed = append(allowed, own[:]...)
		out[i] = tunnel.Peer{
			PublicKey:  p.PublicKey,
			AllowedIPs: allowed[2*i : 2*i+2 : 2*i+2],
			Endpoint:   endpointOf(p.Endpoint, names),
			Learned:    d.learned.Endpoint(p.PublicKey, p.Endpoint != "", now),
			Keepalive:  time.Duration(p.Keepalive) * time.Second,
		}
	}
	return out
}

// endpointOf returns where to reach an endpoint, or zero where there is none, or its name
// isn't resolved.
func endpointOf(text string, names map[string]netip.Addr) netip.AddrPort {
	if text == "" {
		return netip.AddrPort{}
	}
	e, err := mesh.ParseEndpoint(text, 0)
	if err != nil {
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddr(e.Host)
	if err != nil {
		a = names[e.Host]
	}
	if !a.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, e.Port)
}
