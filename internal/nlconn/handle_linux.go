package nlconn

import "github.com/vishvananda/netlink"

// handle has the embedded field without a name that other packages could use to go around
// the methods here.
type handle = netlink.Handle

// A Handle is vishvananda/netlink's with lists that are whole. Its other methods, which
// change something or ask for one thing, are the library's. A method of the library that
// isn't replaced here and reads a list mustn't be used; a test in internal/imports sees to
// it.
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

// LinkByName returns an interface. Kernels that can't find one by its name have all of them
// listed for it.
func (h *Handle) LinkByName(name string) (netlink.Link, error) {
	return whole(func() (netlink.Link, error) { return h.handle.LinkByName(name) })
}

// AddrList returns the addresses of a family that an interface has, or all where link is
// nil.
func (h *Handle) AddrList(link netlink.Link, family int) ([]netlink.Addr, error) {
	return whole(func() ([]netlink.Addr, error) { return h.handle.AddrList(link, family) })
}

// NeighList returns the neighbours of a family at an interface.
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

// RouteList returns the routes of a family by an interface in the main table.
func (h *Handle) RouteList(link netlink.Link, family int) ([]netlink.Route, error) {
	return whole(func() ([]netlink.Route, error) { return h.handle.RouteList(link, family) })
}

// RouteListFiltered returns the routes of a family that have in common with filter what mask
// says.
func (h *Handle) RouteListFiltered(family int, filter *netlink.Route, mask uint64) ([]netlink.Route, error) {
	return whole(func() ([]netlink.Route, error) { return h.handle.RouteListFiltered(family, filter, mask) })
}

// EachRoute calls do for each route that RouteListFiltered would return, without keeping
// them: a router of the internet has a million. begin is called before the first of them,
// and again where the list is asked for again: what do has gathered is void then.
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
