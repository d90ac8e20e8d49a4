// Package host is the contract between the daemon and the hosts that it runs on.
//
// A host creates the mesh interface, observes facts about itself, and enforces rulesets:
// [Link], [Observer] and [Enforcer]. It may also be able to evaluate other software's
// rules, look up routes, print its own rules, and open sockets on the mesh addresses.
// [Host] has all of these as one value, with nil for what a host can't do, so a consumer
// takes the parts that it needs and never asks which host it has.
//
// The hosts are in packages below this one: linux enforces with nftables, macos with pf.
// Neither imports the daemon, and only cmd/meshhelper chooses between them. Package
// hosttest has the tests that every host must pass; package hostfake is a host in memory.
//
// # The promise
//
// Every host keeps this promise at every moment, also in the middle of a call, after a
// failed call and after the process was killed: what passes is a subset of what the old
// or the new ruleset passes; forwarding is never on without the filter; and everything
// that the host changes on the computer is written to disk before the change, with the
// value that was found and the ID of the boot ([WriteJournal]).
package host

import (
	"context"
	"net/netip"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Host is a computer that enforces rulesets, in parts. The methods of Link, Observer and
// Enforcer must be called from one goroutine at a time, except for Watch. Those of the
// other parts may be called by any goroutine at any time, unless they say otherwise.
type Host struct {
	// Name is the host's name in status, such as "linux".
	Name string // required
	// Language is the language of the host's rules, such as "nft".
	Language string // required

	Link     Link     // required
	Observer Observer // required
	Enforcer Enforcer // required

	Others   Others   // optional
	Judge    Judge    // optional
	Ways     Ways     // optional
	Renderer Renderer // optional
	Network  Network  // optional

	// Unexamined are the kinds of problems that the host never looks for, each with the
	// reason.
	Unexamined map[ProblemKind]string // optional
}

// Link creates and removes the mesh interface.
type Link interface {
	// Open repairs what a killed helper left, then creates the mesh interface, which
	// outlives ctx. Nothing of a peer passes yet.
	Open(ctx context.Context, cfg Interface) (tun.Device, error)

	// Close removes the rules, routes, addresses and the interface, in the reverse order
	// of Enforce, and leaves the host as it was found. Anything that stays on purpose,
	// such as forwarding that another program needs by now, is returned as a problem.
	// Close also works without Open, to clean up after a killed helper.
	Close(ctx context.Context) ([]Problem, error)
}

// Observer reads the facts about the host and reports their changes.
type Observer interface {
	// Observe returns the current facts about the host. Forwarding is the families for
	// which Enforce will forward, not the current sysctls.
	Observe(ctx context.Context) (policy.Host, error)

	// Watch follows changes of the host's addresses, routes and interfaces until ctx
	// ends. It calls changed, which must not block, after each change that may affect
	// what Observe or Inspect return. Malformed messages and overruns of the kernel's
	// socket count as a change. It may be called while other methods run, and again after
	// an error.
	Watch(ctx context.Context, changed func()) error
}

// Enforcer makes the host enforce a ruleset.
type Enforcer interface {
	// Enforce makes the host enforce r: first the interface's addresses and a host route
	// per peer, then the filter, then NAT, then forwarding. Called again with the same
	// ruleset, it repairs what has drifted. After an error either nothing of a peer is
	// forwarded, or the old ruleset holds as far as r also allows it; the error names the
	// step ([StepError]).
	Enforce(ctx context.Context, r *policy.Ruleset) error

	// Inspect reads back what the host enforces and compares it with r.
	Inspect(ctx context.Context, r *policy.Ruleset) (Report, error)

	// Cut ends the running flows of the narrowed peers that r doesn't allow, in both
	// directions: no packet of such a flow that an end sends after Cut has returned
	// arrives. It leaves other flows alone.
	Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error

	// Limits returns the packet filter's limits that the guard needs. Without a packet
	// filter they are zero, and memory alone bounds the peers' flows.
	Limits() Limits
}

// Others is the part of a host that can examine other software's packet filters.
type Others interface {
	// Others returns what other software has that stands in the way of r, the enforced
	// ruleset, such as a chain that drops a peer's packets, or WireGuard's own packets to
	// the devices at outer. It doesn't wait for other methods, nor they for it. With an
	// error it returns what it found so far.
	Others(ctx context.Context, r *policy.Ruleset, outer []netip.AddrPort) ([]Problem, error)
}

// Judge is the part of a host that can evaluate other software's rules for one packet.
type Judge interface {
	// ByOthers returns what other software's rules do with a packet on its way from p.In
	// to out; either is empty for this host itself. reply is set for a packet of a flow
	// that the other end opened; otherwise the packet is the first of its flow. It
	// doesn't wait for other methods, nor they for it.
	ByOthers(ctx context.Context, p Packet, out string, reply bool) (ByOthers, error)
}

// Ways is the part of a host whose kernel can look up the route of a packet.
type Ways interface {
	// Way returns the current way of a packet by the host's routes and policy rules: of a
	// packet that arrives on p.In, such as a peer's on the mesh interface, or of the
	// host's own if p.In is empty. Without a source the kernel chooses one. Marks that
	// other software's rules set are considered as far as those rules are understood;
	// redirects aren't. It doesn't wait for other methods, nor they for it.
	Way(ctx context.Context, p Packet) (Way, error)

	// WayCommand returns a command line that shows a person the way to an address on this
	// host, such as "route -n get 192.0.2.1".
	WayCommand(to netip.Addr) string
}

// Renderer is the part of a host that knows more about its rules than the ruleset does,
// such as the ports that peers' flows are translated to.
type Renderer interface {
	// Renderer returns a function that prints a ruleset in the host's language, for the
	// host as it was when Enforce last loaded rules, with the anchor that has them. It is
	// nil while no rules are loaded. Renderer itself is called like the methods of
	// Enforcer; the function may be called by any goroutine at any time.
	Renderer() func(*policy.Ruleset) (anchor, text string, err error)
}
