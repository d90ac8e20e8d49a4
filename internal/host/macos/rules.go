package macos

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// labelPrefix is the prefix of our rules' labels, which pfctl -s labels shows with
// their counters.
const labelPrefix = "mesh-"

// Tags that a peer's packet carries from the rule that passed it in to the interface
// where it leaves. There the filter sees its translated source, since pf translates
// before it filters, and couldn't tell it from the host's own packets.
const (
	tagInternet = "mesh-internet"
	tagLAN      = "mesh-lan"
)

// loopback is the name of a Mac's loopback interface.
const loopback = "lo0"

// MaxStates is the default limit of pf's states for the whole host (PFSTATE_HIWAT in
// xnu bsd/net/pfvar.h). An anchor can't raise it: pfctl ignores `set limit` there.
const MaxStates = 10_000

// StatesPerForwarded is how many states a forwarded flow takes: one where it comes in,
// and a translated one where it leaves. A flow to this host takes one.
const StatesPerForwarded = 2

// maxFlowsPerAddress is max-src-states: how many states one address of a peer may have
// by all rules together. The guard enforces the exact bound, a quarter of pf's states
// for each peer; this one holds without the guard. pf counts it where a peer's packets
// come in, because where they leave all peers have one source address.
const maxFlowsPerAddress = MaxStates / 4 / StatesPerForwarded

// clampMSS makes TCP connections through the tunnel use segments that fit into it: the
// MTU less the IP and TCP headers, 40 bytes for IPv4 (RFC 879) and 60 for IPv6 (RFC
// 8200 8.3).
func (b *builder) clampMSS(mtu int) {
	for _, f := range []struct {
		family  pfconf.Family
		headers int
	}{{pfconf.Inet, 40}, {pfconf.Inet6, 60}} {
		rule := on(pfconf.Both, b.host.Interface)
		rule.Action = pfconf.Scrub
		rule.Family = f.family
		rule.Normalize = pfconf.Normalize{MaxMSS: uint16(mtu - f.headers), Fragment: pfconf.FragmentReassemble}
		b.add(rule, "TCP through the tunnel uses segments that fit into it, in both directions; fragments are reassembled, because only a whole packet has the ports that identify its flow")
	}
}

// reassemble reassembles the fragments of answers to peers, which arrive with an
// address of this host: pf translates only a whole packet back. It leaves IPv6 alone,
// since pf reassembles only IPv6 fragments that arrive in order (pf_norm.c) and would
// drop the host's own. It doesn't use no-df, which would disable path MTU discovery
// for everything that comes in.
func (b *builder) reassemble() {
	for _, e := range b.egress() {
		if e.family != pfconf.Inet || !b.mayLeave(e) {
			continue
		}
		rule := on(pfconf.In, e.name)
		rule.Action, rule.Family, rule.To = pfconf.Scrub, pfconf.Inet, inTable(tableSelf)
		rule.Normalize = pfconf.Normalize{Fragment: pfconf.FragmentReassemble}
		b.add(rule, "an answer in fragments has ports, and so reaches the peer that asked, only after it was reassembled")
	}
}

// translate adds network address translation, for peers' packets only. In pf the first
// translation rule that matches wins (pf.conf(5), TRANSLATION), also across anchors, so
// "no nat" and "no rdr" keep later anchors from translating.
func (b *builder) translate() {
	rule := on(pfconf.Both, b.host.Interface)
	rule.Action = pfconf.NoNat
	b.add(rule, "nothing is translated into the mesh: a foreign rule could make another host look like this one")
	for _, e := range b.egress() {
		if !b.options.NoPorts {
			b.nat(e)
		}
	}
	rule = on(pfconf.Both, b.host.Interface)
	rule.Action = pfconf.NoRdr
	b.add(rule, "a peer's packets are judged by the destination that it sent them to, so a foreign redirection must not change it")
}

// nat adds the translation rule for one interface. A nat match always creates a state
// (pf_test_rule in xnu bsd/net/pf.c), so answers pass whatever rules say about them.
func (b *builder) nat(e Egress) {
	rule := on(pfconf.Both, e.name)
	rule.Action = pfconf.Nat
	rule.Family = e.family
	ports := b.ports()
	rule.Pool = &pfconf.Pool{Addrs: []pfconf.Address{b.natAddress(e)}, PortLo: ports.First, PortHi: ports.Last}
	if e.name == b.uplink(e.family) {
		rule.From = inTable(tableRouting)
		b.add(rule, "by the uplink, peers' packets leave with its address, from ports that no socket of this host has or is assigned")
		return
	}
	rule.From, rule.To = inTable(tableLAN), inTable(tableNetworks)
	b.add(rule, "by another interface, only packets to other networks do; what isn't translated is blocked below")
}

// ports returns the range of source ports for peers' packets, never with WireGuard's.
func (b *builder) ports() darwin.PortRange {
	r := b.options.Ports
	if r == (darwin.PortRange{}) {
		r = defaultPorts
	}
	return withoutPort(r, b.ruleset.Mesh().ListenPort)
}

// uplink returns the interface of a family's default route; empty if there is none.
func (b *builder) uplink(family pfconf.Family) string {
	if family == pfconf.Inet {
		return b.host.Uplink4
	}
	return b.host.Uplink6
}

// mayLeave reports whether some peer's packets may leave by this interface now.
func (b *builder) mayLeave(e Egress) bool {
	table := tableLAN
	if e.name == b.uplink(e.family) {
		table = tableRouting
	}
	return slices.ContainsFunc(b.sets[table].in, func(p netip.Prefix) bool { return isFamily(p.Addr(), e.family) })
}

// Egress is an interface by which peers' packets of one family may leave.
type Egress struct {
	name   string
	family pfconf.Family
}

// egress returns the interfaces by which peers' packets may leave, sorted: the present
// and the past ones. pf accepts a rule for an interface that doesn't exist, and
// matches nothing by it until it appears.
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

// addresses returns an interface's addresses of a family, without IPv6 link-local ones.
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

// isFamily reports whether an address is of a family, which is Inet or Inet6.
func isFamily(a netip.Addr, family pfconf.Family) bool { return a.Is4() == (family == pfconf.Inet) }

// natAddress returns the source address for translated packets: (en0:0), which follows
// the interface's first address. Without :0 pf would use several addresses in turn.
//
// IPv6 packets by the uplink leave with the address that was observed, written as a
// constant; when it changes the anchor is loaded again. pf computes (en0) when an
// address is added or removed, and leaves out one that is tentative then but keeps one
// that is deprecated later (pfi_instance_add in xnu bsd/net/pf_if.c); and it may choose
// a unique local address although there is a global one.
func (b *builder) natAddress(e Egress) pfconf.Address {
	if e.family == pfconf.Inet6 && e.name == b.host.Uplink6 && b.host.Source6.IsValid() {
		return pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: netip.PrefixFrom(b.host.Source6, 128)}
	}
	return pfconf.Address{Kind: pfconf.AddrDynamic, Name: e.name, Mod: pfconf.ModNoAlias}
}

// icmpTypes has each family's ICMP types that need rules of their own: errors, which
// quote the packet that they are about, and redirects (RFC 792, RFC 4443, RFC 4861).
var icmpTypes = []struct {
	family   pfconf.Family
	proto    pfconf.Proto
	errors   []uint8
	redirect uint8
}{
	{pfconf.Inet, pfconf.ProtoICMP, []uint8{3, 11, 12}, 5},
	{pfconf.Inet6, pfconf.ProtoICMPv6, []uint8{1, 2, 3, 4}, 137},
}

// icmp returns the rule restricted to these ICMP types.
func icmp(rule pfconf.Rule, family pfconf.Family, proto pfconf.Proto, types ...uint8) pfconf.Rule {
	rule.Family = family
	rule.Protos = []pfconf.Proto{proto}
	for _, t := range types {
		rule.ICMP = append(rule.ICMP, pfconf.ICMPMatch{V6: family == pfconf.Inet6, Type: t})
	}
	return rule
}

// passJudged calls pass for each protocol that peers' flows may have (TCP, UDP, ICMP),
// unless the rule names protocols itself. Other protocols are dropped: NAT tells flows
// without ports apart by addresses alone, so a peer's ESP or GRE could receive packets
// for this host's own.
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

// fromPeers adds the rules for packets that come out of the tunnel: the classes of
// [policy.Class] in their order, of which the first that contains the destination
// decides.
func (b *builder) fromPeers() {
	in := on(pfconf.In, b.host.Interface)
	with := func(from, to pfconf.Endpoint) pfconf.Rule {
		rule := in
		rule.From, rule.To = from, to
		return rule
	}
	var anyone pfconf.Endpoint
	b.selfTraffic(in)
	b.block(with(notInTable(tablePeers), anyone), "spoofed", "packets out of the tunnel have a peer's source address")
	b.block(with(anyone, inTable(tableMartians)), "martian", "class 1, martian: never")
	for _, t := range icmpTypes {
		b.block(icmp(in, t.family, t.proto, t.redirect), "redirect", "this host accepts no redirects")
		b.block(icmp(in, t.family, t.proto, t.errors...), "unquoted", "an ICMP error about a flow matches that flow's state and doesn't reach this rule; all others are forged")
	}
	if port := b.ruleset.Mesh().ListenPort; port != 0 {
		tunnel := with(anyone, inTable(tableSelf))
		tunnel.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		tunnel.To.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: port}}
		b.block(tunnel, "wireguard", "no tunnel inside the tunnel")
	}
	b.peerPass(with(inTable(tableIncoming), inTable(tableSelf)), "incoming", "class 2, self: with incoming")
	for _, s := range policy.AllServices {
		served := with(inTable(s.Name), inTable(tableHost))
		for _, proto := range s.Protos {
			served.Protos = append(served.Protos, pfconf.Proto(proto))
		}
		served.To.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: s.Port}}
		b.peerPass(served, s.Name, "class 2: "+s.What+" also with "+needed(s))
	}
	b.block(with(anyone, inTable(tableSelf)), "no-incoming", "class 2: all else is closed")
	b.block(with(anyone, inTable(tableMesh)), "mesh", "class 3, mesh: peers never reach each other through this host")
	b.block(with(anyone, inTable(tableLooped)), "lan-loopback", "class lan doesn't lead back to this host: destinations that its routes send to the loopback interface are judged here, because pf often skips that one (after Internet Sharing ran, for example)")
	if b.options.IKE {
		ike := in
		ike.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		ike.From.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: ikePort}}
		b.block(ike, "ike", "pf doesn't translate UDP source port 500, and a socket of this host has it: answers to that socket would go to the peer")
	}
	for _, port := range b.ruleset.OutsidePorts() {
		hairpin := with(anyone, inTable(tableOutside))
		hairpin.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		hairpin.To.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: port}}
		b.block(hairpin, "hairpin", "no tunnel inside the tunnel through the router in front, which sends packets for its own address back")
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

// needed names the permissions that a service needs.
func needed(s policy.Service) string {
	if s.Needs == 0 {
		return "no permission"
	}
	return s.Needs.String()
}

// selfTraffic passes this host's packets to its own mesh address through the mesh
// interface, in both directions. The route to an interface's own address on a
// point-to-point interface leads into that interface (in_ifinit in xnu
// bsd/netinet/in.c), and the guard returns such packets. They are the only exception to
// the rules for peers, and create no state.
func (b *builder) selfTraffic(rule pfconf.Rule) {
	rule.Action, rule.Quick, rule.State, rule.Flags = pfconf.Pass, true, pfconf.NoState, &pfconf.Flags{}
	rule.From, rule.To = inTable(tableHost), inTable(tableHost)
	rule.Label = labelPrefix + "own"
	b.add(rule, "this host's packets to its own mesh address leave by the tunnel, which returns them")
}

// peerPass adds pass rules for flows that a peer opens, limited in number for each
// source address.
func (b *builder) peerPass(rule pfconf.Rule, label, why string) {
	rule.StateOptions.SourceTrack = pfconf.SourceTrackGlobal
	rule.StateOptions.MaxSrcStates = maxFlowsPerAddress
	b.passJudged(rule, label, why)
}

// towardsPeers adds the rules for packets into the tunnel. Answers to peers' flows
// match states and don't reach them.
func (b *builder) towardsPeers() {
	out := on(pfconf.Out, b.host.Interface)
	b.selfTraffic(out)
	for _, t := range icmpTypes {
		b.block(icmp(out, t.family, t.proto, t.redirect), "redirect", "this host sends no redirects to peers")
	}
	b.blockCut(out)
	toPeer := out
	toPeer.From, toPeer.To = inTable(tableHost), inTable(tablePeers)
	b.passJudged(toPeer, "to-peer", "this host itself opens flows to its peers")
	b.block(out, "to-mesh", "nothing else: neither to a mesh address that no peer has, nor from an address of this host other than its mesh address; this host sends nothing through a peer, and no other host opens a flow to a peer")
}

// blockCut blocks this host's packets of flows that peers had opened and that were cut,
// so that they can't create a state in the other direction. Such packets match no state
// and don't begin a flow: TCP segments with ACK (flags A/A, all but the first), echo
// replies, and answers of what the helper serves by UDP. Other UDP answers can't be recognised by
// their ports.
func (b *builder) blockCut(out pfconf.Rule) {
	const why = "a flow that a peer opened, and no longer may, isn't revived by this host's packets"
	out.From, out.To = inTable(tableHost), inTable(tableCut)
	segments := out
	segments.Protos = []pfconf.Proto{pfconf.ProtoTCP}
	segments.Flags = &pfconf.Flags{Set: pfconf.FlagACK, Mask: pfconf.FlagACK}
	b.block(segments, "cut", why)
	b.block(icmp(out, pfconf.Inet, pfconf.ProtoICMP, 0), "cut", why)
	b.block(icmp(out, pfconf.Inet6, pfconf.ProtoICMPv6, 129), "cut", why)
	for _, s := range b.ruleset.Mesh().Serves.List() {
		if slices.Contains(s.Protos, policy.ProtoUDP) {
			answers := out
			answers.Protos = []pfconf.Proto{pfconf.ProtoUDP}
			answers.From.Ports = []pfconf.Port{{Op: pfconf.Equal, Lo: s.Port}}
			b.block(answers, "cut", why)
		}
	}
}

// otherInterfaces adds the rules for all interfaces but the mesh's.
func (b *builder) otherInterfaces() {
	in := notOn(pfconf.In, b.host.Interface)
	own := on(pfconf.In, loopback)
	own.Action, own.Quick, own.State, own.Flags = pfconf.Pass, true, pfconf.NoState, &pfconf.Flags{}
	own.Label = labelPrefix + "loopback"
	to, from := own, own
	to.To, from.From = inTable(tableHost), inTable(tableHost)
	const why = "this host's packets to and from its own mesh addresses on the loopback interface don't match the next lines"
	b.add(to, why)
	b.add(from, why)
	spoofed := in
	spoofed.From = inTable(tablePeers)
	b.block(spoofed, "elsewhere-spoofed", "packets with a peer's source address come out of the tunnel only")
	forged := in
	forged.From = inTable(tableHost)
	b.block(forged, "forged", "packets with this host's mesh address come from no other host: such a packet, forwarded to a peer, would look like this host's own")
	toHost := in
	toHost.To = inTable(tableHost)
	b.block(toHost, "weak-host", "this host's mesh addresses are reached through the tunnel only: a Mac that forwards accepts them on every interface")
	away, toPeer := notOn(pfconf.Both, b.host.Interface), notOn(pfconf.Both, b.host.Interface)
	if port := b.ruleset.Mesh().ListenPort; port != 0 {
		toPeer.To = inTable(tablePeers)
		b.block(toPeer, "away", "packets to a peer's address leave by the tunnel only, WireGuard's own too: the tunnel would carry itself")
		tunnel := notOn(pfconf.Out, b.host.Interface)
		tunnel.Action, tunnel.Quick, tunnel.State = pfconf.Pass, true, pfconf.NoState
		tunnel.Protos = []pfconf.Proto{pfconf.ProtoUDP}
		tunnel.From.Ports, tunnel.To = []pfconf.Port{{Op: pfconf.Equal, Lo: port}}, inTable(tableUnassigned)
		tunnel.Label = labelPrefix + "tunnel"
		b.add(tunnel, "otherwise WireGuard's own packets may leave to any endpoint, even one in the mesh prefixes")
	}
	away.To = inTable(tableAway)
	b.block(away, "away", "no other host opens a flow to a peer, and this host's packets to one leave by the tunnel or not at all, even when the tunnel is down or the peer was removed")
	b.multicastGroups()
}

// multicastGroups passes IGMP on the other interfaces. Its packets have an IP option,
// Router Alert (RFC 2236 2), and pf, once enabled, drops packets with options unless
// the rule that passes them has allow-opts (pf.conf(5)). The rule isn't quick, so that
// later rules of other software can block IGMP.
func (b *builder) multicastGroups() {
	rule := notOn(pfconf.Both, b.host.Interface)
	rule.Action, rule.Family, rule.State = pfconf.Pass, pfconf.Inet, pfconf.NoState
	rule.Protos, rule.AllowOpts = []pfconf.Proto{protoIGMP}, true
	rule.Label = labelPrefix + "igmp"
	b.add(rule, "this host joins multicast groups on its other networks as it did before pf was enabled")
}

// protoIGMP is IGMP's protocol number (RFC 2236).
const protoIGMP pfconf.Proto = 2

// leavingPackets adds the rules for the interfaces where peers' packets leave. Their
// source is translated by then, so they are recognised by their tag.
func (b *builder) leavingPackets() {
	untranslated := notOn(pfconf.Out, b.host.Interface)
	untranslated.From = inTable(tablePeers)
	b.block(untranslated, "untranslated", "no packet leaves with a peer's source address: pf passes it untranslated if the interface has no address or no port is left")
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
		b.pass(rule, "uplink", "class internet leaves by the uplink, and answers are accepted on it only")
	}
	b.block(tagged(pfconf.Rule{Direction: pfconf.Out}, tagInternet), "not-uplink", "class internet leaves by nothing else")
	b.block(tagged(on(pfconf.Out, loopback), tagLAN), "lan-loopback", "nor does class lan leave by the loopback interface, where pf filters that one")
	if len(b.sets[tableLAN].in) > 0 {
		b.pass(tagged(notOn(pfconf.Out, b.host.Interface), tagLAN), "lan-out", "class lan leaves by any other interface, and answers are accepted on that one only")
	}
}

// blockTransit blocks packets that are neither from nor to the mesh, in the families
// that weren't forwarded before the helper enabled forwarding.
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
		b.block(rule, "transit", "this host didn't forward before, so packets that arrive on other interfaces and aren't for it are dropped")
	}
}
