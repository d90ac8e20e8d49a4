package darwin

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// ErrRouteTaken says that a route to the same destination already exists, through another
// interface.
var ErrRouteTaken = errors.New("the destination has another route")

// A Router adds routes through interfaces and deletes them again. Its routes carry the
// flag RouteProto1, which marks them after a crash. It adds no default route: RTM_DELETE
// looks only at destination and mask (xnu bsd/net/route.c), so deleting its own default
// route would delete the physical one (tailscale#21395). The two halves of a family
// (0.0.0.0/1 and 128.0.0.0/1) win over the default route and leave it in place.
type Router struct {
	k   Kernel
	seq int
}

// NewRouter returns a Router that changes k's routing table.
func NewRouter(k Kernel) *Router { return &Router{k: k} }

// Set makes the marked routes through the caller's tunnel, the interface with the index,
// exactly want: it adds missing ones, deletes surplus ones, and reads the table again. If
// another interface already has a route to one of the destinations, the error wraps
// ErrRouteTaken, and the other routes are set all the same. The kernel deletes the routes
// when the tunnel goes.
func (r *Router) Set(index int, want []netip.Prefix) error {
	for _, p := range want {
		if !usable(p) {
			return fmt.Errorf("set routes: prefix %v can't be routed", p)
		}
	}
	table, err := r.table()
	if err != nil {
		return err
	}
	wanted := make(map[netip.Prefix]bool, len(want))
	for _, p := range want {
		wanted[p] = true
	}
	var changes []change
	for p, have := range table {
		if ours(have) && have.Index == index && !wanted[p] {
			changes = append(changes, deletion(have))
		}
	}
	var taken []error
	for _, p := range want {
		have, ok := table[p]
		switch {
		case !ok:
			changes = append(changes, change{xnu.RTMAdd, newRoute(p, index)})
		case have.Index != index:
			taken = append(taken, fmt.Errorf("add route %s: %w", p, ErrRouteTaken))
		}
	}
	if err := r.apply(changes); err != nil {
		return err
	}
	if len(changes) > 0 {
		if err := r.verify(index, want, len(taken)); err != nil {
			return err
		}
	}
	return errors.Join(taken...)
}

// Add adds one route through a gateway, such as the route that keeps packets to a tunnel's
// endpoint out of that tunnel. The route outlives the tunnel and this process, so the
// caller must save its destination first, for Sweep.
func (r *Router) Add(dst netip.Prefix, gateway netip.Addr, index int) error {
	if !usable(dst) || !gateway.IsValid() || gateway.Is4() != dst.Addr().Is4() {
		return fmt.Errorf("add route %v through %v: can't be routed", dst, gateway)
	}
	table, err := r.table()
	if err != nil {
		return err
	}
	route := newRoute(dst, index)
	route.Gateway, route.Flags = gateway, route.Flags|RouteGateway
	if have, ok := table[dst]; ok {
		if have.Gateway == gateway && have.Index == index {
			return nil
		}
		return fmt.Errorf("add route %s: %w", dst, ErrRouteTaken)
	}
	return r.apply([]change{{xnu.RTMAdd, route}})
}

// Sweep deletes the marked routes to the given destinations, through any interface, and
// returns the destinations of those it deleted. Unmarked routes, and marked ones to other
// destinations, belong to other programs (NetBird uses the same mark).
func (r *Router) Sweep(dsts []netip.Prefix) ([]netip.Prefix, error) {
	table, err := r.table()
	if err != nil {
		return nil, err
	}
	var changes []change
	var gone []netip.Prefix
	for _, p := range dsts {
		if have, ok := table[p]; ok && ours(have) {
			changes = append(changes, deletion(have))
			gone = append(gone, p)
		}
	}
	return gone, r.apply(changes)
}

// usable reports whether a Router may add a route to the destination.
func usable(p netip.Prefix) bool {
	return p.IsValid() && p.Bits() > 0 && p == p.Masked() && !p.Addr().Is4In6()
}

func ours(r Route) bool { return r.Flags&RouteProto1 != 0 && r.Dst.Bits() > 0 }

func newRoute(p netip.Prefix, index int) Route {
	flags := RouteUp | RouteStatic | RouteProto1
	if p.IsSingleIP() {
		flags |= RouteHost
	}
	return Route{Dst: p, Index: index, Flags: flags}
}

// deletion returns the change that deletes a route of the table, without the flags that
// only the kernel sets.
func deletion(r Route) change {
	r.Flags &= RouteUp | RouteGateway | RouteHost | RouteStatic | RouteProto1
	return change{xnu.RTMDelete, r}
}

// table returns the unscoped routes by destination.
func (r *Router) table() (map[netip.Prefix]Route, error) {
	b, err := r.k.Routes()
	if err != nil {
		return nil, fmt.Errorf("read routing table: %w", err)
	}
	table := map[netip.Prefix]Route{}
	routes, err := ParseRoutes(b)
	if err != nil {
		return nil, err
	}
	for _, have := range routes {
		if have.Flags&RouteScoped == 0 {
			table[have.Dst] = have
		}
	}
	return table, nil
}

// A change is one routing message to send.
type change struct {
	typ   byte
	route Route
}

// apply sends the changes in their order, in which deletions come first. Adding a route
// that already exists and deleting one that doesn't are successes.
func (r *Router) apply(changes []change) error {
	if len(changes) == 0 {
		return nil
	}
	conn, err := r.k.OpenRoute()
	if err != nil {
		return fmt.Errorf("open routing socket: %w", err)
	}
	defer conn.Close()
	for _, c := range changes {
		r.seq++
		_, err := conn.Write(appendRoute(nil, c.typ, r.seq, c.route))
		switch {
		case err == nil:
		case c.typ == xnu.RTMAdd && errors.Is(err, syscall.EEXIST):
		case c.typ == xnu.RTMDelete && errors.Is(err, syscall.ESRCH):
		case c.typ == xnu.RTMAdd:
			return fmt.Errorf("add route %s: %w", c.route.Dst, err)
		default:
			return fmt.Errorf("delete route %s: %w", c.route.Dst, err)
		}
	}
	return nil
}

// verify reads the table again and fails unless it has the wanted routes. Only as many as
// taken may be missing.
func (r *Router) verify(index int, want []netip.Prefix, taken int) error {
	table, err := r.table()
	if err != nil {
		return err
	}
	for _, p := range want {
		if have, ok := table[p]; ok && have.Index == index {
			continue
		}
		if taken--; taken < 0 {
			return fmt.Errorf("add route %s: it isn't in the routing table afterwards", p)
		}
	}
	return nil
}
