package linux

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/nlconn"
)

const (
	// closeLimit bounds the steps that close, which run even after the caller's context
	// has ended.
	closeLimit = 10 * time.Second
	// graceLimit is how long a caller waits, after its context has ended, for the call to
	// stop and close by itself.
	graceLimit = 2 * time.Second
)

// errHung is the error of a call that hangs and was abandoned, and of one that can't
// start because of it.
var errHung = errors.New("the kernel or the disk doesn't respond")

// worker runs calls one after the other on a thread in one network namespace. A caller
// waits no longer than its context lasts. That takes a thread of its own, because most of
// netlink runs inside sendmsg(2), which can't be interrupted while the kernel waits for a
// lock that another program holds, and neither can a write to a frozen disk.
type worker struct {
	jobs  chan job
	quit  chan struct{}
	stop  func()        // ends the worker after the current job
	grace time.Duration // graceLimit, except in tests
	step  atomic.Value  // string: name of the running step, for the error of a call that hangs
}

// job is one call.
type job struct {
	do        func() error
	done      chan result
	abandoned chan struct{} // closed when the caller no longer waits
}

// result is how a call ended.
type result struct {
	err      error
	panicked any
}

// newWorker returns a worker in the network namespace of the calling thread.
func newWorker() (*worker, error) {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("find the network namespace: %w", err)
	}
	w := &worker{jobs: make(chan job), quit: make(chan struct{}), grace: graceLimit}
	w.stop = sync.OnceFunc(func() { close(w.quit) })
	w.step.Store("")
	entered := make(chan error)
	go func() {
		err := enter(ns)
		entered <- errors.Join(err, ns.Close())
		if err == nil {
			w.work()
		}
	}()
	if err := <-entered; err != nil {
		return nil, fmt.Errorf("enter the network namespace: %w", err)
	}
	return w, nil
}

// enter moves the calling goroutine's thread into a network namespace, unless it is there
// already. A thread that was moved ends with its goroutine.
func enter(ns *os.File) error {
	runtime.LockOSThread()
	want, err := ns.Stat()
	if err != nil {
		return err
	}
	have, err := os.Stat("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	if os.SameFile(want, have) {
		runtime.UnlockOSThread()
		return nil
	}
	return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
}

// work runs jobs until the worker is stopped.
func (w *worker) work() {
	for {
		select {
		case j := <-w.jobs:
			o := j.run()
			select {
			case j.done <- o:
			case <-j.abandoned:
				if o.panicked != nil {
					panic(o.panicked)
				}
			}
		case <-w.quit:
			return
		}
	}
}

// run runs the job and recovers a panic, which is raised again on the caller's goroutine.
func (j job) run() (o result) {
	defer func() {
		if v := recover(); v != nil {
			o.panicked = v
		}
	}()
	return result{err: j.do()}
}

// run runs do and returns its error. After ctx has ended it waits for graceLimit and then
// abandons the call; the next one starts when that one has returned.
func (w *worker) run(ctx context.Context, do func() error) error {
	j := job{do: do, done: make(chan result), abandoned: make(chan struct{})}
	defer close(j.abandoned)
	select {
	case w.jobs <- j:
	default:
		select {
		case w.jobs <- j:
		case <-ctx.Done():
			return w.hung(ctx, "an earlier call hasn't ended: ")
		}
	}
	select {
	case o := <-j.done:
		return o.unpack()
	case <-ctx.Done():
	}
	grace := time.NewTimer(w.grace)
	defer grace.Stop()
	select {
	case o := <-j.done:
		return o.unpack()
	case <-grace.C:
		return w.hung(ctx, "")
	}
}

// unpack returns the error, or panics as the call did.
func (o result) unpack() error {
	if o.panicked != nil {
		panic(o.panicked)
	}
	return o.err
}

// hung returns the error for an abandoned call, with the step in which it hangs.
func (w *worker) hung(ctx context.Context, what string) error {
	step, _ := w.step.Load().(string)
	if step == "" {
		step = "observe the host"
	}
	return &host.StepError{
		Step: step, Err: fmt.Errorf("%s%w: %w", what, errHung, context.Cause(ctx)),
		Hint: "see the kernel's log (dmesg): a disk may be frozen, or another program may hold a lock in the kernel",
	}
}

// run runs a method of the backend on the worker. The sockets' deadline is the end of
// ctx.
func (p *Backend) run(ctx context.Context, do func() error) error {
	return p.worker.run(ctx, func() error {
		defer p.worker.step.Store("")
		if err := p.reopen(); err != nil {
			return err
		}
		p.bind(ctx)
		defer func() { p.unbind() }()
		err := do()
		if ctx.Err() != nil {
			p.outOfSync = true
		}
		return err
	})
}

// ask is run for calls that return a value.
func ask[T any](ctx context.Context, p *Backend, do func() (T, error)) (T, error) {
	var answer T
	err := p.run(ctx, func() (err error) {
		answer, err = do()
		return err
	})
	if errors.Is(err, errHung) {
		var none T // an abandoned call may still write to answer
		return none, err
	}
	return answer, err
}

// bind makes the end of ctx interrupt reads from the sockets, until unbind is called.
func (p *Backend) bind(ctx context.Context) {
	end, bounded := ctx.Deadline()
	conns := []interface{ SetDeadline(time.Time) error }{p.filter.sock, p.filter.change.wire, p.routes, p.ports.diag, p.flows.dump}
	// They get no deadline before ctx has ended, so an abandoned exchange can be
	// recognized by that.
	for _, c := range conns {
		_ = c.SetDeadline(time.Time{})
	}
	limit := socketLimit
	if bounded {
		limit = min(limit, max(time.Until(end), time.Millisecond))
	}
	_ = p.nl.SetSocketTimeout(limit)
	if p.xfrm != nil {
		_ = p.xfrm.SetSocketTimeout(limit)
	}
	stop := context.AfterFunc(ctx, func() {
		for _, c := range conns {
			_ = c.SetDeadline(time.Unix(1, 0))
		}
	})
	p.unbind = func() {
		p.unbind = func() {}
		if !stop() {
			p.outOfSync = true // ctx has ended, and its function may still be running
			return
		}
		for _, c := range conns {
			_ = c.SetDeadline(time.Time{})
		}
	}
}

// socketLimit bounds the wait for one answer of the kernel if ctx has no deadline.
const socketLimit = time.Minute

// withCloseLimit runs steps that close, even after ctx has ended, with closeLimit as
// their own limit.
func (p *Backend) withCloseLimit(ctx context.Context, do func() error) error {
	p.unbind()
	fresh, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	defer func() { p.unbind() }()
	if ctx.Err() != nil {
		p.outOfSync = true
	}
	if err := p.reopen(); err != nil {
		return errors.Join(err, do())
	}
	p.bind(fresh)
	return do()
}

// reopen replaces the sockets for nftables, routes, conntrack and socket lists after an
// exchange was abandoned, because a late answer would be taken for that to the next
// request. (nl ignores answers to other requests by itself.) It isn't known whether an
// abandoned transaction was committed, so the loaded table counts as unknown.
func (p *Backend) reopen() error {
	if !p.outOfSync {
		return nil
	}
	f, err := openFilter()
	if err != nil {
		return err
	}
	routes, err := dialRoutes()
	if err != nil {
		return errors.Join(err, f.close())
	}
	flows, err := openConntrack()
	if err != nil {
		return errors.Join(err, routes.Close(), f.close())
	}
	diag, err := nlconn.Dial(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return errors.Join(err, flows.close(), routes.Close(), f.close())
	}
	_ = p.filter.close()
	_ = p.routes.Close()
	_ = p.flows.close()
	_ = p.ports.diag.Close()
	*p.filter, p.routes, p.outOfSync = *f, routes, false
	p.flows, p.ports.diag = flows, diag
	return nil
}
