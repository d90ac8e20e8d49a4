package linux

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// ipsec returns the destinations that the kernel's IPsec policies take.
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

// securedNetworks returns the destinations of the policies by which packets that
// leave are transformed. Those without a template let packets pass as they are
// (ip-xfrm(8)). Those of an XFRM interface apply to what routes lead there, and so
// the routes say what they take; one for all packets with a mark isn't how the host
// reaches everything.
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
