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

// Enforce implements [host.Enforcer]. The order is that of [Steps]: forwarding is
// enabled last, after the anchor was read back, and disabled when any step fails.
func (b *Backend) Enforce(ctx context.Context, r *policy.Ruleset) error {
	if b.dev == nil {
		return errors.New("enforce ruleset: the mesh interface isn't open")
	}
	if got := r.Host().Interface; got != b.name {
		return fmt.Errorf("enforce ruleset: it is for interface %q, the mesh has %q", got, b.name)
	}
	n, err := darwin.Observe(b.o.Kernel)
	if err != nil {
		return fmt.Errorf("enforce ruleset: %w", err)
	}
	b.recordCuts(r)
	b.enforcedSince = true
	err = b.setAddresses(ctx, n, r)
	if err == nil {
		err = b.setRoutes(n, r)
	}
	if !b.needed(r) {
		return errors.Join(err, b.restore(ctx))
	}
	// The filter is changed even if that failed: what r revokes must not wait.
	if err := errors.Join(err, b.enforceFilter(ctx, r)); err != nil {
		return errors.Join(err, b.disableForwarding(ctx))
	}
	if err := b.setForwarding(ctx, n, r); err != nil {
		return errors.Join(err, b.disableForwarding(ctx))
	}
	return nil
}

// closeLimit bounds how long disabling forwarding takes in one family. It is separate
// from the caller's time limit, because the step before may have failed by using that up.
const closeLimit = 2 * time.Second

// setAddresses gives the mesh interface exactly the host's mesh addresses, besides
// link-local ones, which are the kernel's.
func (b *Backend) setAddresses(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	i := n.Interface(b.name)
	if i == nil {
		return asStepError(StepAddresses, fmt.Errorf("interface %s is gone", b.name))
	}
	want := hostPrefixes(r.Mesh().Addresses)
	var have []netip.Prefix
	for _, a := range i.Addresses {
		if !a.Prefix.Addr().IsLinkLocalUnicast() {
			have = append(have, a.Prefix)
		}
	}
	add, remove := subtract(want, have), subtract(have, want)
	if len(add)+len(remove) == 0 {
		return nil
	}
	return b.step(StepAddresses, func() error {
		for _, a := range remove {
			if err := b.ifconfig.RemoveAddress(ctx, b.name, a.Addr()); err != nil {
				return err
			}
		}
		for _, a := range add {
			if err := b.ifconfig.AddAddress(ctx, b.name, a.Addr()); err != nil {
				return err
			}
		}
		return nil
	})
}

// setRoutes makes the mesh interface have one host route for each address of a peer,
// and no other.
func (b *Backend) setRoutes(n *darwin.Network, r *policy.Ruleset) error {
	want, index := peersWith(r, 0, anyFamily), n.Interface(b.name).Index
	if hasRoutes(n, index, want) {
		return nil
	}
	return b.step(StepRoutes, func() error {
		err := b.router.Set(index, want)
		if errors.Is(err, darwin.ErrRouteTaken) {
			// Nothing leaks by another program's route, because the anchor blocks a
			// peer's addresses on other interfaces. Inspect reports it.
			b.o.Log.Warn("a peer's address has another route", "error", err)
			return nil
		}
		return err
	})
}

// routesOfOthers returns those of want that have a route by another interface. Routes
// with RTF_IFSCOPE don't count: only sockets bound to an interface use them.
func routesOfOthers(n *darwin.Network, index int, want []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range n.Routes {
		if r.Index != index && r.Flags&darwin.RouteScoped == 0 && slices.Contains(want, r.Dst) {
			out = append(out, r.Dst)
		}
	}
	return out
}

// hasRoutes reports whether our routes by an interface are exactly want, less those
// that another program has. Ours are marked with RTF_PROTO1 (route(8), -proto1).
func hasRoutes(n *darwin.Network, index int, want []netip.Prefix) bool {
	want = subtract(want, routesOfOthers(n, index, want))
	var have []netip.Prefix
	for _, r := range n.Routes {
		if r.Index == index && r.Flags&darwin.RouteProto1 != 0 {
			have = append(have, r.Dst)
		}
	}
	return slices.Equal(sorted(have), want)
}

// forwardingFor returns the families in which a ruleset needs forwarding: those in
// which some peer may reach a destination behind this host.
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

// setForwarding enables forwarding where a ruleset needs it, and disables it where we
// had enabled it and it is no longer needed. Before it enables anything, it checks
// whether rules of other software would pass transit that our anchor blocks.
func (b *Backend) setForwarding(ctx context.Context, n *darwin.Network, r *policy.Ruleset) error {
	need := forwardingFor(r)
	now, err := b.forwarding()
	if err != nil {
		return asStepError(StepForwarding, err)
	}
	if opens := need.IPv4 && !now.IPv4 || need.IPv6 && !now.IPv6; opens || len(b.foreign.open) > 0 {
		if err := b.checkTransit(ctx, n, r); err != nil {
			return err
		}
	}
	return b.switchForwarding(ctx, need, now)
}

// disableForwarding disables forwarding where we enabled it, unless other software now
// needs it.
func (b *Backend) disableForwarding(ctx context.Context) error {
	return b.switchForwarding(ctx, policy.Families{}, policy.Families{})
}

// switchForwarding changes forwarding from now to need. Families that were found
// enabled stay enabled, and those that other software now needs. Nothing is enabled if
// a family couldn't be disabled.
func (b *Backend) switchForwarding(ctx context.Context, need, now policy.Families) error {
	ours := b.j.Forwarding
	off := policy.Families{IPv4: ours.IPv4 && !need.IPv4, IPv6: ours.IPv6 && !need.IPv6}
	if off != (policy.Families{}) {
		shared := b.sharedAtEnd(ctx)
		off = policy.Families{IPv4: off.IPv4 && !shared.IPv4, IPv6: off.IPv6 && !shared.IPv6}
		if err := b.restoreForwarding(ctx, off, policy.Families{}); err != nil {
			return err
		}
	}
	if need.IPv4 && !now.IPv4 {
		if err := b.enableForwarding(ctx, darwin.IPv4, &b.j.Forwarding.IPv4); err != nil {
			return err
		}
	}
	if need.IPv6 && !now.IPv6 {
		return b.enableForwarding(ctx, darwin.IPv6, &b.j.Forwarding.IPv6)
	}
	return nil
}

// enableForwarding enables forwarding in one family; ours is its field of the journal,
// which is on disk before. An int32 sysctl: net.inet.ip.forwarding (xnu
// bsd/netinet/ip_input.c) or net.inet6.ip6.forwarding (bsd/netinet6/in6_proto.c).
func (b *Backend) enableForwarding(ctx context.Context, f darwin.Family, ours *bool) error {
	if !*ours {
		err := b.step(StepJournal, func() error {
			*ours = true
			return b.j.write(b.o.StateDir)
		})
		if err != nil {
			return err
		}
	}
	return b.step(StepForwarding, func() error { return b.sysctl.SetForwarding(ctx, f, true) })
}
