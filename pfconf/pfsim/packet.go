package pfsim

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/meshhelper/meshhelper/pfconf"
)

// Further protocols that a [Machine] treats in their own way.
const (
	protoGRE pfconf.Proto = 47
	protoESP pfconf.Proto = 50
	protoAH  pfconf.Proto = 51
)

// A Packet is what pf looks at in an IPv4 or IPv6 packet. Fields that its
// protocol doesn't have stay zero.
type Packet struct {
	// Src and Dst are of one family: IPv4 addresses are not written as IPv6
	// ones, and zones are ignored.
	Src, Dst netip.Addr
	Proto    pfconf.Proto

	SrcPort, DstPort uint16 // TCP and UDP
	// Len is the length of the TCP or UDP payload in bytes.
	Len uint32

	Flags pfconf.TCPFlags
	Seq   uint32
	Ack   uint32
	// Window is the window as it stands in the TCP header, Scale the shift of
	// the window scale option and HasScale whether there is one.
	Window   uint16
	Scale    uint8
	HasScale bool

	// ICMPType and ICMPCode are those of ICMP for IPv4 or of ICMPv6, ICMPID the
	// identifier of an echo message (of others the same two bytes).
	ICMPType, ICMPCode uint8
	ICMPID             uint16
	// Quoted is the packet that an ICMP error is about; nil in other messages,
	// and in an error that quotes too little.
	Quoted *Quoted

	SPI uint32 // ESP

	TOS uint8
	// Options: the IPv4 header has options, or there is an IPv6 routing header.
	Options bool
	// Fragment: more fragments follow, or this isn't the first one. For IPv6 also
	// the only one, with a fragment header.
	Fragment     bool
	DontFragment bool
	// FragmentLen is how many bytes of the datagram the fragment has, behind the
	// IP header and the fragment header, and FragmentOffset where they begin: a
	// multiple of 8. The fields above then describe the whole datagram, whose
	// pieces have the same FragmentID. With a FragmentLen of 0 a fragment can't be
	// put together with others.
	FragmentID     uint32
	FragmentOffset uint16
	FragmentLen    uint16
	MoreFragments  bool

	// Tag is the mark that a rule put on the packet; "": none. It stays on the
	// packet while it is forwarded.
	Tag string
}

// A Quoted is what an ICMP error quotes: the header of the packet that it is
// about, and the first 8 bytes behind it.
type Quoted struct {
	Src, Dst         netip.Addr
	Proto            pfconf.Proto
	SrcPort, DstPort uint16
	Seq              uint32 // TCP
	ICMPID           uint16
	// Later: it was a fragment after the first.
	Later bool
}

// String returns the packet in one line, for messages and tests.
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

// A Verdict is what becomes of a packet.
type Verdict uint8

// The verdicts. A packet that doesn't pass is dropped in silence, answered with
// a TCP reset, or answered with an ICMP unreachable.
const (
	VerdictPass Verdict = iota
	VerdictDrop
	VerdictReset
	VerdictUnreachable
)

// String returns pass, drop, rst or icmp.
func (v Verdict) String() string {
	return [...]string{"pass", "drop", "rst", "icmp"}[v&3]
}

// A StateUse says what a packet had to do with a state.
type StateUse uint8

// The uses: none, the packet made a state, or it belongs to one.
const (
	StateUnused StateUse = iota
	StateCreated
	StateMatched
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

// A Decider is what decided about a packet at a hook.
type Decider uint8

// The deciders.
const (
	// DecidedByRule: Hook.Rule, itself or by a state that it made.
	DecidedByRule Decider = iota
	// DecidedByDefault: no filter rule matched, or a state that a translation
	// made without one.
	DecidedByDefault
	// DecidedByRemoved: a state whose rule is no longer loaded.
	DecidedByRemoved
	// DecidedBySkip: pf is disabled, or told to skip the interface.
	DecidedBySkip
	// DecidedByProtocol: a packet outside its connection's window, or with IP
	// options that its rule doesn't allow, was dropped, or one of a state that
	// max-src-conn or max-src-conn-rate has just ended.
	DecidedByProtocol
	// DecidedByForm: the packet was dropped before any rule, as one that can't
	// be: no port, or flags that scrub refuses. Also a fragment that scrub keeps
	// until the others of its datagram arrive.
	DecidedByForm
)

// A Hook is what pf did with a packet on one interface in one direction.
type Hook struct {
	// Seen: the packet came here. The other fields are meaningless without.
	Seen    bool
	Verdict Verdict
	State   StateUse
	Decider Decider
	// Rule is the filter rule that decided; nil for other deciders than
	// DecidedByRule. It is the machine's own and must not be changed.
	Rule *pfconf.Rule
	// Anchor is the path of the anchor that holds Rule; "" is the main ruleset.
	Anchor string
	// Translation is the nat, binat or rdr rule behind the packet's translation,
	// and TranslationAnchor where it is; nil: none.
	Translation       *pfconf.Rule
	TranslationAnchor string
	// Reassembled is how many bytes the datagram has behind its IP header that
	// this fragment completed, 0 if none.
	Reassembled int
	// Packet is the packet as it leaves this hook, when it passes.
	Packet Packet
}

// Pass reports whether the packet left the hook.
func (h *Hook) Pass() bool { return h.Verdict == VerdictPass }

// A Judgement is what became of a packet on its way through the host.
type Judgement struct {
	// Verdict is that of the last hook that saw the packet.
	Verdict Verdict
	In, Out Hook
}

// Packet returns the packet as it left the last hook that saw it.
func (j *Judgement) Packet() Packet {
	if j.Out.Seen {
		return j.Out.Packet
	}
	return j.In.Packet
}
