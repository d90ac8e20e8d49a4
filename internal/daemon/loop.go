package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/retry"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

const (
	// settle gathers a burst of changes of the host into one look at it.
	settle = 50 * time.Millisecond
	// tunnelLimit bounds the end of the tunnel, so that one that hangs leaves time to
	// put the host back.
	tunnelLimit = 3 * time.Second
	// stepLimit bounds making the interface and each enforcing step, and lookLimit a look at the host: a host
	// that hangs must not keep what was narrowed open for longer. Each has its own time,
	// so that one that used up all of it leaves closing as much as ever.
	stepLimit = 30 * time.Second
	lookLimit = 15 * time.Second
	// restFactor is how many times as long as a round took the pause before the next is
	// that a change of the host asks for, up to restMost.
	restFactor = 4
	restMost   = time.Second
)

// RoundLimit is what the steps of one round take at most: the interface is made anew, the
// host looked at, a ruleset loaded, read back and flows are cut, and then the same three to
// close. What another program changes meanwhile is loaded again, which takes longer only if
// loading nearly hangs each time.
const RoundLimit = stepLimit + lookLimit + 2*(stepLimit+lookLimit+stepLimit)

// loop is the reconcile loop: it alone talks to the host, and its fields
// are its own.
type loop struct {
	d      *Daemon
	tunnel Tunnel // nil while there is no mesh interface
	guard  *guard.Device
	limits host.Limits // of the host's packet filter, when the guard was made
	iface  string
	// opened says that the host made an interface, so that there is a host to
	// leave as it was found.
	opened bool

	// read is what the host was last found to enforce, as it was given to; nil where that
	// isn't so, or isn't known.
	read *policy.Ruleset
	// current is what was last given to enforce, wanted or closed, and nil before
	// anything was.
	current *policy.Ruleset
	// wanted is the wanted policy on the host as last observed.
	wanted *policy.Ruleset
	// narrowed are the peers that lost something since flows were last cut.
	narrowed []policy.Narrowed
	// host is what current was compiled for.
	host policy.Host
	// held is the generation that the host was found to hold, and 0 while it is
	// closed. Peers that the tunnel didn't take are in refused.
	held     uint64
	blind    bool // a look at the host failed in this round
	refused  error
	report   host.Report
	problems []host.Problem
	repairs  uint64
	wait     retry.Backoff
	due      time.Time
	took     time.Duration // by the last round

	rebind chan Tunnel
	seen   observed
	// overlaps are what is to be said of the mesh prefixes: byPrefix, which is of the
	// ruleset overlapsOf and the settings overlapsBy, and what peers' outer addresses add.
	overlaps, byPrefix []host.Problem
	overlapsOf         *policy.Ruleset
	overlapsBy         *wanted.Settings
	// told are the problems that an event told of, and when they were last found.
	told map[host.Problem]time.Time
}

func newLoop(d *Daemon) *loop {
	return &loop{d: d, wait: retry.New(), rebind: make(chan Tunnel, 1), told: map[host.Problem]time.Time{}}
}

// run is the loop. The first round must make the mesh interface: a host where
// that can't be done is refused, rather than tried for ever.
func (l *loop) run(ctx context.Context) error {
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
func (l *loop) next(ctx context.Context) bool {
	t := time.NewTimer(time.Until(l.due))
	defer t.Stop()
	var died <-chan struct{}
	if l.tunnel != nil {
		died = l.tunnel.Done()
	}
	select {
	case <-ctx.Done():
		return false
	case <-l.d.moved:
		l.expedite()
		return true
	case <-died:
		l.dropTunnel()
	case <-l.d.wake:
	case <-t.C:
	}
	l.round(ctx)
	return true
}

// expedite brings the next round forward for a change of the host, of which more
// may follow. It keeps a distance that grows with what a round takes, so that a host which
// changes all the time and has much to look at leaves time for others, and while closed,
// when a round itself may be what changes the host.
func (l *loop) expedite() {
	soon := max(settle, min(restFactor*l.took, restMost))
	if l.held == 0 {
		soon = l.wait.Min
	}
	if due := time.Now().Add(soon); due.Before(l.due) {
		l.due = due
	}
}

// open makes the mesh interface and the tunnel on it.
func (l *loop) open(ctx context.Context) error {
	if l.tunnel != nil {
		return nil
	}
	o := &l.d.opts
	limit, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	dev, err := o.Host.Link.Open(limit, host.Interface{
		Name: o.Interface, MTU: o.MTU, Addresses: l.d.id.Own.List(), Prefixes: l.d.id.List(),
	})
	if err != nil {
		return fmt.Errorf("open mesh interface: %w", err)
	}
	l.opened = true
	name, err := dev.Name()
	if err != nil {
		return errors.Join(fmt.Errorf("open mesh interface: %w", err), dev.Close())
	}
	l.limits = o.Host.Enforcer.Limits()
	l.guard = guard.New(dev, guard.Options{ // nothing passes yet
		Own: l.d.id.Own.List(), States: l.limits.States, PerForwarded: l.limits.PerForwarded,
		Reassembly: l.limits.Reassembly, ClearDF: l.limits.DropsDF,
		Clock: l.d.wanted.Now,
	})
	l.d.gate.use(l.guard)
	tunnel, err := l.d.opts.NewTunnel(l.guard, l.d.wanted.Key(), l.port())
	if err != nil {
		return err // NewTunnel closed dev
	}
	l.tunnel, l.iface = tunnel, name
	return nil
}

// port returns the wanted UDP port; a tunnel that died is made again on the
// port that peers know.
func (l *loop) port() uint16 {
	if l.d.opts.ListenPort != 0 {
		return l.d.opts.ListenPort
	}
	c, _ := l.d.condition()
	return c.listenPort
}

// dropTunnel records that the tunnel ended by itself, because another program took
// the interface away, and lets the next round make it again. It closes the guard first,
// and waits tunnelLimit at most for what is left of the tunnel.
func (l *loop) dropTunnel() {
	l.d.gate.set(nil, nil)
	l.d.journal.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("the mesh interface %s is gone; making it again", l.iface)})
	if !inTime(l.tunnel.Close) {
		l.d.journal.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("the tunnel that was on it didn't end in %v; going on without it", tunnelLimit)})
	}
	l.tunnel, l.held = nil, 0
	l.repairs++
}

// round makes the host equal to the wanted state, once.
func (l *loop) round(ctx context.Context) {
	began := time.Now()
	defer func() { l.took = time.Since(began) }()
	doc := l.d.wanted.Expire()
	l.problems, l.blind = nil, false
	err := l.hold(ctx, doc)
	switch {
	case err != nil && ctx.Err() == nil:
		l.fail(ctx, doc, err)
	case l.refused != nil:
		l.addProblem(l.refused)
	}
	l.schedule(err == nil && l.refused == nil && !l.blind)
	l.look()
	l.publish()
}

// hold enforces doc, or checks that it still is.
func (l *loop) hold(ctx context.Context, doc *wanted.Document) error {
	if err := l.open(ctx); err != nil {
		return err
	}
	host, err := l.observe(ctx)
	if err != nil {
		// A look that fails closes nothing: what was seen last counts until the next.
		err = fmt.Errorf("observe host: %w", err)
		if l.held == 0 || l.current == nil {
			return err
		}
		l.addProblem(err)
		host, l.blind = l.host, true
	}
	// A peer more in the tunnel opens nothing before the filter knows it, and one
	// that the tunnel doesn't take is no reason to close for the others.
	peers := l.d.tunnelPeers(doc)
	port := l.tunnel.ListenPort()
	l.tunnel.SetSelf(placesOf(host, port))
	l.refused = l.tunnel.Sync(l.withoutTakeovers(peers))
	if l.held == doc.Generation && reflect.DeepEqual(host, l.host) && port == l.current.Mesh().ListenPort {
		return l.check(ctx, doc)
	}
	if l.current != nil && pathOf(host) != pathOf(l.host) {
		l.wakePeers()
	}
	r, err := l.d.compile(cmp.Or(l.d.gate.inForce(), l.current), policyMesh(doc, l.d.id, port, true), host)
	if err != nil {
		return err
	}
	l.wanted = r
	if err := l.enforce(ctx, r, doc); err != nil {
		return err
	}
	l.refused = l.tunnel.Sync(peers)
	l.held = doc.Generation
	return nil
}

func (l *loop) observe(ctx context.Context) (policy.Host, error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	host, err := l.d.opts.Host.Observer.Observe(ctx)
	// Where peers are told to reach this host are its addresses from outside.
	endpoint := l.d.wanted.Settings().Endpoint
	host.OutsidePort = endpoint.Port
	if a, notAddr := netip.ParseAddr(endpoint.Host); notAddr == nil {
		host.Outside = append(host.Outside, a.Unmap())
		return host, err
	}
	host.Outside = append(host.Outside, l.d.learned.Outside().Addresses...)
	return host, err
}

// placesOf returns where datagrams reach this host's WireGuard, which listens on port: at
// each of the host's addresses. A router's address is left out, although the router may
// turn them to this host, for it may be a peer's, too: one behind the same router, or one
// whose packets are forwarded and translated, comes from there, and by a router that keeps
// ports from the very port.
func placesOf(host policy.Host, port uint16) (places []netip.AddrPort) {
	for _, i := range host.Interfaces {
		for _, p := range i.Addresses {
			places = append(places, netip.AddrPortFrom(p.Addr().WithZone(""), port))
		}
	}
	return places
}

// path is how WireGuard's packets leave the host. The tunnel answers each peer
// from the address of before, and routers on the way keep their translation of it,
// until the peers are told.
type path struct {
	uplink4, uplink6                   string
	source4, source6, router4, router6 netip.Addr
}

func pathOf(h policy.Host) path {
	return path{h.Uplink4, h.Uplink6, h.Source4, h.Source6, h.Router4, h.Router6}
}

// withoutTakeovers leaves out the peers that take over another's address: what is
// enforced still gives that address the other's permissions.
func (l *loop) withoutTakeovers(peers []tunnel.Peer) []tunnel.Peer {
	if l.current == nil {
		return peers
	}
	return slices.DeleteFunc(slices.Clone(peers), func(p tunnel.Peer) bool {
		return slices.ContainsFunc(p.AllowedIPs, func(a netip.Prefix) bool {
			i, taken := l.current.PeerByAddr(a.Addr())
			return taken && a.IsSingleIP() && l.current.Peers()[i].PublicKey != p.PublicKey
		})
	})
}

// enforce makes r hold, whole: the guard first, so that nothing passes by the
// old policy while the packet filter is changed; then the filter, read back;
// then the running flows that r refuses. While the host is closed the guard is
// last, so that it stays closed until the filter is known to hold.
func (l *loop) enforce(ctx context.Context, r *policy.Ruleset, doc *wanted.Document) error {
	l.narrow(r)
	if l.held != 0 {
		l.d.gate.set(r, doc)
	}
	if err := l.loadAndRead(ctx, r); err != nil {
		return err
	}
	if err := l.cut(ctx, r); err != nil {
		return err
	}
	l.d.gate.set(r, doc)
	l.d.gate.confine(false)
	return nil
}

// readTries is how often what was loaded is read back when it can't be read, or when
// another program changed it in the meantime.
const readTries = 3

// loadAndRead has the host enforce r and reads that back: only then does it count. That
// it can't be read is no reason to close at once, for it may hold; nor is another
// program's change, which is repaired like at any other time.
func (l *loop) loadAndRead(ctx context.Context, r *policy.Ruleset) error {
	var err error
	l.read = nil
	for range readTries {
		if err := l.load(ctx, r); err != nil {
			return fmt.Errorf("enforce: %w", err)
		}
		if err = l.inspect(ctx, r); err == nil {
			drift := l.report.Drift
			if len(drift) == 0 {
				l.read = r
				return nil
			}
			err = &host.StepError{Step: drift[0].Step, Hint: drift[0].Hint, Err: fmt.Errorf("not as enforced: %s", drift[0].Message)}
		}
		if errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			break // a look that hangs would hang again
		}
	}
	return err
}

func (l *loop) load(ctx context.Context, r *policy.Ruleset) error {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	return l.d.opts.Host.Enforcer.Enforce(ctx, r)
}

func (l *loop) inspect(ctx context.Context, r *policy.Ruleset) error {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	report, err := l.d.opts.Host.Enforcer.Inspect(ctx, r)
	if err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	l.report = report
	return nil
}

// narrow notes the peers that have less under r than under what was enforced.
// Before the first ruleset, flows of an earlier helper's time may be running, of
// any peer.
func (l *loop) narrow(r *policy.Ruleset) {
	if l.current == nil {
		l.narrowed = everyone(r)
	} else {
		l.addNarrowed(policy.Diff(l.current, r))
	}
	l.current, l.host = r, r.Host()
}

// addNarrowed adds to the narrowed peers, each peer once, so that what can't be cut
// for long doesn't grow.
func (l *loop) addNarrowed(more []policy.Narrowed) {
	at := make(map[mesh.PublicKey]int, len(l.narrowed))
	for i, n := range l.narrowed {
		at[n.PublicKey] = i
	}
	for _, n := range more {
		i, ok := at[n.PublicKey]
		if !ok {
			at[n.PublicKey] = len(l.narrowed)
			l.narrowed = append(l.narrowed, n)
			continue
		}
		have := &l.narrowed[i]
		have.Lost |= n.Lost
		have.Removed = have.Removed || n.Removed
		for _, a := range n.Addresses {
			if !slices.Contains(have.Addresses, a) {
				have.Addresses = append(slices.Clone(have.Addresses), a)
			}
		}
	}
}

// everyone names every peer of r as narrowed.
func everyone(r *policy.Ruleset) []policy.Narrowed {
	var out []policy.Narrowed
	for _, p := range r.Peers() {
		out = append(out, policy.Narrowed{
			PublicKey: p.PublicKey, Name: p.Name, Addresses: p.Addresses.List(),
			Lost: mesh.All &^ p.Permissions,
		})
	}
	return out
}

// cut ends the flows of the peers that were narrowed since the last time it
// succeeded.
func (l *loop) cut(ctx context.Context, r *policy.Ruleset) error {
	if len(l.narrowed) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	if err := l.d.opts.Host.Enforcer.Cut(ctx, r, l.narrowed); err != nil {
		return fmt.Errorf("cut flows: %w", err)
	}
	l.narrowed = nil
	return nil
}

// check looks whether what is enforced still is, and puts it right.
func (l *loop) check(ctx context.Context, doc *wanted.Document) error {
	if err := l.inspect(ctx, l.current); err != nil {
		// As in hold: a look that fails closes nothing.
		l.addProblem(err)
		l.blind = true
		return nil
	}
	drift := l.report.Drift
	if len(drift) == 0 {
		return nil
	}
	// What needs the filter waits until it is known to hold again. While it was gone,
	// flows may have come to be that it refuses.
	l.d.gate.confine(true)
	l.addNarrowed(everyone(l.current))
	if err := l.enforce(ctx, l.current, doc); err != nil {
		return err
	}
	l.recordRepairs(drift)
	return nil
}

// recordRepairs counts what was put right once per step: a flushed table is one
// change by another program, however many chains it had.
func (l *loop) recordRepairs(drift []host.Problem) {
	more := map[string]int{}
	for _, p := range drift {
		more[p.Step]++
	}
	for _, p := range drift {
		n := more[p.Step]
		if n == 0 {
			continue // told with the first of its step
		}
		more[p.Step] = 0
		message := p.Step + ": " + p.Message
		if n > 1 {
			message += fmt.Sprintf(", and %d more", n-1)
		}
		l.repairs++
		l.d.journal.Record(events.Event{Kind: events.Repair, Message: message})
	}
}

// fail closes: what can't be held as wanted is held without permissions, which
// any filter that works at all can do. What failed may have used up its time; closing
// has its own.
func (l *loop) fail(ctx context.Context, doc *wanted.Document, cause error) {
	l.held = 0
	l.addProblem(cause)
	l.d.gate.set(nil, doc)
	if l.current == nil || l.tunnel == nil {
		return // nothing was opened, or there is nothing to come from
	}
	closed, err := l.d.compile(l.current, policyMesh(doc, l.d.id, l.tunnel.ListenPort(), false), l.host)
	if err == nil {
		err = l.enforce(ctx, closed, doc)
	}
	if err != nil {
		l.addProblem(fmt.Errorf("close: %w", err))
	}
}

// addProblem takes an error apart for status and, where it is news, the
// journal.
func (l *loop) addProblem(err error) {
	p := problemOf(err)
	if slices.Contains(l.problems, p) {
		return
	}
	l.problems = append(l.problems, p)
	if l.isNews(p) {
		l.d.journal.Record(events.Event{Kind: events.Problem, Message: p.Step + ": " + p.Message})
	}
}

// isNews reports whether no event told of a problem lately.
func (l *loop) isNews(p host.Problem) bool {
	now := time.Now()
	last, known := l.told[p]
	if !known && len(l.told) >= maxTold {
		maps.DeleteFunc(l.told, func(_ host.Problem, at time.Time) bool { return now.Sub(at) >= toldFor })
		if len(l.told) >= maxTold {
			return false // status has it
		}
	}
	l.told[p] = now
	return !known || now.Sub(last) >= toldFor
}

// A problem is told of again when it wasn't found for toldFor: one that comes and goes
// from round to round is one. maxTold bounds the memory for those whose text changes.
const (
	toldFor = 10 * time.Minute
	maxTold = 256
)

// problemOf returns an error in the words of status.
func problemOf(err error) host.Problem {
	var step *host.StepError
	if errors.As(err, &step) {
		return host.Problem{Step: step.Step, Message: step.Err.Error(), Hint: step.Hint}
	}
	name, message, found := strings.Cut(err.Error(), ": ")
	if !found {
		name, message = "reconcile", err.Error()
	}
	return host.Problem{Step: name, Message: message}
}

// schedule sets when to look again: at the next tick or end of a grant, or
// after an error by and by later.
func (l *loop) schedule(well bool) {
	wait := l.d.opts.Tick
	if well {
		l.wait.Reset()
	} else {
		wait = l.wait.Next()
	}
	if l.wanted != nil {
		// An end in the past is of a ruleset that couldn't be compiled anew.
		if left := l.wanted.Expires().Sub(l.d.wanted.Now()); left > 0 {
			wait = min(wait, left)
		}
	}
	l.due = time.Now().Add(wait)
}

func (l *loop) publish() {
	c := condition{
		state: api.Closed, iface: l.iface, host: l.host,
		ruleset: l.wanted, loaded: l.current, read: l.read, forwarding: l.report.Forwarding, repairs: l.repairs,
		problems: l.problems, foreign: slices.Concat(l.report.Problems, l.overlaps), tunnel: l.tunnel, guard: l.guard, limits: l.limits,
	}
	if l.held != 0 {
		c.state = api.Enforcing
	}
	if renderer := l.d.opts.Host.Renderer; renderer != nil {
		c.render = renderer.Renderer()
	}
	if l.refused == nil {
		c.enforced = l.held
	}
	if l.tunnel != nil {
		c.listenPort = l.tunnel.ListenPort()
	} else {
		c.listenPort = l.port()
	}
	l.d.publish(c)
	l.d.lookForRoom()
}

// leave ends the tunnel first, so that nothing of a peer arrives while the
// filter is taken away, and then leaves the host as it was found. The host
// begins with forwarding, so that a kill at any moment leaves it closed.
func (l *loop) leave(ctx context.Context) error {
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), host.LeaveLimit)
	defer cancel()
	l.endTunnel()
	defer l.d.finish()
	left, err := l.d.opts.Host.Link.Close(limit)
	for _, p := range left {
		l.d.journal.Record(events.Event{Kind: events.Problem, Message: p.Step + ": " + p.Message})
	}
	if err != nil {
		return fmt.Errorf("leave the host as it was: %w", err)
	}
	return nil
}

// endTunnel closes the guard, so that nothing passes, and then the tunnel. It waits
// tunnelLimit at most: a tunnel that hangs ends when the host removes its
// interface, or with this process.
func (l *loop) endTunnel() {
	if l.tunnel == nil {
		return
	}
	if !inTime(func() {
		l.d.gate.set(nil, nil)
		if stats, err := l.tunnel.Stats(); err == nil {
			l.d.note(numbers{tunnel: stats, guard: l.seen.guard})
		}
		l.tunnel.Close()
	}) {
		l.d.journal.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("the tunnel didn't end in %v; leaving the host without it", tunnelLimit)})
	}
}

// inTime reports whether end returns within tunnelLimit. It goes on after that.
func inTime(end func()) bool {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		end()
	}()
	t := time.NewTimer(tunnelLimit)
	defer t.Stop()
	select {
	case <-ended:
		return true
	case <-t.C:
		return false
	}
}

// wakePeers has the tunnel tell the peers where the host is, in a task of its own
// because that may take long after a wake from sleep. One that waits is replaced: it may
// be of a tunnel that is no more.
func (l *loop) wakePeers() {
	select {
	case <-l.rebind:
	default:
	}
	l.rebind <- l.tunnel // there is room: the loop alone sends
}

func (l *loop) rebinds(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case t := <-l.rebind:
			err := t.Rebind(ctx)
			select {
			case <-t.Done(): // that it ended is the loop's to say
				continue
			default:
			}
			if err != nil && ctx.Err() == nil {
				l.d.journal.Record(events.Event{Kind: events.Problem, Message: err.Error()})
			}
		}
	}
}

// policyMesh returns the mesh to compile, for WireGuard at a UDP port. Without
// grants, nothing opens.
func policyMesh(doc *wanted.Document, m wanted.Identity, listenPort uint16, withGrants bool) policy.Mesh {
	out := policy.Mesh{
		Prefixes:   m.List(),
		Addresses:  m.Own.List(),
		Former:     doc.FormerAddresses(),
		Peers:      doc.Peers, // never changed once published
		ListenPort: listenPort,
	}
	if !withGrants {
		out.Peers = slices.Clone(out.Peers)
		for i := range out.Peers {
			out.Peers[i].Permissions = mesh.Grants{}
		}
	}
	return out
}
