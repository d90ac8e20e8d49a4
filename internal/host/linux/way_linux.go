package linux

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// wayLimit bounds one route lookup, including the wait for other questions.
const wayLimit = 5 * time.Second

// Way implements [host.Ways].
func (p *Backend) Way(ctx context.Context, packet host.Packet) (host.Way, error) {
	if !packet.Dst.IsValid() || packet.Src.IsValid() && packet.Src.Is4() != packet.Dst.Is4() {
		return host.Way{}, fmt.Errorf("find the way from %v to %v: these aren't addresses of one family", packet.Src, packet.Dst)
	}
	limited, cancel := context.WithTimeout(ctx, wayLimit)
	defer cancel()
	var w host.Way
	err := p.packets.run(limited, func() error {
		mark, err := p.packets.markOf(limited, packet)
		if err != nil {
			return fmt.Errorf("find the mark that other software's rules give it: %w", err)
		}
		w, err = p.packets.marked(packet, mark)
		return err
	})
	if err != nil {
		return host.Way{}, fmt.Errorf("find the way to %v: %w", packet.Dst, err)
	}
	return w, nil
}

// WayCommand implements [host.Ways]: ip-rule(8) and ip-route(8).
func (*Backend) WayCommand(to netip.Addr) string { return fmt.Sprintf("ip rule; ip route get %v", to) }

// way returns the way of a packet without a mark.
func (i *informer) way(packet host.Packet) (host.Way, error) { return i.marked(packet, 0) }

// marked returns the way of a packet with this mark.
func (i *informer) marked(packet host.Packet, mark uint32) (host.Way, error) {
	q := nlconn.Packet{Mark: mark, Src: packet.Src, Dst: packet.Dst, Proto: packet.Proto, SrcPort: packet.SrcPort, DstPort: packet.DstPort}
	if packet.In != "" {
		if q.IIF = indexOf(packet.In); q.IIF == 0 {
			return host.Way{}, fmt.Errorf("there is no interface %q", packet.In)
		}
	}
	a, err := askRoute(i.routes, q)
	if err == nil && a.refused == host.WayUnreachable && q.IIF != 0 && q.Dst.Is4() && !i.forwards4(packet.In) {
		// The interface doesn't forward now, and the kernel reports only that
		// (ip_route_input_slow in net/ipv4/route.c). Look up the host's own packets
		// instead; they take the same way, except for policy rules that name the
		// interface.
		q.IIF, q.Src = 0, netip.Addr{}
		if m := i.observed.meshInterface(); packet.In == m.name {
			q.Src = m.own(true)
		}
		a, err = askRoute(i.routes, q)
	}
	if err != nil {
		return host.Way{}, err
	}
	w := host.Way{Router: a.router, Local: a.local, Refused: a.refused}
	if a.oif == 0 || a.local {
		return w, nil
	}
	name, ok := nameOf(a.oif)
	if !ok {
		return w, fmt.Errorf("interface %d is gone", a.oif)
	}
	if w.Interface, w.Source = name, a.src; packet.In == "" {
		return w, nil
	}
	// The lookup for a forwarded packet returns no source.
	own, err := askRoute(i.routes, nlconn.Packet{Dst: q.Dst, OIF: a.oif})
	w.Source = own.src
	return w, err
}

// own returns the host's own mesh address of a family, or an invalid one.
func (m meshInterface) own(v4 bool) netip.Addr {
	for _, a := range m.addresses {
		if a.Is4() == v4 {
			return a
		}
	}
	return netip.Addr{}
}

// forwards4 reports whether IPv4 packets that arrive on an interface are forwarded.
func (i *informer) forwards4(name string) bool {
	v, err := i.sys.read(conf("ipv4", name, "forwarding"))
	return err == nil && v != "0"
}

// answer is the result of a route lookup.
type answer struct {
	oif         int
	router, src netip.Addr
	local       bool
	refused     string // as host.Way.Refused
}

// askRoute looks up a route. A route that drops packets, or no route, is a result and not
// an error.
func askRoute(conn *nlconn.Conn, p nlconn.Packet) (answer, error) {
	r, err := conn.Route(p)
	switch {
	case errors.Is(err, unix.ENETUNREACH):
		return answer{refused: host.WayNone}, nil
	case errors.Is(err, unix.EHOSTUNREACH):
		return answer{refused: host.WayUnreachable}, nil
	case errors.Is(err, unix.EACCES):
		return answer{refused: host.WayProhibited}, nil
	case errors.Is(err, unix.EINVAL):
		return answer{refused: host.WayBlackhole}, nil
	case err != nil:
		return answer{}, fmt.Errorf("ask for a route: %w", err)
	}
	return answerOf(r), nil
}

// answerOf converts the result of a lookup. For a route that drops packets the kernel
// returns an error for IPv4, but for IPv6 also the kind of the route (rt6_fill_node in
// net/ipv6/route.c).
func answerOf(r nlconn.Route) answer {
	switch r.Kind {
	case unix.RTN_UNREACHABLE:
		return answer{refused: host.WayUnreachable}
	case unix.RTN_PROHIBIT:
		return answer{refused: host.WayProhibited}
	case unix.RTN_BLACKHOLE:
		return answer{refused: host.WayBlackhole}
	}
	local := slices.Contains([]uint8{unix.RTN_LOCAL, unix.RTN_ANYCAST, unix.RTN_BROADCAST, unix.RTN_MULTICAST}, r.Kind)
	return answer{oif: r.OIF, router: r.Router, src: r.Src, local: local}
}

// wayProblems reports packets from and to peers that the kernel routes elsewhere than
// expected. marks are those that other software's rules give peers' packets to the
// internet. It doesn't find policy rules that match a port or the mark of an answer.
func (i *informer) wayProblems(r *policy.Ruleset, marks map[bool]uint32) []host.Problem {
	return append(i.waysOut(r, marks), i.waysBack(r)...)
}

// waysBack reports packets for peers that the kernel doesn't route into the tunnel: a
// policy rule takes them before the main table, which has the peers' routes.
func (i *informer) waysBack(r *policy.Ruleset) (out []host.Problem) {
	name := r.Host().Interface
	for _, own := range r.Mesh().Addresses {
		for _, packet := range toPeers(r, own) {
			w, err := i.way(packet)
			if err != nil || w.Interface == name {
				continue
			}
			where, who, flag := "nowhere ("+w.Refused+")", "this host's packets to peers", ""
			if w.Interface != "" {
				where = "by " + w.Interface
			}
			if packet.In != "" {
				who = "answers to peers"
			}
			mesh, _ := r.MeshOf(packet.Dst)
			if own.Is6() {
				flag = "-6 "
			}
			out = append(out, host.Problem{
				Step:    "find the way to the peers",
				Message: fmt.Sprintf("%s, such as to %v, would go %s and not by %s: a policy rule takes them before the main table", who, packet.Dst, where, name),
				Hint:    fmt.Sprintf("have the main table asked first: sudo ip %srule add to %v lookup main pref N, with N below that of the rule, see `ip %srule`", flag, mesh, flag),
			})
			break
		}
	}
	return out
}

// toPeers returns packets of own's family to peers, at most one of each kind: an answer
// from the internet to a peer with routing, and the host's own packet to a peer.
func toPeers(r *policy.Ruleset, own netip.Addr) (out []host.Packet) {
	h, peers := r.Host(), r.Peers()
	first := func(may mesh.Permissions) (netip.Addr, bool) {
		for _, p := range peers {
			if !p.Permissions.Has(may) {
				continue
			}
			for _, a := range p.Addresses {
				if a.Is4() == own.Is4() {
					return a, true
				}
			}
		}
		return netip.Addr{}, false
	}
	far := probes[own.Is4()][0]
	if a, ok := first(mesh.Routing); ok && h.Uplink(own) != "" && h.Forwarding.Of(own) {
		out = append(out, host.Packet{In: h.Uplink(own), Packet: policy.Packet{Src: far, Dst: a}})
	}
	if a, ok := first(0); ok {
		out = append(out, host.Packet{Packet: policy.Packet{Src: own, Dst: a}})
	}
	return out
}

// waysOut reports peers' packets to the internet that the kernel doesn't route by the
// uplink; those are dropped.
func (i *informer) waysOut(r *policy.Ruleset, marks map[bool]uint32) (out []host.Problem) {
	h := r.Host()
	for _, own := range r.Mesh().Addresses {
		first := slices.IndexFunc(r.Peers(), func(p policy.PeerRules) bool { return p.Permissions.Has(mesh.Routing) })
		uplinks := h.Uplinks(own)
		if first < 0 || len(uplinks) == 0 || !h.Forwarding.Of(own) {
			continue
		}
		for _, from := range r.Peers()[first].Addresses {
			for _, to := range probes[own.Is4()] {
				if from.Is4() != own.Is4() || r.Class(to) != policy.Internet {
					continue
				}
				w, err := i.marked(host.Packet{In: h.Interface, Packet: policy.Packet{Src: from, Dst: to}}, marks[own.Is4()])
				if err != nil || slices.Contains(uplinks, w.Interface) {
					continue
				}
				where := "nowhere (" + w.Refused + ")"
				if w.Interface != "" {
					where = "by " + w.Interface
				}
				out = append(out, host.Problem{
					Step: "find the way to the internet",
					Message: fmt.Sprintf("packets of peers to %v would go %s and not by the uplink %s, so they are refused",
						to, where, strings.Join(uplinks, ", ")),
					Hint: "see `ip rule` and `ip route get " + to.String() + " from " + from.String() + " iif " + h.Interface + "`",
				})
				break
			}
		}
	}
	return out
}
