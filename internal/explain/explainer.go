package explain

import (
	"context"
	"log/slog"
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
	Host    host.Host     // required; only its optional parts are used
	Wanted  *wanted.State // required
	Learned *learned.Book // required

	// Held returns the state of the loop's last round, and a channel that is closed when there
	// is a newer one.
	Held func() (held.State, <-chan struct{}) // required
	// InForce returns the ruleset by which the guard judges now, or nil while it passes nothing.
	InForce func() *policy.Ruleset // required
	// NameFailure returns why the last lookup of a name in an endpoint failed, or nil.
	NameFailure func(name string) error // required

	// Languages are the rule languages by name, such as "nft", including the host's own
	// (Host.Language).
	Languages map[string]Language // optional

	StateDir string             // required: where Doctor writes its trial file
	Wall     func() time.Time   // required: the wall clock
	Record   func(events.Event) // required: must not block
	Logger   *slog.Logger       // required: must not block
}

// Explainer answers questions about a running helper. Its methods may be called by any
// goroutine.
type Explainer struct {
	o Options

	// stateDirProblem says that nothing can be written into the state directory; nil if
	// something can. queueSpaceCheck sets it.
	stateDirProblem atomic.Pointer[host.Problem]
	// examining is a semaphore of one: it holds a value while the host examines other
	// software. It isn't a mutex because a caller gives up waiting when its context ends.
	examining chan struct{}
	// questions is a semaphore of maxQuestions for those that are being answered; see enter.
	questions chan struct{}

	mu sync.Mutex
	// othersProblems is the result of the last examination of other software.
	othersProblems []host.Problem
	// prefixes caches the problems with the mesh prefixes, for the ruleset prefixesOf and the
	// settings prefixesSettings: finding them is slow on a host with many routes. Both are
	// compared as pointers, since they are never modified after they are published.
	prefixes         []host.Problem
	prefixesOf       *policy.Ruleset
	prefixesSettings *wanted.Settings
}

// New returns an explainer. It knows of no problems with other software before Run or Doctor.
func New(o Options) *Explainer {
	return &Explainer{o: o, examining: make(chan struct{}, 1), questions: make(chan struct{}, maxQuestions)}
}

const (
	// maxQuestions is how many questions about packets and rules are answered at once. They
	// render and evaluate whole rulesets, and a client may ask without end: more at a time
	// would take the CPU from the loop and the tunnel.
	maxQuestions = 4
	// questionWait bounds the wait for others' questions.
	questionWait = 10 * time.Second
)

// enter waits until a question may be answered, at most for questionWait or until ctx ends.
// Without an error the caller calls leave at the end.
func (x *Explainer) enter(ctx context.Context) (leave func(), err error) {
	limit, cancel := context.WithTimeout(ctx, questionWait)
	defer cancel()
	select {
	case x.questions <- struct{}{}:
		return func() { <-x.questions }, nil
	case <-limit.Done():
		return nil, api.Errorf(api.CodeNotReady, "the helper is busy with other questions, %d at a time", maxQuestions).WithHint("ask again in a moment")
	}
}

// Run examines, after each round of the loop and until ctx ends, what doesn't affect
// enforcement: the mesh prefixes, the space in the state directory, and other software. The
// loop doesn't wait for it. Call it once. It returns nil.
func (x *Explainer) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return x.followRounds(ctx) })
	if x.o.Host.Others != nil {
		g.Go(func() error { return x.followOthers(ctx) })
	}
	return g.Wait()
}

// followRounds checks after each round what needs no question to the host, and records an
// event for each new problem with the mesh prefixes. The status reads the rest.
func (x *Explainer) followRounds(ctx context.Context) error {
	var news events.News[host.Problem]
	for {
		s, newer := x.o.Held()
		if s.Phase != api.Starting {
			x.queueSpaceCheck()
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

// Problems returns the problems of a state, for the status: first those that keep the policy
// from being in force, last those that only the checks of [Explainer.Doctor] find. It asks the
// host nothing.
func (x *Explainer) Problems(s held.State) []host.Problem {
	known := x.knownProblems(s)
	return append(known, x.checkProblems(s, known)...)
}

// knownProblems returns the problems that the loop, the disk and Run reported, those that keep
// the policy from being in force first.
func (x *Explainer) knownProblems(s held.State) []host.Problem {
	out := slices.Clone(s.Problems)
	if p, bad := x.o.Wanted.Problem(); bad {
		out = append(out, host.Problem{Step: p.Step, Message: p.Message, Hint: p.Hint})
	}
	return slices.Concat(out, s.Foreign, x.prefixProblems(s), x.lastOthersProblems())
}

// prefixProblems returns the problems with the mesh prefixes, with routes that are nearly a
// default route, and with peers' outer addresses inside the mesh. The last aren't cached, for
// they change with each handshake.
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
