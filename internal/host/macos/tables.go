package macos

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// The tables of the anchor.
const (
	tablePeers      = "peers"
	tableIncoming   = "incoming"
	tableDNS        = "dns"
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

var tableReasons = map[string]string{
	tablePeers:      "every peer's addresses",
	tableIncoming:   "peers that may connect to this host",
	tableDNS:        "peers that may ask this host's DNS",
	tableRouting:    "peers that may reach the internet, in the families that this host forwards and has an uplink for",
	tableLAN:        "peers that may also reach this host's other networks, in the families that it forwards",
	tableMartians:   "destinations that are never valid, the attached networks' broadcast addresses, and IPv6 addresses that carry one of those, of this host or of the mesh",
	tableSelf:       "every address of this host; as observed, for the word self would leave out temporary IPv6 addresses",
	tableHost:       "this host's own mesh addresses",
	tableMesh:       "the mesh prefixes",
	tableNetworks:   "private address space, the attached networks, what this host reaches other than by its default route, and IPv6 addresses that carry such an IPv4 address",
	tableAway:       "mesh addresses that aren't this host's, and so have no business on another interface, with those of peers that were removed a short time ago; what is behind ! is another owner's part of the mesh prefixes",
	tableCut:        "peers that lost access to this host a short time ago",
	tableLooped:     "what this host's routes lead to the loopback interface",
	tableOutside:    "addresses by which others know this host, where its router turns packets for WireGuard back to it",
	tableUnassigned: "the mesh prefixes, and peers that were removed a short time ago",
	tableLocal:      "destinations that are not forwarded: this host's addresses, broadcast and multicast",
}

// A set is the content of a table. Entries in not are negated: pf lets the
// longest entry decide that holds an address.
type set struct {
	in, not []netip.Prefix
}

// table returns the set as a pf table, in the form in which pf holds it.
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

// holdable returns the prefixes as a table can hold them: masked, each once, and
// without the all-zero hosts. A table drops 0.0.0.0 and :: in silence (they are
// the root of its radix tree; a shorter prefix from there is held), so :: is
// written ::/127 with the loopback address, its only neighbour, and 0.0.0.0 is in
// 0.0.0.0/8 wherever it matters. Where the neighbour isn't in the set, the
// all-zero host is left out: it is no address of a host or a peer, and the kernel
// forwards nothing to it.
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

// fillSets computes what is in each table.
func tableContents(r *policy.Ruleset) map[string]set {
	all := r.Sets()
	host := hostPrefixes(r.Mesh().Addresses)
	return map[string]set{
		tablePeers:      {in: peersWith(r, 0, anyFamily)},
		tableIncoming:   {in: peersWith(r, mesh.Incoming, anyFamily)},
		tableDNS:        {in: dnsPeers(r)},
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
}

// formerOutside returns the removed peers' addresses outside of the mesh prefixes, which
// were others then: they are class mesh, too.
func formerOutside(all policy.Sets) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(all.Former), func(p netip.Prefix) bool { return contained(p, all.Mesh) })
}

// loopedRoutes returns what the host's routes lead to its loopback interface.
func loopedRoutes(h policy.Host) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range h.Routes {
		if r.Interface == loopback && r.Prefix.Bits() > 0 {
			out = append(out, r.Prefix.Masked())
		}
	}
	return sorted(out)
}

var anyFamily = policy.Families{IPv4: true, IPv6: true}

// routedFamilies are the families in which the internet can be reached.
func routedFamilies(h policy.Host) policy.Families {
	return policy.Families{
		IPv4: h.Forwarding.IPv4 && h.Uplink4 != "",
		IPv6: h.Forwarding.IPv6 && h.Uplink6 != "",
	}
}

// peersWith returns the addresses of the peers that have all of these
// permissions. An address that the policy gives to something else, such as an
// interface's own address inside the mesh prefix, is no peer's.
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

// dnsPeers returns the peers that may ask the host's DNS without incoming.
func dnsPeers(r *policy.Ruleset) []netip.Prefix {
	if !r.Mesh().DNS {
		return nil
	}
	return peersWith(r, mesh.Routing, anyFamily)
}

// awaySet is what is reached by the mesh interface only: every address of a peer,
// also of one that was removed a short time ago, and of the mesh prefixes what
// isn't another owner's.
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

// contained reports whether a prefix is inside one of others.
func contained(p netip.Prefix, others []netip.Prefix) bool {
	return slices.ContainsFunc(others, func(o netip.Prefix) bool { return o.Contains(p.Addr()) && o.Bits() <= p.Bits() })
}

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
