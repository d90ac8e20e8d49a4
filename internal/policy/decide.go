package policy

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// IP protocol numbers that the policy looks into.
const (
	ProtoICMP   = 1
	ProtoTCP    = 6
	ProtoUDP    = 17
	ProtoICMPv6 = 58
)

// Packet is a packet as the policy sees it: as its sender made it, before any
// translation. Where it comes from is told by the question that is asked about it.
type Packet struct {
	Src, Dst netip.Addr
	// Proto is the IP protocol number, for IPv6 that of the upper layer.
	Proto uint8
	// SrcPort and DstPort are of TCP and UDP; of an ICMP echo both are its
	// identifier.
	SrcPort, DstPort uint16
	// ICMPType is meaningful where Proto is ICMP of the packet's family.
	ICMPType uint8
	// Malformed says that the header is malformed, truncated or source-routed.
	Malformed bool
}

// IsICMPError reports whether the packet is an ICMP error that quotes the packet
// it is about: unreachable, too big, time exceeded, parameter problem (RFC 792,
// RFC 4443). Source quench is deprecated (RFC 6633) and no error here.
func (p Packet) IsICMPError() bool {
	switch p.Proto {
	case ProtoICMP:
		return p.Src.Is4() && (p.ICMPType == 3 || p.ICMPType == 11 || p.ICMPType == 12)
	case ProtoICMPv6:
		return p.Src.Is6() && p.ICMPType >= 1 && p.ICMPType <= 4
	}
	return false
}

// IsRedirect reports whether the packet is an ICMP redirect (RFC 792; RFC 4861
// 4.5).
func (p Packet) IsRedirect() bool {
	switch p.Proto {
	case ProtoICMP:
		return p.Src.Is4() && p.ICMPType == 5
	case ProtoICMPv6:
		return p.Src.Is6() && p.ICMPType == 137
	}
	return false
}

// isCarried reports whether the packet is of a protocol that peers may use: TCP,
// UDP, and ICMP of the packet's family. A NAT tells flows of other protocols apart
// by their addresses alone, so that a peer's would take the host's own.
func (p *Packet) isCarried() bool {
	switch p.Proto {
	case ProtoTCP, ProtoUDP:
		return true
	case ProtoICMP:
		return p.Src.Is4()
	case ProtoICMPv6:
		return p.Src.Is6()
	}
	return false
}

// FromPeer judges a packet that came out of the tunnel and belongs to no flow:
// whether it may pass and so open one. The sender is the peer that has the packet's
// source; where none has it the packet is refused as spoofed, and Verdict.Peer is -1.
// It allocates nothing.
func (r *Ruleset) FromPeer(p Packet) Verdict {
	// By pointer from here on: copying the packet costs more than judging it.
	v := r.judge(&p)
	if !v.Pass && v.Peer != noPeer {
		v.answered = r.isTold(&p, v)
	}
	return v
}

// isTold reports whether a peer is told that its packet was refused with v. Permissions
// are checked before addresses: otherwise a peer without a permission would learn this
// host's networks and addresses, from which addresses are answered and which are
// silent. So the answer is the one for the class that the peer knows the destination to
// have, whatever its class on this host. Where a packet of that class would have passed
// there is no answer, as from an address that no host has.
func (r *Ruleset) isTold(p *Packet, v Verdict) bool {
	switch v.Rule {
	case RuleMartian, RuleNoIncoming, RuleNoLAN, RuleNoRouting, RuleNoForwarding, RuleNoUplink:
	case RuleMesh: // a removed peer's address may be outside of the mesh prefixes
	default:
		return false
	}
	if p.IsICMPError() { // none is answered (RFC 1122 section 3.2.2)
		return false
	}
	switch as := r.byClass(v, r.known.of(p.Dst).class, p); as.Rule {
	case RuleNoIncoming, RuleNoLAN, RuleNoRouting, RuleNoForwarding, RuleNoUplink:
		return true
	}
	return false
}

// judge is FromPeer without the question whether the sender is told.
func (r *Ruleset) judge(p *Packet) Verdict {
	v := Verdict{Peer: int(r.classes.of(p.Src).peer)}
	if p.Malformed || !p.Dst.IsValid() || p.Src.Is4() != p.Dst.Is4() {
		return v.refuse(RuleMalformed, Martian)
	}
	if v.Peer == noPeer {
		return v.refuse(RuleSpoofed, Spoofed)
	}
	if p.IsRedirect() {
		return v.refuse(RuleRedirect, Martian)
	}
	class := r.classes.of(p.Dst).class
	if !p.isCarried() {
		return v.refuse(RuleProtocol, class)
	}
	if p.IsICMPError() && class != Martian && class != InMesh {
		return v.refuse(RuleUnquoted, class)
	}
	return r.byClass(v, class, p)
}

// byClass is the table "From a peer" of docs/policy.md.
func (r *Ruleset) byClass(v Verdict, class Class, p *Packet) Verdict {
	have := r.peers[v.Peer].Permissions
	switch class {
	case Martian:
		return v.refuse(RuleMartian, class)
	case Self:
		isTunnel := p.Proto == ProtoUDP && p.DstPort == r.mesh.ListenPort && p.DstPort != 0
		switch {
		case have.Has(mesh.Incoming) && isTunnel:
			return v.refuse(RuleWireGuard, class)
		case have.Has(mesh.Incoming):
			return v.pass(RuleIncoming, class, ExitHost)
		case !isTunnel:
			if s := r.serviceOf(p); s != nil && have.Has(s.Needs) {
				return v.pass(s.Rule, class, ExitHost)
			}
		}
		return v.lack(RuleNoIncoming, class, mesh.Incoming)
	case InMesh:
		return v.refuse(RuleMesh, class)
	case OnLAN:
		if missing := (mesh.Routing | mesh.LAN) &^ have; missing != 0 {
			return v.lack(RuleNoLAN, class, missing)
		}
		if !r.host.Forwarding.Of(p.Dst) {
			return v.refuse(RuleNoForwarding, class)
		}
		if r.isHairpin(p) {
			return v.refuse(RuleHairpin, class)
		}
		return v.pass(RuleLAN, class, ExitOther)
	}
	return r.toInternet(v, have, p)
}

func (r *Ruleset) toInternet(v Verdict, have mesh.Permissions, p *Packet) Verdict {
	switch {
	case !have.Has(mesh.Routing):
		return v.lack(RuleNoRouting, Internet, mesh.Routing)
	case !r.host.Forwarding.Of(p.Dst):
		return v.refuse(RuleNoForwarding, Internet)
	case r.host.Uplink(p.Dst) == "":
		return v.refuse(RuleNoUplink, Internet)
	}
	return v.pass(RuleInternet, Internet, ExitUplink)
}

// isHairpin reports whether the host's router would turn the packet back to the
// host's WireGuard, so that the tunnel carried itself (hairpinning, RFC 4787 section 6).
// Whatever else is behind the router is reached.
func (r *Ruleset) isHairpin(p *Packet) bool {
	if p.Proto != ProtoUDP || p.DstPort == 0 || p.DstPort != r.mesh.ListenPort && p.DstPort != r.host.OutsidePort {
		return false
	}
	return holds(r.sets.Outside, netip.PrefixFrom(p.Dst, p.Dst.BitLen()))
}

// serviceOf returns the service that the packet is for, or nil.
func (r *Ruleset) serviceOf(p *Packet) *Service {
	if r.mesh.Serves == 0 || !r.isMeshAddress(p.Dst) {
		return nil
	}
	for i := range AllServices {
		if s := &AllServices[i]; r.mesh.Serves.Has(s.Set) && s.takes(p) {
			return s
		}
	}
	return nil
}

// isMeshAddress reports whether a is one of the host's own mesh addresses.
func (r *Ruleset) isMeshAddress(a netip.Addr) bool {
	for _, own := range r.mesh.Addresses {
		if a == own {
			return true
		}
	}
	return false
}

// FromHost judges a packet that the host itself sends and that belongs to no flow.
// What arrives by the loopback interface is such a packet. The verdict holds for
// whichever interface the packet leaves by, as far as [Verdict].Exit allows that one;
// an enforcer at the tunnel asks [Ruleset.IntoTunnel]. It allocates nothing.
func (r *Ruleset) FromHost(p Packet) Verdict { return r.fromHost(&p) }

func (r *Ruleset) fromHost(p *Packet) Verdict {
	dst := r.classes.of(p.Dst)
	v := Verdict{Peer: int(dst.peer)}
	// What WireGuard sends is sealed, and no outer address of a peer keeps it from
	// leaving, were it a mesh address. A known peer's mesh address is no outer address of
	// any peer: it is routed into the tunnel, which would carry itself.
	isTunnel := p.Proto == ProtoUDP && p.SrcPort == r.mesh.ListenPort && p.SrcPort != 0
	switch {
	case dst.peer != noPeer && isTunnel:
		return v.refuse(RuleWireGuard, 0)
	case dst.peer != noPeer:
		return r.hostToPeer(v, p)
	case isTunnel:
		return v.pass(RuleTunnel, 0, ExitAny)
	case r.former[p.Dst]:
		return v.refuse(RuleFormer, 0)
	case dst.class == InMesh && !r.others.Contains(p.Dst):
		return v.refuse(RuleUnassigned, 0)
	}
	return v.pass(RuleNotOurs, 0, ExitAny)
}

// FromElsewhere judges a packet that belongs to no flow and arrived by another
// interface than the mesh's and loopback. It allocates nothing.
func (r *Ruleset) FromElsewhere(p Packet) Verdict {
	src, dst := r.classes.of(p.Src), r.classes.of(p.Dst)
	v := Verdict{Peer: int(dst.peer)}
	switch {
	case r.isMeshAddress(p.Src):
		return v.refuse(RuleSpoofed, Spoofed)
	case r.isMeshAddress(p.Dst):
		return v.refuse(RuleToHost, 0)
	case src.peer != noPeer:
		v.Peer = int(src.peer)
		return v.refuse(RuleSpoofed, Spoofed)
	case dst.class == Self && p.Proto == ProtoUDP && p.DstPort == r.mesh.ListenPort && p.DstPort != 0:
		return v.pass(RuleTunnel, 0, ExitAny)
	case dst.peer != noPeer:
		return v.refuse(RuleToPeer, 0)
	case r.former[p.Dst]:
		return v.refuse(RuleFormer, 0)
	case dst.class == InMesh && !r.others.Contains(p.Dst):
		return v.refuse(RuleUnassigned, 0)
	case !r.IsForwarded(p.Dst):
		return v.pass(RuleNotOurs, 0, ExitAny)
	case r.host.FoundForwarding.Of(p.Dst):
		return v.pass(RuleTransit, 0, ExitAny)
	}
	return v.refuse(RuleClosedTransit, 0)
}

// hostToPeer judges a packet from the host itself to a peer.
func (r *Ruleset) hostToPeer(v Verdict, p *Packet) Verdict {
	switch {
	case p.IsRedirect():
		return v.refuse(RuleRedirect, 0)
	case !p.isCarried():
		return v.refuse(RuleProtocol, 0)
	case !r.isMeshAddress(p.Src):
		return v.refuse(RuleForeignSource, 0)
	}
	return v.pass(RuleHostToPeer, 0, ExitMesh)
}

// IntoTunnel judges a packet that is about to enter the tunnel and belongs to no
// flow, for an enforcer that doesn't know whether the host made the packet or forwards
// it. Only the host itself opens flows there, from its mesh address: to a peer, and
// through a peer to the classes lan and internet while [Mesh].ThroughPeer says that
// the host routes so. It allocates nothing.
func (r *Ruleset) IntoTunnel(p Packet) Verdict {
	v := r.fromHost(&p)
	switch {
	case !v.Pass || v.Exit == ExitMesh:
		return v
	case v.Rule == RuleTunnel:
		return v.refuse(RuleWireGuard, 0)
	case !r.isMeshAddress(p.Src):
		return v.refuse(RuleToPeer, 0)
	case !r.mesh.ThroughPeer:
		return v.refuse(RuleNotThroughPeer, 0)
	case p.IsRedirect():
		return v.refuse(RuleRedirect, 0)
	case !p.isCarried():
		return v.refuse(RuleProtocol, 0)
	}
	if class := r.classes.of(p.Dst).class; class != OnLAN && class != Internet {
		return v.refuse(RuleNotThroughPeer, 0)
	}
	return v.pass(RuleThroughPeer, 0, ExitMesh)
}

// Opener is the end that opened a flow through the tunnel: the sender of its first
// packet.
type Opener uint8

// The openers. The zero Opener may open nothing.
const (
	ByPeer Opener = iota + 1
	ByHost
)

// MayOpen judges a running flow by the packet that opened it: the flow passes, in both
// directions, while its opener may open it. The same verdict holds for an ICMP error
// that quotes a packet of the flow, of either direction. Which router sent the error,
// and by which interface it arrived, doesn't matter; that a peer sends errors only from
// its own address is judged by the caller with [Ruleset.PeerByAddr].
func (r *Ruleset) MayOpen(by Opener, opened Packet) Verdict {
	switch by {
	case ByPeer:
		return r.FromPeer(opened)
	case ByHost:
		return r.IntoTunnel(opened)
	}
	return Verdict{Peer: noPeer}.refuse(RuleUnasked, 0)
}

// Reply judges a packet that answers a flow: opened is the packet by which the opener
// opened it. The reply has source and destination swapped, and arrives by the
// interface in: the mesh's out of the tunnel, empty from the host itself. It passes
// when the opener may open the flow now and the reply comes from where the flow went to,
// so what a peer sends with a source that isn't its own passes as the reply to a flow
// that the host opened through that peer, and as nothing else.
func (r *Ruleset) Reply(by Opener, opened Packet, in string) Verdict {
	v := r.MayOpen(by, opened)
	if !v.Pass {
		return v
	}
	var arrives bool
	switch v.Exit {
	case ExitHost:
		arrives = in == ""
	case ExitMesh:
		arrives = in == r.host.Interface
	case ExitUplink:
		arrives = r.host.isUplink(in, opened.Dst)
	case ExitOther:
		arrives = in != "" && in != r.host.Interface && !IsLoopback(in)
	}
	if !arrives {
		return v.refuse(RuleWrongWay, v.Class)
	}
	if v.Exit = ExitHost; by == ByPeer {
		v.Exit = ExitMesh
	}
	return v
}

func (v Verdict) pass(rule Rule, class Class, exit Exit) Verdict {
	v.Pass, v.Rule, v.Class, v.Exit, v.Missing = true, rule, class, exit, 0
	return v
}

func (v Verdict) refuse(rule Rule, class Class) Verdict {
	v.Pass, v.Rule, v.Class, v.Exit, v.Missing = false, rule, class, ExitNone, 0
	return v
}

func (v Verdict) lack(rule Rule, class Class, missing mesh.Permissions) Verdict {
	v = v.refuse(rule, class)
	v.Missing = missing
	return v
}
