package pfsim

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/meshhelper/meshhelper/pfconf"
)

// Protocols that pf treats in a way of its own, besides those that pfconf names.
const (
	protoGRE pfconf.Proto = 47
	protoESP pfconf.Proto = 50
	protoAH  pfconf.Proto = 51
)

// A Packet has the parts of an IPv4 or IPv6 packet that pf looks at. Fields that the
// packet's protocol doesn't have stay zero.
type Packet struct {
	// Src and Dst are of one family. IPv4 addresses must not be IPv4-mapped IPv6 ones, and
	// zones are ignored.
	Src, Dst netip.Addr
	Proto    pfconf.Proto

	SrcPort, DstPort uint16 // TCP and UDP
	// Len is the length of the payload in bytes, behind the header of TCP, UDP or ICMP.
	Len uint32

	Flags pfconf.TCPFlags
	Seq   uint32
	Ack   uint32
	// Window is the window in the TCP header, unscaled. Scale is the shift of the window
	// scale option (RFC 7323), and HasScale reports whether the segment has that option.
	Window   uint16
	Scale    uint8
	HasScale bool

	// ICMPType and ICMPCode are those of ICMP or ICMPv6. ICMPID is the identifier of an
	// echo message, and of other messages the same two bytes.
	ICMPType, ICMPCode uint8
	ICMPID             uint16
	// Quoted is the packet that an ICMP error quotes; nil in other messages, and in an
	// error that quotes too little.
	Quoted *Quoted

	SPI uint32 // ESP: the security parameters index

	TOS uint8 // type of service, or IPv6 traffic class
	// Options is set if the IPv4 header has options or the IPv6 packet a routing header.
	Options bool
	// Fragment is set if the packet is a fragment: more follow, or it isn't the first.
	// For IPv6 also if it is the only one, a packet with a fragment header.
	Fragment     bool
	DontFragment bool
	// FragmentLen is the number of the datagram's bytes in the fragment, behind the IP
	// header and the fragment header, and FragmentOffset where they begin in the
	// datagram, in bytes, a multiple of 8. The fields above then describe the whole
	// datagram, whose fragments have the same FragmentID. A fragment with a FragmentLen of
	// 0 can't be reassembled.
	FragmentID     uint32
	FragmentOffset uint16
	FragmentLen    uint16
	MoreFragments  bool

	// Tag is the tag that a rule set on the packet; "": none. A forwarded packet keeps it
	// from one hook to the next.
	Tag string
}

// A Quoted is what an ICMP error quotes of the packet that caused it: the IP header and
// the 8 bytes behind it.
type Quoted struct {
	Src, Dst         netip.Addr
	Proto            pfconf.Proto
	SrcPort, DstPort uint16
	Seq              uint32 // TCP
	ICMPID           uint16
	// Later is set if the packet was a fragment after the first, which has no ports.
	Later bool
}

// String returns the packet on one line, for messages and tests.
func (p Packet) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", p.Proto, p.Src)
	switch p.Proto {
	case pfconf.ProtoTCP, pfconf.ProtoUDP:
		fmt.Fprintf(&b, " port %d > %s port %d", p.SrcPort, p.Dst, p.DstPort)
	default:
		fmt.Fprintf(&b, " > %s", p.Dst)
	}
	switch p.Proto {
	case pfconf.ProtoTCP:
		fmt.Fprintf(&b, " flags %s seq %d ack %d len %d", p.Flags, p.Seq, p.Ack, p.Len)
	case pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		fmt.Fprintf(&b, " type %d code %d id %d", p.ICMPType, p.ICMPCode, p.ICMPID)
	}
	if p.Fragment {
		b.WriteString(" fragment")
	}
	return b.String()
}

// A Verdict says whether a packet passes and, if not, how it is answered.
type Verdict uint8

// The verdicts.
const (
	VerdictPass        Verdict = iota
	VerdictDrop                // dropped silently
	VerdictReset               // dropped and answered with a TCP reset
	VerdictUnreachable         // dropped and answered with an ICMP unreachable
)

// String returns pass, drop, rst or icmp.
func (v Verdict) String() string {
	return [...]string{"pass", "drop", "rst", "icmp"}[v&3]
}

// A StateUse says whether a packet made a state or belongs to one.
type StateUse uint8

// The uses.
const (
	StateUnused  StateUse = iota // neither
	StateCreated                 // the packet made a state
	StateMatched                 // the packet belongs to a state
)

// String returns none, created or matched.
func (u StateUse) String() string {
	switch u {
	case StateCreated:
		return "created"
	case StateMatched:
		return "matched"
	}
	return "none"
}

// A Decider names what decided about a packet at a hook.
type Decider uint8

const (
	// DecidedByRule is Hook.Rule, or a state that it made.
	DecidedByRule Decider = iota
	// DecidedByDefault is pf's default rule, because no filter rule matched, or a state
	// that a translation made under it.
	DecidedByDefault
	// DecidedByRemoved is a state whose rule is no longer loaded.
	DecidedByRemoved
	// DecidedBySkip passes the packet, because pf is disabled or skips the interface.
	DecidedBySkip
	// DecidedByProtocol drops a packet outside its connection's window, one with IP
	// options that its rule doesn't allow, or one of a state that max-src-conn or
	// max-src-conn-rate has just ended.
	DecidedByProtocol
	// DecidedByForm drops a malformed packet before any filter rule: one with port 0 or
	// with flags that scrub refuses. It also drops a fragment that scrub holds back until
	// the others of its datagram arrive.
	DecidedByForm
)

// A Hook is the result of pf for a packet on one interface in one direction.
type Hook struct {
	// Seen is set if the packet reached the hook. Otherwise all other fields are zero.
	Seen    bool
	Verdict Verdict
	State   StateUse
	Decider Decider
	// Rule is the filter rule that decided; nil unless Decider is DecidedByRule. It is the
	// machine's own and must not be changed.
	Rule *pfconf.Rule
	// Anchor is the path of the anchor that has Rule; "" is the main ruleset.
	Anchor string
	// Translation is the nat, binat or rdr rule that translated the packet, itself or by
	// a state, and TranslationAnchor the path of its anchor; nil: not translated.
	Translation       *pfconf.Rule
	TranslationAnchor string
	// Reassembled is the length in bytes, behind the IP header, of the datagram that this
	// fragment completed; 0: none.
	Reassembled int
	// Packet is the packet as it leaves this hook if it passes, otherwise as it arrived.
	Packet Packet
}

// Pass reports whether the packet left the hook.
func (h *Hook) Pass() bool { return h.Verdict == VerdictPass }

// A Judgement is the result of pf for a packet on its way through the host.
type Judgement struct {
	// Verdict is that of the last hook that saw the packet.
	Verdict Verdict
	// In and Out are the two hooks, of which a packet from or to the host sees only one.
	In, Out Hook
}

// Packet returns the packet as it left the last hook that saw it.
func (j *Judgement) Packet() Packet {
	if j.Out.Seen {
		return j.Out.Packet
	}
	return j.In.Packet
}
