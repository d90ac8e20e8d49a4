package macos

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// Kill selects states to kill: those whose opener is in From and whose other end, as
// the opener addresses it, is in To (pfctl -k From -k To, pfctl(8)). It matches both
// states of a forwarded flow, the one on the interface where it came in and the
// translated one where it left, because pf compares the address before translation
// (pfioctl_ioc_state_kill in xnu bsd/net/pf_ioctl.c).
type Kill struct {
	From, To netip.Prefix
}

// Kills returns which states to kill after the rules of next replaced those of old;
// narrowed is the result of [policy.Diff]. Loading rules doesn't affect existing states:
// they pass and translate packets until they are killed or time out.
//
// A peer that lost a permission loses the states to that permission's destinations, and
// keeps the others. The same holds for destinations whose class changed, or that are
// now reached by another path. If a peer lost routing, or its translated flows can't
// continue, everything that it opened is killed; packets that are still permitted
// create new states. Flows that this host opened to a peer continue, unless the peer
// was removed. If old is nil, all states from and to the peers are killed.
func Kills(old, next *policy.Ruleset, narrowed []policy.Narrowed) []Kill {
	var moved []netip.Prefix
	if old != nil {
		moved = changedPrefixes(old, next)
	}
	lan := dropContained(next.Sets().LANOutsideMesh())
	var out []Kill
	for _, n := range narrowed {
		for _, a := range n.Addresses {
			_, known := next.PeerByAddr(a) // false also if an interface of this host has it
			switch {
			case old == nil || n.Removed || !known:
				out = append(out, killAll(a)...)
				continue
			case n.Lost.Has(mesh.Routing) || translationChanged(old, next, a):
				out = append(out, killOpened(a))
				continue
			}
			to := slices.Clone(moved)
			if n.Lost.Has(mesh.Incoming) || lostService(n.Lost) {
				to = append(to, next.Sets().Self...)
			}
			if n.Lost.Has(mesh.LAN) {
				to = append(to, lan...)
			}
			out = append(out, killTo(a, sorted(to))...)
		}
	}
	if len(out) > maxKills {
		return widenKills(out, next.Sets().Mesh)
	}
	return out
}

// lostService reports whether a peer that lost these permissions may have lost a service
// of this host by that.
func lostService(lost mesh.Permissions) bool {
	return slices.ContainsFunc(policy.AllServices[:], func(s policy.Service) bool { return s.Needs&lost != 0 })
}

// dropContained returns the prefixes, sorted, without those contained in another.
func dropContained(ps []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range sorted(slices.Clone(ps)) {
		if n := len(out); n == 0 || !out[n-1].Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

// maxKills is how many runs of pfctl -k a change may take, some milliseconds each.
const maxKills = 256

// widenKills replaces addresses of peers by whole mesh prefixes. That also kills flows
// of peers that lost nothing, but so many lose something at once only when the host
// changes networks or the helper starts.
func widenKills(kills []Kill, mesh []netip.Prefix) []Kill {
	widen := func(p netip.Prefix) netip.Prefix {
		for _, m := range mesh {
			if p.IsSingleIP() && m.Contains(p.Addr()) {
				return m
			}
		}
		return p
	}
	seen := map[Kill]bool{}
	var out []Kill
	for _, k := range kills {
		if k = (Kill{widen(k.From), widen(k.To)}); !seen[k] {
			seen[k] = true
			out = append(out, k)
		}
	}
	return out
}

// killAll selects all states from and to a peer's address.
func killAll(a netip.Addr) []Kill {
	opened := killOpened(a)
	return []Kill{opened, {opened.To, opened.From}}
}

// killOpened selects all states that a peer's address opened.
func killOpened(a netip.Addr) Kill {
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if a.Is6() {
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return Kill{netip.PrefixFrom(a, a.BitLen()), all}
}

// killTo selects the states that a peer's address opened to the destinations. The
// opposite direction isn't needed: only this host opens flows to a peer, and those
// continue.
func killTo(a netip.Addr, to []netip.Prefix) []Kill {
	var out []Kill
	for _, p := range to {
		if p.Addr().Is4() == a.Is4() {
			out = append(out, Kill{netip.PrefixFrom(a, a.BitLen()), p})
		}
	}
	return out
}

// changedPrefixes returns the destinations whose class changed, or that are now reached
// by another path, such as those of a network that was detached. A new address or
// network whose destinations keep their class and path isn't among them. Public
// addresses of the router in front of this host (Sets.Outside) are, if they are new or
// if WireGuard's port there changed; so are the host's mesh addresses if it began
// or stopped to serve something on them.
func changedPrefixes(old, next *policy.Ruleset) []netip.Prefix {
	a, b := old.Sets(), next.Sets()
	var changed []netip.Prefix
	for _, s := range [][2][]netip.Prefix{{a.Martians, b.Martians}, {a.Self, b.Self}, {a.Mesh, b.Mesh}, {a.LAN, b.LAN}} {
		changed = append(append(changed, subtract(s[0], s[1])...), subtract(s[1], s[0])...)
	}
	before, now := egressPaths(old.Host()), egressPaths(next.Host())
	for p, path := range before {
		if now[p] != path {
			changed = append(changed, p)
		}
	}
	var out []netip.Prefix
	boundaries := classBoundaries(slices.Concat(a.Martians, a.Self, a.Mesh, a.LAN, b.Martians, b.Self, b.Mesh, b.LAN))
	for _, p := range sorted(changed) {
		if _, had := before[p]; !sameClass(old, next, p, boundaries) || had && before[p] != now[p] {
			out = append(out, p)
		}
	}
	if slices.Equal(old.OutsidePorts(), next.OutsidePorts()) {
		out = append(out, subtract(b.Outside, a.Outside)...)
	} else {
		out = append(out, b.Outside...)
	}
	if old.Mesh().Serves != next.Mesh().Serves {
		out = append(out, hostPrefixes(old.Mesh().Addresses)...)
	}
	return out
}

// classBoundaries returns, sorted, the addresses at which the class may change: the
// first address of each prefix, and the first after it.
func classBoundaries(ps []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, p := range ps {
		b := p.Addr().AsSlice()
		for bit := p.Bits(); bit < len(b)*8; bit++ {
			b[bit/8] |= 0x80 >> (bit % 8)
		}
		last, _ := netip.AddrFromSlice(b)
		out = append(out, p.Masked().Addr())
		if after := last.Next(); after.IsValid() {
			out = append(out, after)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// sameClass reports whether every address of a prefix has the same class in both
// rulesets. Between two boundaries all addresses have one class, so one of each
// stretch is looked up.
func sameClass(old, next *policy.Ruleset, p netip.Prefix, boundaries []netip.Addr) bool {
	if old.Class(p.Masked().Addr()) != next.Class(p.Masked().Addr()) {
		return false
	}
	i, _ := slices.BinarySearchFunc(boundaries, p.Masked().Addr(), netip.Addr.Compare)
	for ; i < len(boundaries) && p.Contains(boundaries[i]); i++ {
		if old.Class(boundaries[i]) != next.Class(boundaries[i]) {
			return false
		}
	}
	return true
}

// An egressPath is how a network is reached.
type egressPath struct {
	name string // the interface's
	// source is what peers' packets are translated to: the interface's first address.
	// It is left out for the uplink, whose source address is compared by
	// [translationChanged].
	source netip.Addr
}

// egressPaths returns how the host reaches each network, except by default routes.
func egressPaths(h policy.Host) map[netip.Prefix]egressPath {
	out := map[netip.Prefix]egressPath{}
	add := func(p netip.Prefix, name string) {
		family := pfconf.Inet6
		if p.Addr().Is4() {
			family = pfconf.Inet
		}
		w := egressPath{name: name}
		if as := addresses(h, name, family); name != h.Uplink(p.Addr()) && len(as) > 0 {
			w.source = as[0]
		}
		out[p.Masked()] = w
	}
	for _, r := range h.Routes {
		if r.Prefix.Bits() > 0 {
			add(r.Prefix, r.Interface)
		}
	}
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			if i.Name != h.Interface && i.Name != loopback && !p.IsSingleIP() {
				add(p, i.Name)
			}
		}
	}
	return out
}

// subtract returns the elements of a that aren't in b.
func subtract[T comparable](a, b []T) []T {
	in := map[T]bool{}
	for _, one := range b {
		in[one] = true
	}
	return slices.DeleteFunc(slices.Clone(a), func(one T) bool { return in[one] })
}

// translationChanged reports whether translated flows of a's family can't continue:
// the mesh interface, the uplink, forwarding or the uplink's source address changed.
// Other interfaces and addresses don't count: on any Mac those of awdl0, llw0 and
// the system's utuns change many times an hour, and only flows to them depend on
// them.
func translationChanged(old, next *policy.Ruleset, a netip.Addr) bool {
	x, y := old.Host(), next.Host()
	source := x.Source6 != y.Source6
	if a.Is4() {
		source = x.Source4 != y.Source4
	}
	return source || x.Interface != y.Interface || x.Uplink(a) != y.Uplink(a) || x.Forwarding.Of(a) != y.Forwarding.Of(a)
}
