package host

import (
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// LeaveLimit bounds how long the helper takes to leave the host as it was found.
// What supervises it (launchd's ExitTimeOut, say) has to wait for longer before it
// kills.
const LeaveLimit = 15 * time.Second

// Interface is how the mesh interface is to be made.
type Interface struct {
	// Name is the wanted name, or empty for one that the host chooses.
	Name string // optional
	// MTU in bytes, between 1280 (IPv6 needs it, RFC 8200 5) and 65535.
	MTU int // required
	// Addresses are the host's own mesh addresses, one IPv4 and one IPv6.
	Addresses []netip.Addr // required
	// Prefixes are the mesh prefixes: nothing to an address inside leaves by
	// another interface from the first moment on.
	Prefixes []netip.Prefix // required
}

// Limits are what the guard has to know of the host's kernel and its packet filter.
type Limits struct {
	// States is how many entries it holds for the whole host; 0: not known.
	States int
	// PerForwarded is how many of them a forwarded flow takes, 1 or 2.
	PerForwarded int
	// PerPeer is how many entries of one peer's flows it lets come to be by itself, of
	// both families together, whatever the guard has seen of them; 0: it has no such
	// bound.
	PerPeer int
	// Reassembly is the memory, in bytes, in which the kernel puts datagrams together, of
	// each family; 0: not known.
	Reassembly int
	// DropsDF says that it drops fragments with Don't Fragment set.
	DropsDF bool
}

// Report is what looking at the host found.
type Report struct {
	// Drift lists what isn't as enforced and that enforcing again can repair.
	Drift []Problem
	// Problems lists what stands in the way and isn't ours to change, such as a
	// foreign chain that drops a peer's packets.
	Problems []Problem
	// Forwarding is what the host's sysctls say now.
	Forwarding policy.Families
}

// Way is where a host's kernel sends a packet, as it answers when it is asked: not what
// the policy, a packet filter or another host makes of it.
type Way struct {
	// Interface is what the packet leaves by; empty where it isn't sent.
	Interface string
	// Router is the next hop. It isn't valid where the destination is on the link, and
	// where the packet isn't sent.
	Router netip.Addr
	// Source is the address of the host that packets of peers are given, or that the host
	// itself uses, on this way. It isn't valid where it isn't known.
	Source netip.Addr
	// Local says that the packet is for the host itself.
	Local bool
	// Refused says why the packet isn't sent: one of the constants below. It is empty where
	// it is sent, or is for the host itself.
	Refused string
}

// Why a kernel doesn't send a packet: the kinds of routes that lead nowhere
// (ip-route(8), route(8) of macOS), or none that fits.
const (
	WayNone        = "no route"
	WayUnreachable = "unreachable"
	WayProhibited  = "prohibited"
	WayBlackhole   = "blackhole"
)

// ByOthers is what other software's packet filters do with a packet.
type ByOthers struct {
	// Does is one of the constants below; empty where they let it pass.
	Does string
	// Unclear says that a rule which wasn't understood may decide otherwise.
	Unclear bool
	// Where is the chain and the rule that decide, or that aren't understood.
	Where string
}

// What other software's packet filters may do with a packet.
const (
	OthersDrop     = "drop"
	OthersRedirect = "redirect" // to another destination
	OthersUntrack  = "untrack"  // take it out of connection tracking, so that it isn't translated
)

// Problem is something that a person should know, in the words of status.
type Problem struct {
	// Step is what the helper was doing or looking at, such as "load anchor".
	Step string `json:"step"`
	// Message says what is wrong; Hint what to do about it.
	Message string `json:"message"`
	Hint    string `json:"hint"`
	// Tunnel says that it is about WireGuard's own packets, without which nothing of a peer
	// arrives.
	Tunnel bool `json:"-"`
}

// StepError is an error that names the enforcing step it happened in, for
// status.problems.
type StepError struct {
	Step string
	// Hint says what a person can do; it may be empty.
	Hint string
	Err  error
}

// Error returns the step and the cause.
func (e *StepError) Error() string { return e.Step + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *StepError) Unwrap() error { return e.Err }
