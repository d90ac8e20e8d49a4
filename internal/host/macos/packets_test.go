package macos

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

const protoGRE = 47

// randomPacket returns the first packet of a new flow.
func (c *comparison) randomPacket() host.Packet {
	for {
		v4 := c.rng.IntN(2) == 0
		p := host.Packet{In: c.randomIn(), Packet: policy.Packet{Dst: c.w.randomDst(c.rng, v4)}}
		p.Src = c.randomSrc(p.In, v4)
		c.fillProto(&p)
		if p.In == meshInterface {
			// pf drops packets with IP options whatever their destination.
			p.Malformed = c.rng.IntN(40) == 0
		}
		if p.In == loopback && !c.isForHost(p) {
			continue // no other packet comes in there
		}
		if p.Src == p.Dst && p.In != loopback && p.In != "" {
			continue // the packet is its own answer: a foreign floating state would match it
		}
		if p.Proto == protoGRE {
			// After translation, two flows without ports to one destination are
			// indistinguishable: the second one has no state of its own.
			if c.portless[p.Dst] || c.portless[p.Src] {
				continue
			}
			c.portless[p.Dst], c.portless[p.Src] = true, true
		}
		return p
	}
}

func (c *comparison) randomIn() string {
	switch n := c.rng.IntN(10); {
	case n < 6:
		return meshInterface
	case n < 8:
		return ""
	case n == 8 && c.rng.IntN(4) == 0:
		return loopback
	}
	names := c.w.interfaceNames()
	return names[c.rng.IntN(len(names))]
}

// randomSrc returns a source address: mostly a peer's for packets from the tunnel, always
// one of the host's for packets that the host sends.
func (c *comparison) randomSrc(in string, v4 bool) netip.Addr {
	honest := c.rng.IntN(10) > 0
	switch {
	case in == "" || in == loopback:
		return c.w.ownAddr(c.rng, v4)
	case in == meshInterface && honest && len(c.w.mesh.Peers) > 0:
		return c.w.peerAddr(c.rng, v4)
	}
	return c.w.randomDst(c.rng, v4)
}

// fillProto gives a packet a protocol, and ports that no other packet uses.
func (c *comparison) fillProto(p *host.Packet) {
	c.port++
	if c.port < 1024 {
		c.port = 1024
	}
	switch n := c.rng.IntN(20); {
	case n < 8:
		p.Proto = policy.ProtoTCP
	case n < 15:
		p.Proto = policy.ProtoUDP
	case n < 19:
		p.Proto, p.ICMPType = c.randomICMP(p.Dst.Is4())
	default:
		p.Proto = protoGRE
	}
	switch p.Proto {
	case policy.ProtoTCP, policy.ProtoUDP:
		p.SrcPort, p.DstPort = c.port, append(servicePorts(), 443, 8080, listenPort, outsidePort)[c.rng.IntN(4+len(policy.AllServices))]
	case policy.ProtoICMP, policy.ProtoICMPv6:
		p.SrcPort, p.DstPort = c.port, c.port
	}
}

// randomICMP returns mostly an echo request, otherwise an error about no flow or a
// redirect.
func (c *comparison) randomICMP(v4 bool) (proto, kind uint8) {
	other := c.rng.IntN(3) == 0
	if v4 {
		if other {
			return policy.ProtoICMP, []uint8{3, 5, 11, 12}[c.rng.IntN(4)]
		}
		return policy.ProtoICMP, 8
	}
	if other {
		return policy.ProtoICMPv6, []uint8{1, 2, 3, 4, 137}[c.rng.IntN(5)]
	}
	return policy.ProtoICMPv6, 128
}

// randomOut returns the interface that a packet leaves by: half of the time the one in
// the facts, otherwise any, because a route may change before the facts do.
func (c *comparison) randomOut(p host.Packet) string {
	if c.rng.IntN(2) == 0 {
		return c.route(p.Dst)
	}
	all := c.allOut()
	return all[c.rng.IntN(len(all))]
}

// route returns the interface that the host's routes select, or en0 without a route.
func (c *comparison) route(dst netip.Addr) string {
	if out := c.routed(dst); out != "" {
		return out
	}
	return "en0"
}

// routed looks an address up in the host's routing table: the mesh interface for peers
// and the mesh, then the longest attached or routed prefix, then the uplink.
func (c *comparison) routed(dst netip.Addr) string {
	best, out := -1, c.w.host.Uplink(dst)
	if class := c.r.Class(dst); class == policy.InMesh {
		return meshInterface
	}
	for _, r := range c.w.host.Routes {
		if r.Prefix.Contains(dst) && r.Prefix.Bits() > best {
			best, out = r.Prefix.Bits(), r.Interface
		}
	}
	for _, i := range c.w.host.Interfaces {
		for _, p := range i.Addresses {
			if p.Contains(dst) && p.Bits() > best {
				best, out = p.Bits(), i.Name
			}
		}
	}
	return out
}

// allOut returns the interfaces that a packet can leave by. Loopback isn't among them:
// foreign rules on it don't matter, since nothing leaves the host there.
func (c *comparison) allOut() []string {
	names := append(c.w.interfaceNames(), meshInterface)
	if c.subset {
		return names
	}
	return append(names, loopback)
}

// allIn returns the interfaces that other hosts can send by.
func (c *comparison) allIn() []string { return append(c.w.interfaceNames(), meshInterface) }

// toPF converts a packet to pfsim's form.
func (c *comparison) toPF(p host.Packet) pfsim.Packet {
	q := pfsim.Packet{Src: p.Src, Dst: p.Dst, Proto: pfconf.Proto(p.Proto), Options: p.Malformed}
	switch p.Proto {
	case policy.ProtoTCP:
		q.SrcPort, q.DstPort = p.SrcPort, p.DstPort
		flags := []pfconf.TCPFlags{pfconf.FlagSYN, pfconf.FlagSYN, pfconf.FlagACK, pfconf.FlagPSH | pfconf.FlagACK,
			pfconf.FlagFIN | pfconf.FlagACK, pfconf.FlagRST | pfconf.FlagACK}
		q.Flags = flags[c.rng.IntN(len(flags))]
		q.Seq, q.Window = 1000, 65535
		if q.Flags&pfconf.FlagACK != 0 {
			q.Ack = 5000
		}
	case policy.ProtoUDP:
		q.SrcPort, q.DstPort, q.Len = p.SrcPort, p.DstPort, 8
	case policy.ProtoICMP, policy.ProtoICMPv6:
		q.ICMPType, q.ICMPID = p.ICMPType, p.SrcPort
	}
	return q
}

// reverse returns the answer to a packet.
func reverse(p pfsim.Packet) pfsim.Packet {
	p.Src, p.Dst = p.Dst, p.Src
	p.SrcPort, p.DstPort = p.DstPort, p.SrcPort
	p.Tag = ""
	switch p.ICMPType {
	case 8:
		p.ICMPType = 0
	case 128:
		p.ICMPType = 129
	}
	if p.Proto == pfconf.ProtoTCP {
		ack := p.Seq
		if p.Flags&(pfconf.FlagSYN|pfconf.FlagFIN) != 0 {
			ack++
		}
		p.Seq, p.Ack = 5000, ack
		if p.Flags&pfconf.FlagSYN != 0 {
			p.Flags = pfconf.FlagSYN | pfconf.FlagACK
		} else {
			p.Flags = pfconf.FlagACK
		}
	}
	return p
}

func hasPorts(p pfconf.Proto) bool { return p != protoGRE }

// icmpErrors returns the ICMP error types of an address's family.
func icmpErrors(a netip.Addr) []uint8 {
	if a.Is4() {
		return []uint8{3, 11, 12}
	}
	return []uint8{1, 2, 3, 4}
}

// icmpError returns an ICMP error about a packet.
func icmpError(from, to netip.Addr, kind uint8, about pfsim.Packet) pfsim.Packet {
	p := pfsim.Packet{Src: from, Dst: to, Proto: pfconf.ProtoICMPv6, ICMPType: kind, Quoted: &pfsim.Quoted{
		Src: about.Src, Dst: about.Dst, Proto: about.Proto, SrcPort: about.SrcPort, DstPort: about.DstPort,
		Seq: about.Seq, ICMPID: about.ICMPID,
	}}
	if from.Is4() {
		p.Proto = pfconf.ProtoICMP
	}
	return p
}

// servicePorts are the ports of all services.
func servicePorts() (ports []uint16) {
	for _, s := range policy.AllServices {
		ports = append(ports, s.Port)
	}
	return ports
}
