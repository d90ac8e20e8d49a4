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

// informer answers questions that only inform. It has a worker and sockets of its own, so
// enforcing never waits for an answer, however many questions there are and however many
// rules other software has loaded.
type informer struct {
	worker   *worker
	task     string // what its calls do, for the error of one that hangs
	sys      sysctls
	observed *observed
	// readsFlows says that its calls read conntrack, for which flows is opened.
	readsFlows bool
	// lists reads lists of nftables through sock; routes looks up routes. outOfSync is set
	// when an exchange was abandoned, because a late answer would be taken for that to the
	// next request.
	lists     *nlconn.Nftables
	sock      *nlconn.Conn
	routes    *nlconn.Conn
	flows     *conntrack
	outOfSync bool
}

// observed holds the facts from the last Observe that informers need. The enforcing worker
// stores them.
type observed struct {
	// port is a port that peers' flows are translated to, as observePorts chose it; 0:
	// none.
	port atomic.Uint32
	mesh atomic.Pointer[meshInterface] // nil before the first Observe
}

// meshInterface is the mesh interface with the host's own mesh addresses.
type meshInterface struct {
	name      string
	addresses []netip.Addr
}

// meshInterface returns the mesh interface, or the zero value before the first Observe.
func (o *observed) meshInterface() meshInterface {
	if m := o.mesh.Load(); m != nil {
		return *m
	}
	return meshInterface{}
}

// others examines what exists beside our table: other software's chains and flow tables,
// and conntrack. Questions about single packets have another informer: clients ask as many
// of those as they like, and the flows of peers beyond their shares, which endExcess ends,
// mustn't wait for them.
type others struct {
	informer

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

// start starts the worker and opens the sockets, in the network namespace of the calling
// thread.
func (i *informer) start() (err error) {
	if i.worker, err = newWorker(); err != nil {
		return err
	}
	i.outOfSync = true
	return i.worker.run(context.Background(), i.reopen)
}

// reopen opens the sockets if they aren't open or mustn't be used any more.
func (i *informer) reopen() error {
	if !i.outOfSync {
		return nil
	}
	if err := i.close(); err != nil {
		return err
	}
	lists, sock, err := openNftables()
	if err != nil {
		return err
	}
	i.lists, i.sock = lists, sock
	if i.routes, err = dialRoutes(); err != nil {
		return err
	}
	if i.readsFlows {
		if i.flows, err = openConntrack(); err != nil {
			return err
		}
	}
	i.outOfSync = false
	return nil
}

// close closes the sockets that are open.
func (i *informer) close() error {
	var errs []error
	for _, c := range []*nlconn.Conn{i.sock, i.routes} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if i.flows != nil {
		errs = append(errs, i.flows.close())
	}
	i.lists, i.sock, i.routes, i.flows = nil, nil, nil, nil
	return errors.Join(errs...)
}

// release closes the sockets once the running call has ended, or gives up when ctx ends,
// and stops the worker. An informer that wasn't started has nothing to release.
func (i *informer) release(ctx context.Context) error {
	if i.worker == nil {
		return nil
	}
	err := i.worker.run(ctx, i.close)
	i.worker.stop()
	return err
}

// run runs do on the worker. The end of ctx interrupts reads from the sockets.
func (i *informer) run(ctx context.Context, do func() error) error {
	return i.worker.run(ctx, func() error {
		i.worker.step.Store(i.task)
		if err := i.reopen(); err != nil {
			i.outOfSync = true
			return err
		}
		conns := []interface{ SetDeadline(time.Time) error }{i.sock, i.routes}
		if i.readsFlows {
			conns = append(conns, i.flows.dump)
		}
		stop := context.AfterFunc(ctx, func() {
			for _, c := range conns {
				_ = c.SetDeadline(time.Unix(1, 0))
			}
		})
		err := do()
		i.outOfSync = !stop()
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
	o := &p.others
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
	ways, werr := o.otherWays(ctx, r, marks)
	return append(out, ways...), errors.Join(err, werr)
}

// otherWays asks the kernel for the routes of peers' packets. It has a time limit of its
// own, since rules that are slow to evaluate may have taken all of ctx.
func (o *others) otherWays(ctx context.Context, r *policy.Ruleset, marks map[bool]uint32) ([]host.Problem, error) {
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), wayLimit)
	defer cancel()
	var out []host.Problem
	err := o.run(limited, func() error {
		out = o.wayProblems(r, marks)
		return limited.Err()
	})
	if errors.Is(err, errHung) {
		return nil, err // the abandoned call may still write to out
	}
	return out, err
}

// ByOthers implements [host.Judge].
func (p *Backend) ByOthers(ctx context.Context, packet host.Packet, out string, reply bool) (host.ByOthers, error) {
	var f finding
	s := sampleOf(packet, out, reply)
	mesh := p.observed.meshInterface().name
	s.tunnel = mesh != "" && s.iif != mesh && s.oif != mesh
	err := p.packets.run(ctx, func() error {
		e, err := p.packets.newEvaluator(ctx)
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
func (i *informer) markOf(ctx context.Context, packet host.Packet) (uint32, error) {
	if !packet.Src.IsValid() {
		return 0, nil
	}
	e, err := i.newEvaluator(ctx)
	if err != nil {
		return 0, err
	}
	return e.markOf(sampleOf(packet, "", false)), ctx.Err()
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
