package macos

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// Backend makes this Mac enforce rulesets. Except for Watch, ByOthers, Way and what
// Renderer returns, its methods are called from one goroutine at a time.
//
// pf is used only while it is needed: while a peer may route, or this Mac forwards
// anyway (see [Backend.needed]). Otherwise there is no anchor and no token, and
// forwarding is as it was found; the guard at the tunnel enforces the policy. That
// matters because any rule outside Apple's own anchors, with pf enabled, makes iCloud
// Private Relay unavailable (pf_check_compatible_rules in xnu bsd/net/pf.c,
// PF_RULES_PRESENT in bsd/net/necp.c).
type Backend struct {
	o Options
	pfReader
	// questions reads what pf holds for ByOthers. Its commands run beside those of
	// pfReader, so that enforcing doesn't wait for a question.
	questions pfReader

	sysctl   *darwin.Sysctl
	ifconfig *darwin.Ifconfig
	router   *darwin.Router

	j    *journal
	cfg  host.Interface // as Open was given it
	name string         // the mesh interface's, such as utun4
	dev  tun.Device     // nil while the mesh interface isn't open
	// network holds the sockets on the mesh addresses.
	network host.KernelNetwork

	// loaded is the anchor that this helper loaded; nil if pf holds none of ours, or
	// an earlier helper's.
	loaded *loadedAnchor
	// render is what Renderer returns while loaded isn't nil.
	render func(*policy.Ruleset) (anchor, text string, err error)
	// drifted means that pf may hold something else than loaded, so that the next
	// Enforce loads the anchor again.
	drifted bool
	// pastEgress is [AnchorOptions.PastEgress].
	pastEgress []Egress
	// cutFor is the ruleset that flows were last cut for; nil before the first Cut.
	cutFor *policy.Ruleset
	// enforced is the ruleset of the last Enforce. It may be newer than cutFor, since
	// a ruleset that only widens cuts no flows.
	enforced *policy.Ruleset
	cuts     cutRecord
	// unwantedStates means that pf may hold states of peers' packets which no rule of
	// ours created; the next Cut kills them.
	unwantedStates bool
	// statesErr is why the last read of pf's states failed; nil if it succeeded.
	statesErr error
	// findForeign is [FindForeign], except in tests.
	findForeign func(context.Context, *pfsim.Machine, *Anchor, *policy.Ruleset) ([]Foreign, error)
	// tokenAmbiguous means that an earlier helper's token can't be told from those of
	// other programs.
	tokenAmbiguous bool

	observations
}

// New returns a backend, or an error if the label isn't valid. It changes nothing on
// the host.
func New(o Options) (*Backend, error) {
	if o.Label == "" {
		o.Label = DefaultLabel
	}
	if o.CreateTUN == nil {
		o.CreateTUN = tun.CreateTUN
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	path, err := AnchorPath(o.Label)
	if err != nil {
		return nil, err
	}
	p := &Backend{o: o, findForeign: FindForeign, j: &journal{}, cuts: cutRecord{until: map[netip.Addr]time.Time{}}}
	p.pfReader = pfReader{darwin.NewPF(o.Runner), path}
	p.questions = pfReader{darwin.NewPF(o.Runner), path}
	p.sysctl = darwin.NewSysctl(o.Runner, o.Kernel)
	p.ifconfig, p.router = darwin.NewIfconfig(o.Runner), darwin.NewRouter(o.Kernel)
	return p, nil
}

// step runs one enforcing step, and returns its error as a [host.StepError] with the
// step's name. Steps may nest: the error keeps the name of the inner one.
func (b *Backend) step(name string, do func() error) error {
	b.o.Step(name)
	err := do()
	b.o.Step(name)
	return asStepError(name, err)
}

// asStepError returns err as a [host.StepError] of the step, unless it is one
// already or nil.
func asStepError(step string, err error) error {
	var already *host.StepError
	if err == nil || errors.As(err, &already) {
		return err
	}
	e := &host.StepError{Step: step, Err: err}
	switch {
	case errors.Is(err, fs.ErrPermission):
		e.Hint = "run the helper as root"
	case step == StepJournal:
		e.Hint = "the state directory has to be writable and not full"
	}
	return e
}

// Open implements [host.Link].
func (b *Backend) Open(ctx context.Context, cfg host.Interface) (tun.Device, error) {
	if cfg.MTU < 1280 || cfg.MTU > 65535 {
		return nil, fmt.Errorf("MTU %d: want 1280 to 65535", cfg.MTU)
	}
	// Open is also called after the device failed, and its interface disappeared
	// with it: wireguard-go closes the device when reading its routing socket fails.
	if err := b.removeInterface(); err != nil {
		return nil, err
	}
	if err := b.repair(ctx, b.keepFilter); err != nil {
		return nil, err
	}
	b.cfg = cfg
	if cfg.Name == "" {
		cfg.Name = "utun"
	}
	err := b.step(StepInterface, func() (err error) {
		if b.dev, err = b.o.CreateTUN(cfg.Name, cfg.MTU); err != nil {
			return err
		}
		b.name, err = b.dev.Name()
		return err
	})
	if err != nil {
		return nil, errors.Join(err, b.removeInterface(), b.loadWithoutInterface(ctx))
	}
	b.network.Opened(b.name, cfg)
	return b.dev, nil
}

// keepFilter disables forwarding where an earlier helper, or this one with an
// interface that is gone now, had enabled it. It leaves the anchor and its token in
// place: the routes disappeared with the interface, so without the anchor packets to
// peers would leave in clear by the uplink. The next Enforce loads a new anchor, or
// removes this one.
func (b *Backend) keepFilter(ctx context.Context) error {
	b.drifted, b.inForce = true, false
	if err := b.restoreForwarding(ctx, b.j.Forwarding, b.sharedAtEnd(ctx)); err != nil {
		return err
	}
	if !b.j.Enabling {
		return nil
	}
	return b.step(StepRelease, func() (err error) {
		if b.j.Token, err = b.unrecordedToken(ctx); err != nil {
			return err
		}
		b.j.Enabling, b.j.Others = false, nil
		return b.j.write(b.o.StateDir)
	})
}

// noInterface stands for the mesh interface in rules while there is none. No
// interface of macOS has such a name. pf accepts unknown names, and then "on ! NAME"
// matches every interface (pfi_kif_match in xnu bsd/net/pf_if.c).
const noInterface = "mesh-gone"

// loadWithoutInterface loads the anchor with [noInterface] after the mesh interface
// couldn't be created again: another program may get its utun number, and the rules
// would pass that program's packets as the mesh's.
func (b *Backend) loadWithoutInterface(ctx context.Context) error {
	if b.loaded == nil || b.enforced == nil {
		return nil
	}
	o := b.options()
	o.Interface = noInterface
	a, err := Compile(b.enforced, o)
	if err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	return b.ensureAnchor(limit, a)
}

// repair reads the journal and calls undo, which undoes what a helper that was killed
// had changed: everything, or what [Backend.keepFilter] does. The interface needs no
// repair, as the kernel removed it when the process died.
func (b *Backend) repair(ctx context.Context, undo func(context.Context) error) error {
	return b.step(StepRepair, func() error {
		boot, err := b.sysctl.BootSession()
		if err != nil {
			return err
		}
		if b.j, err = readJournal(b.o.StateDir, boot); err != nil {
			return err
		}
		if b.cuts.dir == "" {
			b.cuts.load(b.o.StateDir, boot, b.o.Now())
		}
		return undo(ctx)
	})
}

// restore restores forwarding, flushes the anchor and releases the token, in this
// order, and records each in the journal. A failure in one of the last two doesn't
// stop the other, and what failed is tried again the next time. If forwarding can't
// be restored the filter stays: forwarding without it would be open.
func (b *Backend) restore(ctx context.Context) error {
	b.loaded, b.inForce = nil, false
	if err := b.restoreForwarding(ctx, b.j.Forwarding, b.sharedAtEnd(ctx)); err != nil {
		return err
	}
	return errors.Join(b.flushAnchor(ctx), b.releaseToken(ctx))
}

// restoreForwarding disables forwarding in those of families for which this helper
// enabled it, except in those of shared, where other software now needs it. Each
// family has [closeLimit] of its own, whatever failed before. The journal is written
// last, because its disk may be full or hang: a stale journal only makes the next
// helper disable forwarding that is disabled already.
func (b *Backend) restoreForwarding(ctx context.Context, families, shared policy.Families) error {
	off := policy.Families{IPv4: families.IPv4 && b.j.Forwarding.IPv4, IPv6: families.IPv6 && b.j.Forwarding.IPv6}
	if off == (policy.Families{}) {
		return nil
	}
	return b.step(StepRestore, func() error {
		var failed []error
		for _, f := range []struct {
			family      darwin.Family
			off, needed bool
			ours        *bool
		}{
			{darwin.IPv6, off.IPv6, shared.IPv6, &b.j.Forwarding.IPv6},
			{darwin.IPv4, off.IPv4, shared.IPv4, &b.j.Forwarding.IPv4},
		} {
			if !f.off {
				continue
			}
			if !f.needed {
				if err := b.stopForwarding(ctx, f.family); err != nil {
					failed = append(failed, err)
					continue
				}
			}
			*f.ours = false
		}
		return errors.Join(append(failed, b.j.write(b.o.StateDir))...)
	})
}

// stopForwarding disables forwarding in one family within [closeLimit], even if ctx
// has ended.
func (b *Backend) stopForwarding(ctx context.Context, f darwin.Family) error {
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	return b.sysctl.SetForwarding(limit, f, false)
}

// flushAnchor empties the anchor. The empty anchor itself stays listed until the next
// boot: pf keeps a reference to every anchor that was loaded (pfioctl_ioc_trans in
// xnu bsd/net/pf_ioctl.c). It has no effect.
func (b *Backend) flushAnchor(ctx context.Context) error {
	if b.j.Anchor == "" {
		return nil
	}
	return b.step(StepFlush, func() error {
		if err := b.pf.Flush(ctx, b.j.Anchor); err != nil {
			return err
		}
		b.j.Anchor = ""
		return b.j.write(b.o.StateDir)
	})
}

// releaseToken gives the token back (pfctl -X), or the one that a helper acquired but
// was killed before it recorded, if that can be identified.
func (b *Backend) releaseToken(ctx context.Context) error {
	if b.j.Token == 0 && !b.j.Enabling {
		return nil
	}
	return b.step(StepRelease, func() error {
		if b.j.Enabling && b.j.Token == 0 {
			token, err := b.unrecordedToken(ctx)
			if err != nil {
				return err
			}
			b.j.Token = token
		}
		if b.j.Token != 0 {
			err := b.pf.Release(ctx, darwin.Token(b.j.Token))
			// pfctl -d invalidates every token.
			if err != nil && !errors.Is(err, darwin.ErrTokenInvalid) && !errors.Is(err, darwin.ErrNotEnabled) {
				return err
			}
		}
		b.j.Token, b.j.Enabling, b.j.Others = 0, false, nil
		return b.j.write(b.o.StateDir)
	})
}

// unrecordedToken returns the token that appeared since ours was requested. It
// returns 0 if there is none, or several: releasing another program's would disable
// pf for it. Then ours stays, and tokenProblems reports that.
func (b *Backend) unrecordedToken(ctx context.Context) (uint64, error) {
	now, err := b.tokens(ctx)
	if err != nil {
		return 0, err
	}
	added := subtract(now, b.j.Others)
	if len(added) == 1 {
		return added[0], nil
	}
	b.tokenAmbiguous = b.tokenAmbiguous || len(added) > 1
	return 0, nil
}

// tokenProblems reports that a token of ours can't be told from other programs'.
func (b *Backend) tokenProblems() []host.Problem {
	if !b.tokenAmbiguous {
		return nil
	}
	return []host.Problem{{
		Step: StepRelease,
		Message: "a helper that was killed had enabled the packet filter while other programs did the same: " +
			"its token can't be told from theirs, so the packet filter stays enabled after all others have released it",
		Hint: "restarting the Mac releases it; sudo pfctl -s References lists the tokens and sudo pfctl -X TOKEN releases one",
	}}
}

// tokens returns the tokens that were acquired by pfctl. pf records the name of the
// process that called it, so ours are among these and Apple's daemons' aren't.
func (b *Backend) tokens(ctx context.Context) ([]uint64, error) {
	refs, err := b.pf.References(ctx)
	var out []uint64
	for _, r := range refs {
		if r.Process == "pfctl" {
			out = append(out, r.Token)
		}
	}
	return out, err
}

// forwarding reads the forwarding sysctls.
func (b *Backend) forwarding() (now policy.Families, err error) {
	if now.IPv4, err = b.sysctl.Forwarding(darwin.IPv4); err == nil {
		now.IPv6, err = b.sysctl.Forwarding(darwin.IPv6)
	}
	return now, err
}

// Host returns the contracts of package host that this backend implements.
func (b *Backend) Host() host.Host {
	return host.Host{
		Name: "darwin", Language: "pf", Link: b, Observer: b, Enforcer: b,
		Judge: b, Ways: b, Renderer: b, Network: &b.network,
		Unexamined: neverExamined,
	}
}

// Limits implements [host.Enforcer]. DropsDF is set because pf drops fragments with
// the DF bit where it reassembles without no-df (pf_normalize_ip in xnu
// bsd/net/pf_norm.c).
func (b *Backend) Limits() host.Limits {
	return host.Limits{States: MaxStates, PerForwarded: StatesPerForwarded, DropsDF: true}
}

// Cut implements [host.Enforcer]. It kills states, so the new rules must be loaded:
// the next packet of a flow that ended is then refused by them. The file of cuts
// gets little time before, so that a disk that hangs doesn't delay a narrowing.
func (b *Backend) Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	b.cuts.save(saveBeforeCut)
	if err := errors.Join(b.kill(ctx, Kills(b.cutFor, r, narrowed)), b.killUnwantedStates(ctx, r)); err != nil {
		return err
	}
	b.cutFor = r
	b.cuts.save(saveLimit)
	return nil
}

// Close implements [host.Link]. It undoes Enforce in the opposite order: forwarding,
// the interface with its addresses and routes, states, the anchor, the token. The
// problems are those that remain on the host. Without an open interface it only
// repairs what an earlier helper left.
func (b *Backend) Close(ctx context.Context) ([]host.Problem, error) {
	if b.dev == nil {
		return nil, b.repair(ctx, b.restore)
	}
	defer b.cuts.save(saveLimit)
	shared := b.sharedAtEnd(ctx)
	kept := b.keptForwarding(shared)
	if err := b.restoreForwarding(ctx, b.j.Forwarding, shared); err != nil {
		// The anchor stays: without it, forwarding would be open.
		return kept, errors.Join(err, b.removeInterface())
	}
	err := errors.Join(b.removeInterface(), b.killAllFlows(ctx), b.flushAnchor(ctx), b.releaseToken(ctx))
	b.loaded = nil
	return append(kept, b.tokenProblems()...), err
}

// killAllFlows kills the states of all peers, so that their translated flows don't
// outlive the anchor.
func (b *Backend) killAllFlows(ctx context.Context) error {
	if b.enforced == nil || b.j.Anchor == "" {
		return nil
	}
	var all []policy.Narrowed
	for _, peer := range b.enforced.Peers() {
		all = append(all, policy.Narrowed{Addresses: peer.Addresses.List(), Removed: true})
	}
	kills := Kills(nil, b.enforced, all)
	if len(kills) > maxKillsAtEnd {
		kills = widenKills(kills, b.enforced.Sets().Mesh)
	}
	return b.kill(ctx, kills)
}

// maxKillsAtEnd is how many runs of pfctl -k, each some milliseconds, Close may take;
// with more, whole mesh prefixes are killed. launchd sends SIGKILL ExitTimeOut seconds
// after SIGTERM (launchd.plist(5)).
const maxKillsAtEnd = 16

// kill kills states, one run of pfctl for each element. A failure doesn't stop the
// others, and only the first is returned: thousands may fail for the same reason.
func (b *Backend) kill(ctx context.Context, kills []Kill) error {
	if len(kills) == 0 {
		return nil
	}
	return b.step(StepCut, func() error {
		var first error
		for _, k := range kills {
			err := b.pf.KillFromTo(ctx, k.From, k.To)
			if first == nil {
				first = err
			}
			if ctx.Err() != nil {
				break
			}
		}
		return first
	})
}

// keptForwarding reports the families in which forwarding stays enabled although this
// helper enabled it, because other software now needs it.
func (b *Backend) keptForwarding(shared policy.Families) []host.Problem {
	var out []host.Problem
	for _, f := range []struct {
		stays          bool
		name, variable string
	}{
		{b.j.Forwarding.IPv4 && shared.IPv4, "IPv4", "net.inet.ip.forwarding"},
		{b.j.Forwarding.IPv6 && shared.IPv6, "IPv6", "net.inet6.ip6.forwarding"},
	} {
		if f.stays {
			out = append(out, host.Problem{
				Step:    StepRestore,
				Message: f.name + " forwarding stays on: Internet Sharing or a virtual machine started to need it while the helper ran",
				Hint:    "sudo sysctl -w " + f.variable + "=0 switches it off once nothing needs it",
			})
		}
	}
	return out
}

// removeInterface closes the device; the kernel then removes the interface with its
// addresses and routes.
func (b *Backend) removeInterface() error {
	b.network.Closed()
	if b.dev == nil {
		return nil
	}
	return b.step(StepRemoveInterface, func() error {
		err := b.dev.Close()
		if errors.Is(err, fs.ErrClosed) {
			err = nil
		}
		b.dev = nil
		return err
	})
}
