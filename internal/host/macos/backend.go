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
	taking   string // the step that is being taken

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
	before []Egress
	cut    *policy.Ruleset // for which flows were cut last
	// enforced is what Enforce was called for last. No flows are cut for a
	// ruleset that only widens, so it may be newer than cut.
	enforced *policy.Ruleset
	cuts     cutBook
	// strays says that states of other rules than ours may be of peers' packets.
	strays bool
	// unseenStates is why the last look for them failed; nil: it didn't.
	unseenStates error
	// findForeign is [FindForeign].
	findForeign func(context.Context, *pfsim.Machine, *Anchor, *policy.Ruleset) ([]Foreign, error)
	// astray says that a token which may be ours can't be told from others.
	astray bool

	look
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
	p := &Backend{findForeign: FindForeign, path: path, j: &journal{}, cuts: cutBook{until: map[netip.Addr]time.Time{}}}
	o.Runner, o.Kernel = steppedRunner{o.Runner, p.stepped}, steppedKernel{o.Kernel, p.stepped}
	p.o = o
	p.pf, p.sysctl = darwin.NewPF(o.Runner), darwin.NewSysctl(o.Runner, o.Kernel)
	p.ifconfig, p.router = darwin.NewIfconfig(o.Runner), darwin.NewRouter(o.Kernel)
	return p, nil
}

// step runs one enforcing step and names it in its error.
func (p *Backend) step(name string, do func() error) error {
	outer := p.taking
	p.taking = name
	p.o.Step(name)
	err := do()
	p.o.Step(name)
	p.taking = outer
	return named(name, err)
}

// stepped calls Options.Step within a step, after what may have changed the Mac.
func (p *Backend) stepped() {
	if p.taking != "" {
		p.o.Step(p.taking)
	}
}

func named(step string, err error) error {
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
func (p *Backend) Open(ctx context.Context, cfg host.Interface) (tun.Device, error) {
	if cfg.MTU < 1280 || cfg.MTU > 65535 {
		return nil, fmt.Errorf("open mesh interface: MTU %d: want 1280 to 65535", cfg.MTU)
	}
	// The device may have died under us, and its interface with it.
	if err := p.removeInterface(); err != nil {
		return nil, err
	}
	if err := p.takeOver(ctx, p.keep); err != nil {
		return nil, err
	}
	p.cfg = cfg
	if cfg.Name == "" {
		cfg.Name = "utun"
	}
	err := p.step(StepInterface, func() (err error) {
		if p.dev, err = p.o.CreateTUN(cfg.Name, cfg.MTU); err != nil {
			return err
		}
		p.name, err = p.dev.Name()
		return err
	})
	if err != nil {
		return nil, errors.Join(err, p.removeInterface(), p.keepIn(ctx))
	}
	p.network.Opened(p.name, cfg)
	return p.dev, nil
}

// keep closes forwarding where an earlier helper, or this one with an interface that
// is gone now, had switched it on, and leaves the anchor and its token: with the
// interface its routes went, and without the anchor packets to peers would leave in
// clear by the uplink. The next Enforce loads another, or lets the filter go.
func (p *Backend) keep(ctx context.Context) error {
	p.drifted, p.holds = true, false
	if err := p.restoreForwarding(ctx, p.j.Forwarding, p.sharedAtEnd(ctx)); err != nil {
		return err
	}
	if !p.j.Enabling {
		return nil
	}
	return p.step(StepRelease, func() (err error) {
		if p.j.Token, err = p.unwrittenToken(ctx); err != nil {
			return err
		}
		p.j.Enabling, p.j.Others = false, nil
		return p.j.write(p.o.StateDir)
	})
}

// goneInterface stands in rules for the mesh interface while there is none. No
// interface has this name, and pf takes it all the same: each is another one.
const goneInterface = "mesh-gone"

// keepIn is for when the mesh interface can't be made again: another program may get
// its name, and so be passed what the rules pass by it. Then they name none.
func (p *Backend) keepIn(ctx context.Context) error {
	if p.loaded == nil || p.enforced == nil {
		return nil
	}
	o := p.options()
	o.Interface = goneInterface
	a, err := Compile(p.enforced, o)
	if err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	return p.putAnchor(limit, a)
}

// takeOver reads the journal and has what a killed helper changed put back, all of
// it or what do does. Its interface went with it.
func (p *Backend) takeOver(ctx context.Context, do func(context.Context) error) error {
	return p.step(StepRepair, func() error {
		boot, err := p.sysctl.BootSession()
		if err != nil {
			return err
		}
		if p.j, err = readJournal(p.o.StateDir, boot); err != nil {
			return err
		}
		if p.cuts.dir == "" {
			p.cuts.load(p.o.StateDir, boot, p.o.Now())
		}
		return do(ctx)
	})
}

// giveBack restores forwarding, empties the anchor and lets the packet filter go,
// in this order, and notes each in the journal. What fails is tried again the next
// time; the rest is done all the same, but the filter never goes before
// forwarding does.
func (p *Backend) giveBack(ctx context.Context) error {
	p.loaded, p.holds = nil, false
	if err := p.restoreForwarding(ctx, p.j.Forwarding, p.sharedAtEnd(ctx)); err != nil {
		return err
	}
	return errors.Join(p.flush(ctx), p.release(ctx))
}

// restoreForwarding switches forwarding off in those of the families in which we
// switched it on, unless other software came to need it, which shared says. Whatever
// failed before, it has [closeLimit] for each; one that fails leaves the other as much;
// and the journal, whose disk may be full or hang, is written when they are off: one
// that says too much has the next helper switch off what is off.
func (p *Backend) restoreForwarding(ctx context.Context, families, shared policy.Families) error {
	off := policy.Families{IPv4: families.IPv4 && p.j.Forwarding.IPv4, IPv6: families.IPv6 && p.j.Forwarding.IPv6}
	if off == (policy.Families{}) {
		return nil
	}
	return p.step(StepRestore, func() error {
		var failed []error
		for _, f := range []struct {
			family      darwin.Family
			off, needed bool
			ours        *bool
		}{
			{darwin.IPv6, off.IPv6, shared.IPv6, &p.j.Forwarding.IPv6},
			{darwin.IPv4, off.IPv4, shared.IPv4, &p.j.Forwarding.IPv4},
		} {
			if !f.off {
				continue
			}
			if !f.needed {
				if err := p.stopForwarding(ctx, f.family); err != nil {
					failed = append(failed, err)
					continue
				}
			}
			*f.ours = false
		}
		return errors.Join(append(failed, p.j.write(p.o.StateDir))...)
	})
}

// stopForwarding switches forwarding of a family off, also when ctx has ended.
func (p *Backend) stopForwarding(ctx context.Context, f darwin.Family) error {
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	return p.sysctl.SetForwarding(limit, f, false)
}

func (p *Backend) flush(ctx context.Context) error {
	if p.j.Anchor == "" {
		return nil
	}
	return p.step(StepFlush, func() error {
		if err := p.pf.Flush(ctx, p.j.Anchor); err != nil {
			return err
		}
		p.j.Anchor = ""
		return p.j.write(p.o.StateDir)
	})
}

// release gives the token back, and the one that a killed helper asked for but
// didn't live to write down, if it can be told.
func (p *Backend) release(ctx context.Context) error {
	if p.j.Token == 0 && !p.j.Enabling {
		return nil
	}
	return p.step(StepRelease, func() error {
		if p.j.Enabling && p.j.Token == 0 {
			token, err := p.unwrittenToken(ctx)
			if err != nil {
				return err
			}
			p.j.Token = token
		}
		if p.j.Token != 0 {
			err := p.pf.Release(ctx, darwin.Token(p.j.Token))
			// A pfctl -d voids all tokens.
			if err != nil && !errors.Is(err, darwin.ErrTokenInvalid) && !errors.Is(err, darwin.ErrNotEnabled) {
				return err
			}
		}
		p.j.Token, p.j.Enabling, p.j.Others = 0, false, nil
		return p.j.write(p.o.StateDir)
	})
}

// unwrittenToken returns the only token that came since ours was asked for, or 0: of
// several, another program's might be given back. Then it is said that ours stays.
func (p *Backend) unwrittenToken(ctx context.Context) (uint64, error) {
	now, err := p.tokens(ctx)
	if err != nil {
		return 0, err
	}
	came := missing(now, p.j.Others)
	if len(came) == 1 {
		return came[0], nil
	}
	p.astray = p.astray || len(came) > 1
	return 0, nil
}

// tokenProblems says that a token of ours can't be told from other programs'.
func (p *Backend) tokenProblems() []host.Problem {
	if !p.astray {
		return nil
	}
	return []host.Problem{{
		Step: StepRelease,
		Message: "a helper that was killed had the packet filter kept on, and other programs did so at the same time: " +
			"which token is the helper's can't be told, so that the packet filter stays on when all others have left it",
		Hint: "a restart of the Mac forgets it; sudo pfctl -s References lists the tokens and sudo pfctl -X TOKEN gives one back",
	}}
}

func (p *Backend) tokens(ctx context.Context) ([]uint64, error) {
	refs, err := p.pf.References(ctx)
	var out []uint64
	for _, r := range refs {
		if r.Process == "pfctl" {
			out = append(out, r.Token)
		}
	}
	return out, err
}

func (p *Backend) forwarding() (now policy.Families, err error) {
	if now.IPv4, err = p.sysctl.Forwarding(darwin.IPv4); err == nil {
		now.IPv6, err = p.sysctl.Forwarding(darwin.IPv6)
	}
	return now, err
}

// Host returns the parts of this host.
func (p *Backend) Host() host.Host {
	return host.Host{
		Name: "darwin", Language: "pf", Link: p, Observer: p, Enforcer: p,
		Judge: p, Ways: p, Renderer: p, Network: &p.network,
	}
}

// Limits implements [host.Enforcer].
func (p *Backend) Limits() host.Limits {
	return host.Limits{States: MaxStates, PerForwarded: StatesPerForwarded, DropsDF: true}
}

// Cut implements [host.Enforcer].
func (p *Backend) Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	p.cuts.save(saveBeforeCut)
	if err := errors.Join(p.kill(ctx, Kills(p.cut, r, narrowed)), p.endStrays(ctx, r)); err != nil {
		return err
	}
	p.cut = r
	p.cuts.save(saveLimit)
	return nil
}

// Close implements [host.Link]. It goes back in the order opposite to
// Enforce's: forwarding, the interface with its addresses and routes, flows, the
// anchor, the token.
func (p *Backend) Close(ctx context.Context) ([]host.Problem, error) {
	if p.dev == nil {
		return nil, p.takeOver(ctx, p.giveBack)
	}
	defer p.cuts.save(saveLimit)
	shared := p.sharedAtEnd(ctx)
	left := p.left(shared)
	if err := p.restoreForwarding(ctx, p.j.Forwarding, shared); err != nil {
		// The anchor stays: without it, forwarding would be open.
		return left, errors.Join(err, p.removeInterface())
	}
	err := errors.Join(p.removeInterface(), p.endFlows(ctx), p.flush(ctx), p.release(ctx))
	p.loaded = nil
	return append(left, p.tokenProblems()...), err
}

// endFlows ends what peers still have running.
func (p *Backend) endFlows(ctx context.Context) error {
	if p.enforced == nil || p.j.Anchor == "" {
		return nil
	}
	var all []policy.Narrowed
	for _, peer := range p.enforced.Peers() {
		all = append(all, policy.Narrowed{Addresses: peer.Addresses.List(), Removed: true})
	}
	kills := Kills(nil, p.enforced, all)
	if len(kills) > maxKillsAtEnd {
		kills = coarse(kills, p.enforced.Sets().Mesh)
	}
	return p.kill(ctx, kills)
}

// maxKillsAtEnd bounds how many peers' flows are ended one by one when leaving,
// which has to be over in seconds.
const maxKillsAtEnd = 16

// kill ends states. One that fails holds up none of the others; the first error is
// returned, for each of thousands may be the same.
func (p *Backend) kill(ctx context.Context, kills []Kill) error {
	if len(kills) == 0 {
		return nil
	}
	return p.step(StepCut, func() error {
		var first error
		for _, k := range kills {
			err := p.pf.KillFromTo(ctx, k.From, k.To)
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
func (p *Backend) left(shared policy.Families) []host.Problem {
	var out []host.Problem
	for _, f := range []struct {
		stays          bool
		name, variable string
	}{
		{p.j.Forwarding.IPv4 && shared.IPv4, "IPv4", "net.inet.ip.forwarding"},
		{p.j.Forwarding.IPv6 && shared.IPv6, "IPv6", "net.inet6.ip6.forwarding"},
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
func (p *Backend) removeInterface() error {
	p.network.Closed()
	if p.dev == nil {
		return nil
	}
	return p.step(StepRemoveInterface, func() error {
		err := p.dev.Close()
		if errors.Is(err, fs.ErrClosed) {
			err = nil
		}
		p.dev = nil
		return err
	})
}
