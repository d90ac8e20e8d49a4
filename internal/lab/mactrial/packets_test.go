package mactrial

// Sending packets through the guard or past it, and recording where each one got.

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// A way is how a peer's packets enter the Mac.
type way int

const (
	guarded way = iota // through the guard, as in the product
	alone              // behind it: pf alone
)

func (w way) String() string { return [...]string{"guard and pf", "pf alone"}[w] }

var protos = []netlab.Proto{netlab.TCP, netlab.UDP, netlab.ICMP}

// opening returns the first packet of a new flow.
func (g *rig) opening(in string, src, dst netip.Addr, proto netlab.Proto) host.Packet {
	g.port++
	p := host.Packet{In: in, Packet: policy.Packet{Src: src, Dst: dst, SrcPort: 10000 + g.port%40000, DstPort: 443}}
	switch {
	case proto == netlab.TCP:
		p.Proto = policy.ProtoTCP
	case proto == netlab.UDP:
		p.Proto = policy.ProtoUDP
	case dst.Is6():
		p.Proto, p.ICMPType, p.DstPort = policy.ProtoICMPv6, 128, p.SrcPort
	default:
		p.Proto, p.ICMPType, p.DstPort = policy.ProtoICMP, 8, p.SrcPort
	}
	return p
}

// bytesOf builds a packet: TCP with the given flags, an ICMP echo, or a datagram.
func bytesOf(p host.Packet, flags uint8, reply bool) []byte {
	src, dst := netip.AddrPortFrom(p.Src, p.SrcPort), netip.AddrPortFrom(p.Dst, p.DstPort)
	switch p.Proto {
	case policy.ProtoTCP:
		return netlab.TCPPacket(src, dst, flags, 1, 1, nil)
	case policy.ProtoUDP:
		return netlab.UDPPacket(src, dst, []byte("data"))
	}
	return netlab.EchoPacket(p.Src, p.Dst, reply, p.SrcPort, 1, []byte("data"))
}

// An arrival is where a packet got: "" (nowhere), "host", "peer", or the name of the link
// that it left by.
type arrival struct {
	at string
	o  simmac.Outcome
}

// send has a packet enter by the interface p.In, or has the Mac send it.
func (g *rig) send(w way, p host.Packet, flags uint8, reply bool) arrival {
	b := bytesOf(p, flags, reply)
	var o simmac.Outcome
	switch {
	case p.In == "":
		o = g.mac.Emit(b)
	case p.In == g.device().name && w == guarded:
		d := g.device()
		d.last = &simmac.Outcome{Why: "guard"}
		g.wg.Load().write(b)
		o = *d.last
	default:
		o = g.mac.Inject(p.In, b)
	}
	a := arrival{at: o.Link, o: o}
	switch {
	case o.Fate == simmac.Dropped:
	case o.Fate == simmac.Delivered:
		a.at = "host"
	case o.Link == g.device().name:
		a.at = "peer"
		if passed := g.wg.Load().read(g.own); w == guarded && !passed {
			a.at, a.o.Why = "", "guard"
		}
	}
	return a
}

// open sends the first packet of a flow.
func (g *rig) open(w way, p host.Packet) arrival { return g.send(w, p, netlab.SYN, false) }

// differs describes how an arrival differs from the policy's verdict, or returns "".
func (g *rig) differs(p host.Packet, v policy.Verdict, r *policy.Ruleset, a arrival) string {
	host := r.Host()
	bad := func() string {
		return fmt.Sprintf("%+v: got to %q as %v (%s by pf's %s, %s), policy %+v: %s",
			p, a.at, a.o.Packet, a.o.Why, ruleOf(a.o.In), ruleOf(a.o.Out), v, v.Rule)
	}
	if (a.at != "") != v.Pass {
		return bad()
	}
	if !v.Pass {
		return ""
	}
	right := true
	switch v.Exit {
	case policy.ExitHost:
		right = a.at == "host"
	case policy.ExitMesh:
		right = a.at == "peer"
	case policy.ExitUplink:
		right = a.at == host.Uplink(p.Dst)
	case policy.ExitOther:
		right = a.at != "host" && a.at != "peer"
	}
	if v.NAT() {
		i := slices.IndexFunc(host.Interfaces, func(i policy.Interface) bool { return i.Name == a.at })
		right = right && i >= 0 && slices.ContainsFunc(host.Interfaces[i].Addresses, func(n netip.Prefix) bool { return n.Addr() == a.o.Packet.Src })
	}
	if !right {
		return bad()
	}
	return ""
}

func ruleOf(h pfsim.Hook) string {
	if !h.Seen || h.Rule == nil {
		return "no rule"
	}
	return fmt.Sprintf("%q", h.Rule.Label)
}

// answerTo returns the other end's packet of a flow, from where the flow arrived.
func (g *rig) answerTo(a arrival) host.Packet {
	o := a.o.Packet
	p := host.Packet{Packet: policy.Packet{Src: o.Dst, Dst: o.Src, SrcPort: o.DstPort, DstPort: o.SrcPort, Proto: uint8(o.Proto)}}
	switch a.at {
	case "host":
	case "peer":
		p.In = g.device().name
	default:
		p.In = a.at
	}
	if p.Proto == policy.ProtoICMP || p.Proto == policy.ProtoICMPv6 {
		p.SrcPort, p.DstPort = o.ICMPID, o.ICMPID
	}
	return p
}

// answer has the other end of a flow send a packet.
func (g *rig) answer(w way, a arrival, flags uint8) arrival {
	return g.send(w, g.answerTo(a), flags, true)
}
