package reconcile

import (
	"slices"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// Gate owns the guard. What the guard judges by is the less of two: what the loop
// enforces, and what is wanted now. So a permission that is taken away is gone at the
// guard before the loop, which may be waiting for the host, hears of it; and an older
// ruleset that the loop sets afterwards doesn't bring it back.
//
// Nothing here waits for the host, a disk or a log.
type Gate struct {
	// failed hears of a ruleset that couldn't be compiled.
	failed func(error)
	// now is the clock that permissions end by; set before there is a guard.
	now func() time.Time

	mu     sync.Mutex
	guard  *guard.Device // nil before there is a mesh interface
	rules  *policy.Ruleset
	of     *wanted.Document // that rules are of
	wanted *wanted.Document
	// judged is what the guard was given last; nil while nothing passes.
	judged *policy.Ruleset
}

// NewGate returns a gate without a guard. failed hears of a ruleset that couldn't be
// compiled, while the guard lets nothing pass; it must not wait.
func NewGate(failed func(error)) *Gate { return &Gate{failed: failed} }

// setClock sets the clock that permissions end by, which exists only after the first Limit.
func (g *Gate) setClock(now func() time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now = now
}

// compile compiles for the time now, at less cost what was compiled before, too.
func (g *Gate) compile(before *policy.Ruleset, m policy.Mesh, h policy.Host) (*policy.Ruleset, error) {
	return before.Recompile(m, h, g.now())
}

// use puts a new guard in place of the one before. Nothing passes yet.
func (g *Gate) use(d *guard.Device) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.guard, g.rules, g.of = d, nil, nil
	g.give(nil)
}

// set is for the loop: r, of the wanted state doc, is enforced, as far as it is still
// wanted; nil lets nothing pass.
func (g *Gate) set(r *policy.Ruleset, doc *wanted.Document) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rules, g.of = r, doc
	g.apply()
}

// InForce returns what the guard judges by, and nil while it lets nothing pass. What was
// compiled to narrow at once need not be compiled again for the host.
func (g *Gate) InForce() *policy.Ruleset {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.judged
}

// give has the guard judge by r. g.mu is held.
func (g *Gate) give(r *policy.Ruleset) {
	g.judged = r
	g.guard.Set(r)
}

// Limit takes what is wanted now. When it returns, the guard lets nothing pass that
// doc doesn't allow.
func (g *Gate) Limit(doc *wanted.Document) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wanted = doc
	g.apply()
}

// confine has the guard pass only what needs no packet filter, or all again.
func (g *Gate) confine(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.guard != nil {
		g.guard.Confine(on)
	}
}

// apply puts the less of both in force. g.mu is held.
func (g *Gate) apply() {
	switch {
	case g.guard == nil:
		return
	case g.rules == nil:
		g.give(nil)
		return
	case g.wanted == nil || g.wanted == g.of:
		g.give(g.rules)
		return
	}
	m, less := within(g.rules.Mesh(), g.wanted)
	if !less {
		g.give(g.rules)
		return
	}
	r, err := g.compile(g.rules, m, g.rules.Host())
	if err != nil {
		g.failed(err)
		r = nil
	}
	g.give(r)
}

// within returns m without what doc doesn't want, and whether that is less than m:
// peers that doc has no more, or with other addresses, are left out, and of two ends
// of a permission the earlier counts. What is kept from leaving to removed peers is doc's,
// where that is all of m's and more: then the loop compiles the same mesh next.
func within(m policy.Mesh, doc *wanted.Document) (out policy.Mesh, less bool) {
	find := doc.Finder()
	out = m
	if f := doc.FormerAddresses(); len(f) > len(m.Former) && slices.Equal(f[:len(m.Former)], m.Former) {
		out.Former = f
	}
	out.Peers = make([]mesh.Peer, 0, len(m.Peers))
	for i, p := range m.Peers {
		w := find(i, p.PublicKey)
		if w == nil || p.Addresses != w.Addresses {
			less = true
			continue
		}
		for one, has := range p.Permissions {
			if n := has.And(w.Permissions[one]); n != has {
				p.Permissions[one], less = n, true
			}
		}
		out.Peers = append(out.Peers, p)
	}
	return out, less
}
