package macos

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// wholeEvery is how long the backend goes without reading back all that it has
// in force, when there is no sign that something of it changed.
const fullReadEvery = 3 * time.Minute

// look is what the backend knows from its last looks at the host. Reading all
// that pf holds takes dozens of processes, so that is done after a change of ours,
// after an event of the routing socket, on a sign, and every [wholeEvery]. In
// between, one process at most gives the signs.
type observations struct {
	// moved is set by Watch when the kernel reported a change.
	hostChanged atomic.Bool
	// unchecked says that Enforce changed something since the last whole look, due
	// that it is time for one, and othersDue that other software's rules have to be
	// looked at.
	enforcedSince, fullDue, foreignDue bool
	// holds says that the packet filter was on, with our token, and called our
	// anchor at the last look.
	inForce bool
	lastFull time.Time // of the last whole look
	fingerprint  fingerprint
	// sharing is for which families others translated at the last whole look.
	sharedForwarding policy.Families
	// resolvers and source6 are facts that take a process to read.
	resolvers []netip.Addr
	source6   netip.Addr
	lasting6  []netip.Addr
	// tentative says that an address of the uplink isn't settled. No event tells when
	// it is, so the next tick looks again.
	tentative bool
	// unseen is why the last look at them failed.
	observeErr error
	// found is what reading back all of ours found, others what other software has.
	lastReport  host.Report
	foreign foreignResult
	ports  ports
	// states is how many states pf holds, of most at most.
	states, most uint64
}

// sign is what a cheap look saw, to compare the next one with.
type fingerprint struct {
	known bool
	// matched is how many packets pf has judged by rules, and evaluated how many of
	// them came to our anchor's first rule.
	matched, evaluated uint64
	since              time.Time // when the packet filter was switched on
	main               string    // digest of the main ruleset as it was last loaded
}

// Watch implements [host.Observer].
func (b *Backend) Watch(ctx context.Context, changed func()) error {
	return darwin.NewWatcher(darwin.WatcherOptions{Kernel: b.o.Kernel, Log: b.o.Log}).Run(ctx, func() {
		b.hostChanged.Store(true)
		changed()
	})
}

// Observe implements [host.Observer].
func (b *Backend) Observe(ctx context.Context) (policy.Host, error) {
	n, err := darwin.Observe(b.o.Kernel)
	if err != nil {
		return policy.Host{}, observing(err)
	}
	moved := b.hostChanged.Swap(false)
	if moved || b.lastFull.IsZero() || b.o.Now().Sub(b.lastFull) >= fullReadEvery {
		b.fullDue, b.foreignDue = true, true
	}
	if moved || b.fullDue || b.tentative {
		// A look that fails closes nothing: what was read last counts until the next.
		if b.observeErr = b.readFacts(ctx, n); b.observeErr != nil {
			b.hostChanged.Store(true)
		}
	}
	b.observePorts()
	found, err := b.foundForwarding()
	if err != nil {
		return policy.Host{}, observing(err)
	}
	h := facts(n, b.name, found)
	h.Resolvers = b.resolvers
	if as := addresses(h, h.Uplink4, pfconf.Inet); len(as) > 0 {
		h.Source4 = as[0]
	}
	if slices.Contains(addresses(h, h.Uplink6, pfconf.Inet6), b.source6) {
		h.Source6 = b.source6
	}
	// The kernel has neither temporary nor tentative addresses of IPv4.
	h.Lasting = addresses(h, h.Uplink4, pfconf.Inet)
	for _, a := range b.lasting6 {
		if slices.Contains(addresses(h, h.Uplink6, pfconf.Inet6), a) {
			h.Lasting = append(h.Lasting, a)
		}
	}
	return h, nil
}

func observing(err error) error { return fmt.Errorf("observe host: %w", err) }

// readFacts reads what takes a process.
func (b *Backend) readFacts(ctx context.Context, n *darwin.Network) error {
	resolvers, err := darwin.Resolvers(ctx, b.o.Runner)
	if err == nil {
		b.resolvers = resolvers
	}
	lasting, sourceErr := b.readLasting6(ctx, n)
	if sourceErr == nil {
		b.source6, b.lasting6 = netip.Addr{}, lasting
		if len(lasting) > 0 {
			b.source6 = lasting[0]
		}
	}
	err = errors.Join(err, sourceErr)
	if b.j.Forwarding != (policy.Families{}) {
		shared, sharedErr := b.shared(ctx)
		if sharedErr == nil {
			b.sharedForwarding = shared
		}
		err = errors.Join(err, sharedErr)
	}
	return err
}

// readLasting6 returns the IPv6 addresses of the uplink that are permanent and
// preferred, global ones before unique local ones: temporary and deprecated ones go
// away by themselves. With the first, peers' IPv6 packets leave, and others may be told
// to reach this host by any of them.
func (b *Backend) readLasting6(ctx context.Context, n *darwin.Network) ([]netip.Addr, error) {
	b.tentative = false
	uplink, _ := n.Uplink(darwin.IPv6, b.name)
	if uplink == nil {
		return nil, nil
	}
	all, err := b.ifconfig.Addresses6(ctx, uplink.Name)
	if err != nil {
		return nil, err
	}
	b.tentative = slices.ContainsFunc(all, func(a darwin.Address6) bool { return a.Flags&darwin.AddressTentative != 0 })
	usable := slices.DeleteFunc(all, func(a darwin.Address6) bool { return !a.IsSettled() })
	slices.SortStableFunc(usable, func(a, b darwin.Address6) int { return cmp.Compare(uniqueLocal(a), uniqueLocal(b)) })
	var out []netip.Addr
	for _, a := range usable {
		out = append(out, a.Prefix.Addr())
	}
	return out, nil
}

// uniqueLocal ranks unique local addresses behind global ones.
func uniqueLocal(a darwin.Address6) int {
	if a.Prefix.Addr().IsPrivate() {
		return 1
	}
	return 0
}

// foundForwarding says for which families the host forwards without us: the
// journal tells which we switched on.
func (b *Backend) foundForwarding() (policy.Families, error) {
	now, err := b.forwarding()
	ours := b.j.Forwarding
	return policy.Families{
		IPv4: now.IPv4 && (!ours.IPv4 || b.sharedForwarding.IPv4),
		IPv6: now.IPv6 && (!ours.IPv6 || b.sharedForwarding.IPv6),
	}, err
}

// sharingLimit bounds how long leaving waits for pf to tell whether others need
// forwarding.
const sharingLimit = 2 * time.Second

// sharedAtEnd says for which families others translate. Closing and leaving don't depend on
// it: where pf doesn't tell in time, what was seen last counts.
func (b *Backend) sharedAtEnd(ctx context.Context) policy.Families {
	if b.j.Forwarding == (policy.Families{}) {
		return policy.Families{}
	}
	limit, cancel := context.WithTimeout(ctx, sharingLimit)
	defer cancel()
	if shared, err := b.shared(limit); err == nil {
		b.sharedForwarding = shared
	}
	return b.sharedForwarding
}

// changed reports whether the packet filter gives a sign that it no longer holds
// what we put there, by one process: the anchor's rules with their counters, and
// the packet filter's state.
//
// That the main ruleset still calls the anchor shows in the counters: pf counts the
// packets that it judges by rules (match), and each that comes to our anchor is
// judged by its first rule, whatever becomes of it (pf_test_rule in xnu
// bsd/net/pf.c). When there were some and none came to ours, it is called no more,
// or another product's quick rule ahead of it decides about all. While there were none,
// none passed.
func (b *Backend) changed(ctx context.Context) bool {
	all, err := b.pf.All(ctx, b.path)
	if err == nil {
		b.states, b.most = all.Info.States, statesLimit(all.Sections["LIMITS"])
	}
	if err != nil || !all.Info.Enabled || b.driftShown(all) != nil {
		return true
	}
	matched, counted := all.Info.Matched()
	if !counted {
		return true
	}
	now := fingerprint{known: true, since: b.o.Now().Add(-all.Info.For), matched: matched, evaluated: firstEvaluated(all.Rules), main: all.Info.Checksum}
	was := b.fingerprint
	b.fingerprint = now
	switch {
	case !was.known:
		return false
	case now.since.Sub(was.since).Abs() > maxSkew:
		return true // switched off and on: all tokens are void
	case now.main != was.main:
		return true // another main ruleset was loaded, and maybe with it other rules that come before ours
	case now.matched < was.matched || now.evaluated < was.evaluated:
		return true
	}
	return now.matched > was.matched && now.evaluated == was.evaluated
}

// maxSkew is how far the time at which the packet filter was switched on may seem
// to move: pfctl tells it in whole seconds.
const maxSkew = 3 * time.Second

// driftShown compares the anchor as one look showed it.
func (b *Backend) driftShown(all *pfconf.All) error {
	if b.loaded == nil {
		return errors.New("the anchor isn't loaded")
	}
	return b.driftRules(all.Rules, all.NAT)
}

// firstEvaluated returns how many packets were judged by the first filter rule.
func firstEvaluated(rules string) uint64 {
	for _, r := range pfconf.ParseShown(rules).Rules {
		if r.Action == pfconf.Pass || r.Action == pfconf.Block {
			return r.Evaluations
		}
	}
	return 0
}
