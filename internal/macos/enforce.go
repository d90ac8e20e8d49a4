package macos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/platform"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// loadedAnchor is what we have put in force.
type loadedAnchor struct {
	anchor *Anchor
	text   string
	// rules and nat are what pfctl printed of it right after loading. It prints
	// rules in its own way, so that drift shows only against that.
	rules, nat string
}

// Enforce implements the daemon's contract.
func (p *Platform) Enforce(ctx context.Context, r *policy.Ruleset) error {
	if p.dev == nil {
		return errors.New("enforce ruleset: the mesh interface isn't open")
	}
	if got := r.Host().Interface; got != p.name {
		return fmt.Errorf("enforce ruleset: it is for interface %q, the mesh has %q", got, p.name)
	}
	n, err := darwin.Observe(p.o.Kernel)
	if err != nil {
		return fmt.Errorf("enforce ruleset: %w", err)
	}
	p.bury(r)
	err = p.setAddresses(ctx, n, r)
	if err == nil {
		err = p.setRoutes(n, r)
	}
	if !isNeeded(r) {
		return errors.Join(err, p.giveBack(ctx))
	}
	// The rest is done also when that failed: what r takes away must go.
	if err := errors.Join(err, p.enforceFilter(ctx, r)); err != nil {
		return errors.Join(err, p.setForwarding(ctx, policy.Families{}))
	}
	return p.setForwarding(ctx, forwardingFor(r))
}

// setAddresses gives the mesh interface exactly the host's mesh addresses.
func (p *Platform) setAddresses(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	i := n.Interface(p.name)
	if i == nil {
		return named(StepAddresses, fmt.Errorf("interface %s is gone", p.name))
	}
	want := hostPrefixes(r.Mesh().Addresses)
	var have []netip.Prefix
	for _, a := range i.Addresses {
		if !a.Prefix.Addr().IsLinkLocalUnicast() {
			have = append(have, a.Prefix)
		}
	}
	add, remove := missing(want, have), missing(have, want)
	if len(add)+len(remove) == 0 {
		return nil
	}
	return p.step(StepAddresses, func() error {
		for _, a := range remove {
			if err := p.ifconfig.RemoveAddress(ctx, p.name, a.Addr()); err != nil {
				return err
			}
		}
		for _, a := range add {
			if err := p.ifconfig.AddAddress(ctx, p.name, a.Addr()); err != nil {
				return err
			}
		}
		return nil
	})
}

// setRoutes makes a host route per peer, and no other, by the mesh interface.
func (p *Platform) setRoutes(n *darwin.Network, r *policy.Ruleset) error {
	want, index := peersWith(r, 0, anyFamily), n.Interface(p.name).Index
	if hasRoutes(n, index, want) {
		return nil
	}
	return p.step(StepRoutes, func() error {
		err := p.router.Set(index, want)
		if errors.Is(err, darwin.ErrRouteTaken) {
			// Nothing leaks by somebody else's route, for the filter stops it.
			// Inspect tells of it.
			p.o.Log.Warn("a peer's address has another route", "error", err)
			return nil
		}
		return err
	})
}

// taken returns which destinations have a route by another interface.
func taken(n *darwin.Network, index int, want []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range n.Routes {
		if r.Index != index && r.Flags&darwin.RouteScoped == 0 && slices.Contains(want, r.Dst) {
			out = append(out, r.Dst)
		}
	}
	return out
}

// hasRoutes reports whether our routes by an interface are exactly those, as far
// as nobody else has taken them.
func hasRoutes(n *darwin.Network, index int, want []netip.Prefix) bool {
	want = missing(want, taken(n, index, want))
	var have []netip.Prefix
	for _, r := range n.Routes {
		if r.Index == index && r.Flags&darwin.RouteProto1 != 0 {
			have = append(have, r.Dst)
		}
	}
	return slices.Equal(sorted(have), want)
}

// enforceFilter puts the anchor in force: loaded, the packet filter on, and
// called by the main ruleset.
func (p *Platform) enforceFilter(ctx context.Context, r *policy.Ruleset) error {
	a, err := p.compile(r)
	if err != nil {
		return err
	}
	text := a.Ruleset().String()
	if p.loaded == nil || p.loaded.text != text || p.driftAnchor(ctx) != nil {
		if err := p.load(ctx, a, text); err != nil {
			return err
		}
	}
	on, err := p.isOn(ctx)
	if err == nil && !on {
		err = p.enable(ctx)
	}
	if err != nil {
		return named(StepEnable, err)
	}
	obstacles, err := p.obstacles(ctx, r)
	if err != nil {
		return named(StepAnchor, err)
	}
	if len(obstacles) > 0 {
		return &platform.StepError{Step: StepAnchor, Hint: obstacles[0].Hint, Err: errors.New(obstacles[0].Message)}
	}
	return nil
}

// deadTime is how long a cut connection stays dead: as long as pf keeps an
// established one of TCP (PFTM_TCP_ESTABLISHED_VAL in xnu bsd/net/pfvar.h).
const deadTime = 24 * time.Hour

// bury notes who lost incoming since the ruleset before, and forgets whose time is
// up.
func (p *Platform) bury(r *policy.Ruleset) {
	now := p.o.Now()
	maps.DeleteFunc(p.dead, func(_ netip.Addr, until time.Time) bool { return !now.Before(until) })
	for _, n := range policy.Diff(p.enforced, r) {
		if n.Lost.Has(policy.Incoming) {
			for _, a := range n.Addresses {
				p.dead[a] = now.Add(deadTime)
			}
		}
	}
	p.enforced = r
}

func (p *Platform) compile(r *policy.Ruleset) (*Anchor, error) {
	return Compile(r, Options{Label: p.o.Label, MTU: p.cfg.MTU, Cut: slices.Collect(maps.Keys(p.dead))})
}

// maxBusy is how often a load is tried while pfctl finds a table in use.
const maxBusy = 5

// load loads the anchor in one transaction, reads it back, and checks that it is
// all there.
func (p *Platform) load(ctx context.Context, a *Anchor, text string) error {
	if p.j.Anchor != a.Path {
		err := p.step(StepJournal, func() error {
			p.j.Anchor = a.Path
			return p.j.write(p.o.StateDir)
		})
		if err != nil {
			return err
		}
	}
	return p.step(StepAnchor, func() error {
		p.loaded = nil
		err := p.pf.Load(ctx, a.Path, text)
		for range maxBusy {
			if !errors.Is(err, darwin.ErrBusy) {
				break
			}
			err = p.pf.Load(ctx, a.Path, text)
		}
		if err != nil {
			return err
		}
		l := &loadedAnchor{anchor: a, text: text}
		if l.rules, l.nat, err = p.show(ctx, a.Path); err != nil {
			return err
		}
		if err := l.verify(); err != nil {
			return err
		}
		p.loaded = l
		return nil
	})
}

func (p *Platform) show(ctx context.Context, anchor string) (rules, nat string, err error) {
	if rules, err = p.pf.Rules(ctx, anchor); err == nil {
		nat, err = p.pf.NAT(ctx, anchor)
	}
	return rules, nat, err
}

// verify checks that pfctl shows as many rules as were loaded, with the labels in
// the same order.
func (l *loadedAnchor) verify() error {
	want, err := l.anchor.Ruleset().Expand(l.anchor.Path, nil)
	if err != nil {
		return err
	}
	for _, s := range []struct {
		what  string
		want  []string
		shown string
	}{{"filter", want.ShowRules(), l.rules}, {"translation", want.ShowNat(), l.nat}} {
		got := strings.Split(strings.TrimSpace(s.shown), "\n")
		if len(got) != len(s.want) {
			return fmt.Errorf("%d %s rules are loaded instead of %d", len(got), s.what, len(s.want))
		}
		for i := range got {
			if labelOf(got[i]) != labelOf(s.want[i]) {
				return fmt.Errorf("%s rule %d is `%s` instead of `%s`", s.what, i, got[i], s.want[i])
			}
		}
	}
	return nil
}

// labelOf returns the label in a rule's text, "" without one.
func labelOf(rule string) string {
	_, rest, _ := strings.Cut(rule, `label "`)
	label, _, _ := strings.Cut(rest, `"`)
	return label
}

// driftAnchor says how what is loaded differs from what we loaded; nil: not at
// all.
func (p *Platform) driftAnchor(ctx context.Context) error {
	rules, nat, err := p.show(ctx, p.path)
	switch {
	case err != nil:
		return err
	case rules == "" && nat == "":
		return errors.New("the anchor is empty")
	case rules != p.loaded.rules:
		return errors.New("the anchor's filter rules were changed")
	case nat != p.loaded.nat:
		return errors.New("the anchor's translation rules were changed")
	}
	return p.driftTables(ctx)
}

// driftTables compares the tables' contents, which rules don't show.
func (p *Platform) driftTables(ctx context.Context) error {
	for _, l := range p.loaded.anchor.Lines {
		want, ok := l.Statement.(*pfconf.Table)
		if !ok {
			continue
		}
		got, err := p.pf.Table(ctx, p.path, want.Name)
		if err != nil {
			return err
		}
		if !slices.Equal((&pfconf.Table{Addrs: got}).Entries(), want.Entries()) {
			return fmt.Errorf("the table <%s> was changed", want.Name)
		}
	}
	return nil
}

// isOn reports whether the packet filter is on and our token keeps it so.
func (p *Platform) isOn(ctx context.Context) (bool, error) {
	info, err := p.pf.Info(ctx)
	if err != nil {
		return false, err
	}
	tokens, err := p.tokens(ctx)
	return info.Enabled && p.j.Token != 0 && slices.Contains(tokens, p.j.Token), err
}

// enable takes a token. Which others there are is written down first, so that one
// that we don't live to write down can be told.
func (p *Platform) enable(ctx context.Context) error {
	return p.step(StepEnable, func() (err error) {
		if p.j.Others, err = p.tokens(ctx); err != nil {
			return err
		}
		p.j.Token, p.j.Enabling = 0, true
		if err := p.j.write(p.o.StateDir); err != nil {
			return err
		}
		token, err := p.pf.Enable(ctx)
		if err != nil {
			return err
		}
		p.j.Token, p.j.Enabling, p.j.Others = uint64(token), false, nil
		return p.j.write(p.o.StateDir)
	})
}

// forwardingFor says in which families a ruleset needs forwarding: where a peer
// may reach something.
func forwardingFor(r *policy.Ruleset) policy.Families {
	h := r.Host()
	var routing, lan bool
	for _, p := range r.Peers() {
		routing = routing || p.Permissions.Has(policy.Routing)
		lan = lan || p.Permissions.Has(policy.Routing|policy.LAN)
	}
	return policy.Families{
		IPv4: h.Forwarding.IPv4 && routing && (lan || h.Uplink4 != ""),
		IPv6: h.Forwarding.IPv6 && routing && (lan || h.Uplink6 != ""),
	}
}

// setForwarding switches forwarding on where it is needed and off again where we
// switched it on and it no longer is. What was found on stays on.
func (p *Platform) setForwarding(ctx context.Context, need policy.Families) error {
	now, err := p.forwarding(ctx)
	if err != nil {
		return named(StepForwarding, err)
	}
	var shared policy.Families
	if p.j.Forwarding != (policy.Families{}) {
		if shared, err = p.shared(ctx); err != nil {
			return named(StepForwarding, err)
		}
	}
	for _, f := range []struct {
		family    darwin.Family
		need, now bool
		ours      *bool
		shared    bool
	}{
		{darwin.IPv4, need.IPv4, now.IPv4, &p.j.Forwarding.IPv4, shared.IPv4},
		{darwin.IPv6, need.IPv6, now.IPv6, &p.j.Forwarding.IPv6, shared.IPv6},
	} {
		switch {
		case f.need && !f.now:
			err = p.switchOn(ctx, f.family, f.ours)
		case !f.need && *f.ours && f.now && !f.shared:
			err = p.switchOff(ctx, f.family, f.ours)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *Platform) switchOn(ctx context.Context, f darwin.Family, ours *bool) error {
	if !*ours {
		err := p.step(StepJournal, func() error {
			*ours = true
			return p.j.write(p.o.StateDir)
		})
		if err != nil {
			return err
		}
	}
	return p.step(StepForwarding, func() error { return p.sysctl.SetForwarding(ctx, f, true) })
}

func (p *Platform) switchOff(ctx context.Context, f darwin.Family, ours *bool) error {
	return p.step(StepRestore, func() error {
		if err := p.sysctl.SetForwarding(ctx, f, false); err != nil {
			return err
		}
		*ours = false
		return p.j.write(p.o.StateDir)
	})
}
