package policy

import (
	"cmp"
	"net/netip"
	"slices"
)

// OverlapKind is how another owner uses a part of a mesh prefix.
type OverlapKind uint8

// The kinds of overlaps.
const (
	// OverlapUplink: the address of the uplink or of its router is inside, so the operator
	// of that network may use the whole prefix.
	OverlapUplink OverlapKind = iota + 1
	// OverlapAddress: another interface has an address, or an attached prefix, inside.
	OverlapAddress
	// OverlapRoute: a route that isn't a default one leads there.
	OverlapRoute
	// OverlapIPsec: an IPsec policy applies to packets to there.
	OverlapIPsec
	// OverlapResolver: one of the host's DNS servers is there.
	OverlapResolver
)

// Overlap is another owner's use of a part of a mesh prefix on this host.
type Overlap struct {
	Kind OverlapKind
	// Interface is the other owner's; empty for OverlapIPsec and OverlapResolver.
	Interface string
	// Mesh is the mesh prefix that is overlapped.
	Mesh netip.Prefix
	// Prefixes has the other owner's prefixes, sorted: single addresses for OverlapUplink
	// and OverlapResolver, an address with the attached length for OverlapAddress. One may be
	// wider than Mesh.
	Prefixes []netip.Prefix
	// Peers has the names of the peers with a mesh address inside Prefixes, sorted. These
	// addresses still belong to the peers.
	Peers []string
	// Equal has the peers whose very address an interface of the host has, too, so that the
	// host can't reach them. Own says the same of a mesh address of the host.
	Equal []string
	Own   bool
}

// Overlaps returns the other uses of the mesh prefixes on this host: one for each kind,
// interface and mesh prefix, sorted in this order. [Sets.Others] is made of the same facts.
func (r *Ruleset) Overlaps() []Overlap {
	type key struct {
		kind OverlapKind
		name string
		mesh netip.Prefix
	}
	found := map[key]*Overlap{}
	names := map[netip.Addr]string{}
	for _, p := range r.peers {
		for _, a := range p.Addresses {
			names[a] = p.Name
		}
	}
	add := func(kind OverlapKind, name string, p netip.Prefix, addr netip.Addr) {
		for _, mesh := range r.sets.Mesh {
			if !mesh.Overlaps(p) {
				continue
			}
			k := key{kind, name, mesh}
			o := found[k]
			if o == nil {
				o = &Overlap{Kind: kind, Interface: name, Mesh: mesh}
				found[k] = o
			}
			o.Prefixes = append(o.Prefixes, p)
			o.Own = o.Own || slices.Contains(r.mesh.Addresses, addr)
			if name, ok := names[addr]; ok {
				o.Equal = append(o.Equal, name)
			}
		}
	}
	h := r.host
	for _, a := range h.uplinkAddresses() {
		add(OverlapUplink, h.Uplink(a), netip.PrefixFrom(a, a.BitLen()), a)
	}
	for _, i := range h.Interfaces {
		if i.Name == h.Interface {
			continue
		}
		for _, p := range i.Addresses {
			if i.Name != h.Uplink(p.Addr()) {
				add(OverlapAddress, i.Name, p, p.Addr())
			}
		}
	}
	// Only all routes together tell which are default ones, so ask routed, which leaves
	// those out.
	routed := map[netip.Prefix]bool{}
	for _, p := range h.routed() {
		routed[p] = true
	}
	for _, route := range h.Routes {
		if p := route.Prefix.Masked(); routed[p] && route.Interface != h.Interface && !IsLoopback(route.Interface) && !h.attaches(route.Interface, p) {
			add(OverlapRoute, route.Interface, p, netip.Addr{})
		}
	}
	for _, p := range masked(h.IPsec) {
		if routed[p] {
			add(OverlapIPsec, "", p, netip.Addr{})
		}
	}
	for _, a := range h.Resolvers {
		add(OverlapResolver, "", netip.PrefixFrom(a, a.BitLen()), netip.Addr{})
	}
	out := make([]Overlap, 0, len(found))
	for _, o := range found {
		r.fill(o)
		out = append(out, *o)
	}
	slices.SortFunc(out, func(a, b Overlap) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Interface, b.Interface), comparePrefix(a.Mesh, b.Mesh))
	})
	return out
}

// attaches reports whether an address of the interface attaches exactly the prefix p. Its
// route is then no more than the kernel's own for that address.
func (h Host) attaches(name string, p netip.Prefix) bool {
	return slices.ContainsFunc(h.Interfaces, func(i Interface) bool {
		return i.Name == name && slices.ContainsFunc(i.Addresses, func(a netip.Prefix) bool { return a.Masked() == p })
	})
}

// fill sorts the lists of an overlap, drops duplicates, and sets Peers.
func (r *Ruleset) fill(o *Overlap) {
	slices.SortFunc(o.Prefixes, comparePrefix)
	o.Prefixes = slices.Compact(o.Prefixes)
	inside := make([]netip.Prefix, 0, len(o.Prefixes))
	for _, p := range o.Prefixes {
		inside = append(inside, p.Masked())
	}
	slices.SortFunc(inside, comparePrefix)
	inside = outermost(slices.Compact(inside))
	for _, p := range r.peers {
		if slices.ContainsFunc(p.Addresses[:], func(a netip.Addr) bool { return contains(inside, a) }) {
			o.Peers = append(o.Peers, p.Name)
		}
	}
	slices.Sort(o.Peers)
	slices.Sort(o.Equal)
	o.Equal = slices.Compact(o.Equal)
}

// contains reports whether any of the prefixes contains an address. They must be sorted, and
// none inside another.
func contains(sorted []netip.Prefix, a netip.Addr) bool {
	i, found := slices.BinarySearchFunc(sorted, a, func(p netip.Prefix, a netip.Addr) int { return p.Addr().Compare(a) })
	return found || i > 0 && sorted[i-1].Contains(a)
}

// IsOthers reports whether an address in the mesh prefixes belongs to another owner (see
// [Sets.Others]), so that the host's own packets to it pass.
func (r *Ruleset) IsOthers(a netip.Addr) bool { return r.others.Contains(a) }

// MeshOf returns the mesh prefix that an address is in, and whether there is one.
func (r *Ruleset) MeshOf(a netip.Addr) (netip.Prefix, bool) {
	for _, p := range r.sets.Mesh {
		if p.Contains(a) {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// Free returns a prefix for another mesh, of the family of like, that overlaps nothing known
// of this host, and whether there is one. It is a /16 of 10/8, 172.16/12 or 100.64/10, or a
// /48 of the unique local addresses. RFC 4193, 3.2 wants its global ID to be random: it comes
// from the host's own mesh address, which is derived from a hash. The same host gets the same
// proposal each time.
func (r *Ruleset) Free(like netip.Addr) (netip.Prefix, bool) {
	h := r.host
	taken := slices.Concat(h.attached(), h.routed(), singles(h.addresses()), singles(h.Resolvers), singles(h.uplinkAddresses()), r.sets.Mesh)
	free := func(p netip.Prefix) bool {
		return !slices.ContainsFunc(taken, p.Overlaps)
	}
	seed := [16]byte{}
	for _, a := range r.mesh.Addresses {
		if a.Is6() {
			seed = a.As16()
		}
	}
	if like.Is6() {
		for n := range 256 {
			p := netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, seed[11], seed[12], seed[13], seed[14], seed[15] + byte(n)}), 48)
			if free(p) {
				return p, true
			}
		}
		return netip.Prefix{}, false
	}
	for _, space := range [...]struct{ first, from, many byte }{{10, 0, 0}, {172, 16, 16}, {100, 64, 64}} {
		for n := range 256 {
			second := seed[15] + byte(n)
			if space.many > 0 {
				if n == int(space.many) {
					break
				}
				second = space.from + second%space.many
			}
			if p := netip.PrefixFrom(netip.AddrFrom4([4]byte{space.first, second}), 16); free(p) {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}
