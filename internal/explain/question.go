package explain

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// evaluation is a question about a packet, with the verdict of a ruleset.
type evaluation struct {
	rules *policy.Ruleset
	q     api.Question // with Peer as a name; see evaluate for From and To
	// packet is the one that the question is about. forth is the packet that the peer sends
	// to the other end: packet itself, or the one that packet answers. If the other end opens
	// the flow, forth is what the peer would send there.
	forth, packet host.Packet
	// answer says that packet answers forth; otherwise it opens a flow.
	answer  bool
	verdict policy.Verdict // of packet
}

// peerPort is the port of the peer's end in a question, which names only the other end's: the
// first of the dynamic range (RFC 6335 6). No rule of the policy depends on it.
const peerPort = 49152

// ICMP types (RFC 792; RFC 4443 4.1 and 4.2), which stand for all ICMP in a question.
const (
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
)

// evaluate returns the verdict of r on the packet of a question:
//   - To alone: the peer sends to To.
//   - From equal to To: the answer from there to a flow that the peer opened.
//   - From alone, or From and a different To: From opens a flow to the peer.
//
// IPv4-mapped addresses count as IPv4, and zones are dropped. The errors are *[api.Error].
func evaluate(r *policy.Ruleset, q api.Question) (evaluation, error) {
	e := evaluation{rules: r, q: q}
	target := q.To
	if !target.IsValid() {
		target = q.From
	}
	if !target.IsValid() {
		return e, api.Errorf(api.CodeBadRequest, "no destination is given").WithHint("say where to")
	}
	target = target.WithZone("").Unmap()
	if q.From = q.From.WithZone("").Unmap(); q.From.IsValid() && q.From.Is4() != target.Is4() {
		return e, api.Errorf(api.CodeBadAddress, "%v and %v aren't of one address family", q.From, target).WithHint("give both as IPv4, or both as IPv6")
	}
	proto, err := protocol(q.Proto, target)
	if err != nil {
		return e, err
	}
	if q.Proto == "icmp" && q.Port != 0 {
		return e, api.Errorf(api.CodeBadRequest, "ICMP has no ports, and port %d is given", q.Port).WithHint("leave the port out, or ask for tcp or udp")
	}
	own, err := peerAddress(r, q.Peer, target)
	if err != nil {
		return e, err
	}
	e.forth = host.Packet{In: r.Host().Interface, Packet: policy.Packet{
		Src: own, Dst: target, Proto: proto, SrcPort: peerPort, DstPort: q.Port, ICMPType: echoRequest(target),
	}}
	if q.From == own {
		return e, api.Errorf(api.CodeBadRequest, "%v is %s itself, and \"from\" is the other end, which sends to %s", own, q.Peer, q.Peer).
			WithHint("leave it out: what %s sends is what is judged without it", q.Peer)
	}
	e.packet = e.forth
	switch {
	case !q.From.IsValid():
		e.verdict = r.FromPeer(e.forth.Packet)
	case q.To.IsValid() && q.From == target:
		e.answer, e.packet = true, reverse(e.forth, interfaceTo(r, q.From))
		e.verdict = r.Reply(policy.ByPeer, e.forth.Packet, e.packet.In)
	default:
		// The other end answers nothing of the peer's, so it opens a flow of its own.
		e.packet = host.Packet{In: interfaceTo(r, q.From), Packet: policy.Packet{
			Src: q.From, Dst: own, Proto: proto, SrcPort: q.Port, DstPort: e.forth.SrcPort, ICMPType: e.forth.ICMPType,
		}}
		e.verdict = e.packet.Judge(r)
	}
	return e, nil
}

// reverse returns the answer to a packet, which arrives on the interface in, or "" if the host
// itself sends it.
func reverse(p host.Packet, in string) host.Packet {
	p.In, p.Src, p.Dst, p.SrcPort, p.DstPort = in, p.Dst, p.Src, p.DstPort, p.SrcPort
	switch p.ICMPType {
	case echoRequest4:
		p.ICMPType = echoReply4
	case echoRequest6:
		p.ICMPType = echoReply6
	}
	return p
}

// interfaceTo returns the interface that leads to a, by which packets from a are expected to
// arrive: the one with the longest matching prefix among addresses and routes, otherwise the
// uplink; "" if a is the host's own address. It uses the observed facts only, not the
// kernel's policy routing, which trace.route asks for.
func interfaceTo(r *policy.Ruleset, a netip.Addr) string {
	h := r.Host()
	if slices.Contains(r.Mesh().Addresses, a) {
		return ""
	}
	in, bits := h.Uplink(a), -1
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			if p.Addr() == a {
				return ""
			}
			if p.Contains(a) && p.Bits() > bits {
				in, bits = i.Name, p.Bits()
			}
		}
	}
	for _, route := range h.Routes {
		if route.Prefix.Contains(a) && route.Prefix.Bits() > bits {
			in, bits = route.Interface, route.Prefix.Bits()
		}
	}
	return in
}

// protocol returns the IP protocol number for a name; "icmp" is ICMPv6 for an IPv6 target.
func protocol(name string, target netip.Addr) (uint8, error) {
	switch name {
	case "tcp":
		return policy.ProtoTCP, nil
	case "udp":
		return policy.ProtoUDP, nil
	case "icmp":
		if target.Is4() {
			return policy.ProtoICMP, nil
		}
		return policy.ProtoICMPv6, nil
	}
	return 0, api.Errorf(api.CodeBadRequest, "protocol %.20q is unknown", name).WithHint("it is tcp, udp or icmp")
}

// echoRequest returns the ICMP type of an echo request to target.
func echoRequest(target netip.Addr) uint8 {
	if target.Is4() {
		return echoRequest4
	}
	return echoRequest6
}

// peerAddress returns the peer's mesh address in the target's family. A peer that was added a
// moment ago may be missing from r, which the loop compiled before.
func peerAddress(r *policy.Ruleset, name string, target netip.Addr) (netip.Addr, error) {
	for _, p := range r.Peers() {
		if p.Name != name {
			continue
		}
		for _, a := range p.Addresses {
			if a.Is4() == target.Is4() {
				return a, nil
			}
		}
	}
	return netip.Addr{}, api.Errorf(api.CodeUnknownPeer, "peer %q isn't in the policy yet", name)
}
