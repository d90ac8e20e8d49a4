package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// reconcile makes the host enforce doc, or repairs what has drifted if it already does.
func (l *Loop) reconcile(ctx context.Context, doc *wanted.Document) error {
	if err := l.open(ctx); err != nil {
		return err
	}
	facts, err := l.observe(ctx)
	if err != nil {
		// A failed observation closes nothing: the last one counts until the next.
		err = host.AtStep("observe host", err)
		if l.held == 0 || l.current == nil {
			return err
		}
		l.addProblem(err)
		facts, l.unobserved = l.host, true
	}
	// The tunnel comes first: a new peer in it can't do anything before the guard and the filter
	// have rules for it. Peers that take over an address are added after enforce.
	peers := l.tunnelPeers(doc)
	port := l.tunnel.ListenPort()
	l.tunnel.SetOwnEndpoints(ownEndpoints(facts, port))
	l.syncErr = l.tunnel.Sync(l.withoutTakeovers(peers))
	if l.held == doc.Generation && reflect.DeepEqual(facts, l.host) && port == l.current.Mesh().ListenPort {
		return l.checkDrift(ctx, doc)
	}
	if l.current != nil && pathOf(facts) != pathOf(l.host) {
		l.requestRebind()
	}
	r, err := l.o.Gate.compile(cmp.Or(l.o.Gate.InForce(), l.current), policyMesh(doc, l.id, port, true), facts)
	if err != nil {
		return host.AtStep("compile the policy", err)
	}
	l.wanted = r
	if err := l.enforce(ctx, r, doc); err != nil {
		return err
	}
	l.syncErr = l.tunnel.Sync(peers)
	l.held = doc.Generation
	return nil
}

// observe returns the facts about the host, including the addresses that are this host's as
// seen from outside, which it can't know: those of the endpoint that peers are configured with.
func (l *Loop) observe(ctx context.Context) (policy.Host, error) {
	ctx, cancel := context.WithTimeout(ctx, ObserveLimit)
	defer cancel()
	facts, err := l.o.Host.Observer.Observe(ctx)
	endpoint := l.o.Wanted.Settings().Endpoint
	facts.OutsidePort = endpoint.Port
	if a, notAddr := netip.ParseAddr(endpoint.Host); notAddr == nil {
		facts.Outside = append(facts.Outside, a.Unmap())
		return facts, err
	}
	facts.Outside = append(facts.Outside, l.o.Learned.Outside().Addresses...)
	return facts, err
}

// enforce puts r into force. The guard comes first, so that nothing passes by the old policy
// while the packet filter changes; then the filter, which is read back; then running flows that
// r refuses are cut. While the host is closed the guard comes last instead, so that it stays
// closed until the filter is known to enforce r.
func (l *Loop) enforce(ctx context.Context, r *policy.Ruleset, doc *wanted.Document) error {
	l.setCurrent(r)
	if l.held != 0 {
		l.o.Gate.set(r, doc)
	}
	if err := l.loadAndRead(ctx, r); err != nil {
		return err
	}
	if err := l.cut(ctx, r); err != nil {
		return err
	}
	l.o.Gate.set(r, doc)
	l.o.Gate.confine(false)
	return nil
}

// ReadTries is how many times a ruleset is loaded and read back in one round, if reading fails
// or another program changed the rules in between.
const ReadTries = 3

// loadAndRead has the host enforce r and reads the rules back; r counts as in force only
// then. A read that fails is no reason to close at once, as the rules may well be loaded; nor
// is a change by another program, which is repaired like any other drift.
func (l *Loop) loadAndRead(ctx context.Context, r *policy.Ruleset) error {
	var err error
	l.read = nil
	for range ReadTries {
		if err := l.load(ctx, r); err != nil {
			return host.AtStep("enforce", err)
		}
		if err = l.inspect(ctx, r); err == nil {
			drift := l.report.Drift
			if len(drift) == 0 {
				l.read = r
				return nil
			}
			err = &host.StepError{Step: drift[0].Step, Hint: drift[0].Hint, Kind: drift[0].Kind, Err: fmt.Errorf("not as enforced: %s", drift[0].Message)}
		}
		if errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			break // an inspection that hung would hang again
		}
	}
	return err
}

// load has the host enforce r, within StepLimit.
func (l *Loop) load(ctx context.Context, r *policy.Ruleset) error {
	ctx, cancel := context.WithTimeout(ctx, StepLimit)
	defer cancel()
	return l.o.Host.Enforcer.Enforce(ctx, r)
}

// inspect compares what the host enforces with r, within ObserveLimit, and stores the report.
func (l *Loop) inspect(ctx context.Context, r *policy.Ruleset) error {
	ctx, cancel := context.WithTimeout(ctx, ObserveLimit)
	defer cancel()
	report, err := l.o.Host.Enforcer.Inspect(ctx, r)
	if err != nil {
		return host.AtStep("inspect", err)
	}
	l.report = report
	return nil
}

// setCurrent makes r the current ruleset, and adds the peers that lose something by that to the
// narrowed ones, whose flows are to be cut. Before the first ruleset these are all peers: flows
// from an earlier helper's time may be running.
func (l *Loop) setCurrent(r *policy.Ruleset) {
	if l.current == nil {
		l.narrowed = allPeers(r)
	} else {
		l.addNarrowed(policy.Diff(l.current, r))
	}
	l.current, l.host = r, r.Host()
}

// addNarrowed merges peers into the narrowed ones, each peer once, so that the list stays bounded
// while cutting fails.
func (l *Loop) addNarrowed(more []policy.Narrowed) {
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

// allPeers returns every peer of r as narrowed: each lost what it has no permission for.
func allPeers(r *policy.Ruleset) []policy.Narrowed {
	var out []policy.Narrowed
	for _, p := range r.Peers() {
		out = append(out, policy.Narrowed{
			PublicKey: p.PublicKey, Name: p.Name, Addresses: p.Addresses.List(),
			Lost: mesh.All &^ p.Permissions,
		})
	}
	return out
}

// cut ends the flows, as far as r doesn't allow them, of the peers that were narrowed since cut
// last succeeded.
func (l *Loop) cut(ctx context.Context, r *policy.Ruleset) error {
	if len(l.narrowed) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, StepLimit)
	defer cancel()
	if err := l.o.Host.Enforcer.Cut(ctx, r, l.narrowed); err != nil {
		return host.AtStep("cut flows", err)
	}
	l.narrowed = nil
	return nil
}

// checkDrift compares what the host enforces with the current ruleset, and repairs differences.
func (l *Loop) checkDrift(ctx context.Context, doc *wanted.Document) error {
	if err := l.inspect(ctx, l.current); err != nil {
		// As in reconcile, a failure to read closes nothing.
		l.addProblem(err)
		l.unobserved = true
		return nil
	}
	drift := l.report.Drift
	if len(drift) == 0 {
		return nil
	}
	// Packets that need the filter wait until it is known to be complete again. While it
	// wasn't, flows that it refuses may have begun.
	l.o.Gate.confine(true)
	l.addNarrowed(allPeers(l.current))
	if err := l.enforce(ctx, l.current, doc); err != nil {
		return err
	}
	l.recordRepairs(drift)
	return nil
}

// recordRepairs counts and records one repair per step: a flushed table is one change by another
// program, however many chains it had.
func (l *Loop) recordRepairs(drift []host.Problem) {
	perStep := map[string]int{}
	for _, p := range drift {
		perStep[p.Step]++
	}
	for _, p := range drift {
		n := perStep[p.Step]
		if n == 0 {
			continue // recorded with the first of its step
		}
		perStep[p.Step] = 0
		message := p.Step + ": " + p.Message
		if n > 1 {
			message += fmt.Sprintf(", and %d more", n-1)
		}
		l.repairs++
		l.o.Record(events.Event{Kind: events.Repair, Message: message})
	}
}

// failClosed closes the host after cause: the guard passes nothing, and the host enforces the
// mesh without any permission. It has its own time limits, as the failed step may have used up
// its own.
func (l *Loop) failClosed(ctx context.Context, doc *wanted.Document, cause error) {
	l.held = 0
	l.addProblem(cause)
	l.o.Gate.set(nil, doc)
	if l.current == nil || l.tunnel == nil {
		return // no rules were ever loaded, or no packet can arrive
	}
	closed, err := l.o.Gate.compile(l.current, policyMesh(doc, l.id, l.tunnel.ListenPort(), false), l.host)
	if err == nil {
		err = l.enforce(ctx, closed, doc)
	}
	if err != nil {
		l.addProblem(host.AtStep("close", err))
	}
}

// policyMesh returns the mesh to compile, with WireGuard's UDP port. Without grants it has all
// peers and no permissions: the mesh of a closed host.
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
