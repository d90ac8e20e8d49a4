package linux

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// others looks at what is beside our table: other software's chains and flow tables,
// and conntrack. It has a thread and sockets of its own, so that what enforces doesn't
// wait for it, whatever the others have loaded.
type others struct {
	worker *worker
	sys    sysctls
	// lists reads lists through sock. spent says that an exchange was given up: an answer
	// that comes late would be taken for the next one's.
	lists     *nlconn.Nftables
	sock      *nlconn.Conn
	flows     *conntrack
	outOfSync bool
	// port is one that peers' flows are translated to, as what enforces chose it.
	port atomic.Uint32
	// mesh is the name of the mesh's interface.
	mesh atomic.Value

	holders holders
	excess  excess
	// looked is what others were last looked at for, and obstacles what was found then.
	lastInputs lookInputs
	recheckAt  time.Time // when it is looked at again all the same
	obstacles  []host.Problem
	// marks are those that peers' packets to the internet get before they are routed, by
	// whether they are of IPv4, as of the last look.
	marks map[bool]uint32
}

// occasion is what the answer to a look at others depends on. It is compared, so
// that nothing is read while all is as it was.
type lookInputs struct {
	generation uint32 // of nftables
	samples    string
}

// newOthers opens it in the network namespace of the calling thread.
func newOthers(sys sysctls) (*others, error) {
	w, err := newWorker()
	if err != nil {
		return nil, err
	}
	o := &others{worker: w, sys: sys, outOfSync: true}
	if err := w.run(context.Background(), o.reopen); err != nil {
		w.stop()
		return nil, err
	}
	return o, nil
}

// reopen opens the sockets where they aren't, or mustn't be used any more.
func (o *others) reopen() error {
	if !o.outOfSync {
		return nil
	}
	if err := o.close(); err != nil {
		return err
	}
	lists, sock, err := openNftables()
	if err != nil {
		return err
	}
	o.lists, o.sock = lists, sock
	if o.flows, err = openConntrack(); err != nil {
		return err
	}
	o.outOfSync = false
	return nil
}

// close closes the sockets that are open.
func (o *others) close() error {
	var errs []error
	if o.sock != nil {
		errs = append(errs, o.sock.Close())
	}
	if o.flows != nil {
		errs = append(errs, o.flows.close())
	}
	o.lists, o.sock, o.flows = nil, nil, nil
	return errors.Join(errs...)
}

// end ends the worker when it has nothing to do, and closes the sockets then.
func (o *others) release() error {
	limit, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	err := o.worker.run(limit, o.close)
	o.worker.stop()
	return err
}

// run does a look on the worker. The end of ctx ends what waits at the sockets.
func (o *others) run(ctx context.Context, do func() error) error {
	return o.worker.run(ctx, func() error {
		o.worker.step.Store(stepOthers)
		if err := o.reopen(); err != nil {
			o.outOfSync = true
			return err
		}
		conns := []interface{ SetDeadline(time.Time) error }{o.sock, o.flows.dump}
		stop := context.AfterFunc(ctx, func() {
			for _, c := range conns {
				_ = c.SetDeadline(time.Unix(1, 0))
			}
		})
		err := do()
		o.outOfSync = !stop()
		return err
	})
}

// Others implements [host.Others]. It also ends what peers hold in conntrack
// beyond their shares.
func (p *Backend) Others(ctx context.Context, r *policy.Ruleset, outer []netip.AddrPort) ([]host.Problem, error) {
	var out []host.Problem
	var marks map[bool]uint32
	o := p.others
	err := o.run(ctx, func() error {
		// First what is bounded, then what others' rules may make long.
		eerr := o.endExcess(ctx, r)
		full, ferr := fillProblems(o.sys)
		o.nameHolders(ctx, full, r)
		oerr := o.lookAtOthers(ctx, r, outer)
		legacy, lerr := legacyProblems()
		marks = maps.Clone(o.marks)
		out = slices.Concat(o.excess.found, o.obstacles, legacy, full)
		return errors.Join(eerr, ferr, oerr, lerr)
	})
	if errors.Is(err, errHung) {
		return nil, err // the look that was left behind may still write
	}
	ways, werr := p.otherWays(ctx, r, marks)
	return append(out, ways...), errors.Join(err, werr)
}

// otherWays has the kernel asked where it sends peers' packets, when nothing is being
// enforced.
func (p *Backend) otherWays(ctx context.Context, r *policy.Ruleset, marks map[bool]uint32) ([]host.Problem, error) {
	// As in Way, the end of the caller's patience isn't handed to the sockets.
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), wayLimit)
	defer cancel()
	return ask(limited, p, func() ([]host.Problem, error) { return p.wayProblems(r, marks), nil })
}

// ByOthers implements [host.Judge].
func (p *Backend) ByOthers(ctx context.Context, packet host.Packet, out string, reply bool) (host.ByOthers, error) {
	var f finding
	s := sampleOf(packet, out, reply)
	mesh, _ := p.others.mesh.Load().(string)
	s.tunnel = mesh != "" && s.iif != mesh && s.oif != mesh
	err := p.others.run(ctx, func() error {
		e, err := p.others.newEvaluator(ctx)
		if err != nil {
			return err
		}
		f = e.run(s)
		return ctx.Err()
	})
	if err != nil {
		return host.ByOthers{}, err
	}
	by := host.ByOthers{Unclear: f.unclear, Does: map[outcome]string{
		dropped: host.OthersDrop, redirected: host.OthersRedirect, untracked: host.OthersUntrack,
	}[f.outcome]}
	if by.Does != "" || by.Unclear {
		by.Where = f.where()
	}
	return by, nil
}

func sampleOf(packet host.Packet, out string, reply bool) sample {
	return sample{
		iif: packet.In, oif: out, src: packet.Src, dst: packet.Dst, proto: packet.Proto,
		sport: packet.SrcPort, dport: packet.DstPort, reply: reply,
	}
}

// markOf returns the mark that other software's rules give a packet before it is routed.
func (p *Backend) markOf(ctx context.Context, packet host.Packet) (mark uint32, err error) {
	if !packet.Src.IsValid() {
		return 0, nil
	}
	err = p.others.run(ctx, func() error {
		e, err := p.others.newEvaluator(ctx)
		if err != nil {
			return err
		}
		mark = e.markOf(sampleOf(packet, "", false))
		return ctx.Err()
	})
	return mark, err
}

// lookAgain is after how long others' rules are looked at although none changed: elements
// of sets expire and quotas run out without a change of the ruleset. It is lookFactor
// times as long as a look takes at least, which keeps that below 0.5 % of a core.
const (
	recheckAfter  = time.Minute
	recheckFactor = 200
)

// lookAtOthers looks at others' rules where they, or what they are asked about, changed
// since the last look.
func (o *others) lookAtOthers(ctx context.Context, r *policy.Ruleset, outer []netip.AddrPort) error {
	now, err := generationOf(o.sock)
	if err != nil {
		return err
	}
	all := samples(r, outer)
	asked := lookInputs{now, fmt.Sprint(all)}
	began := time.Now()
	if asked == o.lastInputs && began.Before(o.recheckAt) {
		return nil
	}
	found, err := o.findObstacles(ctx, r.Host(), all)
	if err != nil {
		o.lastInputs = lookInputs{}
		return err
	}
	o.lastInputs, o.obstacles = asked, found
	o.recheckAt = time.Now().Add(max(recheckAfter, recheckFactor*time.Since(began)))
	return nil
}
