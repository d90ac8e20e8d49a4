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

// Backend makes this Mac enforce rulesets. Its methods but Watch are called from
// one goroutine at a time.
//
// The packet filter is used only while it is needed: while a peer may route, or
// this Mac forwards anyway. Otherwise there is no anchor and no token, and
// forwarding is as it was found: iCloud Private Relay works, and the guard at the
// tunnel holds the policy.
type Backend struct {
	o        Options
	path     string // of the anchor
	pf       *darwin.PF
	sysctl   *darwin.Sysctl
	ifconfig *darwin.Ifconfig
	router   *darwin.Router
	currentStep   string // the step that is being taken

	j    *journal
	cfg  host.Interface
	name string
	dev  tun.Device
	// network has the sockets on the mesh addresses.
	network host.KernelNetwork

	loaded *loadedAnchor // nil: nothing of ours is in force
	// render is what Renderer returns while something is.
	render func(*policy.Ruleset) (anchor, text string, err error)
	// drifted says that what pf holds isn't known to be what is in loaded.
	drifted bool
	// before are the interfaces that peers' packets could leave by so far.
	pastEgress []Egress
	cutFor    *policy.Ruleset // for which flows were cut last
	// enforced is what Enforce was called for last. No flows are cut for a
	// ruleset that only widens, so it may be newer than cut.
	enforced *policy.Ruleset
	cuts     cutRecord
	// strays says that states of other rules than ours may be of peers' packets.
	unwantedStates bool
	// unseenStates is why the last look for them failed; nil: it didn't.
	statesErr error
	// findForeign is [FindForeign].
	findForeign func(context.Context, *pfsim.Machine, *Anchor, *policy.Ruleset) ([]Foreign, error)
	// astray says that a token which may be ours can't be told from others.
	tokenAmbiguous bool

	observations
}

// New returns a backend; it changes nothing yet.
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
	p := &Backend{findForeign: FindForeign, path: path, j: &journal{}, cuts: cutRecord{until: map[netip.Addr]time.Time{}}}
	o.Runner, o.Kernel = steppedRunner{o.Runner, p.afterChange}, steppedKernel{o.Kernel, p.afterChange}
	p.o = o
	p.pf, p.sysctl = darwin.NewPF(o.Runner), darwin.NewSysctl(o.Runner, o.Kernel)
	p.ifconfig, p.router = darwin.NewIfconfig(o.Runner), darwin.NewRouter(o.Kernel)
	return p, nil
}

// step runs one enforcing step and names it in its error.
func (b *Backend) step(name string, do func() error) error {
	outer := b.currentStep
	b.currentStep = name
	b.o.Step(name)
	err := do()
	b.o.Step(name)
	b.currentStep = outer
	return asStepError(name, err)
}

// stepped calls Options.Step within a step, after what may have changed the Mac.
func (b *Backend) afterChange() {
	if b.currentStep != "" {
		b.o.Step(b.currentStep)
	}
}

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
		return nil, fmt.Errorf("open mesh interface: MTU %d: want 1280 to 65535", cfg.MTU)
	}
	// The device may have died under us, and its interface with it.
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

// keep closes forwarding where an earlier helper, or this one with an interface that
// is gone now, had switched it on, and leaves the anchor and its token: with the
// interface its routes went, and without the anchor packets to peers would leave in
// clear by the uplink. The next Enforce loads another, or lets the filter go.
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

// goneInterface stands in rules for the mesh interface while there is none. No
// interface has this name, and pf takes it all the same: each is another one.
const noInterface = "mesh-gone"

// keepIn is for when the mesh interface can't be made again: another program may get
// its name, and so be passed what the rules pass by it. Then they name none.
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

// takeOver reads the journal and has what a killed helper changed put back, all of
// it or what do does. Its interface went with it.
func (b *Backend) repair(ctx context.Context, do func(context.Context) error) error {
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
		return do(ctx)
	})
}

// giveBack restores forwarding, empties the anchor and lets the packet filter go,
// in this order, and notes each in the journal. What fails is tried again the next
// time; the rest is done all the same, but the filter never goes before
// forwarding does.
func (b *Backend) restore(ctx context.Context) error {
	b.loaded, b.inForce = nil, false
	if err := b.restoreForwarding(ctx, b.j.Forwarding, b.sharedAtEnd(ctx)); err != nil {
		return err
	}
	return errors.Join(b.flushAnchor(ctx), b.releaseToken(ctx))
}

// restoreForwarding switches forwarding off in those of the families in which we
// switched it on, unless other software came to need it, which shared says. Whatever
// failed before, it has [closeLimit] for each; one that fails leaves the other as much;
// and the journal, whose disk may be full or hang, is written when they are off: one
// that says too much has the next helper switch off what is off.
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

// stopForwarding switches forwarding of a family off, also when ctx has ended.
func (b *Backend) stopForwarding(ctx context.Context, f darwin.Family) error {
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	return b.sysctl.SetForwarding(limit, f, false)
}

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

// release gives the token back, and the one that a killed helper asked for but
// didn't live to write down, if it can be told.
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
			// A pfctl -d voids all tokens.
			if err != nil && !errors.Is(err, darwin.ErrTokenInvalid) && !errors.Is(err, darwin.ErrNotEnabled) {
				return err
			}
		}
		b.j.Token, b.j.Enabling, b.j.Others = 0, false, nil
		return b.j.write(b.o.StateDir)
	})
}

// unwrittenToken returns the only token that came since ours was asked for, or 0: of
// several, another program's might be given back. Then it is said that ours stays.
func (b *Backend) unrecordedToken(ctx context.Context) (uint64, error) {
	now, err := b.tokens(ctx)
	if err != nil {
		return 0, err
	}
	came := subtract(now, b.j.Others)
	if len(came) == 1 {
		return came[0], nil
	}
	b.tokenAmbiguous = b.tokenAmbiguous || len(came) > 1
	return 0, nil
}

// tokenProblems says that a token of ours can't be told from other programs'.
func (b *Backend) tokenProblems() []host.Problem {
	if !b.tokenAmbiguous {
		return nil
	}
	return []host.Problem{{
		Step: StepRelease,
		Message: "a helper that was killed had the packet filter kept on, and other programs did so at the same time: " +
			"which token is the helper's can't be told, so that the packet filter stays on when all others have left it",
		Hint: "a restart of the Mac forgets it; sudo pfctl -s References lists the tokens and sudo pfctl -X TOKEN gives one back",
	}}
}

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

func (b *Backend) forwarding() (now policy.Families, err error) {
	if now.IPv4, err = b.sysctl.Forwarding(darwin.IPv4); err == nil {
		now.IPv6, err = b.sysctl.Forwarding(darwin.IPv6)
	}
	return now, err
}

// Host returns the parts of this host.
func (b *Backend) Host() host.Host {
	return host.Host{
		Name: "darwin", Language: "pf", Link: b, Observer: b, Enforcer: b,
		Judge: b, Ways: b, Renderer: b, Network: &b.network,
	}
}

// Limits implements [host.Enforcer].
func (b *Backend) Limits() host.Limits {
	return host.Limits{States: MaxStates, PerForwarded: StatesPerForwarded, DropsDF: true}
}

// Cut implements [host.Enforcer].
func (b *Backend) Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	b.cuts.save(saveBeforeCut)
	if err := errors.Join(b.kill(ctx, Kills(b.cutFor, r, narrowed)), b.killUnwantedStates(ctx, r)); err != nil {
		return err
	}
	b.cutFor = r
	b.cuts.save(saveLimit)
	return nil
}

// Close implements [host.Link]. It goes back in the order opposite to
// Enforce's: forwarding, the interface with its addresses and routes, flows, the
// anchor, the token.
func (b *Backend) Close(ctx context.Context) ([]host.Problem, error) {
	if b.dev == nil {
		return nil, b.repair(ctx, b.restore)
	}
	defer b.cuts.save(saveLimit)
	shared := b.sharedAtEnd(ctx)
	left := b.keptForwarding(shared)
	if err := b.restoreForwarding(ctx, b.j.Forwarding, shared); err != nil {
		// The anchor stays: without it, forwarding would be open.
		return left, errors.Join(err, b.removeInterface())
	}
	err := errors.Join(b.removeInterface(), b.killAllFlows(ctx), b.flushAnchor(ctx), b.releaseToken(ctx))
	b.loaded = nil
	return append(left, b.tokenProblems()...), err
}

// endFlows ends what peers still have running.
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

// maxKillsAtEnd bounds how many peers' flows are ended one by one when leaving,
// which has to be over in seconds.
const maxKillsAtEnd = 16

// kill ends states. One that fails holds up none of the others; the first error is
// returned, for each of thousands may be the same.
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

// left says what of our doing stays because other software came to need it.
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
				Message: f.name + " forwarding stays on: Internet Sharing or a virtual machine came to need it while the helper ran",
				Hint:    "sudo sysctl -w " + f.variable + "=0 switches it off, if nothing needs it any more",
			})
		}
	}
	return out
}

// removeInterface closes the device; the kernel takes the interface away with its
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
