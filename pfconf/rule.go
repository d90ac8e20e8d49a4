package pfconf

// An Action is the kind of a rule, named by the keyword that it begins with.
type Action uint8

// The actions. Pass and Block are those of the filter. The No forms end the search of
// their list without translating or normalising. Those that end in Anchor call an
// anchor, each for one kind of its rules: Anchor for its filter rules.
const (
	Pass Action = iota
	Block
	Scrub
	NoScrub
	Nat
	NoNat
	Binat
	NoBinat
	Rdr
	NoRdr
	Anchor
	NatAnchor
	BinatAnchor
	RdrAnchor
	ScrubAnchor
	DummynetAnchor
)

// A Direction is the direction of a packet seen from the host: In is a packet that
// arrives on an interface, Out one that leaves by it. A forwarded packet is In on one
// interface and Out on another.
type Direction uint8

// The directions. The zero value, in a rule, means either.
const (
	Both Direction = iota
	In
	Out
)

// A Family is an address family.
type Family uint8

// The families. The zero value, in a rule, means either.
const (
	AnyFamily Family = iota
	Inet
	Inet6
)

// A Rule is a filter, translation or normalisation rule, or the call of an
// anchor. Its zero value is pass all. [Ruleset.Validate] refuses fields that the
// rule's action doesn't take. The fields follow pf.conf(5), sections TRANSLATION,
// PACKET FILTERING, TRAFFIC NORMALIZATION and ANCHORS.
//
// As written, a rule has lists and stands for each combination of their
// entries; in a [Loaded] ruleset each list has at most one entry, as in the
// kernel's struct pf_rule (xnu bsd/net/pfvar.h).
type Rule struct {
	Action Action
	// Anchor is the name of the called anchor, such as com.apple/*. It is empty
	// for all but the anchor actions, and for a nameless inline anchor.
	Anchor string
	// Body holds an inline anchor's rules: anchor "x" { … }. nil: none.
	Body *Ruleset

	// Return is how Block answers.
	Return Return
	// Pass is nat pass and the like: the translated packet skips the filter.
	Pass bool

	Direction Direction
	Log       *Log // nil: not logged
	// Quick ends the search at this rule if it matches, also out of the anchors
	// that it is in.
	Quick      bool
	Interfaces []InterfaceMatch // empty: all
	Route      *Route           // route-to, reply-to, dup-to; nil: none
	Family     Family
	Protos     []Proto // empty: all
	From, To   Endpoint
	// OS are operating systems of the sender, told by the fingerprint of its TCP
	// SYN (pf.os(5)).
	OS []string

	// Users and Groups compare the owner of the local socket of a TCP or UDP packet;
	// a forwarded packet has none.
	Users  []IDMatch
	Groups []IDMatch
	// Flags is nil if the rule has no flags. Expand then writes S/SA into a pass
	// rule that keeps state.
	Flags *Flags
	ICMP  []ICMPMatch // icmp-type and icmp6-type; empty: all
	TOS   *uint8      // any of these bits of the type of service; never 0
	// Fragment matches fragments only.
	Fragment bool
	// AllowOpts lets packets with IP options pass by this rule or by its states. The
	// kernel drops them otherwise: IGMP, which carries Router Alert, needs it.
	AllowOpts bool
	// Probability is the chance with which a packet that fits matches, above 0 and
	// up to 1; 0: not written, always. The kernel holds it as a fraction of 2^32-1.
	Probability float64
	Label       string // shown with the rule's counters; at most 63 bytes
	Tag         string // put on a matching packet; at most 63 bytes
	Tagged      string // that the packet must have, from an earlier rule
	NotTagged   bool   // ! tagged: that it must not have
	// Queue and PriQueue are queues of ALTQ, which macOS lacks; they are kept as
	// written. PriQueue takes the ACKs without data and the packets of low delay.
	Queue    string
	PriQueue string
	RTable   *uint8 // routing table; kept as written

	// State says whether a passed packet makes a state, and StateOptions are the words
	// in parentheses behind it.
	State        StateKind
	StateOptions StateOptions

	Normalize Normalize // scrub and no scrub only
	// Pool is what nat, binat and rdr translate to. nil: no ->, as in the No forms.
	Pool *Pool
}

// A ReturnKind says how a block rule answers.
type ReturnKind uint8

const (
	// ReturnDefault is a bare block: what set block-policy says, drop at first.
	ReturnDefault ReturnKind = iota
	// ReturnDrop is block drop: no answer.
	ReturnDrop
	// ReturnAll is block return: a reset for TCP, and for all else but ICMP, ESP
	// and AH an ICMP unreachable.
	ReturnAll
	// ReturnRST is block return-rst: a reset; for TCP only.
	ReturnRST
	// ReturnICMP is block return-icmp or return-icmp6: an ICMP unreachable.
	ReturnICMP
)

// A Return is how a block rule answers.
type Return struct {
	Kind ReturnKind
	// TTL is the time to live of the reset, return-rst (ttl N); 0: the kernel's default.
	TTL uint8
	// Code and Code6 are the codes of the ICMP and the ICMPv6 unreachable that
	// ReturnICMP sends; nil: port-unr. With Code alone, pfctl makes the answer to an
	// IPv6 packet an ICMPv6 time exceeded: set both, or the rule's family.
	Code, Code6 *uint8
}

// A Log is log with its options.
type Log struct {
	All  bool   // log (all): every packet of the state, not only the first
	User bool   // log (user): with the owner of the local socket
	To   string // log (to …): pflog0 to pflog15; "": not written, which is pflog0
}

// An InterfaceMatch is one entry of on: an interface by its whole name, perhaps
// negated. macOS has no interface groups, so on utun never matches utun4.
type InterfaceMatch struct {
	Name string
	Not  bool
}

// A Proto is an IP protocol number, as assigned by IANA. 0 stands for any protocol.
type Proto uint8

// The protocols with a meaning in the grammar: rules for them may compare ports,
// TCP flags or ICMP types.
const (
	ProtoICMP   Proto = 1
	ProtoTCP    Proto = 6
	ProtoUDP    Proto = 17
	ProtoICMPv6 Proto = 58
)

// An Endpoint is one side of a packet, from or to: its addresses and ports. An empty
// list matches all.
type Endpoint struct {
	Addrs []Address
	Ports []Port
}

// A CompareOp compares a port, a user id or a group id with one number or two, PF_OP_*
// of xnu bsd/net/pfvar.h.
type CompareOp uint8

// The comparisons. The last three have two operands: Range is lo:hi with both ends,
// Inside is lo >< hi without its ends, and Outside is lo <> hi, below lo or above
// hi.
const (
	Equal CompareOp = iota
	NotEqual
	Less
	LessEqual
	Greater
	GreaterEqual
	Range
	Inside
	Outside
)

// A Port is a comparison of a TCP or UDP port. Hi is 0 for all but Range, Inside and
// Outside.
type Port struct {
	Op     CompareOp
	Lo, Hi uint16
}

// An IDMatch is a comparison of the user id or group id of a socket's owner.
type IDMatch struct {
	// Op is any but Range.
	Op CompareOp
	// Lo and Hi are ids; Hi is for Inside and Outside. 2^32-1 can't be written, since
	// the kernel holds unknown as that number.
	Lo, Hi  uint32
	Unknown bool // the word unknown: the packet belongs to no local socket
	// Name is the name of a user or group where one was written instead of a number.
	// Expand keeps it, because only the host can resolve it.
	Name string
}

// TCPFlags is a set of TCP header flags, with the bits that they have in the header
// (RFC 9293, section 3.1).
type TCPFlags uint8

// The flags. pf.conf writes them by the letters F S R P A U E W, in this order.
const (
	FlagFIN TCPFlags = 1 << iota
	FlagSYN
	FlagRST
	FlagPSH
	FlagACK
	FlagURG
	FlagECE
	FlagCWR
)

// Flags is flags Set/Mask: of the flags in Mask exactly those in Set must be on.
// S/SA, a SYN without ACK, is the first packet of a connection. The zero value is
// flags any.
type Flags struct {
	Set, Mask TCPFlags
}

// An ICMPMatch is icmp-type and code, of ICMP or of ICMPv6.
type ICMPMatch struct {
	V6   bool // icmp6-type
	Type uint8
	Code *uint8 // nil: all
}

// A StateKind says what states a rule makes.
type StateKind uint8

const (
	// StateDefault is a rule without a word about states: keep state for pass, no
	// state for block.
	StateDefault StateKind = iota
	// NoState is no state: each packet is judged by the rules.
	NoState
	// KeepState is keep state: the first packet makes a state, by which replies and
	// the flow's later packets pass.
	KeepState
	// ModulateState is modulate state: keep state that also gives TCP connections
	// random sequence numbers.
	ModulateState
	// SynproxyState is synproxy state: modulate state in which pf finishes the
	// handshake with the client before it contacts the server.
	SynproxyState
)

// A StatePolicy says which interfaces a state's later packets may use.
type StatePolicy uint8

const (
	// PolicyDefault is what set state-policy says, floating at first.
	PolicyDefault StatePolicy = iota
	// Floating lets packets of the state through on every interface. A host on another
	// interface that forges the flow's addresses and ports gets through as well.
	Floating
	// IfBound ties the state to the interface on which it was made.
	IfBound
)

// SourceTrack says whether and how pf counts the source addresses of a rule's states.
type SourceTrack uint8

// The ways of counting sources: for the rule alone, or together with all other rules
// of source-track global. SourceTrackPlain is the word without an argument: it means
// global, or rule if an option asks for counts of the rule.
const (
	NoSourceTrack SourceTrack = iota
	SourceTrackPlain
	SourceTrackRule
	SourceTrackGlobal
)

// FlushKind says which states of a source end when overload puts it into its table.
type FlushKind uint8

// The kinds of flush.
const (
	NoFlush     FlushKind = iota // none
	Flush                        // those of this rule
	FlushGlobal                  // those of all rules
)

// StateOptions are the words in parentheses behind keep state (pf.conf(5), section
// STATEFUL TRACKING OPTIONS). Zero means not written.
//
// pf silently drops a packet whose state would exceed a limit. It counts for each
// expanded rule by itself and starts anew when the ruleset is loaded again, except with
// source-track global.
type StateOptions struct {
	Max         uint32 // states of this rule
	NoSync      bool   // leave the states out of pfsync(4)
	SourceTrack SourceTrack
	// MaxSrcStates limits the states of one source address.
	MaxSrcStates uint32
	// MaxSrcConn limits the connections of one source whose TCP handshake is complete,
	// and MaxSrcConnRate how many of them complete within some seconds.
	MaxSrcConn     uint32
	MaxSrcConnRate Rate
	// Overload is the table that a source enters when it exceeds one of the two, and
	// Flush what happens to its states.
	Overload string
	Flush    FlushKind
	// MaxSrcNodes limits how many source addresses may have states at a time.
	MaxSrcNodes uint32
	Policy      StatePolicy
	// Timeouts replace those of set timeout for the states of this rule.
	Timeouts []Timeout
}

// A Rate is Count/Seconds, such as 15/5; the zero value means none.
type Rate struct {
	Count, Seconds uint32
}

// A Timeout is one of pf's timeouts by its name, such as tcp.established; see
// [TimeoutNames]. Those called adaptive.start and adaptive.end count states, not
// seconds.
type Timeout struct {
	Name    string
	Seconds uint32
}

// FragmentMode says what scrub does with fragments.
type FragmentMode uint8

const (
	// FragmentDefault is scrub without the word: reassemble.
	FragmentDefault FragmentMode = iota
	// FragmentReassemble holds fragments back until the datagram is complete.
	FragmentReassemble
	// FragmentCrop passes fragments on at once and drops the parts that were seen
	// before. Overlapping fragments can make the kernel of macOS panic in this mode.
	FragmentCrop
	// FragmentDropOvl is FragmentCrop that also drops the rest of a datagram whose
	// fragments overlap.
	FragmentDropOvl
)

// Normalize is what a scrub rule does to packets (pf.conf(5), section TRAFFIC
// NORMALIZATION). Zero means not written.
type Normalize struct {
	NoDF          bool   // clears don't-fragment; fragments that have it are dropped otherwise
	MinTTL        uint8  // raises a lower time to live to this
	MaxMSS        uint16 // lowers a higher maximum segment size of TCP to this, in bytes
	RandomID      bool   // replaces the identification of IPv4 packets that are no fragments
	SetTOS        *uint8 // replaces the type of service; never 0
	Fragment      FragmentMode
	ReassembleTCP bool // tracks TCP connections beyond their sequence numbers
}

// A PoolKind says how pf chooses the next of a pool's addresses (PF_POOL_* of xnu
// bsd/net/pfvar.h).
type PoolKind uint8

const (
	// PoolDefault is a pool without a type: its only address, or round-robin if it has,
	// or may come to have, several.
	PoolDefault PoolKind = iota
	// Bitmask keeps the host part of the address that is translated.
	Bitmask
	// Random chooses an address of the network at random.
	Random
	// SourceHash chooses it by a hash of the source address and the pool's key.
	SourceHash
	// RoundRobin takes one after the other. It is the only type for several addresses,
	// tables and interfaces in parentheses.
	RoundRobin
)

// PoolOptions are the words behind a pool's addresses.
type PoolOptions struct {
	Kind PoolKind
	// Key is that of source-hash: 0x and 32 hexadecimal digits, or a string, which pfctl
	// hashes to as many. "": pfctl chooses one at random.
	Key        string
	StaticPort bool // nat only: keep the source port
	Sticky     bool // sticky-address: one source keeps its address while it has states
	// ExtFilter and ExtMap are Apple's filtering and mapping of UDP through nat, in the
	// terms of RFC 4787: ei (independent of the endpoint), ad (dependent on its
	// address) or apd (on address and port). "": not written.
	ExtFilter, ExtMap string
}

// A Pool is what nat, binat and rdr translate to, the part of the rule behind ->. In the
// No forms it has no addresses.
type Pool struct {
	Addrs []Address
	// PortLo and PortHi are port lo:hi. Both 0: not written. PortHi 0: PortLo
	// alone. Without ports, nat chooses one from 50001 to 65535, and rdr keeps
	// the port.
	PortLo, PortHi uint16
	// PortStar is port lo:*: rdr maps the range of ports that it matches to one of the
	// same length that begins with PortLo.
	PortStar bool
	PoolOptions
}

// A RouteKind says how a Route overrides the routing table.
type RouteKind uint8

const (
	RouteTo   RouteKind = iota // route-to: the packet leaves by a hop
	ReplyTo                    // reply-to: replies of the packet's state do
	DupTo                      // dup-to: a copy of the packet does
	Fastroute                  // fastroute: the packet leaves by an ordinary route lookup
)

// A Route is route-to, reply-to, dup-to or fastroute.
type Route struct {
	Kind RouteKind
	Hops []Hop // none for fastroute
	PoolOptions
}

// A Hop is an interface, perhaps with the address of the next router on it.
type Hop struct {
	Interface string
	Addr      *Address // nil: none
}
