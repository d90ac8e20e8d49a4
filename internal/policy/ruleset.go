package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/gaissmai/bart"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Ruleset is a compiled policy. It is immutable and safe for concurrent use.
type Ruleset struct {
	mesh    Mesh
	host    Host
	peers   []PeerRules
	expires time.Time // the next end of a grant, or zero
	*ground
}

// ground is the part of a ruleset that depends neither on time nor on grants. Rulesets made
// by [Ruleset.At] and [Ruleset.Recompile] share it, as it takes most of the time to make.
type ground struct {
	classes classes
	// known has the classes as a peer sees them that doesn't know this host's networks.
	known classes
	sets  Sets
	// others, local and former have the sets of these names in a form for lookups.
	others bart.Lite
	local  bart.Lite
	former map[netip.Addr]bool
}

// PeerRules are the rules for one peer.
type PeerRules struct {
	PublicKey mesh.PublicKey
	Name      string
	Addresses mesh.Addresses
	// Permissions are the effective ones: LAN, for example, only together with Routing.
	Permissions mesh.Permissions
}

// Sets has the prefixes of each class, for enforcers that express the policy's table in a
// packet filter's language. They must match in the order Martians, Self, Mesh, LAN, as the
// classes do; a destination in none of them is class internet. Each set is sorted, without
// duplicates.
type Sets struct {
	Martians []netip.Prefix
	// Local is the part of Martians, with the broadcast addresses of the host's networks,
	// that the host receives or drops but never forwards, whoever sends the packet.
	Local []netip.Prefix
	// Self has the host's addresses, including its mesh addresses.
	Self []netip.Prefix
	// Mesh has the mesh prefixes. Peers has every peer's addresses as single addresses, which
	// are inside Mesh.
	Mesh, Peers []netip.Prefix
	LAN         []netip.Prefix
	// Outside has the single addresses of class lan from which a router returns packets for
	// WireGuard to this host (hairpin NAT): [Host.Outside], and the IPv6 addresses of a
	// translator that carry one.
	Outside []netip.Prefix
	// Others has the parts of the mesh prefixes that belong to another owner, such as another
	// VPN or a carrier. The host's own packets from and to them pass, except those for the
	// addresses of peers and former peers inside. A peer's packets to them are class mesh.
	// None is inside another.
	Others []netip.Prefix
	// Former has the addresses of removed peers that neither a peer nor the host has now, as
	// single addresses. Nothing is sent to them. They are class mesh, even outside Mesh.
	Former []netip.Prefix
}

// Compile makes the ruleset for a mesh on a host, with the grants of the time now;
// [Ruleset.Expires] is when the first of them ends. It refuses a mesh in which the source of
// a packet would be ambiguous (a name, key or address that occurs twice, or a peer with the
// host's address), a peer outside the prefixes, and facts that [Host.Validate] refuses. The
// ruleset keeps host, so its slices must not be changed afterwards; of m it has a copy.
func Compile(m Mesh, host Host, now time.Time) (*Ruleset, error) {
	if err := host.Validate(); err != nil {
		return nil, fmt.Errorf("compile ruleset: %w", err)
	}
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("compile ruleset: %w", err)
	}
	r := &Ruleset{mesh: m.clone(), host: host, ground: &ground{}}
	r.grant(now)
	r.sets = makeSets(r.mesh, host)
	for _, p := range r.sets.Others {
		r.others.Insert(p)
	}
	for _, p := range r.sets.Local {
		r.local.Insert(p)
	}
	r.former = make(map[netip.Addr]bool, len(r.sets.Former))
	for _, p := range r.sets.Former {
		r.former[p.Addr()] = true
	}
	r.classify()
	// An address that is also in a class before lan has that class, and is no such address.
	r.sets.Outside = slices.DeleteFunc(r.sets.Outside, func(p netip.Prefix) bool { return r.Class(p.Addr()) != OnLAN })
	return r, nil
}

// grant sets the peers' effective permissions at the time now, and expires.
func (r *Ruleset) grant(now time.Time) {
	r.peers = make([]PeerRules, len(r.mesh.Peers))
	for i, p := range r.mesh.Peers {
		r.peers[i] = PeerRules{
			PublicKey: p.PublicKey, Name: p.Name, Addresses: p.Addresses,
			Permissions: p.Permissions.At(now).Effective(),
		}
	}
	r.expires = r.mesh.nextEnd(now)
}

// At returns the ruleset at the time now: r itself before [Ruleset.Expires], and otherwise
// one without the grants that have ended, as [Compile] would make it from the same mesh and
// host. It is cheap, as both share a ground.
func (r *Ruleset) At(now time.Time) *Ruleset {
	if r.expires.IsZero() || now.Before(r.expires) {
		return r
	}
	later := *r
	later.grant(now)
	return &later
}

// Recompile returns what [Compile] would, given the previous ruleset r, which may be nil. If
// neither mesh nor host changed and no grant ended, it returns r. If only grants changed or
// ended it is cheap, as the new ruleset shares r's ground.
func (r *Ruleset) Recompile(m Mesh, host Host, now time.Time) (*Ruleset, error) {
	if r == nil || !sameButGrants(r.mesh, m) || !reflect.DeepEqual(r.host, host) {
		return Compile(m, host, now)
	}
	same := func(a, b mesh.Peer) bool { return a.Permissions == b.Permissions }
	if slices.EqualFunc(r.mesh.Peers, m.Peers, same) && (r.expires.IsZero() || now.Before(r.expires)) {
		return r, nil
	}
	other := *r
	other.mesh.Peers = slices.Clone(r.mesh.Peers)
	for i := range other.mesh.Peers {
		other.mesh.Peers[i].Permissions = m.Peers[i].Permissions
	}
	other.grant(now)
	return &other, nil
}

// sameButGrants reports whether two meshes differ in nothing but their peers' grants.
func sameButGrants(a, b Mesh) bool {
	return slices.Equal(a.Prefixes, b.Prefixes) && slices.Equal(a.Addresses, b.Addresses) &&
		slices.Equal(a.Former, b.Former) && a.ListenPort == b.ListenPort && a.Serves == b.Serves && a.ThroughPeer == b.ThroughPeer &&
		slices.EqualFunc(a.Peers, b.Peers, func(p, q mesh.Peer) bool {
			return p.PublicKey == q.PublicKey && p.Name == q.Name && p.Addresses == q.Addresses
		})
}

// classify fills the class tables from the sets.
func (r *Ruleset) classify() {
	c := &r.classes
	for i, p := range r.peers {
		c.add(InMesh, int32(i), singles(p.Addresses[:])...)
	}
	c.add(Martian, noPeer, r.sets.Martians...)
	c.add(Self, noPeer, r.sets.Self...)
	c.add(InMesh, noPeer, r.sets.Mesh...)
	c.add(InMesh, noPeer, r.sets.Former...) // they are outside Mesh if the prefixes changed
	c.add(OnLAN, noPeer, r.sets.LAN...)
	c.inherit()

	k := &r.known
	k.add(Martian, noPeer, martians...)
	k.add(Martian, noPeer, carried(slices.Concat(martians, r.sets.Mesh))...)
	k.add(Self, noPeer, singles(r.mesh.Addresses)...)
	k.add(InMesh, noPeer, slices.Concat(r.sets.Mesh, r.sets.Peers)...)
	k.add(OnLAN, noPeer, slices.Concat(private, carried(private))...)
	k.inherit()
}

// makeSets makes the sets of a mesh on a host. Outside still needs the classes; see Compile.
func makeSets(m Mesh, host Host) Sets {
	attached := host.attached()
	s := Sets{
		Local: slices.Clone(local),
		Self:  singles(slices.Concat(m.Addresses, host.addresses())),
		LAN:   slices.Concat(private, attached, host.routed(), singles(host.Outside)),
	}
	for _, p := range attached {
		s.Local = append(s.Local, broadcasts(p)...)
	}
	for _, p := range m.Prefixes {
		s.Mesh = append(s.Mesh, p.Masked())
	}
	for _, p := range m.Peers {
		s.Peers = append(s.Peers, singles(p.Addresses[:])...)
	}
	s.Martians = slices.Concat(martians, s.Local)
	s.Former = m.gone(slices.Concat(s.Self, s.Local))
	s.carry()
	s.Others = m.others(host)
	s.Outside = singles(host.Outside)
	for _, p := range carried(s.Outside) {
		if p.IsSingleIP() {
			s.Outside = append(s.Outside, p)
		}
	}
	for _, set := range []*[]netip.Prefix{&s.Martians, &s.Local, &s.Self, &s.Mesh, &s.Peers, &s.LAN, &s.Outside, &s.Others, &s.Former} {
		slices.SortFunc(*set, comparePrefix)
		*set = slices.Compact(*set)
	}
	s.Martians, s.Others = outermost(s.Martians), outermost(s.Others)
	return s
}

// gone returns the former addresses that are neither a peer's nor in local, which has the
// host's addresses and the broadcast addresses of its networks. It leaves out addresses that
// are neither in the mesh prefixes nor private, so that no public address is ever blocked.
func (m Mesh) gone(local []netip.Prefix) []netip.Prefix {
	if len(m.Former) == 0 {
		return nil
	}
	has := map[netip.Prefix]bool{}
	for _, p := range m.Peers {
		for _, a := range p.Addresses {
			has[single(a)] = true
		}
	}
	for _, p := range local {
		has[p] = true
	}
	return slices.DeleteFunc(singles(m.Former), func(p netip.Prefix) bool {
		a := p.Addr()
		return has[p] || !m.contains(a) && !slices.ContainsFunc(private, func(q netip.Prefix) bool { return q.Contains(a) })
	})
}

// carry adds the IPv6 prefixes that carry IPv4 addresses (6to4, NAT64 and the like; see
// carried) to the classes of these. Those that carry an address of the host or of the mesh
// become martians: the IPv6 address isn't the host's, and a translator would deliver the
// packet from outside. The exception is a host that has addresses in its own 6to4 prefix: it
// is a 6to4 router, and the prefix has its networks, which are class lan.
func (s *Sets) carry() {
	own := slices.Clone(s.Self)
	s.Martians = append(s.Martians, carried(slices.Concat(s.Martians, s.Mesh, s.Former))...)
	networks := s.LANOutsideMesh()
	slices.SortFunc(networks, comparePrefix)
	s.LAN = append(s.LAN, carried(outermost(networks))...)
	for _, p := range carried(own) {
		if slices.ContainsFunc(own, func(o netip.Prefix) bool { return p.Contains(o.Addr()) }) {
			s.LAN = append(s.LAN, p)
		} else {
			s.Martians = append(s.Martians, p)
		}
	}
}

// others returns the parts of the mesh prefixes that belong to another owner on this host:
// prefixes attached to other interfaces or reached by a route that isn't a default one, and
// the host's resolvers. If an uplink has an address in a mesh prefix, it returns the whole
// prefix, because the routers and servers of a carrier's network need not be in the attached
// part of it (RFC 6598).
func (m Mesh) others(host Host) []netip.Prefix {
	taken := slices.Concat(host.attached(), host.routed(), singles(host.Resolvers))
	uplinks := host.uplinkAddresses()
	var out []netip.Prefix
	for _, prefix := range m.Prefixes {
		prefix = prefix.Masked()
		if slices.ContainsFunc(uplinks, prefix.Contains) {
			out = append(out, prefix)
		}
		for _, p := range taken {
			switch {
			case !prefix.Overlaps(p):
			case p.Bits() < prefix.Bits():
				out = append(out, prefix)
			default:
				out = append(out, p)
			}
		}
	}
	return out
}

// outermost drops, from sorted prefixes, those that are inside another. It reuses the slice.
func outermost(sorted []netip.Prefix) []netip.Prefix {
	out := sorted[:0]
	for _, p := range sorted {
		if n := len(out); n == 0 || !out[n-1].Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

// holds reports whether p itself is an element of a sorted set.
func holds(sorted []netip.Prefix, p netip.Prefix) bool {
	_, ok := slices.BinarySearchFunc(sorted, p, comparePrefix)
	return ok
}

// comparePrefix sorts by address, IPv4 first, and then shorter prefixes first.
func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// clone returns a copy that shares no memory with m and lacks the fields of peers that the
// policy doesn't use.
func (m Mesh) clone() Mesh {
	m.Prefixes = slices.Clone(m.Prefixes)
	m.Addresses = slices.Clone(m.Addresses)
	m.Former = slices.Clone(m.Former)
	m.Peers = slices.Clone(m.Peers)
	for i := range m.Peers {
		p := &m.Peers[i]
		*p = mesh.Peer{Name: p.Name, PublicKey: p.PublicKey, Addresses: p.Addresses, Permissions: p.Permissions}
	}
	return m
}

// validate reports the first thing that Compile refuses about a mesh.
func (m Mesh) validate() error {
	taken := map[netip.Addr]string{}
	claim := func(who string, as []netip.Addr) error {
		for _, a := range as {
			if !mesh.IsPlain(a) {
				return fmt.Errorf("%s: address %v is not valid", who, a)
			}
			if other, ok := taken[a]; ok {
				return fmt.Errorf("%s: address %v is taken by %s", who, a, other)
			}
			taken[a] = who
		}
		return nil
	}
	for _, p := range m.Prefixes {
		if !p.IsValid() {
			return fmt.Errorf("mesh prefix %v is not valid", p)
		}
	}
	if err := claim("the host", m.Addresses); err != nil {
		return err
	}
	for _, a := range m.Former {
		if !mesh.IsPlain(a) {
			return fmt.Errorf("a removed peer's address %v is not valid", a)
		}
	}
	names, keys := map[string]bool{}, map[mesh.PublicKey]bool{}
	for _, p := range m.Peers {
		switch {
		case names[p.Name]:
			return fmt.Errorf("peer %q is listed twice", p.Name)
		case keys[p.PublicKey]:
			return fmt.Errorf("peer %q: another peer has its key", p.Name)
		}
		names[p.Name], keys[p.PublicKey] = true, true
		for _, a := range p.Addresses {
			if !m.contains(a) {
				return fmt.Errorf("peer %q: address %v is outside the mesh prefixes", p.Name, a)
			}
		}
		if err := claim(fmt.Sprintf("peer %q", p.Name), p.Addresses[:]); err != nil {
			return err
		}
	}
	return nil
}

// contains reports whether an address is inside one of the mesh prefixes.
func (m Mesh) contains(a netip.Addr) bool {
	return slices.ContainsFunc(m.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// nextEnd returns the earliest end after now of a grant, or the zero time.
func (m Mesh) nextEnd(now time.Time) time.Time {
	var next time.Time
	for i := range m.Peers {
		for _, g := range m.Peers[i].Permissions {
			if !g.In(now) || g.Until.IsZero() {
				continue
			}
			if next.IsZero() || g.Until.Before(next) {
				next = g.Until
			}
		}
	}
	return next
}

// Expires returns when the next grant ends, from when [Ruleset.At] returns another ruleset.
// It is zero if no grant has an end.
func (r *Ruleset) Expires() time.Time { return r.expires }

// Mesh returns the mesh that the ruleset was compiled from. It must not be
// changed.
func (r *Ruleset) Mesh() Mesh { return r.mesh }

// Host returns the facts that the ruleset was compiled from. They must not be
// changed.
func (r *Ruleset) Host() Host { return r.host }

// Peers returns the rules for each peer, in the order of the mesh's peers. They must not be
// changed.
func (r *Ruleset) Peers() []PeerRules { return r.peers }

// Sets returns the prefixes of each class. They must not be changed.
func (r *Ruleset) Sets() Sets { return r.sets }

// OutsidePorts returns the UDP ports from which a router may return packets to this host's
// WireGuard, sorted: none, one or two.
func (r *Ruleset) OutsidePorts() []uint16 {
	ports := slices.DeleteFunc([]uint16{r.mesh.ListenPort, r.host.OutsidePort}, func(p uint16) bool { return p == 0 })
	slices.Sort(ports)
	return slices.Compact(ports)
}

// IsForwarded reports whether a host that forwards would forward a packet to dst, which is
// so unless dst is an address of the host or in [Sets.Local].
func (r *Ruleset) IsForwarded(dst netip.Addr) bool {
	return r.classes.of(dst).class != Self && !r.local.Contains(dst)
}

// PeerByAddr returns the index in [Ruleset.Peers] of the peer with this address,
// and whether there is one.
func (r *Ruleset) PeerByAddr(a netip.Addr) (int, bool) {
	d := r.classes.of(a)
	return int(d.peer), d.peer != noPeer
}

// Class returns the class of a destination as a peer sees it.
func (r *Ruleset) Class(dst netip.Addr) Class { return r.classes.of(dst).class }
