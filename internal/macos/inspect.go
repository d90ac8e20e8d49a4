package macos

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/platform"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// Inspect implements the daemon's contract.
func (p *Platform) Inspect(ctx context.Context, r *policy.Ruleset) (platform.Report, error) {
	var report platform.Report
	now, err := p.forwarding(ctx)
	if err != nil {
		return report, named(StepForwarding, err)
	}
	report.Forwarding = now
	n, err := darwin.Observe(p.o.Kernel)
	if err != nil {
		return report, named(StepAddresses, err)
	}
	drift := func(step, message string) {
		report.Drift = append(report.Drift, platform.Problem{Step: step, Message: message, Hint: "the helper repairs it"})
	}
	p.inspectInterface(n, r, drift)
	report.Problems = p.takenRoutes(n, r)
	if !isNeeded(r) {
		if !p.j.isEmpty() {
			drift(StepRestore, "the packet filter or forwarding is still in use")
		}
		return report, nil
	}
	if err := p.inspectFilter(ctx, r, drift); err != nil {
		return report, err
	}
	obstacles, err := p.obstacles(ctx, r)
	if err != nil {
		return report, named(StepAnchor, err)
	}
	// Enforcing again repairs them only by closing, which is what must happen.
	report.Drift = append(report.Drift, obstacles...)
	need := forwardingFor(r)
	for _, f := range []struct {
		family     darwin.Family
		need, isOn bool
	}{{darwin.IPv4, need.IPv4, now.IPv4}, {darwin.IPv6, need.IPv6, now.IPv6}} {
		if f.need && !f.isOn {
			drift(StepForwarding, fmt.Sprintf("forwarding of %v is off", f.family))
		}
	}
	if len(obstacles) > 0 {
		report.Problems = append(report.Problems, obstacles...)
		return report, nil
	}
	report.Problems = append(report.Problems, p.problems(ctx, n, r)...)
	return report, nil
}

// takenRoutes are the peers that can't be reached because somebody else has a
// route to their address.
func (p *Platform) takenRoutes(n *darwin.Network, r *policy.Ruleset) []platform.Problem {
	i := n.Interface(p.name)
	if i == nil {
		return nil
	}
	var out []platform.Problem
	for _, dst := range taken(n, i.Index, peersWith(r, 0, anyFamily)) {
		out = append(out, platform.Problem{
			Step: StepRoutes, Message: fmt.Sprintf("%v, a peer's address, has another route", dst.Addr()),
			Hint: fmt.Sprintf("see who made it: route -n get %v", dst.Addr()),
		})
	}
	return out
}

func (p *Platform) inspectInterface(n *darwin.Network, r *policy.Ruleset, drift func(step, message string)) {
	i := n.Interface(p.name)
	if i == nil {
		drift(StepInterface, fmt.Sprintf("interface %s is gone", p.name))
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

func (p *Platform) inspectFilter(ctx context.Context, r *policy.Ruleset, drift func(step, message string)) error {
	a, err := p.compile(r)
	if err != nil {
		return err
	}
	if p.loaded == nil || p.loaded.text != a.Ruleset().String() {
		drift(StepAnchor, "another ruleset is loaded")
	} else if err := p.driftAnchor(ctx); err != nil {
		drift(StepAnchor, err.Error())
	}
	on, err := p.isOn(ctx)
	if err != nil {
		return named(StepEnable, err)
	}
	if !on {
		drift(StepEnable, "the packet filter is off, or our token for it is void")
	}
	return nil
}

// problems are what others have in the packet filter that stands in our way.
func (p *Platform) problems(ctx context.Context, n *darwin.Network, r *policy.Ruleset) (out []platform.Problem) {
	if p.loaded == nil {
		return nil
	}
	found, err := p.foreign(ctx, n, r)
	if err != nil {
		// Ours is in force all the same.
		return []platform.Problem{{Step: StepAnchor, Message: "the rules of other software can't be judged: " + err.Error(),
			Hint: "look at them: sudo pfctl -s rules; sudo pfctl -s nat"}}
	}
	for _, f := range found[:min(len(found), maxForeign)] {
		hint := "see what software loads it, and whether you want it to"
		if f.Wider {
			hint = "the helper holds it off at the tunnel; for the rest, remove the rule or the software that loads it"
		}
		out = append(out, platform.Problem{Step: StepAnchor, Message: f.String(), Hint: hint})
	}
	return out
}

// maxForeign is how many foreign rules are told of at a time.
const maxForeign = 8

// obstacles are why the anchor can't be in force, although it is loaded: the main
// ruleset doesn't call it, or an interface is skipped. Forwarding must not be on
// then.
func (p *Platform) obstacles(ctx context.Context, r *policy.Ruleset) ([]platform.Problem, error) {
	rules, nat, err := p.show(ctx, "")
	if err != nil {
		return nil, err
	}
	var out []platform.Problem
	for _, hook := range []struct {
		text   string
		action pfconf.Action
	}{{rules, pfconf.Anchor}, {nat, pfconf.NatAnchor}} {
		if !calls(hook.text, hook.action) {
			out = append(out, platform.Problem{
				Step: StepAnchor, Message: fmt.Sprintf("the main ruleset doesn't call %s \"com.apple/*\"", hook.action),
				Hint: "restore /etc/pf.conf as Apple ships it and run: sudo pfctl -f /etc/pf.conf",
			})
		}
	}
	skipped, err := p.pf.Skipped(ctx)
	if err != nil {
		return nil, err
	}
	b := newBuilder(r)
	for _, name := range append(b.egress(), p.name) {
		if slices.Contains(skipped, name) {
			out = append(out, platform.Problem{
				Step: StepAnchor, Message: fmt.Sprintf("the packet filter is told to skip %s", name),
				Hint: "remove `set skip` from the main ruleset, or the software that put it there",
			})
		}
	}
	return out, nil
}

// calls reports whether a list of the main ruleset calls com.apple's children,
// for every packet.
func calls(shown string, action pfconf.Action) bool {
	plain := (&pfconf.Rule{Action: action, Anchor: anchorParent + "*"}).String()
	return slices.ContainsFunc(pfconf.ParseShown(shown).Rules, func(r pfconf.ShownRule) bool {
		return r.Action == action && r.Rule.String() == plain
	})
}

// othersRules is what the others had loaded when it was last looked at.
type othersRules struct {
	key   string
	found []Foreign
}

// foreign says which rules of others win over ours. All that they have loaded is
// read; the probing is done again only if it changed, or our anchor did.
func (p *Platform) foreign(ctx context.Context, n *darwin.Network, r *policy.Ruleset) ([]Foreign, error) {
	var key strings.Builder
	rulesets, err := p.readOthers(ctx, &key)
	if err != nil {
		return nil, err
	}
	key.WriteString(p.loaded.text)
	if p.others.key == key.String() {
		return p.others.found, nil
	}
	m, err := machineWith(n, rulesets)
	if err != nil {
		return nil, err
	}
	if err := m.LoadAnchor(p.path, p.loaded.anchor.Ruleset()); err != nil {
		return nil, err
	}
	found, err := FindForeign(m, p.loaded.anchor, r)
	if err != nil {
		return nil, err
	}
	p.others = othersRules{key.String(), found}
	return found, nil
}

// maxOthers bounds how many anchors of others are read: each takes some runs of
// pfctl.
const maxOthers = 64

// a foreignRuleset is an anchor of others, or the main ruleset.
type foreignRuleset struct {
	path  string
	rules *pfconf.Ruleset
}

// readOthers reads the main ruleset and the anchors below it, ours excepted.
func (p *Platform) readOthers(ctx context.Context, key *strings.Builder) ([]foreignRuleset, error) {
	var out []foreignRuleset
	next := []string{""}
	for len(next) > 0 && len(out) < maxOthers {
		path := next[0]
		next = next[1:]
		rules, nat, err := p.show(ctx, path)
		if err != nil {
			return nil, err
		}
		rs := pfconf.ParseShown(rules).Ruleset(pfconf.ParseShown(nat))
		tables, err := p.readTables(ctx, path)
		if err != nil {
			return nil, err
		}
		rs.Statements = append(tables, rs.Statements...)
		out = append(out, foreignRuleset{path, rs})
		fmt.Fprintf(key, "%s\n%s\n", path, rs)
		children, err := p.pf.Anchors(ctx, path)
		if err != nil {
			return nil, err
		}
		next = append(next, slices.DeleteFunc(children, func(child string) bool { return child == p.path })...)
	}
	return out, nil
}

func (p *Platform) readTables(ctx context.Context, anchor string) ([]pfconf.Statement, error) {
	names, err := p.pf.Tables(ctx, anchor)
	if err != nil {
		return nil, err
	}
	var out []pfconf.Statement
	for _, name := range names {
		t := &pfconf.Table{Name: name, Persist: true, HasAddrs: true}
		if t.Addrs, err = p.pf.Table(ctx, anchor, name); err != nil {
			continue // gone meanwhile
		}
		out = append(out, t)
	}
	return out, nil
}

// machineWith returns a machine with this host's interfaces that holds the
// rulesets.
func machineWith(n *darwin.Network, rulesets []foreignRuleset) (*pfconf.Machine, error) {
	m := pfconf.NewMachine(pfconf.MachineOptions{})
	for _, i := range n.Interfaces {
		one := pfconf.Interface{Name: i.Name}
		for _, a := range i.Addresses {
			one.Addresses = append(one.Addresses, a.Prefix)
		}
		m.AddInterface(one)
	}
	for _, rs := range rulesets {
		load := func() error { return m.LoadAnchor(rs.path, rs.rules) }
		if rs.path == "" {
			load = func() error { return m.LoadMain(rs.rules) }
		}
		if err := load(); err != nil {
			return nil, fmt.Errorf("understand the rules of others: %w", err)
		}
	}
	return m, m.Enable()
}

// Rules returns the text of the loaded rules and the anchor they are in.
func (p *Platform) Rules(ctx context.Context) (anchor, text string, err error) {
	rules, nat, err := p.show(ctx, p.path)
	return p.path, nat + rules, err
}
