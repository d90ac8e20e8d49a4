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

// others examines what exists beside our table: other software's chains and flow tables,
// and conntrack. It has a worker and sockets of its own, so enforcing never waits for it,
// however many rules other software has loaded.
type others struct {
	worker *worker
	sys    sysctls
	// lists reads lists through sock. outOfSync is set when an exchange was abandoned,
	// because a late answer would be taken for that to the next request.
	lists     *nlconn.Nftables
	sock      *nlconn.Conn
	flows     *conntrack
	outOfSync bool
	// port is a port that peers' flows are translated to, as observePorts chose it; 0:
	// none.
	port atomic.Uint32
	// mesh is the name of the mesh interface, a string.
	mesh atomic.Value

	// holders and excess keep the results of the last readings of conntrack.
	holders holders
	excess  excess
	// lastInputs are the inputs of the last evaluation, and obstacles its result.
	lastInputs lookInputs
	recheckAt  time.Time // when to evaluate again even if no input changed
	obstacles  []host.Problem
	// marks are the marks that peers' packets to the internet get before routing, by
	// family (IPv4 under true), as of the last evaluation.
	marks map[bool]uint32
}

// lookInputs is everything that the evaluation of other rules depends on. It is compared,
// so that nothing is read as long as nothing changed.
type lookInputs struct {
	generation uint32 // of nftables
	samples    string
}

// newOthers opens the sockets in the network namespace of the calling thread.
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

// reopen opens the sockets if they aren't open or mustn't be used any more.
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

// release closes the sockets once the running call has ended, and stops the worker.
func (o *others) release() error {
	limit, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	err := o.worker.run(limit, o.close)
	o.worker.stop()
	return err
}

// run runs do on the worker. The end of ctx interrupts reads from the sockets.
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

// Others implements [host.Others]. It also ends conntrack entries of peers beyond their
// shares. Of other software it covers chains and flow tables of nftables (which include
// those of iptables-nft), tables of iptables-legacy, and policy rules that route peers'
// packets elsewhere.
func (p *Backend) Others(ctx context.Context, r *policy.Ruleset, outer []netip.AddrPort) ([]host.Problem, error) {
	var out []host.Problem
	var marks map[bool]uint32
	o := p.others
	err := o.run(ctx, func() error {
		// First what takes bounded time, then what other software's rules can make slow.
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
		return nil, err // the abandoned call may still write to out
	}
	ways, werr := p.otherWays(ctx, r, marks)
	return append(out, ways...), errors.Join(err, werr)
}

// otherWays asks the kernel for the routes of peers' packets, between calls that enforce.
func (p *Backend) otherWays(ctx context.Context, r *policy.Ruleset, marks map[bool]uint32) ([]host.Problem, error) {
	// As in Way, the end of ctx isn't passed on to the sockets.
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

// sampleOf returns the sample for a packet on its way to the interface out.
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

// recheckAfter is how long a result holds if no rule changed: set elements expire and
// quotas run out without a change of the ruleset. It holds recheckFactor times as long as
// the evaluation took, if that is longer, which keeps the cost below 0.5 % of a core.
const (
	recheckAfter  = time.Minute
	recheckFactor = 200
)

// lookAtOthers evaluates other software's rules if they or the samples changed since the
// last evaluation.
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
