package linux

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// tableName is the name of our table, of the family inet.
const tableName = "meshhelper"

// Priorities of our chains, relative to what the kernel and other software do at
// the same hooks (linux/netfilter_ipv4.h).
const (
	// afterDefrag: packets are whole, no conntrack yet, before "raw" (-300).
	afterDefrag = -350
	// afterConntrack: flows are known (-200), redirects not yet done (-100).
	afterConntrack = -150
	// afterDNAT: redirects are done, and answers have the address of the flow's
	// opener as their destination (-100); the host hasn't routed yet.
	afterDNAT = -90
	filtering = 0
	// sourceNAT is before other programs' source translation (100): the first rule
	// that translates a flow is the only one, and a masquerade of all that leaves by
	// the uplink would give a peer's flow any port.
	sourceNAT = 90
	// afterNAT: other programs' translation is done.
	afterNAT = 300
)

// Values as the kernel compares them.
var (
	ipv4 = number("ipv4", 2)  // NFPROTO_IPV4
	ipv6 = number("ipv6", 10) // NFPROTO_IPV6

	tcp = number("tcp", policy.ProtoTCP)
	udp = number("udp", policy.ProtoUDP)

	original = number("original", 0)
	reply    = number("reply", 1)

	// Bits of NFT_CT_STATE: invalid 1, established 2, related 4, new 8,
	// untracked 64.
	established = bits("established", 2)
	related     = bits("related", 4)
	noFlow      = bits("invalid,untracked", 1|64)
	dnat        = bits("dnat", 1<<5)      // IPS_DST_NAT
	confirmed   = bits("confirmed", 1<<3) // IPS_CONFIRMED: not a flow's first packet
	// helped is IPS_HELPER: a rule assigned a helper to the flow, such as FTP's, which
	// has the kernel expect flows that a packet announces (nft_ct.c, xt_CT.c and
	// nf_conntrack_helper.c in net/netfilter). nft has no name for it, and its "ct
	// helper" is the helper of an expected flow's parent.
	hasHelper = bits("0x2000", 1<<13)
	syn       = number("syn", 2)
	dnsPort   = number("53", 0, 53)
	icmp4     = number("icmp", policy.ProtoICMP)
	icmp6     = number("ipv6-icmp", policy.ProtoICMPv6)
	redirect4 = number("redirect", 5)
	redirect6 = number("nd-redirect", 137)
)

// Parameters of the table that the ruleset doesn't have.
type params struct {
	// mtu of the mesh interface, to which the TCP segment sizes are clamped.
	mtu int
	// transit4 and transit6 name the interfaces that forwarded for others before
	// we came although their family didn't as a whole.
	transit4, transit6 []string
	// bridges names the interfaces whose frames this host's packet filter sees.
	bridges []string
	// ipsec says that the kernel has IPsec.
	ipsec bool
	// uid is the user that WireGuard's sockets belong to.
	uid uint32
	// ports are those that new flows of peers leave from. Without any, none leaves.
	// Running ones may have any port of around.
	ports, around portRange
	// sockets are the ports of around that sockets of the host have, in order: no packet
	// of a peer's leaves from them.
	sockets []uint16
	// sources are the addresses, of IPv4 under true, that the uplink's default route names
	// for packets of the host, where masquerading takes another one.
	sources map[bool]netip.Addr
	// flowsPerPeer bounds the flows of each family that one peer opened and that
	// conntrack has; 0: unknown, and then neither this nor the timeouts below are set.
	flowsPerPeer uint32
	// established is how long the host lets a TCP connection be silent.
	established time.Duration
}

// Text returns the nftables ruleset that enforces r, in nft's language, for
// reading: the program nft has no words for comparing what an ICMP error quotes
// with addresses, which the kernel can do, and it allows no ports with ICMP, whose
// identifiers the kernel treats like them. mtu is the mesh interface's, in bytes.
// The ports of peers' translated flows are those of a host with Linux's defaults, and a
// comment says so.
func Text(r *policy.Ruleset, mtu int) string {
	return fmt.Sprintf("# Peers' flows are translated to ports %v by default; a helper on Linux chooses those that the host's own settings and sockets leave.\n", defaultPorts) + compile(r, params{
		mtu: mtu, ipsec: true, ports: defaultPorts, around: defaultPorts,
		flowsPerPeer: maxFlowsPerPeer, established: flow.TCPEstablished,
	}).String()
}

// family holds what differs between IPv4 and IPv6.
type family struct {
	suffix     string // of the names of sets and chains
	proto      value
	addr       string // nft's type of an address
	src, dst   field
	quoted     field // destination of the packet that an ICMP error quotes
	icmp       field
	icmpProto  value
	redirect   value
	icmpErrors string // set of ICMP types
	overhead   int    // bytes of the IP and TCP headers without options
	belongs    func(netip.Addr) bool
	whole      netip.Prefix
}

var families = [...]family{
	{"4", ipv4, "ipv4_addr", saddr4, daddr4, quotedDst4, icmpType, icmp4, redirect4, "errors4", 40, netip.Addr.Is4, netip.MustParsePrefix("0.0.0.0/0")},
	{"6", ipv6, "ipv6_addr", saddr6, daddr6, quotedDst6, icmp6Type, icmp6, redirect6, "errors6", 60, netip.Addr.Is6, netip.MustParsePrefix("::/0")},
}

// compiler collects what the chains' authors need.
type compiler struct {
	*table
	r    *policy.Ruleset
	host policy.Host
	mesh value
	params
}

// compile makes the table that enforces r.
func compile(r *policy.Ruleset, p params) *table {
	c := compiler{table: &table{}, r: r, host: r.Host(), mesh: name(r.Host().Interface), params: p}
	c.timeLimits()
	for _, f := range families {
		c.sets = append(c.sets, c.classSets(f)...)
		c.sets = append(c.sets, c.peerSets(f)...)
		c.sets = append(c.sets, lanSets(f)...)
	}
	c.sets = append(c.sets, icmpErrors()...)
	c.sets = append(c.sets, boundSet(c.sockets))
	c.ingress()
	c.protocols()
	for _, f := range families {
		c.unclaimed(f)
	}
	c.judge()
	c.transit()
	c.input()
	c.forward()
	c.output()
	c.egress()
	return c.table
}

// classSets are the destinations by class, and whom the host itself may reach.
//
// What nothing may pass by is never a set of ranges that has to match: when a
// table is replaced, the kernel takes the new rules into use before the ranges
// (nf_tables_commit in net/netfilter/nf_tables_api.c commits sets last), and for
// some microseconds such a set is empty. So the mesh prefixes are compared in the
// rules, and lan and internet are what they are without the classes before them.
// For the same reason other owners' networks in the mesh prefixes are compared in
// rules, and only their single addresses are a set, which isn't one of ranges:
// the host's own traffic, by a carrier's uplink all of it, doesn't stop for those
// microseconds.
func (c *compiler) classSets(f family) []set {
	s := c.r.Sets()
	pick := func(ps []netip.Prefix) []netip.Prefix {
		var out []netip.Prefix
		for _, p := range ps {
			if f.belongs(p.Addr()) {
				out = append(out, p)
			}
		}
		return out
	}
	var own []netip.Prefix
	for _, a := range c.r.Mesh().Addresses {
		own = append(own, netip.PrefixFrom(a, a.BitLen()))
	}
	earlier := slices.Concat(pick(s.Martians), pick(s.Self), pick(s.Mesh))
	transit := map[string][]string{"4": c.transit4, "6": c.transit6}[f.suffix]
	var names []value
	for _, n := range transit {
		names = append(names, name(n))
	}
	return []set{
		ranges("martian"+f.suffix, f.addr, pick(s.Martians)),
		addresses("self"+f.suffix, f.addr, pick(s.Self)),
		without("lan"+f.suffix, f.addr, pick(s.LAN), earlier),
		without("internet"+f.suffix, f.addr, []netip.Prefix{f.whole}, append(earlier, pick(s.LAN)...)),
		addresses("outside"+f.suffix, f.addr, pick(s.Outside)),
		addresses("own"+f.suffix, f.addr, pick(own)),
		addresses("former"+f.suffix, f.addr, pick(s.Former)),
		addresses("others"+f.suffix, f.addr, slices.DeleteFunc(pick(s.Others), isWide)),
		constants("transit"+f.suffix, "ifname", names...),
	}
}

func isWide(p netip.Prefix) bool { return !p.IsSingleIP() }

// peerSets are the peers, what they may, and what was cut.
func (c *compiler) peerSets(f family) []set {
	peers := addresses("peers"+f.suffix, f.addr, nil)
	pairs := set{name: "same" + f.suffix, types: []string{f.addr, f.addr}}
	may := [...]set{
		addresses("may_incoming"+f.suffix, f.addr, nil),
		addresses("may_routing"+f.suffix, f.addr, nil),
		addresses("may_lan"+f.suffix, f.addr, nil),
	}
	need := [...]mesh.Permissions{mesh.Incoming, mesh.Routing, mesh.Routing | mesh.LAN}
	for _, p := range c.r.Peers() {
		for _, a := range p.Addresses {
			if !f.belongs(a) {
				continue
			}
			e := element{key: a.AsSlice()}
			peers.elements = append(peers.elements, e)
			pairs.elements = append(pairs.elements, element{key: slices.Concat(e.key, e.key)})
			for i := range may {
				if p.Permissions.Has(need[i]) {
					may[i].elements = append(may[i].elements, e)
				}
			}
		}
	}
	sets := []set{peers, pairs, may[0], may[1], may[2], cutSet(f)}
	if c.flowsPerPeer > 0 {
		sets = append(sets, set{name: "flows" + f.suffix, types: []string{f.addr, "mark"}, size: maxCounters})
	}
	return sets
}

// cutSet holds the host's side of flows to the host that were cut: source,
// destination, protocol and ports of the host's packets.
func cutSet(f family) set {
	return set{
		name: "cut" + f.suffix, timeout: true,
		types: []string{f.addr, f.addr, "inet_proto", "inet_service", "inet_service"},
	}
}

// icmpErrors are the types of the messages that quote the packet they are about
// (RFC 792, RFC 4443).
func icmpErrors() []set {
	return []set{
		constants("errors4", "icmp_type", number("destination-unreachable", 3),
			number("time-exceeded", 11), number("parameter-problem", 12)),
		constants("errors6", "icmpv6_type", number("destination-unreachable", 1),
			number("packet-too-big", 2), number("time-exceeded", 3), number("parameter-problem", 4)),
	}
}

// boundName is the set of the ports that sockets of the host have in the range.
const boundName = "bound"

func boundSet(ports []uint16) set {
	values := make([]value, len(ports))
	for i, p := range ports {
		values[i] = portValue(p)
	}
	return constants(boundName, "inet_service", values...)
}

// ingress looks at packets before conntrack does: which source is claimed on
// which interface. So a forged packet doesn't even touch a flow.
func (c *compiler) ingress() {
	in0 := c.hook("ingress", "filter", "prerouting", afterDefrag)
	in0.accept("", is(iifname, name("lo")))
	in0.branch("ingress_elsewhere", isNot(iifname, c.mesh))
	for _, f := range families {
		in0.drop("a peer with a foreign source", notIn("peers"+f.suffix, f.src))
	}
	for _, route := range []field{lsrr, ssrr, routingHeader} {
		in0.drop("source-routed", exists(route))
	}
	for _, f := range families {
		in0.drop("redirects never pass", is(f.icmp, f.redirect))
	}
	in0.jump("carried")

	out := c.chain("ingress_elsewhere")
	for _, f := range families {
		out.drop("the host's own mesh address as a source, not from the host", in("own"+f.suffix, f.src))
		out.drop("the host's mesh address, not from the mesh", in("own"+f.suffix, f.dst))
		out.drop("a peer's source, not from the mesh", in("peers"+f.suffix, f.src))
		out.drop("no other host reaches a peer", in("peers"+f.suffix, f.dst))
		c.dropUnassigned(out, f)
	}
}

// listenPort returns WireGuard's port, where it is known.
func (c *compiler) listenPort() (value, bool) {
	p := c.r.Mesh().ListenPort
	return portValue(p), p != 0
}

func portValue(p uint16) value { return number(strconv.Itoa(int(p)), port(p)...) }

// carried returns for the protocols that peers may use, and drops the others: a
// NAT tells their flows apart by addresses alone. It names those that pass, since
// a header that the kernel can't read has no protocol.
func (c *compiler) protocols() {
	p := c.chain("carried")
	p.ret("", is(l4proto, tcp))
	p.ret("", is(l4proto, udp))
	for _, f := range families {
		p.ret("", is(nfproto, f.proto), is(l4proto, f.icmpProto))
	}
	p.drop("only TCP, UDP and ICMP")
}

// judge looks at each packet from a peer when its flow is known and no rule has
// redirected it yet, and before the kernel answers for it (time exceeded, no
// route), so that what may not pass stays unanswered.
func (c *compiler) judge() {
	j := c.hook("judge", "filter", "prerouting", afterConntrack)
	j.accept("", isNot(iifname, c.mesh))
	j.drop("no flow: malformed or out of place", has(ctState, noFlow))
	for _, f := range families {
		j.branch("quoted", in(f.icmpErrors, f.icmp))
	}
	for _, p := range [...]value{icmp4, icmp6} {
		j.drop("other ICMP about a flow", has(ctState, related), is(l4proto, p))
	}
	for _, f := range families {
		j.accept("answers to the host", is(ctDirection, reply), in("own"+f.suffix, f.dst))
	}
	j.drop("no other host opens a flow to a peer", is(ctDirection, reply))
	j.jump(asSent.name)
	c.limitFlows(j)

	q := c.chain("quoted")
	for _, f := range families {
		q.branch("quoted_own", in("same"+f.suffix, f.src, f.quoted))
	}
	q.drop("about a packet that another host received")

	own := c.chain("quoted_own")
	for _, f := range families {
		own.accept("about the host's flow with this peer", is(ctDirection, reply), in("own"+f.suffix, f.dst))
	}
	own.branch(asSent.name, is(ctDirection, original))
	own.drop("")

	for _, v := range [...]view{asSent, asAnswered, asQuoted} {
		c.permitted(v)
	}
}

// maxFlowsPerPeer bounds what one peer may have open in conntrack in one family, where an
// eighth of conntrack's maximum isn't less, so that both families are a quarter at most:
// what the guard lets it have (4096), and 20 times the square root of that. The flows are
// counted in flowParts, drawn by their destination and ports, by which flows differ; each
// part then has room for five standard deviations more than its mean, and the guard's
// bound comes first.
const maxFlowsPerPeer = 5376

// closedInKernel is how long conntrack keeps a connection that was reset
// (nf_conntrack_tcp_timeout_close in Documentation/networking/nf_conntrack-sysctl.rst).
const closedInKernel = 10 * time.Second

// States of a TCP connection in conntrack (linux/netfilter/nf_conntrack_tcp.h) that the
// kernel doesn't count (already_closed in net/netfilter/nf_conncount.c).
const (
	stateTimeWait = 7
	stateClose    = 8
)

// timeLimits has flows of peers end in the kernel when they end at the guard, so
// that what a peer left behind doesn't use up its share.
func (c *compiler) timeLimits() {
	if c.flowsPerPeer == 0 {
		return
	}
	for _, f := range families {
		c.timeouts = append(c.timeouts,
			timeouts{"peer_tcp" + f.suffix, f.proto, tcp, []stateTimeout{
				{"syn_sent", 1, flow.TCPFirst}, {"syn_recv", 2, flow.TCPOpening},
				{"established", 3, min(flow.TCPEstablished, c.established)},
				{"time_wait", stateTimeWait, flow.TCPClosed}, {"close", stateClose, closedInKernel},
			}},
			timeouts{"peer_udp" + f.suffix, f.proto, udp, []stateTimeout{
				{"unreplied", 1, flow.UDPSingle}, {"replied", 2, flow.UDPMultiple},
			}})
	}
}

// bound is for the first packet of a flow, where it may be opened. Later ones aren't
// counted: one flow takes one place, also one that is never answered.
func (c *compiler) limitFlows(j *chain) {
	if c.flowsPerPeer == 0 {
		return
	}
	for _, f := range families {
		for _, proto := range [...]value{tcp, udp} {
			j.add(action{verb: expire, timeout: "peer_" + proto.text + f.suffix}, "", lacks(ctStatus, confirmed), is(nfproto, f.proto), is(l4proto, proto))
		}
		j.drop("the peer has too many flows", lacks(ctStatus, confirmed), exceeds("flows"+f.suffix, f.src, f.dst, c.flowsPerPeer))
	}
}

// view says where in a packet the addresses are that the packet which opened its
// flow came from and went to. They could be had from conntrack, too, but nft
// can't list a rule that looks one of those up in a set: it needs keys of a
// known length (netlink_parse_concat_expr of nft 1.0 aborts).
type view struct {
	name     string // of the chain
	src, dst func(family) field
}

var (
	// asSent: the opener's own packets, before any redirection. An ICMP error of
	// the opener goes to the sender of the packet that it quotes, which conntrack
	// ensures (nf_conntrack_inet_error in net/netfilter/nf_conntrack_proto_icmp.c).
	asSent = view{"permitted", func(f family) field { return f.src }, func(f family) field { return f.dst }}
	// asAnswered: packets to the opener, of a flow that wasn't redirected.
	asAnswered = view{"permitted_back", func(f family) field { return f.dst }, func(f family) field { return f.src }}
	// asQuoted: ICMP errors to the opener, which quote a packet of its own.
	asQuoted = view{"permitted_quoted", func(f family) field { return f.dst }, func(f family) field { return f.quoted }}
)

// permitted returns when the opener of the packet's flow may open it now, and drops
// the packet otherwise: the table "From a peer" of the policy. It looks at the
// flow only, so that it holds for packets of both directions and for what is
// quoted in ICMP errors.
func (c *compiler) permitted(v view) {
	top := c.chain(v.name)
	for _, f := range families {
		top.branch(v.name+f.suffix, is(nfproto, f.proto))
	}
	top.drop("")
	for _, f := range families {
		c.permittedFamily(v, f)
		c.permittedHost(v, f)
	}
}

func (c *compiler) permittedFamily(v view, f family) {
	src, dst := v.src(f), v.dst(f)
	p := c.chain(v.name + f.suffix)
	p.drop("martian", in("martian"+f.suffix, dst))
	p.branch(v.name+"_self"+f.suffix, in("self"+f.suffix, dst))
	c.eachMeshPrefix(f, func(m netip.Prefix) { p.drop("mesh: the host does not forward between peers", within(dst, m)) })
	if c.formerOutside(f) {
		p.drop("mesh: a removed peer's address", in("former"+f.suffix, dst))
	}
	if c.forwards(f) {
		for _, to := range c.r.OutsidePorts() {
			p.drop("WireGuard's port, by way of the router", in("outside"+f.suffix, dst), is(ctProtocol, udp), is(ctOrigDport, portValue(to)))
		}
		p.ret("lan", in("lan"+f.suffix, dst), in("may_lan"+f.suffix, src))
	}
	p.drop("lan needs routing and lan", in("lan"+f.suffix, dst))
	if c.forwards(f) && len(c.uplinks(f)) > 0 {
		p.ret("internet", in("internet"+f.suffix, dst), in("may_routing"+f.suffix, src))
	}
	p.drop("")
}

func (c *compiler) permittedHost(v view, f family) {
	s := c.chain(v.name + "_self" + f.suffix)
	if port, ok := c.listenPort(); ok {
		s.drop("WireGuard's port, through the tunnel", is(ctProtocol, udp), is(ctOrigDport, port))
	}
	s.ret("incoming", in("may_incoming"+f.suffix, v.src(f)))
	if c.r.Mesh().DNS {
		for _, proto := range [...]value{tcp, udp} {
			s.ret("the host's DNS", in("own"+f.suffix, v.dst(f)), is(ctProtocol, proto),
				is(ctOrigDport, dnsPort), in("may_routing"+f.suffix, v.src(f)))
		}
	}
	s.drop("self needs incoming")
}

// formerOutside reports whether a removed peer's address is outside of the mesh prefixes,
// because they were others then.
func (c *compiler) formerOutside(f family) bool {
	return slices.ContainsFunc(c.r.Sets().Former, func(p netip.Prefix) bool {
		return f.belongs(p.Addr()) && !slices.ContainsFunc(c.r.Sets().Mesh, func(m netip.Prefix) bool { return m.Contains(p.Addr()) })
	})
}

// eachMesh calls do for each mesh prefix of a family.
func (c *compiler) eachMeshPrefix(f family, do func(netip.Prefix)) {
	for _, p := range c.r.Sets().Mesh {
		if f.belongs(p.Addr()) {
			do(p)
		}
	}
}

func (c *compiler) forwards(f family) bool {
	if f.suffix == "4" {
		return c.host.Forwarding.IPv4
	}
	return c.host.Forwarding.IPv6
}

func (c *compiler) foundForwarding(f family) bool {
	if f.suffix == "4" {
		return c.host.FoundForwarding.IPv4
	}
	return c.host.FoundForwarding.IPv6
}

// uplinks are the interfaces by which peers' packets reach the internet.
func (c *compiler) uplinks(f family) []string { return c.host.Uplinks(f.whole.Addr()) }

// input looks again at what the kernel takes for the host itself: an address
// that the host has had for a moment only isn't in the sets yet, and the kernel
// knows better.
func (c *compiler) input() {
	i := c.hook("input", "filter", "input", filtering)
	i.accept("", isNot(iifname, c.mesh))
	for _, f := range families {
		i.accept("answers to the host", is(ctDirection, reply), in("own"+f.suffix, f.dst))
	}
	i.drop("", is(ctDirection, reply))
	i.drop("redirected to the host", has(ctStatus, dnat))
	i.jump(asSent.name)
	for _, f := range families {
		i.accept("", in("self"+f.suffix, f.dst))
	}
	i.drop("not an address of the host when it was sent")
}

// forward looks at what the kernel forwards: here both interfaces are known.
func (c *compiler) forward() {
	f := c.hook("forward", "filter", "forward", filtering)
	f.branch("from_mesh", is(iifname, c.mesh))
	f.branch("to_mesh", is(oifname, c.mesh))
	c.bridged(f)
	for _, fam := range families {
		if !c.foundForwarding(fam) {
			f.drop("transit, closed as it was found", is(nfproto, fam.proto), notIn("transit"+fam.suffix, iifname))
		}
	}
	c.fromMesh()
	c.toMesh()
}

func (c *compiler) fromMesh() {
	m := c.chain("from_mesh")
	m.drop("from peer to peer", is(oifname, c.mesh))
	m.drop("", is(ctDirection, reply))
	m.drop("a helper would let others open flows to it", has(ctStatus, hasHelper))
	m.drop("redirected from where it was sent to", has(ctStatus, dnat))
	m.jump(asSent.name)
	c.clamp(m)
	for _, f := range families {
		m.drop("", in("self"+f.suffix, f.dst))
		m.branch("to_lan"+f.suffix, in("lan"+f.suffix, f.dst))
		for _, u := range c.uplinks(f) {
			m.accept("internet, by the uplink", in("internet"+f.suffix, f.dst), is(oifname, name(u)))
		}
	}
	m.drop("internet, not by the uplink")
	for _, f := range families {
		c.toLAN(f)
	}
}

func (c *compiler) toMesh() {
	m := c.chain("to_mesh")
	// Everything below goes by the packet's own addresses, which tell the
	// opener only where conntrack knows the flow.
	m.drop("no flow, so it has no opener", has(ctState, noFlow))
	m.drop("no host opens a flow to a peer", is(ctDirection, original))
	m.drop("redirected from where it was sent to", has(ctStatus, dnat))
	m.jump("carried")
	for _, f := range families {
		m.branch("to_mesh_error", in(f.icmpErrors, f.icmp))
	}
	for _, p := range [...]value{icmp4, icmp6} {
		m.drop("redirects and the like", has(ctState, related), is(l4proto, p))
	}
	m.jump(asAnswered.name)
	c.clamp(m)
	for _, f := range families {
		m.drop("", in("self"+f.suffix, f.src))
		m.accept("lan, by the interface that leads there", in("lan"+f.suffix, f.src),
			match{fields: []field{returnPath}, op: found})
		m.drop("lan, by another interface", in("lan"+f.suffix, f.src))
		for _, u := range c.uplinks(f) {
			m.accept("internet, by the uplink", in("internet"+f.suffix, f.src), is(iifname, name(u)))
		}
	}
	m.drop("internet, not by the uplink")

	e := c.chain("to_mesh_error")
	e.jump(asQuoted.name)
	e.accept("ICMP errors, from any router")
}

// clamp keeps TCP from sending segments that don't fit in the tunnel, where path
// MTU discovery is broken. The kernel only ever lowers the option.
func (c *compiler) clamp(to *chain) {
	for _, f := range families {
		mss := uint16(c.mtu - f.overhead)
		to.add(action{verb: clamp, mss: mss}, "", is(nfproto, f.proto), has(tcpFlags, syn))
	}
}

// output looks at what the host itself sends to a peer: from its mesh address,
// by the mesh, and not on a flow that was cut.
func (c *compiler) output() {
	o := c.hook("output", "filter", "output", filtering)
	for _, f := range families {
		o.branch("to_peer", in("peers"+f.suffix, f.dst))
	}
	c.acceptTunnel(o)
	for _, f := range families {
		c.dropUnassigned(o, f)
	}

	p := c.chain("to_peer")
	p.drop("a peer is reached by the mesh only", isNot(oifname, c.mesh))
	p.jump("carried")
	if port, ok := c.listenPort(); ok {
		// A known peer's mesh address as another's outer one would be a loop.
		p.drop("the tunnel doesn't carry itself", is(l4proto, udp), is(sport, port))
	}
	for _, f := range families {
		p.drop("redirects never pass", is(f.icmp, f.redirect))
	}
	p.branch("answer", is(ctDirection, reply))
	for _, f := range families {
		p.drop("from a mesh address only", notIn("own"+f.suffix, f.src))
		p.accept("the kernel's own errors, also about no flow", in(f.icmpErrors, f.icmp))
		p.drop("a flow that was cut stays dead", in("cut"+f.suffix, f.src, f.dst, l4proto, sport, dport))
	}
	p.accept("the host may open flows to peers", is(ctDirection, original))
	p.drop("")

	a := c.chain("answer")
	for _, f := range families {
		a.branch("to_mesh_error", in(f.icmpErrors, f.icmp))
	}
	a.jump(asAnswered.name)
	a.accept("")
}

// tunnel accepts WireGuard's own packets to any outer address: those of removed
// peers and unassigned mesh addresses included, but not those of peers, which the
// rules before it judge. They leave from its port, by a socket of this process's
// user: a forwarded packet may have the same port.
func (c *compiler) acceptTunnel(to *chain) {
	if port, ok := c.listenPort(); ok {
		to.accept("WireGuard's own", isNot(oifname, c.mesh), is(l4proto, udp), is(sport, port),
			is(skuid, bits(strconv.Itoa(int(c.uid)), c.uid)))
	}
}

// unassigned drops what goes to a mesh address that no peer has.
func (c *compiler) dropUnassigned(to *chain, f family) {
	to.accept("", in("self"+f.suffix, f.dst))
	to.drop("a removed peer's address", in("former"+f.suffix, f.dst))
	c.eachMeshPrefix(f, func(p netip.Prefix) { to.branch("unclaimed"+f.suffix, within(f.dst, p)) })
}

// unclaimed judges the mesh addresses that are neither a peer's nor the host's:
// other owners of a part of the prefix keep it.
func (c *compiler) unclaimed(f family) {
	u := c.chain("unclaimed" + f.suffix)
	u.accept("another owner's", in("others"+f.suffix, f.dst))
	for _, p := range c.r.Sets().Others {
		if isWide(p) && f.belongs(p.Addr()) {
			u.accept("another owner's", within(f.dst, p))
		}
	}
	u.drop("an unassigned mesh address")
}

// leave translates peers' packets and takes the last look at what leaves, also
// when another interface was chosen after the other hooks, and when this process
// is no longer alive.
func (c *compiler) egress() {
	n := c.hook("source_nat", "nat", "postrouting", sourceNAT)
	for _, f := range families {
		n.branch("translate", isNot(oifname, c.mesh), in("peers"+f.suffix, f.src))
	}
	c.translate()

	e := c.hook("egress", "filter", "postrouting", afterNAT)
	e.accept("", is(oifname, c.mesh))
	e.accept("", is(oifname, name("lo")))
	c.dropIPsec(e)
	for _, f := range families {
		e.drop("untranslated", in("peers"+f.suffix, f.src))
		e.drop("in clear", in("peers"+f.suffix, f.dst))
	}
	// A rule behind the forward chain may have assigned one.
	e.drop("a helper would let others open flows to it", is(iifname, c.mesh), has(ctStatus, hasHelper))
	// Another program's translation may have been first, and an older flow may be
	// from a time when the host had other ports. Kernels before 5.7 don't know here where a
	// packet came in.
	for _, proto := range [...]value{tcp, udp} {
		if c.ports.size() > 0 {
			e.drop("a peer's, from a port that may be the host's", is(iifname, c.mesh), is(l4proto, proto), notInPorts(sport, c.around))
			// A new flow that drew such a port isn't in conntrack yet (nf_confirm is last
			// at this hook, NF_IP_PRI_CONNTRACK_CONFIRM), so that the packet that is sent
			// again draws another.
			e.drop("a peer's, from the port of a socket of the host", is(iifname, c.mesh), is(l4proto, proto), in(boundName, sport))
		}
	}
	c.acceptTunnel(e)
	for _, f := range families {
		c.dropUnassigned(e, f)
	}
}

// translate gives peers' flows a port that can't be the host's, drawn at random, so
// that no answer to the host comes to them and the host always has ports left for
// itself. Identifiers of pings are in the same range for the same reason.
func (c *compiler) translate() {
	t := c.chain("translate")
	if c.ports.size() == 0 {
		return
	}
	for _, f := range families {
		source := c.sources[f.whole.Addr().Is4()]
		uplink := c.host.Uplink(f.whole.Addr())
		if !source.IsValid() || uplink == "" || c.host.Source(f.whole.Addr()) != source {
			continue // they are of another moment
		}
		for _, proto := range [...]value{tcp, udp, f.icmpProto} {
			t.add(action{verb: snat, source: source, ports: c.ports}, "", is(nfproto, f.proto), is(l4proto, proto),
				is(oifname, name(uplink)), in("internet"+f.suffix, f.dst))
		}
	}
	to := func(ms ...match) { t.add(action{verb: masquerade, ports: c.ports}, "", ms...) }
	to(is(l4proto, tcp))
	to(is(l4proto, udp))
	for _, f := range families {
		to(is(nfproto, f.proto), is(l4proto, f.icmpProto))
	}
}
