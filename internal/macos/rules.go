package macos

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// labelPrefix begins the labels of our rules, so that pfctl -s labels shows
// whose counters they are.
const labelPrefix = "mesh-"

// Tags that a peer's packet carries from the interface it came in by to the one
// that it leaves by, where its source is translated already.
const (
	tagInternet = "mesh-internet"
	tagLAN      = "mesh-lan"
)

// loopback is the name of a Mac's loopback interface.
const loopback = "lo0"

// maxFlowsPerPeer bounds the states that a peer's address can make by one rule.
// pf holds 10000 of the whole host (PFSTATE_HIWAT in xnu bsd/net/pfvar.h), and
// a forwarded flow takes two: no peer can use all of them up.
const maxFlowsPerPeer = 1000

// clampMSS lets no TCP connection through the tunnel use segments that don't
// fit into it: RFC 879 and RFC 8200 8.3 give the headers' lengths.
func (b *builder) clampMSS(mtu int) {
	for _, f := range []struct {
		family  pfconf.Family
		headers int
	}{{pfconf.Inet, 40}, {pfconf.Inet6, 60}} {
		rule := on(pfconf.Both, b.host.Interface)
		rule.Action = pfconf.Scrub
		rule.Family = f.family
		rule.Normalize = pfconf.Normalize{MaxMSS: uint16(mtu - f.headers), Fragment: pfconf.FragmentReassemble}
		b.add(rule, "TCP through the tunnel uses segments that fit into it, in both directions; fragments are put together, for only a whole packet has the ports by which its flow is known")
	}
}

// translate writes network address translation: of peers' packets only, and only
// where they may leave.
func (b *builder) translate() {
	rule := on(pfconf.Both, b.host.Interface)
	rule.Action = pfconf.NoNat
	b.add(rule, "nothing is translated into the mesh: another product's rule could make a stranger look like this host")
	for _, name := range b.egress() {
		for _, family := range []pfconf.Family{pfconf.Inet, pfconf.Inet6} {
			b.nat(name, family)
		}
	}
	rule = on(pfconf.Both, b.host.Interface)
	rule.Action = pfconf.NoRdr
	b.add(rule, "what a peer may reach is judged by the destination that it sent to, so another product's redirection must not change it")
}

func (b *builder) nat(name string, family pfconf.Family) {
	rule := on(pfconf.Both, name)
	rule.Action = pfconf.Nat
	rule.Family = family
	rule.Pool = &pfconf.Pool{Addrs: []pfconf.Address{b.natAddress(name, family)}}
	switch {
	case name == b.uplink(family):
		rule.From = inTable(tableRouting)
		b.add(rule, "by the uplink, peers' packets leave with its address")
	case b.reaches(name, family):
		rule.From, rule.To = inTable(tableLAN), inTable(tableNetworks)
		b.add(rule, "by another interface, only those to other networks do; what isn't translated is stopped below")
	}
}

func (b *builder) uplink(family pfconf.Family) string {
	if family == pfconf.Inet {
		return b.host.Uplink4
	}
	return b.host.Uplink6
}

// egress returns the interfaces by which peers' packets may leave, sorted.
func (b *builder) egress() []string {
	names := []string{b.host.Uplink4, b.host.Uplink6}
	for _, i := range b.host.Interfaces {
		names = append(names, i.Name)
	}
	for _, r := range b.host.Routes {
		names = append(names, r.Interface)
	}
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(name string) bool {
		return name == "" || name == loopback || name == b.host.Interface
	})
}

// reaches reports whether anything of a family is known to be behind an
// interface.
func (b *builder) reaches(name string, family pfconf.Family) bool {
	return len(b.addresses(name, family)) > 0 || slices.ContainsFunc(b.host.Routes, func(r policy.Route) bool {
		return r.Interface == name && isFamily(r.Prefix.Addr(), family)
	})
}

// addresses returns an interface's addresses of a family that can be used
// beyond the link.
func (b *builder) addresses(name string, family pfconf.Family) []netip.Addr {
	var out []netip.Addr
	for _, i := range b.host.Interfaces {
		if i.Name != name {
			continue
		}
		for _, p := range i.Addresses {
			if a := p.Addr(); isFamily(a, family) && !(a.Is6() && a.IsLinkLocalUnicast()) {
				out = append(out, a)
			}
		}
	}
	return out
}

func isFamily(a netip.Addr, family pfconf.Family) bool { return a.Is4() == (family == pfconf.Inet) }

// natAddress returns what packets leave with: (en0:0), the interface's first
// address at the time, of several not each in turn. Only where that would give
// what goes to the internet a unique local IPv6 address is it a global one as
// observed; the anchor is loaded again when that changes.
func (b *builder) natAddress(name string, family pfconf.Family) pfconf.Address {
	if family == pfconf.Inet6 && name == b.host.Uplink6 {
		as := b.addresses(name, family)
		global := slices.IndexFunc(as, func(a netip.Addr) bool { return !a.IsPrivate() })
		if global > 0 {
			return pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: netip.PrefixFrom(as[global], 128)}
		}
	}
	return pfconf.Address{Kind: pfconf.AddrDynamic, Name: name, Mod: pfconf.ModNoAlias}
}

// icmpTypes are a family's ICMP types that are judged by more than addresses:
// errors, which carry the packet that they are about, and redirects.
var icmpTypes = []struct {
	family   pfconf.Family
	proto    pfconf.Proto
	errors   []uint8
	redirect uint8
}{
	{pfconf.Inet, pfconf.ProtoICMP, []uint8{3, 11, 12}, 5},
	{pfconf.Inet6, pfconf.ProtoICMPv6, []uint8{1, 2, 3, 4}, 137},
}

func icmp(rule pfconf.Rule, family pfconf.Family, proto pfconf.Proto, types ...uint8) pfconf.Rule {
	rule.Family = family
	rule.Protos = []pfconf.Proto{proto}
	for _, t := range types {
		rule.ICMP = append(rule.ICMP, pfconf.ICMPMatch{V6: family == pfconf.Inet6, Type: t})
	}
	return rule
}

// fromPeers writes the table "From a peer" of the policy: the first class that
// the destination fits decides.
func (b *builder) fromPeers() {
	in := on(pfconf.In, b.host.Interface)
	with := func(from, to pfconf.Endpoint) pfconf.Rule {
		rule := in
		rule.From, rule.To = from, to
		return rule
	}
	var anyone pfconf.Endpoint
	b.block(with(notInTable(tablePeers), anyone), "spoofed", "what comes out of the tunnel has a peer's address; answers to this host from elsewhere, while it routes through a peer, have a state and don't come here")
	b.block(with(anyone, inTable(tableMartians)), "martian", "class 1, martian: never")
	for _, t := range icmpTypes {
		b.block(icmp(in, t.family, t.proto, t.redirect), "redirect", "nobody tells this host another route")
		b.block(icmp(in, t.family, t.proto, t.errors...), "unquoted", "an ICMP error that is about a flow has that flow's state and doesn't come here; the others are forged")
	}
	b.peerPass(with(inTable(tableIncoming), inTable(tableSelf)), "incoming", "class 2, self: with incoming")
	dns := with(inTable(tableDNS), inTable(tableHost))
	dns.Protos = []pfconf.Proto{pfconf.ProtoTCP, pfconf.ProtoUDP}
	dns.To.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: 53}}
	b.peerPass(dns, "dns", "class 2: this host's DNS also with routing")
	b.block(with(anyone, inTable(tableSelf)), "no-incoming", "class 2: all else is closed")
	b.block(with(anyone, inTable(tableMesh)), "mesh", "class 3, mesh: peers never reach each other through this host")
	lan := with(inTable(tableLAN), inTable(tableNetworks))
	lan.Tag = tagLAN
	b.peerPass(lan, "lan", "class 4, lan: with routing and lan")
	b.block(with(anyone, inTable(tableNetworks)), "no-lan", "class 4: all else is closed")
	internet := with(inTable(tableRouting), anyone)
	internet.Tag = tagInternet
	b.peerPass(internet, "internet", "class 5, internet: with routing")
	b.block(in, "no-routing", "all else is closed")
}

// peerPass is pass for what a peer opens: a peer's flows are bounded.
func (b *builder) peerPass(rule pfconf.Rule, label, why string) {
	rule.StateOptions.SourceTrack = pfconf.SourceTrackRule
	rule.StateOptions.MaxSrcStates = maxFlowsPerPeer
	b.pass(rule, label, why)
}

// towardsPeers writes what may go into the tunnel besides answers, which have a
// state.
func (b *builder) towardsPeers() {
	out := on(pfconf.Out, b.host.Interface)
	for _, t := range icmpTypes {
		b.block(icmp(out, t.family, t.proto, t.redirect), "redirect", "this host tells no peer another route")
	}
	b.keepCut(out)
	toPeer := out
	toPeer.From, toPeer.To = inTable(tableHost), inTable(tablePeers)
	b.pass(toPeer, "to-peer", "this host itself opens flows to its peers")
	nobody := out
	nobody.To = inTable(tableAway)
	b.block(nobody, "nobody", "to a mesh address that no peer has, or from another address of this host than its mesh address")
	through := out
	through.From = inTable(tableHost)
	b.pass(through, "through-peer", "while this host routes through a peer, its own packets to anywhere")
	b.block(out, "to-mesh", "nobody else opens a flow to a peer or through one")
}

// keepCut keeps connections dead that peers had opened: of this host's own packets
// without a state, those that begin nothing. flags A/A are all segments of TCP but
// the first.
func (b *builder) keepCut(out pfconf.Rule) {
	const why = "what a peer opened and may no longer isn't revived from this side"
	out.From, out.To = inTable(tableHost), inTable(tableCut)
	segments := out
	segments.Protos = []pfconf.Proto{pfconf.ProtoTCP}
	segments.Flags = &pfconf.Flags{Set: pfconf.FlagACK, Mask: pfconf.FlagACK}
	b.block(segments, "cut", why)
	b.block(icmp(out, pfconf.Inet, pfconf.ProtoICMP, 0), "cut", why)
	b.block(icmp(out, pfconf.Inet6, pfconf.ProtoICMPv6, 129), "cut", why)
}

// elsewhere writes what holds on all interfaces but the mesh's.
func (b *builder) elsewhere() {
	in := notOn(pfconf.In, b.host.Interface)
	own := on(pfconf.In, loopback)
	own.Action, own.Quick, own.State, own.Flags = pfconf.Pass, true, pfconf.NoState, &pfconf.Flags{}
	own.Label = labelPrefix + "loopback"
	to, from := own, own
	to.To, from.From = inTable(tableHost), inTable(tableHost)
	const why = "this host talks to its own mesh addresses, and from them, by the loopback interface, and isn't caught by the next lines"
	b.add(to, why)
	b.add(from, why)
	spoofed := in
	spoofed.From = inTable(tablePeers)
	b.block(spoofed, "elsewhere-spoofed", "a peer's address comes from the tunnel only")
	forged := in
	forged.From = inTable(tableHost)
	b.block(forged, "forged", "this host's mesh address comes from nowhere else: nobody on another network poses as this host, and forwarded through a peer such a packet would look like its own")
	toHost := in
	toHost.To = inTable(tableHost)
	b.block(toHost, "weak-host", "this host's mesh addresses are reached by the tunnel only: a Mac that forwards accepts them on every interface")
	away := notOn(pfconf.Both, b.host.Interface)
	away.To = inTable(tableAway)
	b.block(away, "away", "nobody elsewhere opens a flow to a peer, and what this host sends to one leaves by the tunnel or not at all, also when the tunnel is down or the peer is gone")
}

// leaving writes what holds where peers' packets leave: here their source is
// translated, so they are known by their tag.
func (b *builder) leaving() {
	untranslated := notOn(pfconf.Out, b.host.Interface)
	untranslated.From = inTable(tablePeers)
	b.block(untranslated, "untranslated", "no packet leaves with a peer's address: pf lets it through as it is when the interface has no address to give, or no port is left")
	tagged := func(rule pfconf.Rule, tag string) pfconf.Rule {
		rule.Tagged = tag
		return rule
	}
	for _, family := range []pfconf.Family{pfconf.Inet, pfconf.Inet6} {
		if b.uplink(family) == "" || !b.anyRouting(family) {
			continue
		}
		rule := tagged(on(pfconf.Out, b.uplink(family)), tagInternet)
		rule.Family = family
		b.pass(rule, "uplink", "class internet leaves by the uplink, and its answers come in by it only")
	}
	b.block(tagged(pfconf.Rule{Direction: pfconf.Out}, tagInternet), "not-uplink", "class internet leaves by nothing else")
	b.block(tagged(on(pfconf.Out, loopback), tagLAN), "lan-loopback", "class lan doesn't come back to this host")
	if len(b.sets[tableLAN].in) > 0 {
		b.pass(tagged(notOn(pfconf.Out, b.host.Interface), tagLAN), "lan-out", "class lan leaves by any other interface, and its answers come in by that one only")
	}
}

// anyRouting reports whether a peer may reach the internet in a family.
func (b *builder) anyRouting(family pfconf.Family) bool {
	return slices.ContainsFunc(b.sets[tableRouting].in, func(p netip.Prefix) bool { return isFamily(p.Addr(), family) })
}

// closeTransit writes that what has nothing to do with the mesh isn't forwarded
// where it wasn't before.
func (b *builder) closeTransit() {
	for _, f := range []struct {
		family pfconf.Family
		found  bool
	}{
		{pfconf.Inet, b.host.FoundForwarding.IPv4},
		{pfconf.Inet6, b.host.FoundForwarding.IPv6},
	} {
		if f.found {
			continue
		}
		rule := notOn(pfconf.In, b.host.Interface)
		rule.Family = f.family
		rule.To = notInTable(tableLocal)
		b.block(rule, "transit", "this host didn't forward before, so what came in elsewhere and isn't for it goes nowhere")
	}
}
