package macos

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/darwin"
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

// MaxStates is how many states pf holds for the whole host (PFSTATE_HIWAT in xnu
// bsd/net/pfvar.h). An anchor can't raise it: `set limit` counts in the main
// ruleset only.
const MaxStates = 10_000

// StatesPerForwarded is how many of them a forwarded flow takes: one where it
// comes in and one, with its translation, where it leaves. A flow to this host
// takes one.
const StatesPerForwarded = 2

// maxFlowsPerAddress bounds the flows that one address of a peer has by all rules
// together. The guard holds the exact bound of a peer (a quarter of what pf
// holds); this is the second line, for when the guard isn't there. It is counted
// where a peer's packets come in: where they leave, all peers have one address.
const maxFlowsPerAddress = MaxStates / 4 / StatesPerForwarded

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

// reassemble puts the fragments of answers to peers together, which come in to an
// address of this host's: only a whole packet is translated back. Not those of
// IPv6, of which pf puts together only what comes in order, and so would lose
// this host's own; nor with no-df, which would take path MTU discovery from
// everything that comes in.
func (b *builder) reassemble() {
	for _, e := range b.egress() {
		if e.family != pfconf.Inet || !b.mayLeave(e) {
			continue
		}
		rule := on(pfconf.In, e.name)
		rule.Action, rule.Family, rule.To = pfconf.Scrub, pfconf.Inet, inTable(tableSelf)
		rule.Normalize = pfconf.Normalize{Fragment: pfconf.FragmentReassemble}
		b.add(rule, "an answer that comes in fragments has ports, and so reaches the peer that asked, only when it was put together")
	}
}

// translate writes network address translation: of peers' packets only, and only
// where they may leave.
func (b *builder) translate() {
	rule := on(pfconf.Both, b.host.Interface)
	rule.Action = pfconf.NoNat
	b.add(rule, "nothing is translated into the mesh: another product's rule could make a stranger look like this host")
	for _, e := range b.egress() {
		if !b.options.NoPorts {
			b.nat(e)
		}
	}
	rule = on(pfconf.Both, b.host.Interface)
	rule.Action = pfconf.NoRdr
	b.add(rule, "what a peer may reach is judged by the destination that it sent to, so another product's redirection must not change it")
}

func (b *builder) nat(e Egress) {
	rule := on(pfconf.Both, e.name)
	rule.Action = pfconf.Nat
	rule.Family = e.family
	ports := b.ports()
	rule.Pool = &pfconf.Pool{Addrs: []pfconf.Address{b.natAddress(e)}, PortLo: ports.First, PortHi: ports.Last}
	if e.name == b.uplink(e.family) {
		rule.From = inTable(tableRouting)
		b.add(rule, "by the uplink, peers' packets leave with its address, and from ports that no socket of this host has or may get")
		return
	}
	rule.From, rule.To = inTable(tableLAN), inTable(tableNetworks)
	b.add(rule, "by another interface, only those to other networks do; what isn't translated is stopped below")
}

// ports returns the range that peers' packets leave with.
func (b *builder) ports() darwin.PortRange {
	r := b.options.Ports
	if r == (darwin.PortRange{}) {
		r = defaultPorts
	}
	return withoutPort(r, b.ruleset.Mesh().ListenPort)
}

func (b *builder) uplink(family pfconf.Family) string {
	if family == pfconf.Inet {
		return b.host.Uplink4
	}
	return b.host.Uplink6
}

// mayLeave reports whether a peer's packets may leave there now.
func (b *builder) mayLeave(e Egress) bool {
	table := tableLAN
	if e.name == b.uplink(e.family) {
		table = tableRouting
	}
	return slices.ContainsFunc(b.sets[table].in, func(p netip.Prefix) bool { return isFamily(p.Addr(), e.family) })
}

// Egress is an interface by which peers' packets leave in one family.
type Egress struct {
	name   string
	family pfconf.Family
}

// egress returns where peers' packets may leave, sorted: what the facts name, and
// what was one before. pf takes a rule for an interface that isn't there, and
// matches nothing by it.
func (b *builder) egress() []Egress {
	all := slices.Concat(egressOf(b.host), b.options.PastEgress)
	slices.SortFunc(all, Egress.compare)
	return slices.Compact(all)
}

func (e Egress) compare(f Egress) int {
	return cmp.Or(cmp.Compare(e.name, f.name), cmp.Compare(e.family, f.family))
}

// egressOf returns the uplinks, and each interface other than the mesh's and
// loopback that has an address of a family or a route of it.
func egressOf(h policy.Host) []Egress {
	var out []Egress
	for _, family := range []pfconf.Family{pfconf.Inet, pfconf.Inet6} {
		names := map[string]bool{h.Uplink4: family == pfconf.Inet}
		if family == pfconf.Inet6 {
			names = map[string]bool{h.Uplink6: true}
		}
		for _, i := range h.Interfaces {
			names[i.Name] = names[i.Name] || len(addresses(h, i.Name, family)) > 0
		}
		for _, r := range h.Routes {
			names[r.Interface] = names[r.Interface] || isFamily(r.Prefix.Addr(), family)
		}
		for name, ok := range names {
			if ok && name != "" && name != h.Interface && name != loopback {
				out = append(out, Egress{name, family})
			}
		}
	}
	return out
}

// addresses returns an interface's addresses of a family that can be used
// beyond the link.
func addresses(h policy.Host, name string, family pfconf.Family) []netip.Addr {
	var out []netip.Addr
	for _, i := range h.Interfaces {
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
// address at the time, of several not each in turn. By the uplink, IPv6 packets
// leave with the address that the facts name, as it is: what pf takes for (en0) is
// what was right when an address last came or went there, without one that was
// still tentative and with one that is deprecated now (pfi_instance_add in xnu
// bsd/net/pf_if.c), and may be a unique local one beside a global one. The anchor is
// loaded again when that address changes.
func (b *builder) natAddress(e Egress) pfconf.Address {
	if e.family == pfconf.Inet6 && e.name == b.host.Uplink6 && b.host.Source6.IsValid() {
		return pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: netip.PrefixFrom(b.host.Source6, 128)}
	}
	return pfconf.Address{Kind: pfconf.AddrDynamic, Name: e.name, Mod: pfconf.ModNoAlias}
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

// passJudged is pass for each protocol that peers' flows may have, unless the rule
// names one. The others are dropped: a NAT keeps flows without ports apart by
// addresses alone, so a peer's ESP or GRE could take this host's own.
func (b *builder) passJudged(rule pfconf.Rule, label, why string) {
	if rule.Protos != nil {
		b.pass(rule, label, why)
		return
	}
	for _, p := range []struct {
		family pfconf.Family
		protos []pfconf.Proto
	}{
		{pfconf.AnyFamily, []pfconf.Proto{pfconf.ProtoTCP, pfconf.ProtoUDP}},
		{pfconf.Inet, []pfconf.Proto{pfconf.ProtoICMP}},
		{pfconf.Inet6, []pfconf.Proto{pfconf.ProtoICMPv6}},
	} {
		one := rule
		one.Family, one.Protos = p.family, p.protos
		b.pass(one, label, why)
	}
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
	b.selfTraffic(in)
	b.block(with(notInTable(tablePeers), anyone), "spoofed", "what comes out of the tunnel has a peer's address")
	b.block(with(anyone, inTable(tableMartians)), "martian", "class 1, martian: never")
	for _, t := range icmpTypes {
		b.block(icmp(in, t.family, t.proto, t.redirect), "redirect", "this host takes no redirects")
		b.block(icmp(in, t.family, t.proto, t.errors...), "unquoted", "an ICMP error that is about a flow has that flow's state and doesn't come here; the others are forged")
	}
	if port := b.ruleset.Mesh().ListenPort; port != 0 {
		tunnel := with(anyone, inTable(tableSelf))
		tunnel.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		tunnel.To.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: port}}
		b.block(tunnel, "wireguard", "no tunnel inside the tunnel")
	}
	b.peerPass(with(inTable(tableIncoming), inTable(tableSelf)), "incoming", "class 2, self: with incoming")
	dns := with(inTable(tableDNS), inTable(tableHost))
	dns.Protos = []pfconf.Proto{pfconf.ProtoTCP, pfconf.ProtoUDP}
	dns.To.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: 53}}
	b.peerPass(dns, "dns", "class 2: this host's DNS also with routing")
	b.block(with(anyone, inTable(tableSelf)), "no-incoming", "class 2: all else is closed")
	b.block(with(anyone, inTable(tableMesh)), "mesh", "class 3, mesh: peers never reach each other through this host")
	b.block(with(anyone, inTable(tableLooped)), "lan-loopback", "class lan doesn't come back to this host: what its routes lead to the loopback interface is judged here, for that one is often skipped (after Internet Sharing ran, for one)")
	if b.options.IKE {
		ike := in
		ike.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		ike.From.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: ikePort}}
		b.block(ike, "ike", "pf leaves UDP port 500 as it is, and a socket of this host has it: answers to that one would go to the peer")
	}
	for _, port := range b.ruleset.OutsidePorts() {
		hairpin := with(anyone, inTable(tableOutside))
		hairpin.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		hairpin.To.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: port}}
		b.block(hairpin, "hairpin", "no tunnel inside the tunnel by way of the router in front, which turns packets for its own address back")
	}
	lan := with(inTable(tableLAN), inTable(tableNetworks))
	lan.Tag = tagLAN
	b.peerPass(lan, "lan", "class 4, lan: with routing and lan")
	b.block(with(anyone, inTable(tableNetworks)), "no-lan", "class 4: all else is closed")
	internet := with(inTable(tableRouting), anyone)
	internet.Tag = tagInternet
	b.peerPass(internet, "internet", "class 5, internet: with routing")
	b.block(in, "no-routing", "all else is closed")
}

// turnedRound lets this host's packets to its own mesh address through the mesh
// interface, both ways: the route to an own address on a point-to-point interface
// leads into it (in_ifinit in xnu bsd/netinet/in.c), and the guard turns such
// packets round. They are the one exception to the table, and make no state.
func (b *builder) selfTraffic(rule pfconf.Rule) {
	rule.Action, rule.Quick, rule.State, rule.Flags = pfconf.Pass, true, pfconf.NoState, &pfconf.Flags{}
	rule.From, rule.To = inTable(tableHost), inTable(tableHost)
	rule.Label = labelPrefix + "own"
	b.add(rule, "this host's packets to its own mesh address leave by the tunnel and are turned round there")
}

// peerPass is pass for what a peer opens: flows of the protocols that are judged,
// bounded in number.
func (b *builder) peerPass(rule pfconf.Rule, label, why string) {
	rule.StateOptions.SourceTrack = pfconf.SourceTrackGlobal
	rule.StateOptions.MaxSrcStates = maxFlowsPerAddress
	b.passJudged(rule, label, why)
}

// towardsPeers writes what may go into the tunnel besides answers, which have a
// state.
func (b *builder) towardsPeers() {
	out := on(pfconf.Out, b.host.Interface)
	b.selfTraffic(out)
	for _, t := range icmpTypes {
		b.block(icmp(out, t.family, t.proto, t.redirect), "redirect", "this host tells no peer another route")
	}
	b.blockCut(out)
	toPeer := out
	toPeer.From, toPeer.To = inTable(tableHost), inTable(tablePeers)
	b.passJudged(toPeer, "to-peer", "this host itself opens flows to its peers")
	b.block(out, "to-mesh", "nothing else: neither to a mesh address that no peer has, nor from another address of this host than its mesh address; this host sends nothing through a peer, and no other host opens a flow to a peer")
}

// keepCut keeps connections dead that peers had opened: of this host's own packets
// without a state, those that begin nothing. flags A/A are all segments of TCP but
// the first. Of UDP only the answers of this host's DNS are known by their port.
func (b *builder) blockCut(out pfconf.Rule) {
	const why = "what a peer opened and may no longer isn't revived from this side"
	out.From, out.To = inTable(tableHost), inTable(tableCut)
	segments := out
	segments.Protos = []pfconf.Proto{pfconf.ProtoTCP}
	segments.Flags = &pfconf.Flags{Set: pfconf.FlagACK, Mask: pfconf.FlagACK}
	b.block(segments, "cut", why)
	b.block(icmp(out, pfconf.Inet, pfconf.ProtoICMP, 0), "cut", why)
	b.block(icmp(out, pfconf.Inet6, pfconf.ProtoICMPv6, 129), "cut", why)
	if b.ruleset.Mesh().DNS {
		dns := out
		dns.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		dns.From.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: 53}}
		b.block(dns, "cut", why)
	}
}

// elsewhere writes what holds on all interfaces but the mesh's.
func (b *builder) otherInterfaces() {
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
	b.block(forged, "forged", "this host's mesh address comes from nowhere else: no host on another network poses as this one, and forwarded to a peer such a packet would look like its own")
	toHost := in
	toHost.To = inTable(tableHost)
	b.block(toHost, "weak-host", "this host's mesh addresses are reached by the tunnel only: a Mac that forwards accepts them on every interface")
	away, toPeer := notOn(pfconf.Both, b.host.Interface), notOn(pfconf.Both, b.host.Interface)
	if port := b.ruleset.Mesh().ListenPort; port != 0 {
		toPeer.To = inTable(tablePeers)
		b.block(toPeer, "away", "what is for a peer leaves by the tunnel only, WireGuard's own packets too: the tunnel would carry itself")
		tunnel := notOn(pfconf.Out, b.host.Interface)
		tunnel.Action, tunnel.Quick, tunnel.State = pfconf.Pass, true, pfconf.NoState
		tunnel.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		tunnel.From.Ports, tunnel.To = []pfconf.Port{{Op: pfconf.Equal, Lo: port}}, inTable(tableUnassigned)
		tunnel.Label = labelPrefix + "tunnel"
		b.add(tunnel, "else WireGuard's own packets leave whatever outer address a peer has, were it a mesh address")
	}
	away.To = inTable(tableAway)
	b.block(away, "away", "no flow to a peer is opened from elsewhere, and what this host sends to one leaves by the tunnel or not at all, also when the tunnel is down or the peer is gone")
	b.multicastGroups()
}

// multicastGroups lets IGMP through on the other interfaces, which pf drops once
// it is on: such packets have an IP option, Router Alert (RFC 2236 2), and pf
// passes none of those without allow-opts. It isn't quick, so what others say of
// IGMP later counts.
func (b *builder) multicastGroups() {
	rule := notOn(pfconf.Both, b.host.Interface)
	rule.Action, rule.Family, rule.State = pfconf.Pass, pfconf.Inet, pfconf.NoState
	rule.Protos, rule.AllowOpts = []pfconf.Proto{protoIGMP}, true
	rule.Label = labelPrefix + "igmp"
	b.add(rule, "this host joins multicast groups on its other networks as it did before pf was on")
}

// protoIGMP is IGMP's number (RFC 2236).
const protoIGMP pfconf.Proto = 2

// leaving writes what holds where peers' packets leave: here their source is
// translated, so they are known by their tag.
func (b *builder) leavingPackets() {
	untranslated := notOn(pfconf.Out, b.host.Interface)
	untranslated.From = inTable(tablePeers)
	b.block(untranslated, "untranslated", "no packet leaves with a peer's address: pf lets it through as it is when the interface has no address to give, or no port is left")
	tagged := func(rule pfconf.Rule, tag string) pfconf.Rule {
		rule.Tagged = tag
		return rule
	}
	for _, family := range []pfconf.Family{pfconf.Inet, pfconf.Inet6} {
		if b.uplink(family) == "" || !b.mayLeave(Egress{b.uplink(family), family}) {
			continue
		}
		rule := tagged(on(pfconf.Out, b.uplink(family)), tagInternet)
		rule.Family = family
		b.pass(rule, "uplink", "class internet leaves by the uplink, and its answers come in by it only")
	}
	b.block(tagged(pfconf.Rule{Direction: pfconf.Out}, tagInternet), "not-uplink", "class internet leaves by nothing else")
	b.block(tagged(on(pfconf.Out, loopback), tagLAN), "lan-loopback", "nor by the loopback interface, where pf looks at it")
	if len(b.sets[tableLAN].in) > 0 {
		b.pass(tagged(notOn(pfconf.Out, b.host.Interface), tagLAN), "lan-out", "class lan leaves by any other interface, and its answers come in by that one only")
	}
}

// closeTransit writes that what has nothing to do with the mesh isn't forwarded
// where it wasn't before.
func (b *builder) blockTransit() {
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
