// Package host is the contract between the daemon and the hosts that it runs on.
//
// A host makes the mesh interface, tells the facts about itself, and enforces rulesets:
// [Link], [Observer] and [Enforcer]. It may also be able to answer questions about other
// software's rules and about routes, to show its own rules, and to open sockets on the
// mesh addresses. [Host] holds all of these as one value, with nil for what a host can't
// do, so that a consumer takes the parts it needs and never asks which host it has.
//
// The hosts are in rooms below this one: linux enforces by nftables, macos by pf. Neither
// imports the daemon, and only cmd/meshhelper chooses between them. Package hosttest
// has the tests that each host must pass; package hostfake is a host in memory.
//
// # The promise
//
// Every host keeps this one: at every moment, also in the middle of a call, after a failed
// one and after the process was killed, what passes is a subset of what the old or the new
// ruleset passes; forwarding is never on without the filter; and everything that the host
// changes on the computer is on disk, with what was found and the boot's id, before it is
// changed.
package host

import (
	"context"
	"net/netip"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Host is a computer that enforces rulesets, part by part. The methods of Link, Observer
// and Enforcer are called from one goroutine at a time, Watch excepted; those of the other
// parts may be called by any goroutine, at any time, unless they say otherwise.
type Host struct {
	// Name is what status calls it, such as "linux".
	Name string // required
	// Language is what its rules are written in, such as "nft".
	Language string // required

	Link     Link     // required
	Observer Observer // required
	Enforcer Enforcer // required

	Others   Others   // optional
	Judge    Judge    // optional
	Ways     Ways     // optional
	Renderer Renderer // optional
	Network  Network  // optional
}

// Link makes the mesh interface and takes it away.
type Link interface {
	// Open repairs what a killed helper left behind, then creates the mesh
	// interface, which outlives ctx. Nothing of a peer passes yet.
	Open(ctx context.Context, cfg Interface) (tun.Device, error)

	// Close takes the rules, routes, addresses and the interface away, in the
	// reverse order of Enforce, and leaves the host as it was found. What stays
	// on purpose (forwarding that another program came to need) is returned as
	// problems. It works without Open too, for a crashed helper's leftovers.
	Close(ctx context.Context) ([]Problem, error)
}

// Observer tells the facts about the host, and when they change.
type Observer interface {
	// Observe returns the facts about the host that hold now. Forwarding says
	// for which families Enforce will forward, not what the sysctls say.
	Observe(ctx context.Context) (policy.Host, error)

	// Watch follows the changes of the host's addresses, routes and interfaces: it
	// calls changed, which never blocks, after each change that may alter
	// what Observe or Inspect return, until ctx ends. It survives odd messages
	// and overruns of the kernel's socket, which count as a change. It may be called
	// beside all other methods, and again after an error.
	Watch(ctx context.Context, changed func()) error
}

// Enforcer makes the host enforce a ruleset.
type Enforcer interface {
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

	// Limits returns what the guard has to know of the packet filter. Where there is none
	// the limits are zero, and memory alone bounds the peers' flows.
	Limits() Limits
}

// Others can tell what other software has beside the host's own rules.
type Others interface {
	// Others returns what of other software stands in the way of r, which is in force,
	// such as a foreign chain that drops a peer's packets, or WireGuard's own to the
	// devices at outer. It doesn't wait for other methods, nor they for it.
	// With an error it returns what it found nevertheless.
	Others(ctx context.Context, r *policy.Ruleset, outer []netip.AddrPort) ([]Problem, error)
}

// Judge can tell what other software's rules do with one packet.
type Judge interface {
	// ByOthers returns what others' rules do with a packet on its way from p.In to out,
	// of which either is empty for this host itself. reply says that it belongs to a flow
	// that the other end opened; otherwise it is the first of its flow. It doesn't wait for
	// other methods, nor they for it.
	ByOthers(ctx context.Context, p Packet, out string, reply bool) (ByOthers, error)
}

// Ways is the part of a host whose kernel can be asked for the way of a packet.
type Ways interface {
	// Way returns the way of a packet now, by the host's routes and policy rules: of one
	// that comes in by p.In, such as a peer's by the mesh interface, or of the host's own
	// where that is empty. Without a source it is a packet of the host's choice. Marks
	// that other software's rules give it count where they are understood; redirections
	// aren't known to it. It waits until what is being enforced has been, or ctx ends.
	Way(ctx context.Context, p Packet) (Way, error)
}

// Renderer is the part of a host that knows more about its rules than the ruleset does,
// such as the ports that peers' flows are translated to.
type Renderer interface {
	// Renderer returns a function that writes a ruleset with what the host was as
	// Enforce last loaded rules, in the language of the host, with the anchor that
	// they are in. It is nil while none are loaded. Renderer itself is called as the
	// methods of Enforcer are; the function may be called at any time and by any goroutine.
	Renderer() func(*policy.Ruleset) (anchor, text string, err error)
}
