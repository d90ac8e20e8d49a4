package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/retry"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

const (
	// settle is the delay between a change of the host and the round for it, so that a burst
	// of changes is one round.
	settle = 50 * time.Millisecond
	// TunnelLimit bounds closing the tunnel. A tunnel that hangs must leave time to put the
	// host back within [host.LeaveLimit].
	TunnelLimit = 3 * time.Second
	// StepLimit bounds making the interface and each enforcing step, ObserveLimit each
	// observation and inspection: a host that hangs must not keep open for longer what was
	// narrowed. Each call has a limit of its own, so that closing has its full time after a
	// step that used up its own.
	StepLimit    = 30 * time.Second
	ObserveLimit = 15 * time.Second
	// After a round that took a time t, the next round for a change of the host comes
	// restFactor*t later at the earliest, or maxRest later if that is less. So on a host that
	// changes all the time, rounds take a fifth of the time.
	restFactor = 4
	maxRest    = time.Second
)

// RoundLimit is the most that the steps of one round take: making the interface and
// observing the host; then loading a ruleset, reading it back and cutting flows, once for the
// wanted ruleset and once to close. Loading again what another program changed in between
// exceeds it only if each load nearly hangs. A watchdog must be more patient than that.
const RoundLimit = StepLimit + ObserveLimit + 2*(StepLimit+ObserveLimit+StepLimit)

// Tunnel is the WireGuard device as the loop drives it; *tunnel.Device is one.
type Tunnel interface {
	held.Tunnel
	// Sync makes the tunnel's peers equal to want, touching only those that differ.
	Sync(want []tunnel.Peer) error
	// ListenPort returns the UDP port that the tunnel listens on.
	ListenPort() uint16
	// SetOwnEndpoints sets the endpoints that reach the tunnel itself, which no peer can have.
	SetOwnEndpoints(endpoints []netip.AddrPort)
	// Rebind tells the peers where the host is after a change of networks or sleep. It
	// ends early when ctx or the tunnel does.
	Rebind(ctx context.Context) error
	// Done is closed when the tunnel has ended, by Close or by itself.
	Done() <-chan struct{}
	Close()
}

// Options configure a Loop.
type Options struct {
	Host host.Host // required
	Gate *Gate     // required: the one that narrows for Wanted

	Wanted  *wanted.State // required
	Learned *learned.Book // required

	// NewTunnel starts the WireGuard device on the guard, with a UDP port or 0 to let the
	// system choose. If it fails, it has closed the guard.
	NewTunnel func(tun.Device, mesh.PrivateKey, uint16) (Tunnel, error) // required
	// Record records an event. It must not block.
	Record func(events.Event) // required
	// Logger must not block.
	Logger *slog.Logger // required

	Interface  string // optional: the name of the mesh interface, the host chooses
	MTU        int    // required: of the mesh interface, in bytes
	ListenPort uint16 // optional: UDP, 0 lets the system choose

	Tick time.Duration    // required: the longest time between two rounds
	Wall func() time.Time // required: the wall clock
}

// Loop makes the host enforce the wanted state. It alone calls the host's link, observer and
// enforcer. Only the goroutine of run uses the fields, apart from the channels and the two
// that mu guards.
type Loop struct {
	o  Options
	id wanted.Identity

	// woken starts a round for a change of the wanted state at once, moved one for a change of
	// the host soon. Both have room for one signal.
	woken, moved chan struct{}

	mu      sync.Mutex    // guards now and changed
	now     held.State    // the latest published one
	changed chan struct{} // closed when now is replaced

	tunnel *boundedTunnel // nil while there is no mesh interface
	guard  *guard.Device  // the last one, also after its tunnel has ended
	limits host.Limits    // of the host's packet filter, when the guard was made
	iface  string         // the mesh interface's name
	// opened is set once the host made an interface: from then on the host must be put back.
	opened bool

	// current is the ruleset that the host was last told to enforce, wanted or closed; nil
	// before the first. read is current once an inspection found the host to enforce it, and
	// nil otherwise.
	current, read *policy.Ruleset
	// wanted is the wanted policy on the host as last observed.
	wanted *policy.Ruleset
	// narrowed are the peers that lost a permission since flows were last cut.
	narrowed []policy.Narrowed
	// host has the facts that current was compiled for.
	host policy.Host
	// held is the generation that the host was found to hold, and 0 while it is closed.
	held uint64
	// unobserved is set if an observation or inspection failed in this round.
	unobserved bool
	// syncErr is why the tunnel didn't accept some peers; nil if it accepted all. They are no
	// reason to close for the others, but the generation doesn't count as enforced.
	syncErr  error
	report   host.Report    // of the last inspection
	problems []host.Problem // of this round, the cause first
	repairs  uint64         // since Run began
	backoff  retry.Backoff  // between rounds that fail
	due      time.Time      // when the next round begins at the latest
	took     time.Duration  // by the last round

	rebind chan Tunnel // from requestRebind to runRebinds; has room for one
	seen   observed
	// counted is what readTunnel read in this round.
	counted held.Numbers
	news    events.News[host.Problem] // the problems that were recorded already
}

// New returns a loop in the phase api.Starting. It touches neither the host nor the disk.
func New(o Options) *Loop {
	l := &Loop{
		o: o, id: o.Wanted.Identity(),
		woken: make(chan struct{}, 1), moved: make(chan struct{}, 1), changed: make(chan struct{}),
		now:     held.State{Phase: api.Starting},
		backoff: retry.New(),
		rebind:  make(chan Tunnel, 1),
	}
	o.Gate.setClock(o.Wanted.Now)
	return l
}

// Run keeps the host equal to the wanted state until ctx ends, and then restores it to how it was
// found. It ends earlier only with an error, if the mesh interface can't be created at the
// start. Call it once.
func (l *Loop) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.run(ctx) })
	g.Go(func() error { return l.runRebinds(ctx) })
	g.Go(func() error { return l.watch(ctx) })
	return g.Wait()
}

// Wake starts a round at once, for a change of the wanted state. It doesn't wait.
func (l *Loop) Wake() { signal(l.woken) }

// Moved starts a round soon, for a change of the host, such as its address as seen from outside.
// It doesn't wait.
func (l *Loop) Moved() { signal(l.moved) }

// State returns the latest published state, and a channel that is closed when there is a newer
// one.
func (l *Loop) State() (held.State, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now, l.changed
}

// run is the loop. If the mesh interface can't be created at the start, it returns the error
// instead of trying for ever: the person or service manager that started the helper must learn
// of it.
func (l *Loop) run(ctx context.Context) error {
	err := l.open(ctx)
	if err != nil && !l.opened && !errors.Is(err, context.DeadlineExceeded) {
		return err // Open left nothing behind, which one that hung may have done
	}
	if err != nil {
		return errors.Join(err, l.leave(ctx))
	}
	l.round(ctx)
	for l.next(ctx) {
	}
	return l.leave(ctx)
}

// next waits for a reason for a round, and runs it. A change of the host only brings the round
// forward. It returns false once ctx has ended.
func (l *Loop) next(ctx context.Context) bool {
	t := time.NewTimer(time.Until(l.due))
	defer t.Stop()
	var died <-chan struct{}
	if l.tunnel != nil {
		died = l.tunnel.Done()
	}
	select {
	case <-ctx.Done():
		return false
	case <-l.moved:
		l.expedite()
		return true
	case <-died:
		l.dropTunnel()
	case <-l.woken:
	case <-t.C:
	}
	l.round(ctx)
	return true
}

// expedite brings the next round forward for a change of the host, which others may follow. The
// distance from now grows with the duration of a round, so that rounds leave the processor to
// others on a host that changes all the time. While closed it is the backoff's shortest pause,
// since the round itself may be what changes the host.
func (l *Loop) expedite() {
	soon := max(settle, min(restFactor*l.took, maxRest))
	if l.held == 0 {
		soon = l.backoff.Min
	}
	if due := time.Now().Add(soon); due.Before(l.due) {
		l.due = due
	}
}

// round makes the host equal to the wanted state, once, and publishes the result.
func (l *Loop) round(ctx context.Context) {
	began := time.Now()
	defer func() { l.took = time.Since(began) }()
	doc := l.o.Wanted.Expire()
	l.problems, l.unobserved = nil, false
	err := l.reconcile(ctx, doc)
	switch {
	case err != nil && ctx.Err() == nil:
		l.failClosed(ctx, doc, err)
	case l.syncErr != nil:
		l.addProblem(host.AtStep(stepTunnel, l.syncErr))
	}
	l.schedule(err == nil && l.syncErr == nil && !l.unobserved)
	l.readTunnel()
	l.publish()
}

// schedule sets when the next round is due: after a tick, or after the backoff's pause if this
// one had an error, and at the next end of a permission at the latest.
func (l *Loop) schedule(ok bool) {
	wait := l.o.Tick
	if ok {
		l.backoff.Reset()
	} else {
		wait = l.backoff.Next()
	}
	if l.wanted != nil {
		// An end in the past is of a ruleset that couldn't be compiled again.
		if left := l.wanted.Expires().Sub(l.o.Wanted.Now()); left > 0 {
			wait = min(wait, left)
		}
	}
	l.due = time.Now().Add(wait)
}

// publish replaces the state by this round's result, wakes those who wait for it, and records
// an event if the phase changed. The values in it are never modified afterwards.
func (l *Loop) publish() {
	s := held.State{
		Phase: api.Closed, Interface: l.iface, ListenPort: l.port(), Host: l.host,
		Ruleset: l.wanted, Loaded: l.current, Read: l.read,
		Forwarding: l.report.Forwarding, Repairs: l.repairs,
		Problems: l.problems, Foreign: l.report.Problems, Unexamined: l.report.Unexamined, Guard: l.guard, Limits: l.limits, Counted: l.counted,
	}
	if l.held != 0 {
		s.Phase = api.Enforcing
	}
	if l.syncErr == nil {
		s.Enforced = l.held
	}
	if renderer := l.o.Host.Renderer; renderer != nil {
		s.Render = renderer.Renderer()
	}
	if l.tunnel != nil {
		s.Tunnel, s.ListenPort = l.tunnel, l.tunnel.ListenPort()
	}
	l.mu.Lock()
	before := l.now.Phase
	l.now = s
	close(l.changed)
	l.changed = make(chan struct{})
	l.mu.Unlock()
	if before != s.Phase {
		l.o.Record(events.Event{Kind: events.State, Message: before + " became " + s.Phase})
	}
}
