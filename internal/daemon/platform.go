package daemon

import (
	"context"
	"net/netip"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Platform makes one kind of host enforce a ruleset. The daemon calls its
// methods from one goroutine at a time, Watch excepted.
//
// The promise that every implementation keeps: at every moment, also in the
// middle of a call, after a failed one and after the process was killed, what
// passes is a subset of what the old or the new ruleset passes; forwarding is
// never on without the filter; and everything it changes on the host is on disk,
// with what was found and the boot's id, before it is changed.
type Platform interface {
	// Open repairs what a killed helper left behind, then creates the mesh
	// interface. Nothing of a peer passes yet.
	Open(ctx context.Context, cfg Interface) (tun.Device, error)

	// Observe returns the facts about the host that hold now. Forwarding says
	// for which families Enforce will forward, not what the sysctls say.
	Observe(ctx context.Context) (policy.Host, error)

	// Enforce makes the host enforce r: the interface's addresses and a host
	// route per peer, then the filter, then NAT, then forwarding. It may be
	// called again with the same ruleset and then repairs what has drifted. After
	// an error, nothing of a peer is forwarded or the old ruleset holds as far as
	// r also allows it; the error names the step (see [StepError]).
	Enforce(ctx context.Context, r *policy.Ruleset) error

	// Inspect reads back what the host enforces and compares it with r.
	Inspect(ctx context.Context, r *policy.Ruleset) (Report, error)

	// Cut ends the running flows of the narrowed peers that r doesn't allow, in
	// both directions, so that no packet of theirs that an end sends after Cut
	// returned arrives. Other flows are left alone.
	Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error

	// Close takes the rules, routes, addresses and the interface away, in the
	// reverse order of Enforce, and leaves the host as it was found. What stays
	// on purpose (forwarding that somebody else came to need) is returned as
	// problems. It works without Open too, for a crashed helper's leftovers.
	Close(ctx context.Context) ([]Problem, error)
}

// Watcher follows the changes of a host's addresses, routes and interfaces.
type Watcher interface {
	// Watch calls changed, which never blocks, after each change that may alter
	// what Observe or Inspect return, until ctx ends. It survives odd messages
	// and overruns of the kernel's socket, which count as a change.
	Watch(ctx context.Context, changed func()) error
}

// Interface is how the mesh interface is to be made.
type Interface struct {
	// Name is the wanted name, or empty for one that the platform chooses.
	Name string // optional
	// MTU in bytes, between 1280 (IPv6 needs it, RFC 8200 5) and 65535.
	MTU int // required
	// Addresses are the host's own mesh addresses, one IPv4 and one IPv6.
	Addresses []netip.Addr // required
}

// Report is what Inspect found.
type Report struct {
	// Drift lists what isn't as enforced and that Enforce can repair.
	Drift []Problem
	// Problems lists what stands in the way and isn't ours to change, such as a
	// foreign chain that drops a peer's packets.
	Problems []Problem
	// Forwarding is what the host's sysctls say now.
	Forwarding policy.Families
}

// Problem is something that a person should know, in the words of status.
type Problem struct {
	// Step is what the helper was doing or looking at, such as "load anchor".
	Step string `json:"step"`
	// Message says what is wrong; Hint what to do about it.
	Message string `json:"message"`
	Hint    string `json:"hint"`
}

// StepError is an error of a platform that names the enforcing step it happened
// in, for status.problems.
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
