package macos

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// The names of the anchor's tables, shorter than 32 bytes (PF_TABLE_NAME_SIZE in xnu
// bsd/net/pfvar.h). tableReasons says what each holds.
const (
	tablePeers      = "peers"
	tableIncoming   = "incoming"
	tableRouting    = "routing"
	tableLAN        = "lan"
	tableMartians   = "martians"
	tableSelf       = "own"
	tableHost       = "host"
	tableMesh       = "mesh"
	tableNetworks   = "networks"
	tableAway       = "away"
	tableCut        = "cut"
	tableLocal      = "local"
	tableLooped     = "looped"
	tableUnassigned = "unassigned"
	tableOutside    = "outside"
)

// reasonOf returns [Line.Why] of a table.
func reasonOf(table string) string {
	for _, s := range policy.AllServices {
		if s.Name == table {
			return "peers that may reach " + s.What
		}
	}
	return tableReasons[table]
}

// tableReasons has [Line.Why] for each table but those of services.
var tableReasons = map[string]string{
	tablePeers:      "every peer's addresses",
	tableIncoming:   "peers that may connect to this host",
	tableRouting:    "peers that may reach the internet, in the families that this host forwards and has an uplink for",
	tableLAN:        "peers that may also reach this host's other networks, in the families that it forwards",
	tableMartians:   "destinations that are never valid, the attached networks' broadcast addresses, and IPv6 addresses that embed one of those, of this host or of the mesh",
	tableSelf:       "every address of this host, as observed: the keyword self would leave out temporary IPv6 addresses",
	tableHost:       "this host's own mesh addresses",
	tableMesh:       "the mesh prefixes",
	tableNetworks:   "private address space, the attached networks, destinations that this host reaches other than by its default route, and IPv6 addresses that embed such an IPv4 address",
	tableAway:       "mesh addresses that aren't this host's, and so don't belong on any other interface, and those of recently removed peers; entries with ! are another owner's part of the mesh prefixes",
	tableCut:        "peers that recently lost access to this host",
	tableLooped:     "destinations that this host's routes send to the loopback interface",
	tableOutside:    "this host's public addresses, from which its router sends packets for WireGuard back to it",
	tableUnassigned: "the mesh prefixes, and recently removed peers",
	tableLocal:      "destinations that are not forwarded: this host's addresses, broadcast and multicast",
}

// serviceTables returns the names of the tables of services. Each has the peers that reach
// the service without incoming, and exists, empty, while it isn't served.
func serviceTables() (names []string) {
	for _, s := range policy.AllServices {
		names = append(names, s.Name)
	}
	return names
}

// A set is the content of a table. The entries of not are negated ("!"): the longest
// prefix that contains an address decides (pf.conf(5), TABLES).
type set struct {
	in, not []netip.Prefix
}

// table returns the set as a pf table, in the form in which pf stores it.
func (s set) table(name string) *pfconf.Table {
	t := &pfconf.Table{Name: name, HasAddrs: true, Addrs: make([]pfconf.Address, 0, len(s.in)+len(s.not))}
	for _, p := range storable(s.in) {
		t.Addrs = append(t.Addrs, pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: p})
	}
	for _, p := range storable(s.not) {
		t.Addrs = append(t.Addrs, pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: p, Not: true})
	}
	return t
}

// storable returns the prefixes as a table can store them: masked, without duplicates
// and without the hosts 0.0.0.0 and ::. A table drops these two without an error,
// because they are the root of its radix tree; shorter prefixes that start there are
// stored. So :: is written as ::/127, together with the loopback address, if that is in
// the set too; 0.0.0.0 is in 0.0.0.0/8 wherever it matters. Otherwise the entry is left
// out: no host or peer has that address, and the kernel forwards nothing to it.
func storable(ps []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(ps))
	for _, p := range ps {
		p = p.Masked()
		if p.IsSingleIP() && p.Addr().IsUnspecified() {
			if !slices.Contains(ps, netip.PrefixFrom(p.Addr().Next(), p.Bits())) {
				continue
			}
			p = netip.PrefixFrom(p.Addr(), p.Bits()-1)
		}
		out = append(out, p)
	}
	return sorted(out)
}

// tableContents returns the content of each table by name.
func tableContents(r *policy.Ruleset) map[string]set {
	all := r.Sets()
	host := hostPrefixes(r.Mesh().Addresses)
	out := map[string]set{
		tablePeers:      {in: peersWith(r, 0, anyFamily)},
		tableIncoming:   {in: peersWith(r, mesh.Incoming, anyFamily)},
		tableRouting:    {in: peersWith(r, mesh.Routing, routedFamilies(r.Host()))},
		tableLAN:        {in: peersWith(r, mesh.Routing|mesh.LAN, r.Host().Forwarding)},
		tableMartians:   {in: all.Martians},
		tableSelf:       {in: all.Self},
		tableHost:       {in: host},
		tableMesh:       {in: sorted(slices.Concat(all.Mesh, formerOutside(all)))},
		tableNetworks:   {in: all.LAN},
		tableAway:       awaySet(r, host),
		tableLocal:      {in: sorted(slices.Concat(all.Self, all.Local))},
		tableOutside:    {in: all.Outside},
		tableLooped:     {in: loopedRoutes(r.Host())},
		tableUnassigned: {in: sorted(slices.Concat(all.Mesh, all.Former))},
	}
	for _, s := range policy.AllServices {
		out[s.Name] = set{}
		if r.Mesh().Serves.Has(s.Set) {
			out[s.Name] = set{in: peersWith(r, s.Needs, anyFamily)}
		}
	}
	return out
}

// formerOutside returns removed peers' addresses outside the mesh prefixes, which were
// different at that time. They are of class mesh too.
func formerOutside(all policy.Sets) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(all.Former), func(p netip.Prefix) bool { return contained(p, all.Mesh) })
}

// loopedRoutes returns the destinations of routes to the loopback interface.
func loopedRoutes(h policy.Host) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range h.Routes {
		if r.Interface == loopback && r.Prefix.Bits() > 0 {
			out = append(out, r.Prefix.Masked())
		}
	}
	return sorted(out)
}

// anyFamily selects both families.
var anyFamily = policy.Families{IPv4: true, IPv6: true}

// routedFamilies returns the families in which this host forwards to an uplink.
func routedFamilies(h policy.Host) policy.Families {
	return policy.Families{
		IPv4: h.Forwarding.IPv4 && h.Uplink4 != "",
		IPv6: h.Forwarding.IPv6 && h.Uplink6 != "",
	}
}

// peersWith returns the addresses of the peers that have all permissions of want, in
// these families. It leaves out addresses that the policy doesn't count as the peer's,
// such as one that an interface of this host has.
func peersWith(r *policy.Ruleset, want mesh.Permissions, families policy.Families) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range r.Peers() {
		if !p.Permissions.Has(want) {
			continue
		}
		for _, a := range p.Addresses {
			if _, ok := r.PeerByAddr(a); ok && families.Of(a) {
				out = append(out, netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	return sorted(out)
}

// awaySet returns the destinations that may be reached by the mesh interface only: the
// addresses of peers and of recently removed ones, and the mesh prefixes except for
// the parts that another network owns.
func awaySet(r *policy.Ruleset, host []netip.Prefix) set {
	all := r.Sets()
	kept := sorted(slices.Concat(peersWith(r, 0, anyFamily), all.Former))
	var s set
	for _, p := range slices.Concat(all.Others, all.Self, host) {
		if contained(p, all.Mesh) && !slices.Contains(kept, p) {
			s.not = append(s.not, p)
		}
	}
	s.not = sorted(s.not)
	for _, m := range all.Mesh {
		if !slices.Contains(s.not, m) {
			s.in = append(s.in, m)
		}
	}
	s.in = sorted(append(s.in, kept...))
	s.not = slices.DeleteFunc(s.not, func(p netip.Prefix) bool { return !contained(p, s.in) })
	return s
}

// contained reports whether one of others contains a prefix.
func contained(p netip.Prefix, others []netip.Prefix) bool {
	return slices.ContainsFunc(others, func(o netip.Prefix) bool { return o.Contains(p.Addr()) && o.Bits() <= p.Bits() })
}

// hostPrefixes returns a /32 or /128 for each address, sorted.
func hostPrefixes(as []netip.Addr) []netip.Prefix {
	out := make([]netip.Prefix, len(as))
	for i, a := range as {
		out[i] = netip.PrefixFrom(a, a.BitLen())
	}
	return sorted(out)
}

// sorted sorts in place, by address and then length, and drops duplicates.
func sorted(ps []netip.Prefix) []netip.Prefix {
	slices.SortFunc(ps, netip.Prefix.Compare)
	return slices.Compact(ps)
}
