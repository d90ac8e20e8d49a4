package explain

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// asked is a question about a packet, and what the policy says.
type asked struct {
	r *policy.Ruleset
	q api.Question
	// forth is the packet that the peer sends, packet the one that is asked about.
	forth, packet host.Packet
	// answer says that packet answers forth; else it opens a flow.
	answer bool
	v      policy.Verdict
}

// ask judges what a question is about by the policy.
func ask(r *policy.Ruleset, q api.Question) (asked, error) {
	a := asked{r: r, q: q}
	target := q.To
	if !target.IsValid() {
		target = q.From
	}
	if !target.IsValid() {
		return a, api.Errorf(api.CodeBadRequest, "no destination is given").WithHint("say where to")
	}
	target = target.WithZone("").Unmap()
	if q.From = q.From.WithZone("").Unmap(); q.From.IsValid() && q.From.Is4() != target.Is4() {
		return a, api.Errorf(api.CodeBadAddress, "%v and %v aren't of one address family", q.From, target).WithHint("give both as IPv4, or both as IPv6")
	}
	proto, err := protoOf(q.Proto, target)
	if err != nil {
		return a, err
	}
	if q.Proto == "icmp" && q.Port != 0 {
		return a, api.Errorf(api.CodeBadRequest, "ICMP has no ports, and port %d is given", q.Port).WithHint("leave the port out, or ask for tcp or udp")
	}
	own, err := addressOf(r, q.Peer, target)
	if err != nil {
		return a, err
	}
	a.forth = host.Packet{In: r.Host().Interface, Packet: policy.Packet{
		Src: own, Dst: target, Proto: proto, SrcPort: 49152, DstPort: q.Port, ICMPType: echo(target),
	}}
	if q.From == own {
		return a, api.Errorf(api.CodeBadRequest, "%v is %s itself, and \"from\" is the other end, which sends to %s", own, q.Peer, q.Peer).
			WithHint("leave it out: what %s sends is what is judged without it", q.Peer)
	}
	a.packet = a.forth
	switch {
	case !q.From.IsValid():
		a.v = r.FromPeer(a.forth.Packet)
	case q.To.IsValid() && q.From == target:
		a.answer, a.packet = true, reverse(a.forth, arrivesBy(r, q.From))
		a.v = r.Reply(policy.ByPeer, a.forth.Packet, a.packet.In)
	default:
		// A host that the peer didn't send to opens a flow of its own.
		a.packet = host.Packet{In: arrivesBy(r, q.From), Packet: policy.Packet{
			Src: q.From, Dst: own, Proto: proto, SrcPort: q.Port, DstPort: a.forth.SrcPort, ICMPType: a.forth.ICMPType,
		}}
		a.v = a.packet.Judge(r)
	}
	return a, nil
}

// reverse returns the answer to a packet, as it comes in by an interface.
func reverse(p host.Packet, in string) host.Packet {
	p.In, p.Src, p.Dst, p.SrcPort, p.DstPort = in, p.Dst, p.Src, p.DstPort, p.SrcPort
	switch p.ICMPType { // an echo's reply (RFC 792, RFC 4443)
	case 8:
		p.ICMPType = 0
	case 128:
		p.ICMPType = 129
	}
	return p
}

// arrivesBy returns the interface by which packets of a come: the longest
// prefix's, else the uplink; empty for the host itself.
func arrivesBy(r *policy.Ruleset, a netip.Addr) string {
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

// protoOf returns the IP protocol of a name, for ICMP that of the target's family.
func protoOf(name string, target netip.Addr) (uint8, error) {
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

// echo returns the type of an echo request (RFC 792, RFC 4443).
func echo(target netip.Addr) uint8 {
	if target.Is4() {
		return 8
	}
	return 128
}

// addressOf returns the peer's address of the target's family.
func addressOf(r *policy.Ruleset, name string, target netip.Addr) (netip.Addr, error) {
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
