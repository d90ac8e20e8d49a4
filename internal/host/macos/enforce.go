package macos

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Enforce implements [host.Enforcer].
func (p *Backend) Enforce(ctx context.Context, r *policy.Ruleset) error {
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
	p.noteCut(r)
	p.unchecked = true
	err = p.setAddresses(ctx, n, r)
	if err == nil {
		err = p.setRoutes(n, r)
	}
	if !p.needed(r) {
		return errors.Join(err, p.giveBack(ctx))
	}
	// The rest is done also when that failed: what r takes away must go.
	if err := errors.Join(err, p.enforceFilter(ctx, r)); err != nil {
		return errors.Join(err, p.closeForwarding(ctx))
	}
	if err := p.setForwarding(ctx, n, r); err != nil {
		return errors.Join(err, p.closeForwarding(ctx))
	}
	return nil
}

// closeLimit bounds how long switching forwarding off takes in one family. It is time
// of its own: what failed before may have failed because the time was up.
const closeLimit = 2 * time.Second

// setAddresses gives the mesh interface exactly the host's mesh addresses.
func (p *Backend) setAddresses(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
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
func (p *Backend) setRoutes(n *darwin.Network, r *policy.Ruleset) error {
	want, index := peersWith(r, 0, anyFamily), n.Interface(p.name).Index
	if hasRoutes(n, index, want) {
		return nil
	}
	return p.step(StepRoutes, func() error {
		err := p.router.Set(index, want)
		if errors.Is(err, darwin.ErrRouteTaken) {
			// Nothing leaks by another program's route, for the filter stops it.
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
// as no other program has taken them.
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

// forwardingFor says in which families a ruleset needs forwarding: where a peer
// may reach something.
func forwardingFor(r *policy.Ruleset) policy.Families {
	h := r.Host()
	var routing, lan bool
	for _, p := range r.Peers() {
		routing = routing || p.Permissions.Has(mesh.Routing)
		lan = lan || p.Permissions.Has(mesh.Routing|mesh.LAN)
	}
	return policy.Families{
		IPv4: h.Forwarding.IPv4 && routing && (lan || h.Uplink4 != ""),
		IPv6: h.Forwarding.IPv6 && routing && (lan || h.Uplink6 != ""),
	}
}

// setForwarding switches forwarding on where a ruleset needs it, and off again
// where we switched it on and it no longer is needed. Before it opens anything, it
// looks whether another product's rules let transit through in our anchor's place.
func (p *Backend) setForwarding(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	need := forwardingFor(r)
	now, err := p.forwarding()
	if err != nil {
		return named(StepForwarding, err)
	}
	if opens := need.IPv4 && !now.IPv4 || need.IPv6 && !now.IPv6; opens || len(p.others.open) > 0 {
		if err := p.checkTransit(ctx, n, r); err != nil {
			return err
		}
	}
	return p.switchForwarding(ctx, need, now)
}

// closeForwarding switches forwarding off where we switched it on, and what others
// came to need stays.
func (p *Backend) closeForwarding(ctx context.Context) error {
	return p.switchForwarding(ctx, policy.Families{}, policy.Families{})
}

// switchForwarding makes forwarding, which is as in now, what is needed. What was
// found on stays on, and what others came to need. Nothing is switched on where
// something couldn't be switched off.
func (p *Backend) switchForwarding(ctx context.Context, need, now policy.Families) error {
	ours := p.j.Forwarding
	off := policy.Families{IPv4: ours.IPv4 && !need.IPv4, IPv6: ours.IPv6 && !need.IPv6}
	if off != (policy.Families{}) {
		shared := p.sharedAtEnd(ctx)
		off = policy.Families{IPv4: off.IPv4 && !shared.IPv4, IPv6: off.IPv6 && !shared.IPv6}
		if err := p.restoreForwarding(ctx, off, policy.Families{}); err != nil {
			return err
		}
	}
	if need.IPv4 && !now.IPv4 {
		if err := p.switchOn(ctx, darwin.IPv4, &p.j.Forwarding.IPv4); err != nil {
			return err
		}
	}
	if need.IPv6 && !now.IPv6 {
		return p.switchOn(ctx, darwin.IPv6, &p.j.Forwarding.IPv6)
	}
	return nil
}

func (p *Backend) switchOn(ctx context.Context, f darwin.Family, ours *bool) error {
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
