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

// tableName is the name of our table, which is of the family inet. Names of tables,
// chains and sets must not be keywords of nft, such as "fwd" and "mh".
const tableName = "meshhelper"

// Priorities of our base chains, relative to the kernel's and other software's at the
// same hooks (linux/netfilter_ipv4.h, "CHAINS" in nft(8)). Lower ones run first.
const (
	// afterDefrag: packets are reassembled (-400) but not yet tracked (-200), before
	// "raw" (-300).
	afterDefrag = -350
	// afterConntrack: flows are known (-200), destinations not yet translated (-100).
	afterConntrack = -150
	// afterDNAT: destinations are translated (-100), so answers have the address of their
	// flow's opener; the packet isn't routed yet.
	afterDNAT = -90
	filtering = 0
	// sourceNAT is before other programs' source translation (100): the first rule that
	// translates a flow is the only one, and another program's masquerade of everything
	// that leaves by the uplink would give a peer's flow any port.
	sourceNAT = 90
	// afterNAT: other programs' translation is done.
	afterNAT = 300
)

// Constants in the kernel's encoding.
var (
	ipv4 = number("ipv4", 2)  // NFPROTO_IPV4
	ipv6 = number("ipv6", 10) // NFPROTO_IPV6

	tcp = number("tcp", policy.ProtoTCP)
	udp = number("udp", policy.ProtoUDP)

	original = number("original", 0)
	reply    = number("reply", 1)

	// Bits of NFT_CT_STATE (linux/netfilter/nf_tables.h): invalid 1, established 2,
	// related 4, new 8, untracked 64.
	established = bits("established", 2)
	related     = bits("related", 4)
	noFlow      = bits("invalid,untracked", 1|64)
	dnat        = bits("dnat", 1<<5)      // IPS_DST_NAT
	confirmed   = bits("confirmed", 1<<3) // IPS_CONFIRMED: not a flow's first packet
	// hasHelper is IPS_HELPER: a rule assigned a helper such as FTP's to the flow, which
	// makes the kernel expect flows that a packet announces (nft_ct.c, xt_CT.c and
	// nf_conntrack_helper.c in net/netfilter). nft has no name for the bit; its "ct
	// helper" is the helper of an expected flow's parent.
	hasHelper = bits("0x2000", 1<<13)
	syn       = number("syn", 2)
	icmp4     = number("icmp", policy.ProtoICMP)
	icmp6     = number("ipv6-icmp", policy.ProtoICMPv6)
	redirect4 = number("redirect", 5)
	redirect6 = number("nd-redirect", 137)
)

// params are the parameters of the table that the ruleset doesn't have.
type params struct {
	// mtu is that of the mesh interface in bytes, to which TCP segment sizes are clamped.
	mtu int
	// transit4 and transit6 name the interfaces that already forwarded when the helper
	// came, although the host as a whole didn't.
	transit4, transit6 []string
	// bridges names the bridges whose frames the packet filter sees.
	bridges []string
	// ipsec is set if the kernel has IPsec.
	ipsec bool
	// uid is the user that WireGuard's sockets belong to.
	uid uint32
	// ports are those that new flows of peers are translated to; without any, none is
	// translated or leaves. Running flows may have any port of around.
	ports, around portRange
	// sockets are the ports in around that sockets of the host use, in order. No packet
	// of a peer leaves from them.
	sockets []uint16
	// sources are the addresses, IPv4's under true, that the uplink's default route names
	// as source, where masquerade would choose another one.
	sources map[bool]netip.Addr
	// flowsPerPeer bounds the conntrack entries of each family that one peer opened. At 0
	// neither this bound nor timeouts are set.
	flowsPerPeer uint32
	// established is how long the host lets a TCP connection be idle.
	established time.Duration
}

// Text returns the nftables ruleset that enforces r, in nft's language, for reading. mtu
// is the mesh interface's, in bytes. The ports of translated flows are those of a host
// with Linux's defaults, and a comment says so.
//
// The program nft doesn't accept all of it: it has no syntax to compare the packet that
// an ICMP error quotes with addresses, and allows no ports with ICMP, although the kernel
// supports both (it treats ICMP identifiers like ports).
func Text(r *policy.Ruleset, mtu int) string {
	return fmt.Sprintf("# Peers' flows are translated to ports %v by default; a helper on Linux chooses those that the host's own settings and sockets leave.\n", defaultPorts) + compile(r, params{
		mtu: mtu, ipsec: true, ports: defaultPorts, around: defaultPorts,
		flowsPerPeer: maxFlowsPerPeer, established: flow.TCPEstablished,
	}).String()
}

// family holds what differs between IPv4 and IPv6.
type family struct {
	suffix     string // suffix of the names of sets and chains
	proto      value
	addr       string // nft's type name of an address
	src, dst   field
	quoted     field // destination in the packet that an ICMP error quotes
	icmp       field
	icmpProto  value
	redirect   value
	icmpErrors string // name of the set of ICMP error types
	overhead   int    // size of the IP and TCP headers without options, in bytes
	belongs    func(netip.Addr) bool
	whole      netip.Prefix
}

// families are IPv4 and IPv6. The overhead is 20 or 40 bytes of IP and 20 of TCP.
var families = [...]family{
	{"4", ipv4, "ipv4_addr", saddr4, daddr4, quotedDst4, icmpType, icmp4, redirect4, "errors4", 40, netip.Addr.Is4, netip.MustParsePrefix("0.0.0.0/0")},
	{"6", ipv6, "ipv6_addr", saddr6, daddr6, quotedDst6, icmp6Type, icmp6, redirect6, "errors6", 60, netip.Addr.Is6, netip.MustParsePrefix("::/0")},
}

// compiler compiles a ruleset to a table.
type compiler struct {
	*table
	r    *policy.Ruleset
	host policy.Host
	mesh value
	params
}

// compile returns the table that enforces r.
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
	// The order is that of the printed table.
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

// classSets returns the sets of destinations by class, and of addresses that the host
// itself may reach.
//
// A rule that must match to drop a packet never uses an interval set. When a table is
// replaced, the kernel activates its rules before the elements of interval sets
// (nf_tables_commit in net/netfilter/nf_tables_api.c commits sets last), so for some
// microseconds such a set is empty: a drop by a set of ranges let 13,997 packets pass in
// 370 loads. So rules compare the mesh prefixes themselves, and the sets lan and internet
// exclude the classes before them. For the same reason rules compare other owners'
// networks in the mesh prefixes, and only their single addresses are in a set, which
// isn't an interval set: the host's own traffic, all of it if the uplink is a carrier's,
// isn't interrupted for those microseconds.
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

// isWide reports whether a prefix has more than one address.
func isWide(p netip.Prefix) bool { return !p.IsSingleIP() }

// peerSets returns the sets of peers, of their permissions, of cut flows, and the
// counters.
func (c *compiler) peerSets(f family) []set {
	peers := addresses("peers"+f.suffix, f.addr, nil)
	pairs := set{name: "same" + f.suffix, types: []string{f.addr, f.addr}}
	may := []set{
		addresses("may_incoming"+f.suffix, f.addr, nil),
		addresses("may_routing"+f.suffix, f.addr, nil),
		addresses("may_lan"+f.suffix, f.addr, nil),
	}
	need := []mesh.Permissions{mesh.Incoming, mesh.Routing, mesh.Routing | mesh.LAN}
	for _, s := range c.r.Mesh().Serves.List() {
		may, need = append(may, addresses("may_"+s.Name+f.suffix, f.addr, nil)), append(need, s.Needs)
	}
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
	sets := append(append([]set{peers, pairs}, may...), cutSet(f))
	if c.flowsPerPeer > 0 {
		sets = append(sets, set{name: "flows" + f.suffix, types: []string{f.addr, "mark"}, size: maxCounters})
	}
	return sets
}

// cutSet returns the set of cut flows to the host: source, destination, protocol and
// ports of the host's packets.
func cutSet(f family) set {
	return set{
		name: "cut" + f.suffix, timeout: true,
		types: []string{f.addr, f.addr, "inet_proto", "inet_service", "inet_service"},
	}
}

// icmpErrors returns the sets of ICMP messages that quote the packet they are about (RFC
// 792, RFC 4443 2.1).
func icmpErrors() []set {
	return []set{
		constants("errors4", "icmp_type", number("destination-unreachable", 3),
			number("time-exceeded", 11), number("parameter-problem", 12)),
		constants("errors6", "icmpv6_type", number("destination-unreachable", 1),
			number("packet-too-big", 2), number("time-exceeded", 3), number("parameter-problem", 4)),
	}
}

// boundName is the name of the set of ports in the range that sockets of the host use.
const boundName = "bound"

// boundSet returns the set of ports that sockets of the host use.
func boundSet(ports []uint16) set {
	values := make([]value, len(ports))
	for i, p := range ports {
		values[i] = portValue(p)
	}
	return constants(boundName, "inet_service", values...)
}

// ingress judges packets before conntrack: which source may arrive on which interface. So
// a spoofed packet doesn't touch a flow.
func (c *compiler) ingress() {
	in0 := c.hook("ingress", "filter", "prerouting", afterDefrag)
	// The host's packets to itself use loopback, also those between its mesh addresses.
	in0.accept("", is(iifname, name("lo")))
	in0.branch("ingress_elsewhere", isNot(iifname, c.mesh))
	// From here on the packet is from the mesh. WireGuard's allowed IPs already bind a
	// source to its peer; the table doesn't rely on that alone.
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

	// Another host that uses a mesh address, as source or destination, isn't a peer.
	out := c.chain("ingress_elsewhere")
	for _, f := range families {
		out.drop("the host's own mesh address as a source, not from the host", in("own"+f.suffix, f.src))
		out.drop("the host's mesh address, not from the mesh", in("own"+f.suffix, f.dst))
		out.drop("a peer's source, not from the mesh", in("peers"+f.suffix, f.src))
		out.drop("no other host reaches a peer", in("peers"+f.suffix, f.dst))
		c.dropUnassigned(out, f)
	}
}

// listenPort returns WireGuard's port if it is known.
func (c *compiler) listenPort() (value, bool) {
	p := c.r.Mesh().ListenPort
	return portValue(p), p != 0
}

// protocolValue returns the value of a protocol with ports.
func protocolValue(proto uint8) value {
	if proto == policy.ProtoUDP {
		return udp
	}
	return tcp
}

// portValue returns a port as a value.
func portValue(p uint16) value { return number(strconv.Itoa(int(p)), port(p)...) }

// protocols makes the chain carried, which returns for the protocols that peers may use
// and drops the others: a NAT distinguishes flows without ports by addresses alone. It
// lists the allowed ones, because a header that the kernel can't parse has no protocol.
func (c *compiler) protocols() {
	p := c.chain("carried")
	p.ret("", is(l4proto, tcp))
	p.ret("", is(l4proto, udp))
	for _, f := range families {
		p.ret("", is(nfproto, f.proto), is(l4proto, f.icmpProto))
	}
	p.drop("only TCP, UDP and ICMP")
}

// judge judges each packet from a peer after conntrack and before any redirect, such as
// that of a port which Docker publishes: the policy is about the destination as the peer
// sent it. This is also before the kernel would answer the packet (time exceeded, no
// route), so what may not pass gets no answer.
func (c *compiler) judge() {
	j := c.hook("judge", "filter", "prerouting", afterConntrack)
	j.accept("", isNot(iifname, c.mesh))
	// Without a flow there is no opener, and nothing below can decide.
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
	// An answer of the peer on a flow that another host opened: no such flow may exist.
	j.drop("no other host opens a flow to a peer", is(ctDirection, reply))
	j.jump(asSent.name)
	c.limitFlows(j)

	// An ICMP error of a peer may only be about a packet that the peer itself received.
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

// maxFlowsPerPeer bounds the conntrack entries of one peer in one family, unless an
// eighth of conntrack's maximum is less; both families together get at most a quarter.
// Without a bound, one peer with a colluding server filled 236,257 of 262,144 entries
// with established connections in 84 s, which stay for five days and leave the host
// itself without a network.
//
// The number is the guard's bound, 4,096, plus 20 times its square root. Flows are
// counted in flowParts parts by a hash of destination and ports, so each part has room
// for five standard deviations more than its mean, and the guard's bound is reached
// first.
const maxFlowsPerPeer = 5376

// closedInKernel is how long conntrack keeps a connection that was reset
// (nf_conntrack_tcp_timeout_close in Documentation/networking/nf_conntrack-sysctl.rst).
const closedInKernel = 10 * time.Second

// States of TCP connections (linux/netfilter/nf_conntrack_tcp.h) that the kernel doesn't
// count (already_closed in net/netfilter/nf_conncount.c).
const (
	stateTimeWait = 7
	stateClose    = 8
)

// timeLimits makes peers' flows end in conntrack when they end at the guard, so that dead
// flows don't use up a peer's share.
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

// limitFlows counts a flow at its first packet, if it may be opened. Unconfirmed means
// first packet; later ones aren't counted, so each flow counts once, answered or not.
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

// view says where a packet has the addresses of the packet that opened its flow.
// Conntrack has them, too, but nft can't list a rule that looks one of those up in a set:
// netlink_parse_concat_expr of nft 1.0 aborts without a key length.
type view struct {
	name     string // of the chain
	src, dst func(family) field
}

var (
	// asSent: the opener's own packets, before any redirect. Conntrack ensures that an
	// ICMP error of the opener goes to the sender of the packet that it quotes
	// (nf_conntrack_inet_error in net/netfilter/nf_conntrack_proto_icmp.c).
	asSent = view{"permitted", func(f family) field { return f.src }, func(f family) field { return f.dst }}
	// asAnswered: packets to the opener, of a flow that wasn't redirected.
	asAnswered = view{"permitted_back", func(f family) field { return f.dst }, func(f family) field { return f.src }}
	// asQuoted: ICMP errors to the opener, which quote one of its packets.
	asQuoted = view{"permitted_quoted", func(f family) field { return f.dst }, func(f family) field { return f.quoted }}
)

// permitted makes the chains that return if the opener of the packet's flow may open it
// now, and drop the packet otherwise: the table "From a peer" of docs/policy.md. They
// look only at the flow, so they hold for packets in both directions and for packets that
// ICMP errors quote.
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

// permittedFamily makes the chain for one family, class by class.
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

// permittedHost makes the chain for class self.
func (c *compiler) permittedHost(v view, f family) {
	s := c.chain(v.name + "_self" + f.suffix)
	if port, ok := c.listenPort(); ok {
		s.drop("WireGuard's port, through the tunnel", is(ctProtocol, udp), is(ctOrigDport, port))
	}
	s.ret("incoming", in("may_incoming"+f.suffix, v.src(f)))
	for _, served := range c.r.Mesh().Serves.List() {
		for _, proto := range served.Protos {
			s.ret(served.What, in("own"+f.suffix, v.dst(f)), is(ctProtocol, protocolValue(proto)),
				is(ctOrigDport, portValue(served.Port)), in("may_"+served.Name+f.suffix, v.src(f)))
		}
	}
	s.drop("self needs incoming")
}

// formerOutside reports whether a removed peer's address is outside of the mesh prefixes,
// which may have been changed since.
func (c *compiler) formerOutside(f family) bool {
	return slices.ContainsFunc(c.r.Sets().Former, func(p netip.Prefix) bool {
		return f.belongs(p.Addr()) && !slices.ContainsFunc(c.r.Sets().Mesh, func(m netip.Prefix) bool { return m.Contains(p.Addr()) })
	})
}

// eachMeshPrefix calls do for each mesh prefix of a family.
func (c *compiler) eachMeshPrefix(f family, do func(netip.Prefix)) {
	for _, p := range c.r.Sets().Mesh {
		if f.belongs(p.Addr()) {
			do(p)
		}
	}
}

// forwards reports whether the host forwards the family for peers.
func (c *compiler) forwards(f family) bool {
	if f.suffix == "4" {
		return c.host.Forwarding.IPv4
	}
	return c.host.Forwarding.IPv6
}

// foundForwarding reports whether the host already forwarded the family when the helper
// came.
func (c *compiler) foundForwarding(f family) bool {
	if f.suffix == "4" {
		return c.host.FoundForwarding.IPv4
	}
	return c.host.FoundForwarding.IPv6
}

// uplinks are the interfaces by which peers' packets reach the internet.
func (c *compiler) uplinks(f family) []string { return c.host.Uplinks(f.whole.Addr()) }

// input judges again what the kernel delivers to the host: an address that the host got a
// moment ago may not be in the sets yet, but the kernel already knows it.
func (c *compiler) input() {
	i := c.hook("input", "filter", "input", filtering)
	i.accept("", isNot(iifname, c.mesh))
	for _, f := range families {
		i.accept("answers to the host", is(ctDirection, reply), in("own"+f.suffix, f.dst))
	}
	i.drop("", is(ctDirection, reply))
	// The peer sent it to another destination, which isn't class self.
	i.drop("redirected to the host", has(ctStatus, dnat))
	i.jump(asSent.name)
	for _, f := range families {
		i.accept("", in("self"+f.suffix, f.dst))
	}
	i.drop("not an address of the host when it was sent")
}

// forward judges what the kernel forwards; both interfaces are known here.
func (c *compiler) forward() {
	f := c.hook("forward", "filter", "forward", filtering)
	// From the mesh first: a packet from peer to peer has the interface on both sides.
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

// fromMesh judges forwarded packets from a peer.
func (c *compiler) fromMesh() {
	m := c.chain("from_mesh")
	m.drop("from peer to peer", is(oifname, c.mesh))
	m.drop("", is(ctDirection, reply))
	m.drop("a helper would let others open flows to it", has(ctStatus, hasHelper))
	m.drop("redirected from where it was sent to", has(ctStatus, dnat))
	m.jump(asSent.name)
	c.clamp(m)
	// The permission is there; what is left is the way. The kernel's route may be newer
	// than the facts, so internet passes only by the uplink.
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

// toMesh judges forwarded packets to a peer, which must be answers.
func (c *compiler) toMesh() {
	m := c.chain("to_mesh")
	// The rules below use the packet's own addresses, which tell the flow's opener only
	// if conntrack knows the flow.
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

// clamp limits the size of TCP segments to what fits in the tunnel, for paths on which
// path MTU discovery fails. The kernel only ever lowers the option
// (nft_exthdr_tcp_set_eval in net/netfilter/nft_exthdr.c).
func (c *compiler) clamp(to *chain) {
	for _, f := range families {
		mss := uint16(c.mtu - f.overhead)
		to.add(action{verb: clamp, mss: mss}, "", is(nfproto, f.proto), has(tcpFlags, syn))
	}
}

// output judges what the host sends to a peer: only from its mesh address, by the mesh
// interface, and not on a flow that was cut.
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
		// If a peer's endpoint were a known peer's mesh address, the tunnel would carry
		// itself in a loop.
		p.drop("the tunnel doesn't carry itself", is(l4proto, udp), is(sport, port))
	}
	for _, f := range families {
		p.drop("redirects never pass", is(f.icmp, f.redirect))
	}
	p.branch("answer", is(ctDirection, reply))
	// The host's own flows: allowed whatever the peer's permissions are.
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

// acceptTunnel accepts WireGuard's own packets to any endpoint, also at addresses of
// removed peers and unassigned mesh addresses. Those to peers' addresses are judged by
// the rules before. WireGuard's packets leave from its port by a socket of this process's
// user; the port alone doesn't suffice, because a forwarded packet may have it.
func (c *compiler) acceptTunnel(to *chain) {
	if port, ok := c.listenPort(); ok {
		to.accept("WireGuard's own", isNot(oifname, c.mesh), is(l4proto, udp), is(sport, port),
			is(skuid, bits(strconv.Itoa(int(c.uid)), c.uid)))
	}
}

// dropUnassigned drops packets to a mesh address that no peer has.
func (c *compiler) dropUnassigned(to *chain, f family) {
	to.accept("", in("self"+f.suffix, f.dst))
	to.drop("a removed peer's address", in("former"+f.suffix, f.dst))
	c.eachMeshPrefix(f, func(p netip.Prefix) { to.branch("unclaimed"+f.suffix, within(f.dst, p)) })
}

// unclaimed makes the chain for mesh addresses that are neither a peer's nor the host's:
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

// egress translates peers' packets and makes the last check of what leaves. That check
// also covers packets for which an interface was chosen after the other hooks, and holds
// when this process is dead.
func (c *compiler) egress() {
	n := c.hook("source_nat", "nat", "postrouting", sourceNAT)
	for _, f := range families {
		n.branch("translate", isNot(oifname, c.mesh), in("peers"+f.suffix, f.src))
	}
	c.translate()

	// Everything below holds for packets of any program, also while this process is dead.
	// Only the mesh interface and loopback are exempt.
	e := c.hook("egress", "filter", "postrouting", afterNAT)
	e.accept("", is(oifname, c.mesh))
	e.accept("", is(oifname, name("lo")))
	c.dropIPsec(e)
	for _, f := range families {
		e.drop("untranslated", in("peers"+f.suffix, f.src))
		e.drop("in clear", in("peers"+f.suffix, f.dst))
	}
	// A rule after the forward chain may have assigned one.
	e.drop("a helper would let others open flows to it", is(iifname, c.mesh), has(ctStatus, hasHelper))
	// Another program's translation may have come first, and an old flow may be from a
	// time when the host used other ports. Kernels before 5.7 don't know the input
	// interface here.
	for _, proto := range [...]value{tcp, udp} {
		if c.ports.size() > 0 {
			e.drop("a peer's, from a port that may be the host's", is(iifname, c.mesh), is(l4proto, proto), notInPorts(sport, c.around))
			// A new flow that drew such a port isn't in conntrack yet (nf_confirm runs
			// last at this hook, NF_IP_PRI_CONNTRACK_CONFIRM), so the retransmitted
			// packet draws another one.
			e.drop("a peer's, from the port of a socket of the host", is(iifname, c.mesh), is(l4proto, proto), in(boundName, sport))
		}
	}
	c.acceptTunnel(e)
	for _, f := range families {
		c.dropUnassigned(e, f)
	}
}

// translate gives peers' flows random ports that can't be the host's. Plain masquerade
// keeps the source port if it is free: a peer that sends from port 51820 to a device that
// the host has a tunnel with would receive that device's handshakes, because the reply
// tuple of its flow is that of the host's own. So ports are drawn from a range without
// the host's, fully-random, and the host always has ports left for itself. Ping
// identifiers are in the same range for the same reason.
func (c *compiler) translate() {
	t := c.chain("translate")
	if c.ports.size() == 0 {
		return
	}
	for _, f := range families {
		source := c.sources[f.whole.Addr().Is4()]
		uplink := c.host.Uplink(f.whole.Addr())
		if !source.IsValid() || uplink == "" || c.host.Source(f.whole.Addr()) != source {
			continue // the address was observed with another uplink or source
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
