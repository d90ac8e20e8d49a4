package macos

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// Kill names states to end: those whose opener is in From and whose other end,
// as the opener sees it, is in To. It ends the state on the interface that a
// forwarded packet came in by and the one, with its translation, on the interface
// that it left by: pfctl(8) -k compares the address before translation.
type Kill struct {
	From, To netip.Prefix
}

// Kills returns what has to be ended after the packet filter was given the rules
// of next instead of those of old; narrowed is what [policy.Diff] says of the
// two. States made by rules that are gone go on passing, and translating, until
// then.
//
// A peer that lost a permission loses the states of that permission's
// destinations, and keeps the others; so it is with destinations that have another
// class now, or are reached another way. Where a peer has lost routing, or its
// translated flows can't go on as they were, all that it opened ends: what may go
// on makes itself new states. What this host opened to a peer goes on, unless the
// peer is gone. A nil old ends everything from and to the peers.
func Kills(old, next *policy.Ruleset, narrowed []policy.Narrowed) []Kill {
	var moved []netip.Prefix
	if old != nil {
		moved = changedPrefixes(old, next)
	}
	lan := dropContained(next.Sets().LANOutsideMesh())
	var out []Kill
	for _, n := range narrowed {
		for _, a := range n.Addresses {
			_, known := next.PeerByAddr(a) // or an interface of this host's has it
			switch {
			case old == nil || n.Removed || !known:
				out = append(out, killAll(a)...)
				continue
			case n.Lost.Has(mesh.Routing) || isUprooted(old, next, a):
				out = append(out, killOpened(a))
				continue
			}
			to := slices.Clone(moved)
			if n.Lost.Has(mesh.Incoming) {
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

// widest returns the prefixes, sorted, without those that are inside another.
func dropContained(ps []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range sorted(slices.Clone(ps)) {
		if n := len(out); n == 0 || !out[n-1].Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

// maxKills bounds how many states' ends are named one by one: each is a run of
// pfctl, of some milliseconds.
const maxKills = 256

// coarse names whole mesh prefixes instead of single peers. Peers that lost
// nothing then have flows ended, too; that many lose something at once only when
// the host moves, or at the start.
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

// killAll ends everything from and to a peer's address.
func killAll(a netip.Addr) []Kill {
	opened := killOpened(a)
	return []Kill{opened, {opened.To, opened.From}}
}

// killOpened ends everything that a peer's address opened.
func killOpened(a netip.Addr) Kill {
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if a.Is6() {
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return Kill{netip.PrefixFrom(a, a.BitLen()), all}
}

// killTo ends what a peer's address opened to the destinations. No host behind
// them can have opened anything to a peer but the host itself, and that may go on.
func killTo(a netip.Addr, to []netip.Prefix) []Kill {
	var out []Kill
	for _, p := range to {
		if p.Addr().Is4() == a.Is4() {
			out = append(out, Kill{netip.PrefixFrom(a, a.BitLen()), p})
		}
	}
	return out
}

// movedPrefixes returns the destinations that have another class now, or that are
// reached another way: a network that went, for one. An address or a network that
// only came where the same class and way held is none. Addresses of the router in front
// that are known only now, and all where WireGuard has another port there, are among them.
func changedPrefixes(old, next *policy.Ruleset) []netip.Prefix {
	a, b := old.Sets(), next.Sets()
	var changed []netip.Prefix
	for _, s := range [][2][]netip.Prefix{{a.Martians, b.Martians}, {a.Self, b.Self}, {a.Mesh, b.Mesh}, {a.LAN, b.LAN}} {
		changed = append(append(changed, subtract(s[0], s[1])...), subtract(s[1], s[0])...)
	}
	before, now := egressPaths(old.Host()), egressPaths(next.Host())
	for p, way := range before {
		if now[p] != way {
			changed = append(changed, p)
		}
	}
	var out []netip.Prefix
	edges := classBoundaries(slices.Concat(a.Martians, a.Self, a.Mesh, a.LAN, b.Martians, b.Self, b.Mesh, b.LAN))
	for _, p := range sorted(changed) {
		if _, went := before[p]; !sameClass(old, next, p, edges) || went && before[p] != now[p] {
			out = append(out, p)
		}
	}
	if slices.Equal(old.OutsidePorts(), next.OutsidePorts()) {
		out = append(out, subtract(b.Outside, a.Outside)...)
	} else {
		out = append(out, b.Outside...)
	}
	if old.Mesh().DNS != next.Mesh().DNS {
		out = append(out, hostPrefixes(old.Mesh().Addresses)...)
	}
	return out
}

// edgesOf returns, sorted, the addresses at which a class may begin: the first of
// each prefix, and the one behind it.
func classBoundaries(ps []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, p := range ps {
		b := p.Addr().AsSlice()
		for bit := p.Bits(); bit < len(b)*8; bit++ {
			b[bit/8] |= 0x80 >> (bit % 8)
		}
		last, _ := netip.AddrFromSlice(b)
		out = append(out, p.Masked().Addr())
		if behind := last.Next(); behind.IsValid() {
			out = append(out, behind)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// sameClass reports whether every address of a prefix has the class that it had.
// Between two edges all have one class.
func sameClass(old, next *policy.Ruleset, p netip.Prefix, edges []netip.Addr) bool {
	if old.Class(p.Masked().Addr()) != next.Class(p.Masked().Addr()) {
		return false
	}
	i, _ := slices.BinarySearchFunc(edges, p.Masked().Addr(), netip.Addr.Compare)
	for ; i < len(edges) && p.Contains(edges[i]); i++ {
		if old.Class(edges[i]) != next.Class(edges[i]) {
			return false
		}
	}
	return true
}

// way is by which interface a network is reached, and what packets there leave
// with: the interface's first address, unless it is the uplink's, which has its own.
type egressPath struct {
	name   string
	source netip.Addr
}

// ways returns how the host reaches each network, default routes left out.
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

// subtract returns what is in a and not in b.
func subtract[T comparable](a, b []T) []T {
	in := map[T]bool{}
	for _, one := range b {
		in[one] = true
	}
	return slices.DeleteFunc(slices.Clone(a), func(one T) bool { return in[one] })
}

// isUprooted reports whether the translated flows of an address's family have
// lost what they stand on: the mesh interface, the uplink, forwarding, or the
// address that they have outside. Other addresses of this host's, and other
// interfaces, come and go many times an hour on any Mac, and nothing of a peer
// depends on them but its flows to them.
func isUprooted(old, next *policy.Ruleset, a netip.Addr) bool {
	x, y := old.Host(), next.Host()
	source := x.Source6 != y.Source6
	if a.Is4() {
		source = x.Source4 != y.Source4
	}
	return source || x.Interface != y.Interface || x.Uplink(a) != y.Uplink(a) || x.Forwarding.Of(a) != y.Forwarding.Of(a)
}
