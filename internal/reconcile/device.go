package reconcile

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// open makes the mesh interface and the tunnel on it.
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
		return fmt.Errorf("open mesh interface: %w", err)
	}
	l.opened = true
	name, err := dev.Name()
	if err != nil {
		return errors.Join(fmt.Errorf("open mesh interface: %w", err), dev.Close())
	}
	l.limits = l.o.Host.Enforcer.Limits()
	l.guard = guard.New(dev, guard.Options{ // nothing passes yet
		Own: l.id.Own.List(), States: l.limits.States, PerForwarded: l.limits.PerForwarded,
		Reassembly: l.limits.Reassembly, ClearDF: l.limits.DropsDF,
		Clock: l.o.Wanted.Now,
	})
	l.o.Gate.use(l.guard)
	tunnel, err := l.o.NewTunnel(l.guard, l.o.Wanted.Key(), l.port())
	if err != nil {
		return err // NewTunnel closed dev
	}
	l.tunnel, l.iface = tunnel, name
	return nil
}

// port returns the wanted UDP port; a tunnel that died is made again on the
// port that peers know.
func (l *Loop) port() uint16 {
	if l.o.ListenPort != 0 {
		return l.o.ListenPort
	}
	s, _ := l.State()
	return s.ListenPort
}

// dropTunnel records that the tunnel ended by itself, because another program took
// the interface away, and lets the next round make it again. It closes the guard first,
// and waits TunnelLimit at most for what is left of the tunnel.
func (l *Loop) dropTunnel() {
	l.o.Gate.set(nil, nil)
	l.o.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("the mesh interface %s is gone; making it again", l.iface)})
	if !inTime(l.tunnel.Close) {
		l.o.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("the tunnel that was on it didn't end in %v; going on without it", TunnelLimit)})
	}
	l.tunnel, l.held = nil, 0
	l.repairs++
}

// leave ends the tunnel first, so that nothing of a peer arrives while the
// filter is taken away, and then leaves the host as it was found. The host
// begins with forwarding, so that a kill at any moment leaves it closed.
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
	if !inTime(func() {
		l.o.Gate.set(nil, nil)
		if stats, err := l.tunnel.Stats(); err == nil {
			l.note(held.Numbers{Tunnel: stats, Guard: l.seen.guard})
		}
		l.tunnel.Close()
	}) {
		l.o.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("the tunnel didn't end in %v; leaving the host without it", TunnelLimit)})
	}
}

// inTime reports whether end returns within TunnelLimit. It goes on after that.
func inTime(end func()) bool {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		end()
	}()
	t := time.NewTimer(TunnelLimit)
	defer t.Stop()
	select {
	case <-ended:
		return true
	case <-t.C:
		return false
	}
}

// path is how WireGuard's packets leave the host. The tunnel answers each peer
// from the address of before, and routers on the way keep their translation of it,
// until the peers are told.
type path struct {
	uplink4, uplink6                   string
	source4, source6, router4, router6 netip.Addr
}

// pathOf returns the path by the facts about a host.
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

// wakePeers has the tunnel tell the peers where the host is, in a task of its own
// because that may take long after a wake from sleep. One that waits is replaced: it may
// be of a tunnel that is no more.
func (l *Loop) wakePeers() {
	select {
	case <-l.rebind:
	default:
	}
	l.rebind <- l.tunnel // there is room: the loop alone sends
}

// rebinds carries out what wakePeers asks for, until ctx ends. An error of a tunnel that
// ended meanwhile isn't reported: the loop notices the end itself.
func (l *Loop) rebinds(ctx context.Context) error {
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
