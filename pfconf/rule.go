package pfconf

// An Action is what kind a rule is, by the word that it begins with.
type Action uint8

// The actions. Those of the filter are Pass and Block; the No forms end the
// search of their list without translating (or normalising).
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

// A Direction is the direction of a packet as its interface sees it.
type Direction uint8

// The directions; the zero value is a rule for both.
const (
	Both Direction = iota
	In
	Out
)

// A Family is an address family.
type Family uint8

// The families; the zero value is a rule for both.
const (
	AnyFamily Family = iota
	Inet
	Inet6
)

// A Rule is a filter, translation or normalisation rule, or the call of an
// anchor. Its zero value is pass all. Which fields an action takes is checked
// by [Ruleset.Validate].
//
// As written, a rule has lists and stands for each combination of their
// entries; in a [Loaded] ruleset each list has at most one entry.
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

	Direction  Direction
	Log        *Log // nil: not logged
	Quick      bool
	Interfaces []InterfaceMatch // empty: all
	Route      *Route           // route-to, reply-to, dup-to; nil: none
	Family     Family
	Protos     []Proto // empty: all
	From, To   Endpoint
	OS         []string // os of the sender, by fingerprint

	Users     []IDMatch
	Groups    []IDMatch
	Flags     *Flags // nil: not written
	ICMP      []ICMPMatch
	TOS       *uint8
	Fragment  bool // matches fragments only
	AllowOpts bool
	// Probability is between 0 and 1, 0 when the rule always counts. pf keeps
	// it as a 32-bit fraction.
	Probability float64
	Label       string
	Tag         string // put on the packet
	Tagged      string // asked of the packet
	NotTagged   bool   // ! tagged
	Queue       string // ALTQ, which macOS lacks; kept
	PriQueue    string // second queue, for ACKs
	RTable      *uint8

	State        StateKind
	StateOptions StateOptions

	Normalize Normalize // what scrub does
	Pool      *Pool     // where nat, binat and rdr go
}

// A ReturnKind is the way in which a block rule answers.
type ReturnKind uint8

// The ways of blocking. ReturnDefault is a bare block, which does what the
// option block-policy says; ReturnAll answers TCP with a reset, UDP with an
// unreachable, and the rest with silence.
const (
	ReturnDefault ReturnKind = iota
	ReturnDrop
	ReturnAll
	ReturnRST
	ReturnICMP
)

// A Return is how a block rule answers.
type Return struct {
	Kind ReturnKind
	// TTL is that of the reset of return-rst (ttl N); 0: the default.
	TTL uint8
	// Code and Code6 are the codes of the ICMP and the ICMPv6 unreachable that
	// ReturnICMP sends; nil: port-unr. pfctl sends a strange ICMPv6 error when
	// only Code is given: give both, or the family.
	Code, Code6 *uint8
}

// A Log is log with its options.
type Log struct {
	All  bool // every packet of the state, not just the first
	User bool
	To   string // interface, such as pflog0; "": not written
}

// An InterfaceMatch is one entry of on: an interface by its whole name (macOS
// has no groups), perhaps negated.
type InterfaceMatch struct {
	Name string
	Not  bool
}

// A Proto is an IP protocol number.
type Proto uint8

// The protocols that the grammar gives a meaning.
const (
	ProtoICMP   Proto = 1
	ProtoTCP    Proto = 6
	ProtoUDP    Proto = 17
	ProtoICMPv6 Proto = 58
)

// An Endpoint is one side of a packet: addresses and ports, each any when
// empty.
type Endpoint struct {
	Addrs []Address
	Ports []Port
}

// A CompareOp is a comparison of a number: a port, a user, a group.
type CompareOp uint8

// The comparisons. The last three have two operands: Range is lo:hi and takes
// both ends, Inside is lo >< hi and takes neither, Outside is lo <> hi, what
// lies below lo or above hi.
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

// A Port is a comparison of a TCP or UDP port; Hi counts only for Range,
// Inside and Outside.
type Port struct {
	Op     CompareOp
	Lo, Hi uint16
}

// An IDMatch is a comparison of a socket owner's user or group id.
type IDMatch struct {
	Op      CompareOp
	Lo, Hi  uint32
	Unknown bool // the word unknown: no socket
	// Name is the name that was written instead of a number. Expand keeps it:
	// users belong to the host.
	Name string
}

// TCPFlags is a set of TCP header flags, with the bits of the header.
type TCPFlags uint8

// The flags, by their letters F S R P A U E W.
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

// Flags is flags Set/Mask: of the flags in Mask exactly those of Set are on.
// The zero value is flags any.
type Flags struct {
	Set, Mask TCPFlags
}

// An ICMPMatch is icmp-type and code, of ICMP or of ICMPv6.
type ICMPMatch struct {
	V6   bool // icmp6-type
	Type uint8
	Code *uint8 // nil: any
}

// A StateKind is what a rule says about states.
type StateKind uint8

// The kinds of state. StateDefault, nothing written, is keep state for pass
// and none for block.
const (
	StateDefault StateKind = iota
	NoState
	KeepState
	ModulateState
	SynproxyState
)

// A StatePolicy says which interfaces a state's later packets may use.
type StatePolicy uint8

// The policies. PolicyDefault is what set state-policy says, floating at first.
const (
	PolicyDefault StatePolicy = iota
	Floating
	IfBound
)

// SourceTrack is how sources are counted.
type SourceTrack uint8

// The ways of counting sources. SourceTrackPlain is the word without argument,
// which means global.
const (
	NoSourceTrack SourceTrack = iota
	SourceTrackPlain
	SourceTrackRule
	SourceTrackGlobal
)

// FlushKind is what overload does to an offender's states.
type FlushKind uint8

// The kinds of flush.
const (
	NoFlush FlushKind = iota
	Flush             // states of this rule
	FlushGlobal
)

// StateOptions are the words in parentheses after keep state. Zero means not
// written.
type StateOptions struct {
	Max            uint32 // states of this rule
	NoSync         bool
	SourceTrack    SourceTrack
	MaxSrcStates   uint32
	MaxSrcConn     uint32
	MaxSrcConnRate Rate
	Overload       string // table
	Flush          FlushKind
	MaxSrcNodes    uint32
	Policy         StatePolicy
	Timeouts       []Timeout
}

// A Rate is count/seconds.
type Rate struct {
	Count, Seconds uint32
}

// A Timeout is one of pf's timeouts, such as tcp.established, in seconds.
type Timeout struct {
	Name    string
	Seconds uint32
}

// FragmentMode is what scrub does with fragments.
type FragmentMode uint8

// The modes; the default is reassemble.
const (
	FragmentDefault FragmentMode = iota
	FragmentReassemble
	FragmentCrop
	FragmentDropOvl
)

// Normalize is what a scrub rule does. Zero means not written.
type Normalize struct {
	NoDF          bool
	MinTTL        uint8
	MaxMSS        uint16
	RandomID      bool
	SetTOS        *uint8
	Fragment      FragmentMode
	ReassembleTCP bool
}

// A PoolKind is how a pool's next address is chosen.
type PoolKind uint8

// The kinds of pool. PoolDefault, nothing written, is round-robin where there
// is more than one address.
const (
	PoolDefault PoolKind = iota
	Bitmask
	Random
	SourceHash
	RoundRobin
)

// PoolOptions are the words behind a pool's addresses.
type PoolOptions struct {
	Kind       PoolKind
	Key        string // of source-hash; "": chosen by pfctl
	StaticPort bool   // nat only: keep the source port
	Sticky     bool   // sticky-address
	// ExtFilter and ExtMap are Apple's filtering and mapping of UDP through
	// nat, ei, ad or apd (RFC 4787). Kept, and not written by this package.
	ExtFilter, ExtMap string
}

// A Pool is what stands behind -> in nat, binat and rdr. In the No forms it has
// no addresses.
type Pool struct {
	Addrs []Address
	// PortLo and PortHi are port lo:hi. Both 0: not written. PortHi 0: PortLo
	// alone. PortStar is port lo:*, as many ports as the rdr rule's range has.
	PortLo, PortHi uint16
	PortStar       bool
	PoolOptions
}

// A RouteKind is how Route changes a packet's way.
type RouteKind uint8

// The kinds of route.
const (
	RouteTo RouteKind = iota
	ReplyTo
	DupTo
	Fastroute
)

// A Route is route-to, reply-to, dup-to or fastroute.
type Route struct {
	Kind RouteKind
	Hops []Hop // none for fastroute
	PoolOptions
}

// A Hop is an interface, perhaps with the address of a router behind it.
type Hop struct {
	Interface string
	Addr      *Address // nil: none
}
