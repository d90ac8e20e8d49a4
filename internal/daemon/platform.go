package daemon

import (
	"context"
	"net/netip"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/host"
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
	// interface, which outlives ctx. Nothing of a peer passes yet.
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
	// on purpose (forwarding that another program came to need) is returned as
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

// Neighbours is a host that can tell what other software has beside its rules.
type Neighbours interface {
	// Others returns what of other software stands in the way of r, which is in force,
	// such as a foreign chain that drops a peer's packets, or WireGuard's own to the
	// devices at outer. It may be called by any goroutine, beside the methods of
	// [Platform], which don't wait for it.
	// With an error it returns what it found nevertheless.
	Others(ctx context.Context, r *policy.Ruleset, outer []netip.AddrPort) ([]Problem, error)
}

// OthersJudge is a host that can tell what other software's rules do with one packet.
type OthersJudge interface {
	// ByOthers returns what others' rules do with a packet on its way from p.In to out,
	// of which either is empty for this host itself. reply says that it belongs to a flow
	// that the other end opened; otherwise it is the first of its flow. It may be called by
	// any goroutine, beside the methods of [Platform], which don't wait for it.
	ByOthers(ctx context.Context, p host.Packet, out string, reply bool) (host.ByOthers, error)
}

// Limiter tells what the guard has to know of a host's packet filter. Of a host
// that isn't one, memory alone bounds the peers' flows.
type Limiter interface {
	Limits() host.Limits
}

// Wayfinder is a host whose kernel can be asked for the way of a packet.
type Wayfinder interface {
	// Way returns the way of a packet now, by the host's routes and policy rules: of one
	// that comes in by p.In, such as a peer's by the mesh interface, or of the host's own
	// where that is empty. Without a source it is a packet of the host's choice. Marks
	// that other software's rules give it count where they are understood; redirections
	// aren't known to it. It may be called at any time
	// and by any goroutine, and waits until what is being enforced has been, or ctx ends.
	Way(ctx context.Context, p host.Packet) (host.Way, error)
}

// Renderer is a host that knows more about its rules than the ruleset does, such as
// the ports that peers' flows are translated to.
type Renderer interface {
	// Renderer returns a function that writes a ruleset with what the host was as
	// Enforce last loaded rules, in the language of the host, with the anchor that
	// they are in. It is nil while none are loaded. The function may be called at any
	// time and by any goroutine.
	Renderer() func(*policy.Ruleset) (anchor, text string, err error)
}

// The words of the contract, which the platforms use without importing this
// package.
type (
	// Interface is how the mesh interface is to be made.
	Interface = host.Interface
	// Report is what Inspect found.
	Report = host.Report
	// Problem is something that a person should know.
	Problem = host.Problem
	// StepError names the enforcing step that an error happened in.
	StepError = host.StepError
)
