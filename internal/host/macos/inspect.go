package macos

import (
	"context"
	"fmt"
	"slices"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// Inspect implements [host.Enforcer]. Interfaces, routes and sysctls, which take no
// process to read, are compared each time. What pf holds is read back completely when
// there is a reason (see [observations]); otherwise one process looks for a change.
func (b *Backend) Inspect(ctx context.Context, r *policy.Ruleset) (host.Report, error) {
	var report host.Report
	now, err := b.forwarding()
	if err != nil {
		return report, asStepError(StepForwarding, err)
	}
	report.Forwarding = now
	n, err := darwin.Observe(b.o.Kernel)
	if err != nil {
		return report, asStepError(StepAddresses, err)
	}
	drift := func(step, message string) {
		report.Drift = append(report.Drift, host.Problem{Step: step, Message: message, Hint: "the helper repairs it"})
	}
	b.inspectInterface(n, r, drift)
	report.Problems = b.routeProblems(n, r)
	if b.observeErr != nil {
		report.Problems = append(report.Problems, host.Problem{
			Step: "observe host", Message: "not all of it can be read: " + b.observeErr.Error(), Hint: "the helper uses the last ones that it read, and tries again",
		})
	}
	if !b.enforcedSince {
		b.cuts.save(saveLimit)
	}
	report.Problems = append(report.Problems, b.cutProblems()...)
	if !b.needed(r) {
		b.enforcedSince, b.fullDue, b.lastFull = false, false, b.o.Now()
		if !b.j.IsEmpty() {
			drift(StepRestore, "the packet filter or forwarding is still in use")
		}
		report.Unexamined = b.unexamined()
		return report, nil
	}
	a, err := b.compile(r)
	if err != nil {
		return report, err
	}
	if b.loaded == nil || b.loaded.anchor.text() != a.text() {
		drift(StepAnchor, "another ruleset is loaded")
	}
	need := forwardingFor(r)
	for _, f := range []struct {
		family     darwin.Family
		need, isOn bool
	}{{darwin.IPv4, need.IPv4, now.IPv4}, {darwin.IPv6, need.IPv6, now.IPv6}} {
		if f.need && !f.isOn {
			drift(StepForwarding, fmt.Sprintf("forwarding of %v is off", f.family))
		}
	}
	ours, whole := b.enforcedSince, b.enforcedSince || b.fullDue || !b.inForce || b.changed(ctx)
	if whole {
		if err := b.inspectFilter(ctx, r); err != nil {
			return report, err
		}
	}
	if !ours && (whole || b.foreignDue) {
		// Not right after Enforce: a change that narrows must not wait for the
		// evaluation of foreign rules.
		b.inspectUnwantedStates(ctx, r, drift)
		b.inspectForeign(ctx, n, r)
	}
	report.Unexamined = b.unexamined()
	report.Drift = append(append(report.Drift, b.lastReport.Drift...), b.foreign.open...)
	report.Problems = slices.Concat(report.Problems, b.portProblems(), b.tokenProblems(), b.stateProblems(), b.stateLimitProblems(), b.lastReport.Problems, b.foreign.problems)
	return report, nil
}

// routeProblems reports peers that can't be reached because another program has a route
// to their address.
func (b *Backend) routeProblems(n *darwin.Network, r *policy.Ruleset) []host.Problem {
	i := n.Interface(b.name)
	if i == nil {
		return nil
	}
	var out []host.Problem
	for _, dst := range routesOfOthers(n, i.Index, peersWith(r, 0, anyFamily)) {
		out = append(out, host.Problem{
			Step: StepRoutes, Message: fmt.Sprintf("%v, a peer's address, has another route", dst.Addr()),
			Hint: fmt.Sprintf("see what made it: route -n get %v", dst.Addr()),
		})
	}
	return out
}

// inspectInterface compares the mesh interface, its addresses and its routes.
func (b *Backend) inspectInterface(n *darwin.Network, r *policy.Ruleset, drift func(step, message string)) {
	i := n.Interface(b.name)
	if i == nil {
		drift(StepInterface, fmt.Sprintf("interface %s is gone", b.name))
		return
	}
	for _, want := range hostPrefixes(r.Mesh().Addresses) {
		if !slices.ContainsFunc(i.Addresses, func(a darwin.Address) bool { return a.Prefix == want }) {
			drift(StepAddresses, fmt.Sprintf("address %v is missing", want.Addr()))
		}
	}
	if !hasRoutes(n, i.Index, peersWith(r, 0, anyFamily)) {
		drift(StepRoutes, "the peers' routes were changed")
	}
}

// inspectFilter reads back everything that pf holds of ours, and whether pf is enabled
// and evaluates it. The result goes to lastReport.
func (b *Backend) inspectFilter(ctx context.Context, r *policy.Ruleset) error {
	b.inForce, b.lastReport = false, host.Report{}
	drift := func(step, message string) {
		b.lastReport.Drift = append(b.lastReport.Drift, host.Problem{Step: step, Message: message, Hint: "the helper repairs it"})
	}
	if b.loaded != nil {
		if err := b.driftAnchor(ctx); err != nil {
			b.drifted = true
			drift(StepAnchor, err.Error())
		}
	}
	on, err := b.isOn(ctx)
	if err != nil {
		return asStepError(StepEnable, err)
	}
	if !on {
		drift(StepEnable, "the packet filter is off, or our token for it is void")
	}
	obstacles, err := b.obstacles(ctx)
	if err != nil {
		return asStepError(StepAnchor, err)
	}
	// Enforcing again can't remove obstacles, but it fails on them and so disables
	// forwarding.
	b.lastReport.Drift = append(b.lastReport.Drift, obstacles...)
	b.lastReport.Problems = obstacles
	b.inForce = len(b.lastReport.Drift) == 0
	b.enforcedSince, b.fullDue, b.lastFull, b.fingerprint = false, false, b.o.Now(), fingerprint{}
	return nil
}

// obstacles returns why the anchor isn't in force although it is loaded: the main
// ruleset doesn't call it (after pfctl -F all, or with another /etc/pf.conf), or pf
// skips an interface, on which then nothing is filtered or translated (PFI_IFLAG_SKIP
// in xnu bsd/net/pf.c). Forwarding must be disabled then.
func (b *Backend) obstacles(ctx context.Context) ([]host.Problem, error) {
	rules, nat, err := b.showAnchor(ctx, "")
	if err != nil {
		return nil, err
	}
	var out []host.Problem
	for _, hook := range []struct {
		text   string
		action pfconf.Action
	}{{rules, pfconf.Anchor}, {nat, pfconf.NatAnchor}} {
		called, message := false, fmt.Sprintf("the main ruleset doesn't call %s \"com.apple/*\"", hook.action)
		if err := b.withRecover(func() error { called = calls(hook.text, hook.action); return nil }); err != nil {
			message = fmt.Sprintf("whether the main ruleset calls %s \"com.apple/*\" isn't known: %v", hook.action, err)
		}
		if !called {
			out = append(out, host.Problem{
				Step: StepAnchor, Kind: host.KindOtherFilters, Message: message,
				Hint: "restore /etc/pf.conf as Apple ships it and run: sudo pfctl -f /etc/pf.conf",
			})
		}
	}
	skipped, err := b.pf.Skipped(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range skipped {
		if name == loopback {
			continue // no rule of ours relies on it, and vmnet leaves it skipped
		}
		out = append(out, host.Problem{
			Step: StepAnchor, Kind: host.KindOtherFilters, Message: fmt.Sprintf("the packet filter is told to skip %s", name),
			Hint: "remove `set skip` from the main ruleset, or the software that put it there",
		})
	}
	return out, nil
}

// calls reports whether the main ruleset, as pfctl shows it, calls com.apple's children
// for every packet: a call with conditions, such as an interface, doesn't count.
func calls(shown string, action pfconf.Action) bool {
	plain := (&pfconf.Rule{Action: action, Anchor: anchorParent + "*"}).String()
	return slices.ContainsFunc(pfconf.ParseShown(shown).Rules, func(r pfconf.ShownRule) bool {
		return r.Action == action && r.Rule.String() == plain
	})
}

// Rules returns the text of the loaded rules and the anchor they are in.
func (b *Backend) Rules(ctx context.Context) (anchor, text string, err error) {
	rules, nat, err := b.showAnchor(ctx, b.path)
	return b.path, nat + rules, err
}
