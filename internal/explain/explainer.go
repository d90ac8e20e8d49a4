package explain

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// Options are what New needs.
type Options struct {
	Host    host.Host     // required: asked for its optional parts alone
	Wanted  *wanted.State // required
	Learned *learned.Book // required

	// Held returns what holds now, and a channel that is closed when there is something
	// newer.
	Held func() (held.State, <-chan struct{}) // required
	// InForce returns what the guard judges by now, and nil while it lets nothing pass.
	InForce func() *policy.Ruleset // required
	// NameFailure returns why the name in an endpoint wasn't found at the last attempt.
	NameFailure func(name string) error // required

	// Languages are those that rulesets are enforced in, by name; the host's own is among
	// them.
	Languages map[string]Language // optional

	StateDir string             // required: tried by the doctor
	Wall     func() time.Time   // required: the wall clock
	Record   func(events.Event) // required: must not block
}

// Explainer answers questions about a running helper. Its methods may be called by any
// goroutine.
type Explainer struct {
	o Options

	// full says that the state directory takes nothing, or is nil.
	full atomic.Pointer[host.Problem]
	// asking is held, by a value in it, while the host is asked about other software.
	asking chan struct{}

	mu sync.Mutex
	// byOthers is what other software was found to stand in the way with.
	byOthers []host.Problem
	// prefixes are the problems with the mesh prefixes, of a ruleset and settings: finding
	// them takes long where there are many routes.
	prefixes         []host.Problem
	prefixesOf       *policy.Ruleset
	prefixesSettings *wanted.Settings
}

// New returns an explainer. What it tells of other software is empty before Run.
func New(o Options) *Explainer { return &Explainer{o: o, asking: make(chan struct{}, 1)} }

// Run looks, until ctx ends, for what only informs: after each round of the loop at the
// mesh prefixes and the state directory, and at other software. The loop doesn't wait for
// it. Call it once.
func (x *Explainer) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return x.followRounds(ctx) })
	if x.o.Host.Others != nil {
		g.Go(func() error { return x.followOthers(ctx) })
	}
	return g.Wait()
}

// followRounds looks after each round at what costs no question to the host, and records
// what is new of it.
func (x *Explainer) followRounds(ctx context.Context) error {
	var news events.News[host.Problem]
	for {
		s, newer := x.o.Held()
		if s.Phase != api.Starting {
			x.checkSpaceSoon()
		}
		for _, p := range x.prefixProblems(s) {
			if news.Is(p) {
				x.o.Record(events.Event{Kind: events.Problem, Message: p.Step + ": " + p.Message})
			}
		}
		select {
		case <-newer:
		case <-ctx.Done():
			return nil
		}
	}
}

// Problems returns what is wrong in a state, for the status: what keeps the policy from
// being in force first, and last what the checks of [Explainer.Doctor] find besides.
func (x *Explainer) Problems(s held.State) []host.Problem {
	found := x.found(s)
	return append(found, x.more(s, found)...)
}

// found returns what was found wrong without a check: what keeps the policy from being in
// force first.
func (x *Explainer) found(s held.State) []host.Problem {
	out := slices.Clone(s.Problems)
	if p, bad := x.o.Wanted.Problem(); bad {
		out = append(out, host.Problem{Step: p.Step, Message: p.Message, Hint: p.Hint})
	}
	return slices.Concat(out, s.Foreign, x.prefixProblems(s), x.foundByOthers())
}

// prefixProblems returns the problems with the mesh prefixes and with routes that are
// nearly a default route.
func (x *Explainer) prefixProblems(s held.State) []host.Problem {
	if s.Ruleset == nil {
		return nil
	}
	x.mu.Lock()
	if settings := x.o.Wanted.Settings(); x.prefixesOf != s.Ruleset || x.prefixesSettings != settings {
		x.prefixesOf, x.prefixesSettings = s.Ruleset, settings
		x.prefixes = append(overlapProblems(s.Ruleset, settings), nearlyProblems(s.Ruleset.Host())...)
	}
	out := slices.Clone(x.prefixes)
	x.mu.Unlock()
	return append(out, outerProblems(s.Ruleset, x.o.Wanted.Document().Peers, s.Counted)...)
}
