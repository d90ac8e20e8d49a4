package host

import (
	"errors"
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// LeaveLimit bounds how long the helper takes to leave the host as it was found. A
// supervisor must wait longer before it kills the helper (ExitTimeOut in
// launchd.plist(5), TimeoutStopSec in systemd.service(5)).
const LeaveLimit = 15 * time.Second

// Interface describes the mesh interface to create.
type Interface struct {
	// Name is the wanted name, or empty to let the host choose.
	Name string // optional
	// MTU is in bytes, from 1280 (the minimum for IPv6, RFC 8200 5) to 65535.
	MTU int // required
	// Addresses are the host's own mesh addresses, one IPv4 and one IPv6.
	Addresses []netip.Addr // required
	// Prefixes are the mesh prefixes: from the first moment on, nothing to an address in
	// them leaves by another interface.
	Prefixes []netip.Prefix // required
}

// Limits are the limits of the host's kernel and packet filter that the guard needs.
type Limits struct {
	// States is how many entries the packet filter holds for the whole host; 0: not
	// known.
	States int
	// PerForwarded is how many entries a forwarded flow takes, 1 or 2.
	PerForwarded int
	// PerPeer is the packet filter's own bound on one peer's entries, both families
	// together, whatever the guard has seen of them; 0: it has none.
	PerPeer int
	// Reassembly is the kernel's memory for reassembling fragments, in bytes per family;
	// 0: not known.
	Reassembly int
	// DropsDF is set if the packet filter drops fragments with Don't Fragment set.
	DropsDF bool
}

// Report is the result of Inspect.
type Report struct {
	// Drift lists differences from the ruleset, which enforcing again can repair.
	Drift []Problem
	// Problems lists what stands in the way and isn't ours to change, such as another
	// program's chain that drops a peer's packets.
	Problems []Problem
	// Unexamined are the kinds of problems that weren't looked for this time, besides
	// those of Host.Unexamined, each with the reason.
	Unexamined map[ProblemKind]string
	// Forwarding is what the host's sysctls say now.
	Forwarding policy.Families
}

// Way is where the host's kernel sends a packet according to a route lookup, whatever the
// policy, a packet filter or another host does with it.
type Way struct {
	// Interface is the one that the packet leaves by; empty if it isn't sent.
	Interface string
	// Router is the next hop. It isn't valid if the destination is on the link or the
	// packet isn't sent.
	Router netip.Addr
	// Source is the host's address that packets of peers are translated to on this way,
	// or that the host itself uses. It isn't valid if it isn't known.
	Source netip.Addr
	// Local is set if the packet is for the host itself.
	Local bool
	// Refused is the reason why the packet isn't sent, one of the constants below; empty
	// if it is sent or is for the host itself.
	Refused string
}

// Reasons why a kernel doesn't send a packet: the kinds of routes that drop packets
// (ip-route(8); route(8) on macOS), or no matching route.
const (
	WayNone        = "no route"
	WayUnreachable = "unreachable"
	WayProhibited  = "prohibited"
	WayBlackhole   = "blackhole"
)

// ByOthers is what other software's packet filters do with a packet.
type ByOthers struct {
	// Does is one of the constants below; empty if the packet passes.
	Does string
	// Unclear is set if a rule that wasn't understood may decide otherwise.
	Unclear bool
	// Where is the chain and the rule that decide, or that weren't understood.
	Where string
}

// Values of ByOthers.Does.
const (
	OthersDrop     = "drop"
	OthersRedirect = "redirect" // changes the destination
	OthersUntrack  = "untrack"  // excludes it from connection tracking, so that it isn't translated
)

// Problem is a message for people, as status shows it.
type Problem struct {
	// Step is what the helper was doing or examining, such as "load anchor".
	Step string `json:"step"`
	// Message says what is wrong, and Hint what to do about it.
	Message string `json:"message"`
	Hint    string `json:"hint"`
	// Kind is what it is about, by which problems are grouped.
	Kind ProblemKind `json:"-"`
}

// ProblemKind is what a problem is about.
type ProblemKind int

const (
	// KindOwn is a step of the helper's own, or a fact about the host.
	KindOwn ProblemKind = iota
	// KindOtherFilters is packet filtering outside our own rules that affects peers'
	// packets: other software's rules, and the kernel's tables and ports that both use.
	KindOtherFilters
	// KindHostFirewall is a rule of other software that stops WireGuard's own packets,
	// without which nothing of a peer arrives.
	KindHostFirewall
	// KindPrefix is another owner of a part of the mesh prefixes.
	KindPrefix
)

// StepError is an error that names the enforcing step in which it happened.
type StepError struct {
	Step string
	// Hint says what a person can do about it; it may be empty.
	Hint string
	// Kind is the kind of the problem that made the step fail.
	Kind ProblemKind
	Err  error
}

// Error returns the step and the cause.
func (e *StepError) Error() string { return e.Step + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *StepError) Unwrap() error { return e.Err }

// AtStep returns err as one of a step, unless it names its step itself. A nil err stays nil.
func AtStep(step string, err error) error {
	var named *StepError
	if err == nil || errors.As(err, &named) {
		return err
	}
	return &StepError{Step: step, Err: err}
}
