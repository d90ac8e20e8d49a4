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

// fullReadEvery is the interval at which the backend reads back everything that pf
// holds, when nothing indicates a change.
const fullReadEvery = 3 * time.Minute

// observations is what the backend last read from the host. Reading everything that pf
// holds takes dozens of processes, so that is done after Enforce, after an event of the
// routing socket, when the [fingerprint] changed unexpectedly, and every
// [fullReadEvery]. In between, at most one process per tick reads the fingerprint.
type observations struct {
	// hostChanged is set by Watch when the kernel reported a change, and by Observe
	// when a fact couldn't be read, so that the next tick reads it.
	hostChanged atomic.Bool
	// enforcedSince means that Enforce ran since the last full read, fullDue that one
	// is due, and foreignDue that foreign rules have to be evaluated.
	enforcedSince, fullDue, foreignDue bool
	// inForce means that at the last full read pf was enabled, with our token, and
	// called our anchor.
	inForce     bool
	lastFull    time.Time // when the last full read was
	fingerprint fingerprint
	// sharedForwarding has the families in which other software forwarded when this
	// was last read.
	sharedForwarding policy.Families
	// resolvers, source6 and lasting6 are facts that take a process to read: the
	// configured DNS servers, and [policy.Host.Source6] and the IPv6 part of
	// [policy.Host.Lasting].
	resolvers []netip.Addr
	source6   netip.Addr
	lasting6  []netip.Addr
	// tentative means that duplicate address detection still runs for an address of the
	// uplink. No event reports its end, so the next tick reads the addresses again.
	tentative bool
	// observeErr is why those facts couldn't be read the last time.
	observeErr error
	// lastReport is the result of the last full read.
	lastReport host.Report
	foreign    foreignResult
	ports      ports
	// states is how many states pf held, and most its limit; 0 if not read yet.
	states, most uint64
}

// A fingerprint has counters and digests that one run of pfctl shows, by which a change
// of what pf holds is recognised.
type fingerprint struct {
	known bool // false until the first read after a full one
	// matched counts the packets that pf evaluated rules for (match of pfctl -s info),
	// evaluated the evaluations of our anchor's first filter rule.
	matched, evaluated uint64
	since              time.Time // when pf was enabled, in whole seconds
	main               string    // checksum of the main ruleset when it was loaded
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
		// A failed read must not close anything: the last facts hold until the next.
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
	// IPv4 has neither temporary nor tentative addresses.
	h.Lasting = addresses(h, h.Uplink4, pfconf.Inet)
	for _, a := range b.lasting6 {
		if slices.Contains(addresses(h, h.Uplink6, pfconf.Inet6), a) {
			h.Lasting = append(h.Lasting, a)
		}
	}
	return h, nil
}

// observing wraps an error of Observe.
func observing(err error) error { return fmt.Errorf("observe host: %w", err) }

// readFacts reads the facts that take a process. It keeps the last value of those that
// it can't read.
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

// readLasting6 returns the uplink's IPv6 addresses that are neither temporary (RFC
// 8981), deprecated nor tentative, global ones before unique local ones. Peers' IPv6
// packets are translated to the first. All of them are good for telling others how to
// reach this host, as temporary addresses expire within days.
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

// uniqueLocal returns 1 for a unique local address (RFC 4193) and 0 otherwise, to sort
// by.
func uniqueLocal(a darwin.Address6) int {
	if a.Prefix.Addr().IsPrivate() {
		return 1
	}
	return 0
}

// foundForwarding returns the families in which the host forwards independently of us:
// forwarding is enabled, and either the journal doesn't say that we did it, or other
// software now needs it too.
func (b *Backend) foundForwarding() (policy.Families, error) {
	now, err := b.forwarding()
	ours := b.j.Forwarding
	return policy.Families{
		IPv4: now.IPv4 && (!ours.IPv4 || b.sharedForwarding.IPv4),
		IPv6: now.IPv6 && (!ours.IPv6 || b.sharedForwarding.IPv6),
	}, err
}

// sharingLimit bounds how long disabling forwarding waits for pfctl to show whether
// other software needs it.
const sharingLimit = 2 * time.Second

// sharedAtEnd returns the families in which other software translates, before
// forwarding is disabled. If pfctl doesn't answer in time the last value counts:
// disabling must not depend on it.
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

// changed reports whether pf may no longer hold or evaluate what we loaded. It runs one
// pfctl process, which shows the anchor's rules with their counters and pf's status, and
// compares them with the last fingerprint.
//
// The counters show whether the main ruleset still calls the anchor. pf counts every
// packet that it evaluates rules for (match), and a packet that reaches our anchor
// evaluates its first rule, whether that matches or not (pf_test_rule in xnu
// bsd/net/pf.c). If match grew and the evaluations of the first rule didn't, either
// the anchor is no longer called or a foreign quick rule before it decides about every
// packet. If match didn't grow, no new flow passed.
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
		return true // pf was disabled and enabled, which invalidated all tokens
	case now.main != was.main:
		return true // another main ruleset was loaded, perhaps with rules before ours
	case now.matched < was.matched || now.evaluated < was.evaluated:
		return true
	}
	return now.matched > was.matched && now.evaluated == was.evaluated
}

// maxSkew is how far the computed time at which pf was enabled may move without a
// change: pfctl shows how long ago that was in whole seconds, and takes time itself.
const maxSkew = 3 * time.Second

// driftShown compares the anchor as pfctl -s all showed it.
func (b *Backend) driftShown(all *pfconf.All) error {
	if b.loaded == nil {
		return errors.New("the anchor isn't loaded")
	}
	return b.driftRules(all.Rules, all.NAT)
}

// firstEvaluated returns the evaluations of the first filter rule, 0 if there is none.
func firstEvaluated(rules string) uint64 {
	for _, r := range pfconf.ParseShown(rules).Rules {
		if r.Action == pfconf.Pass || r.Action == pfconf.Block {
			return r.Evaluations
		}
	}
	return 0
}
