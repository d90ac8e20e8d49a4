package reconcile

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// open creates the mesh interface, the guard and the tunnel, one on top of the other, unless
// there is a tunnel. Nothing passes the guard until the gate gives it a ruleset. After a failure
// with opened set, the host must be put back (leave).
func (l *Loop) open(ctx context.Context) error {
	if l.tunnel != nil {
		return nil
	}
	limit, cancel := context.WithTimeout(ctx, StepLimit)
	defer cancel()
	dev, err := l.o.Host.Link.Open(limit, host.Interface{
		Name: l.o.Interface, MTU: l.o.MTU, Addresses: l.id.Own.List(), Prefixes: l.id.List(),
	})
	if err != nil {
		return host.AtStep(stepOpen, err)
	}
	l.opened = true
	name, err := dev.Name()
	if err != nil {
		return errors.Join(host.AtStep(stepOpen, err), dev.Close())
	}
	l.limits = l.o.Host.Enforcer.Limits()
	l.guard = guard.New(dev, guard.Options{ // nothing passes yet
		Own: l.id.Own.List(), States: l.limits.States, PerForwarded: l.limits.PerForwarded,
		Reassembly: l.limits.Reassembly, ClearDF: l.limits.DropsDF,
		Clock: l.o.Wanted.Now,
	})
	l.o.Gate.setGuard(l.guard)
	tunnel, err := l.o.NewTunnel(l.guard, l.o.Wanted.Key(), l.port())
	if err != nil {
		return host.AtStep(stepTunnel, err) // NewTunnel closed dev
	}
	l.tunnel, l.iface = bound(tunnel), name
	return nil
}

// port returns the UDP port for the next tunnel: the option, otherwise that of the tunnel before,
// which peers know, otherwise 0.
func (l *Loop) port() uint16 {
	if l.o.ListenPort != 0 {
		return l.o.ListenPort
	}
	s, _ := l.State()
	return s.ListenPort
}

// dropTunnel handles a tunnel that ended by itself, because another program removed the
// interface, or one that hangs: the next round makes it again. It closes the guard first, and
// then waits TunnelLimit at most for the rest of the tunnel to end.
func (l *Loop) dropTunnel() {
	l.o.Gate.set(nil, nil)
	cause := fmt.Sprintf("the mesh interface %s is gone", l.iface)
	if l.tunnel.hasHung() {
		cause = fmt.Sprintf("the tunnel on %s doesn't answer", l.iface)
	}
	l.o.Record(events.Event{Kind: events.Problem, Message: cause + "; making it again"})
	if !returnsInTime(l.tunnel.Close) {
		l.o.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("the tunnel that was on it didn't end in %v; going on without it", TunnelLimit)})
	}
	l.tunnel, l.held = nil, 0
	l.repairs++
}

// leave ends the tunnel first, so that nothing of a peer arrives while the filter is removed,
// and then restores the host to how it was found. The host restores forwarding before it removes
// the filter, so that a kill at any moment leaves it closed. ctx has usually ended; leave has
// host.LeaveLimit of its own.
func (l *Loop) leave(ctx context.Context) error {
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), host.LeaveLimit)
	defer cancel()
	l.endTunnel()
	left, err := l.o.Host.Link.Close(limit)
	for _, p := range left {
		l.o.Record(events.Event{Kind: events.Problem, Message: p.Step + ": " + p.Message})
	}
	if err != nil {
		return fmt.Errorf("leave the host as it was: %w", err)
	}
	return nil
}

// endTunnel closes the guard, so that nothing passes, and then the tunnel. It waits
// TunnelLimit at most: a tunnel that hangs ends when the host removes its
// interface, or with this process.
func (l *Loop) endTunnel() {
	if l.tunnel == nil {
		return
	}
	if !returnsInTime(func() {
		l.o.Gate.set(nil, nil)
		if stats, err := l.tunnel.Stats(); err == nil {
			l.noteLearned(held.Numbers{Tunnel: stats, Guard: l.seen.guard})
		}
		l.tunnel.Close()
	}) {
		l.o.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("the tunnel didn't end in %v; leaving the host without it", TunnelLimit)})
	}
}

// returnsInTime reports whether end returns within TunnelLimit.
func returnsInTime(end func()) bool { return returnsWithin(TunnelLimit, nil, end) }

// path is how WireGuard's packets leave the host. After it changed, the tunnel would go on
// sending from the old address, and routers on the way would keep their translations, until
// each peer has received something from the new one (Tunnel.Rebind).
type path struct {
	uplink4, uplink6                   string
	source4, source6, router4, router6 netip.Addr
}

// pathOf returns the path according to the facts about the host.
func pathOf(h policy.Host) path {
	return path{h.Uplink4, h.Uplink6, h.Source4, h.Source6, h.Router4, h.Router6}
}

// ownEndpoints returns the endpoints that reach this host's WireGuard, which listens on
// port: each of the host's addresses. The router's address isn't one, although the router
// may forward that port to this host. It may be a peer's endpoint as well: the packets of a
// peer behind the same router, or of one whose packets the router translates, come from
// there, and even from the same port if the router keeps ports.
func ownEndpoints(host policy.Host, port uint16) (endpoints []netip.AddrPort) {
	for _, i := range host.Interfaces {
		for _, p := range i.Addresses {
			endpoints = append(endpoints, netip.AddrPortFrom(p.Addr().WithZone(""), port))
		}
	}
	return endpoints
}

// requestRebind has runRebinds call the tunnel's Rebind, which may take long after a wake from
// sleep. A request that still waits is replaced, since it may be for a tunnel that has ended.
func (l *Loop) requestRebind() {
	select {
	case <-l.rebind:
	default:
	}
	l.rebind <- l.tunnel // never blocks: the loop alone sends, and it has just made room
}

// runRebinds carries out the requests of requestRebind until ctx ends. An error of a tunnel that
// has ended isn't recorded, because the loop notices the end itself.
func (l *Loop) runRebinds(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case t := <-l.rebind:
			err := t.Rebind(ctx)
			select {
			case <-t.Done():
				continue
			default:
			}
			if err != nil && ctx.Err() == nil {
				l.o.Record(events.Event{Kind: events.Problem, Message: err.Error()})
			}
		}
	}
}
