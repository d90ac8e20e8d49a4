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
	// StepLimit bounds making the interface and each enforcing step, LookLimit each
	// observation and inspection: a host that hangs must not keep open for longer what was
	// narrowed. Each call has a limit of its own, so that closing has its full time after a
	// step that used up its own.
	StepLimit = 30 * time.Second
	LookLimit = 15 * time.Second
	// After a round that took a time t, the next round for a change of the host comes
	// restFactor*t later at the earliest, or restMost later if that is less: a host that
	// changes all the time is looked at a fifth of the time.
	restFactor = 4
	restMost   = time.Second
)

// RoundLimit is the most that the steps of one round take: making the interface and
// observing the host; then loading a ruleset, reading it back and cutting flows, once for the
// wanted ruleset and once to close. Loading again what another program changed in between
// exceeds it only if each load nearly hangs. A watchdog must be more patient than that.
const RoundLimit = StepLimit + LookLimit + 2*(StepLimit+LookLimit+StepLimit)

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

// Options are what New needs.
type Options struct {
	Host host.Host // required
	Gate *Gate     // required: the one that narrows for Wanted

	Wanted  *wanted.State // required
	Learned *learned.Book // required

	// NewTunnel starts the WireGuard device around the guard, on a UDP port, of which 0
	// lets the system choose. It closes the device if it fails.
	NewTunnel func(tun.Device, mesh.PrivateKey, uint16) (Tunnel, error) // required
	// Record records an event. It must not block.
	Record func(events.Event) // required
	// Logger must not block.
	Logger *slog.Logger // required

	Interface  string // optional: the name of the mesh interface, the host chooses
	MTU        int    // required: of the mesh interface, in bytes
	ListenPort uint16 // optional: UDP, 0 lets the system choose

	Tick time.Duration    // required: between looks at the host
	Wall func() time.Time // required: the wall clock
}

// Loop makes the host hold what is wanted. It alone calls the host's link, observer and
// enforcer. Only the goroutine of run uses the fields, apart from the channels and those
// below mu.
type Loop struct {
	o  Options
	id wanted.Identity

	// woken starts a round for a change of the wanted state at once, moved one for a change of
	// the host soon. Both have room for one signal.
	woken, moved chan struct{}

	mu      sync.Mutex
	now     held.State
	changed chan struct{} // closed when now is replaced

	tunnel Tunnel // nil while there is no mesh interface
	guard  *guard.Device
	limits host.Limits // of the host's packet filter, when the guard was made
	iface  string
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
	// blind is set if an observation or inspection failed in this round.
	blind bool
	// refused is why the tunnel didn't take some peers; nil if it took all.
	refused  error
	report   host.Report
	problems []host.Problem
	repairs  uint64
	wait     retry.Backoff
	due      time.Time
	took     time.Duration // by the last round

	rebind chan Tunnel
	seen   observed
	// counted is what readTunnel read in this round.
	counted held.Numbers
	news    events.News[host.Problem]
}

// New returns a loop that hasn't begun; Run runs it.
func New(o Options) *Loop {
	l := &Loop{
		o: o, id: o.Wanted.Identity(),
		woken: make(chan struct{}, 1), moved: make(chan struct{}, 1), changed: make(chan struct{}),
		now:    held.State{Phase: api.Starting},
		wait:   retry.New(),
		rebind: make(chan Tunnel, 1),
	}
	o.Gate.setClock(o.Wanted.Now)
	return l
}

// Run keeps the host equal to what is wanted until ctx ends, and then leaves it as it was
// found. It ends earlier, with an error, only when the mesh interface can't be made in the
// first place. Call it once.
func (l *Loop) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.run(ctx) })
	g.Go(func() error { return l.rebinds(ctx) })
	g.Go(func() error { return l.watch(ctx) })
	return g.Wait()
}

// Wake has the loop hold a change of what is wanted. It doesn't wait.
func (l *Loop) Wake() { poke(l.woken) }

// Moved has the loop look at the host soon, for something about it changed, such as its
// address as seen from outside. It doesn't wait.
func (l *Loop) Moved() { poke(l.moved) }

// State returns what the host was last found to hold, and a channel that is closed when
// there is something newer.
func (l *Loop) State() (held.State, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now, l.changed
}

// run is the loop. The first round must make the mesh interface: a host where
// that can't be done is refused, rather than tried for ever.
func (l *Loop) run(ctx context.Context) error {
	err := l.open(ctx)
	if err != nil && !l.opened && !errors.Is(err, context.DeadlineExceeded) {
		return err // Open left nothing behind, unless it hung
	}
	if err != nil {
		return errors.Join(err, l.leave(ctx))
	}
	l.round(ctx)
	for l.next(ctx) {
	}
	return l.leave(ctx)
}

// next waits for the next reason to look, and looks. It reports false at the
// end.
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

// expedite brings the next round forward for a change of the host, of which more
// may follow. It keeps a distance that grows with what a round takes, so that a host which
// changes all the time and has much to look at leaves time for others, and while closed,
// when a round itself may be what changes the host.
func (l *Loop) expedite() {
	soon := max(settle, min(restFactor*l.took, restMost))
	if l.held == 0 {
		soon = l.wait.Min
	}
	if due := time.Now().Add(soon); due.Before(l.due) {
		l.due = due
	}
}

// round makes the host equal to the wanted state, once.
func (l *Loop) round(ctx context.Context) {
	began := time.Now()
	defer func() { l.took = time.Since(began) }()
	doc := l.o.Wanted.Expire()
	l.problems, l.blind = nil, false
	err := l.hold(ctx, doc)
	switch {
	case err != nil && ctx.Err() == nil:
		l.fail(ctx, doc, err)
	case l.refused != nil:
		l.addProblem(l.refused)
	}
	l.schedule(err == nil && l.refused == nil && !l.blind)
	l.readTunnel()
	l.publish()
}

// schedule sets when to look again: at the next tick or end of a grant, or
// after an error by and by later.
func (l *Loop) schedule(well bool) {
	wait := l.o.Tick
	if well {
		l.wait.Reset()
	} else {
		wait = l.wait.Next()
	}
	if l.wanted != nil {
		// An end in the past is of a ruleset that couldn't be compiled anew.
		if left := l.wanted.Expires().Sub(l.o.Wanted.Now()); left > 0 {
			wait = min(wait, left)
		}
	}
	l.due = time.Now().Add(wait)
}

// publish replaces what is known to be held by what this round found.
func (l *Loop) publish() {
	s := held.State{
		Phase: api.Closed, Interface: l.iface, ListenPort: l.port(), Host: l.host,
		Ruleset: l.wanted, Loaded: l.current, Read: l.read,
		Forwarding: l.report.Forwarding, Repairs: l.repairs,
		Problems: l.problems, Foreign: l.report.Problems, Guard: l.guard, Limits: l.limits, Counted: l.counted,
	}
	if l.held != 0 {
		s.Phase = api.Enforcing
	}
	if l.refused == nil {
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
