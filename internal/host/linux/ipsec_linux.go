package linux

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// ipsec returns the destinations of the kernel's IPsec policies.
func (o observer) ipsec(family int) ([]netip.Prefix, error) {
	if o.xfrm == nil {
		return nil, nil
	}
	ps, err := o.xfrm.XfrmPolicyList(family)
	if err != nil {
		return nil, fmt.Errorf("list IPsec policies: %w", err)
	}
	return ipsecDestinations(ps), nil
}

// ipsecDestinations returns the destinations of policies that transform leaving packets.
// Policies without a template let packets pass unchanged (ip-xfrm(8)). Policies of an
// XFRM interface apply only to packets that are routed to it, so the routes tell those. A
// policy for all destinations that requires a mark doesn't apply to the host's traffic in
// general.
func ipsecDestinations(ps []netlink.XfrmPolicy) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range ps {
		to, ok := toPrefix(p.Dst)
		if !ok || p.Dir != netlink.XFRM_DIR_OUT || p.Action != netlink.XFRM_POLICY_ALLOW || len(p.Tmpls) == 0 || p.Ifid != 0 {
			continue
		}
		if to.Bits() > 0 || p.Mark == nil || p.Mark.Mask == 0 {
			out = append(out, to.Masked())
		}
	}
	slices.SortFunc(out, comparePrefix)
	return slices.Compact(out)
}
