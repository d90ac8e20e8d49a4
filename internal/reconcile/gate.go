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

// Gate gives the guard its rulesets: always the intersection of what the loop enforces and what
// is wanted now. So the guard loses a revoked permission before the loop, which may be waiting
// for the host, learns of it; and an older ruleset that the loop sets afterwards doesn't bring
// it back.
//
// Its methods may be called by any goroutine. None waits for the host, a disk or a log, because
// a revocation waits for them.
type Gate struct {
	// failed is called, with mu held, if a ruleset couldn't be compiled.
	failed func(error)
	// now is the clock by which permissions end; set before there is a guard.
	now func() time.Time

	mu    sync.Mutex
	guard *guard.Device // nil before there is a mesh interface
	// rules is the ruleset that the loop enforces, nil while the loop lets nothing pass, and
	// rulesDoc the document that it was compiled from.
	rules    *policy.Ruleset
	rulesDoc *wanted.Document
	wanted   *wanted.Document // the latest one; nil before the first Limit
	// inForce is what the guard was given last; nil while nothing passes.
	inForce *policy.Ruleset
}

// NewGate returns a gate without a guard. failed is called if a ruleset can't be compiled; then
// the guard passes nothing. It must not block.
func NewGate(failed func(error)) *Gate { return &Gate{failed: failed} }

// setClock sets the clock by which permissions end. NewGate can't have it: the clock is part of
// wanted.State, which calls Limit while it is opened.
func (g *Gate) setClock(now func() time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now = now
}

// compile compiles m and h for the present time. It reuses the unchanged parts of before, which
// may be nil.
func (g *Gate) compile(before *policy.Ruleset, m policy.Mesh, h policy.Host) (*policy.Ruleset, error) {
	return before.Recompile(m, h, g.now())
}

// setGuard replaces the guard by a new one, which passes nothing yet.
func (g *Gate) setGuard(d *guard.Device) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.guard, g.rules, g.rulesDoc = d, nil, nil
	g.setGuardRules(nil)
}

// set is called by the loop: the guard enforces r, which was compiled from doc, as far as it is
// still wanted. A nil r passes nothing.
func (g *Gate) set(r *policy.Ruleset, doc *wanted.Document) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rules, g.rulesDoc = r, doc
	g.apply()
}

// InForce returns the ruleset that the guard judges by, or nil while it passes nothing. After a
// revocation the loop recompiles from it, which is nearly free if the host hasn't changed.
func (g *Gate) InForce() *policy.Ruleset {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.inForce
}

// setGuardRules has the guard judge by r; nil passes nothing. The caller holds g.mu.
func (g *Gate) setGuardRules(r *policy.Ruleset) {
	g.inForce = r
	g.guard.Set(r)
}

// Limit sets the wanted document. When it returns, the guard passes nothing that doc doesn't
// allow.
func (g *Gate) Limit(doc *wanted.Document) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wanted = doc
	g.apply()
}

// confine has the guard pass only packets that need no packet filter, or with false all that
// its ruleset passes. The loop confines it while it repairs the filter.
func (g *Gate) confine(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.guard != nil {
		g.guard.Confine(on)
	}
}

// apply gives the guard the intersection of rules and wanted. The caller holds g.mu.
func (g *Gate) apply() {
	switch {
	case g.guard == nil:
		return
	case g.rules == nil:
		g.setGuardRules(nil)
		return
	case g.wanted == nil || g.wanted == g.rulesDoc:
		g.setGuardRules(g.rules)
		return
	}
	m, narrower := intersect(g.rules.Mesh(), g.wanted)
	if !narrower {
		g.setGuardRules(g.rules)
		return
	}
	r, err := g.compile(g.rules, m, g.rules.Host())
	if err != nil {
		g.failed(err)
		r = nil
	}
	g.setGuardRules(r)
}

// intersect returns m without what doc doesn't allow, and whether that is narrower than m: peers
// that doc doesn't have, or has with other addresses, are left out, and the earlier of two ends
// of a permission counts. The former peers' addresses, to which nothing may leave, are doc's if
// they only add to m's. Then the loop's next mesh is the same, and is compiled from this one.
func intersect(m policy.Mesh, doc *wanted.Document) (out policy.Mesh, narrower bool) {
	find := doc.Finder()
	out = m
	if f := doc.FormerAddresses(); len(f) > len(m.Former) && slices.Equal(f[:len(m.Former)], m.Former) {
		out.Former = f
	}
	out.Peers = make([]mesh.Peer, 0, len(m.Peers))
	for i, p := range m.Peers {
		w := find(i, p.PublicKey)
		if w == nil || p.Addresses != w.Addresses {
			narrower = true
			continue
		}
		for one, has := range p.Permissions {
			if n := has.And(w.Permissions[one]); n != has {
				p.Permissions[one], narrower = n, true
			}
		}
		out.Peers = append(out.Peers, p)
	}
	return out, narrower
}
