package nlconn

import "github.com/vishvananda/netlink"

// handle makes the embedded field unexported, so that other packages can't bypass the
// methods here.
type handle = netlink.Handle

// A Handle is a netlink.Handle of vishvananda/netlink whose dumps are complete. Methods that
// change something or read a single object are the library's own. A method that reads a dump
// and isn't replaced here mustn't be used, which a test in internal/imports enforces.
type Handle struct{ *handle }

// NewHandle opens sockets of netlink families, such as unix.NETLINK_ROUTE.
func NewHandle(families ...int) (*Handle, error) {
	h, err := netlink.NewHandle(families...)
	if err != nil {
		return nil, err
	}
	return &Handle{h}, nil
}

// LinkList returns all interfaces.
func (h *Handle) LinkList() ([]netlink.Link, error) { return whole(h.handle.LinkList) }

// LinkByName returns an interface by its name. For kernels that can't look up a name the
// library dumps all interfaces.
func (h *Handle) LinkByName(name string) (netlink.Link, error) {
	return whole(func() (netlink.Link, error) { return h.handle.LinkByName(name) })
}

// AddrList returns the addresses of a family on an interface, or on all if link is nil.
func (h *Handle) AddrList(link netlink.Link, family int) ([]netlink.Addr, error) {
	return whole(func() ([]netlink.Addr, error) { return h.handle.AddrList(link, family) })
}

// NeighList returns the neighbours of a family on the interface with the index link.
func (h *Handle) NeighList(link, family int) ([]netlink.Neigh, error) {
	return whole(func() ([]netlink.Neigh, error) { return h.handle.NeighList(link, family) })
}

// RuleList returns the policy rules of a family.
func (h *Handle) RuleList(family int) ([]netlink.Rule, error) {
	return whole(func() ([]netlink.Rule, error) { return h.handle.RuleList(family) })
}

// XfrmPolicyList returns the IPsec policies of a family.
func (h *Handle) XfrmPolicyList(family int) ([]netlink.XfrmPolicy, error) {
	return whole(func() ([]netlink.XfrmPolicy, error) { return h.handle.XfrmPolicyList(family) })
}

// RouteList returns the routes of a family through an interface in the main table.
func (h *Handle) RouteList(link netlink.Link, family int) ([]netlink.Route, error) {
	return whole(func() ([]netlink.Route, error) { return h.handle.RouteList(link, family) })
}

// RouteListFiltered returns the routes of a family that equal filter in the fields that mask
// selects (netlink.RT_FILTER_*).
func (h *Handle) RouteListFiltered(family int, filter *netlink.Route, mask uint64) ([]netlink.Route, error) {
	return whole(func() ([]netlink.Route, error) { return h.handle.RouteListFiltered(family, filter, mask) })
}

// EachRoute calls do for each route that RouteListFiltered would return, without keeping
// them all in memory: a router with the internet's full table has a million. It calls begin
// before each try; whatever do gathered in an earlier one is void then.
func (h *Handle) EachRoute(family int, filter *netlink.Route, mask uint64, begin func(), do func(netlink.Route)) error {
	_, err := whole(func() (struct{}, error) {
		begin()
		return struct{}{}, h.handle.RouteListFilteredIter(family, filter, mask, func(r netlink.Route) bool {
			do(r)
			return true
		})
	})
	return err
}
