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
	// closeLimit bounds what closes: it is done also when the caller's context has
	// ended.
	closeLimit = 10 * time.Second
	// graceLimit is how long a caller waits after the end of its context for a call
	// that stops by itself and closes.
	graceLimit = 2 * time.Second
)

// errHangs is the error of a call that was left behind while it hangs, and of one
// that can't begin because of it.
var errHung = errors.New("the kernel or the disk doesn't answer")

// worker runs calls one after the other on a thread in one network namespace. A
// caller waits no longer than its context: most of netlink works inside sendmsg(2),
// where a kernel that waits for another program's lock can't be interrupted, and so
// does a frozen disk.
type worker struct {
	jobs  chan job
	quit  chan struct{}
	stop  func()        // ends the worker when it has nothing to do
	grace time.Duration // graceLimit, except in tests
	step  atomic.Value  // string: what is being done
}

type job struct {
	do        func() error
	done      chan result
	abandoned chan struct{} // closed when the caller has gone
}

type result struct {
	err      error
	panicked any
}

// newWorker makes a worker in the network namespace of the calling thread.
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

// enter brings the calling goroutine into a network namespace, unless its thread is
// there. A thread that was brought elsewhere ends with its goroutine.
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

// run hands a panic on to the caller, on whose goroutine it belongs.
func (j job) run() (o result) {
	defer func() {
		if v := recover(); v != nil {
			o.panicked = v
		}
	}()
	return result{err: j.do()}
}

// run has do done and returns its error. When ctx ends it waits for graceLimit and
// then leaves the call behind; the next one begins when that has ended.
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

func (o result) unpack() error {
	if o.panicked != nil {
		panic(o.panicked)
	}
	return o.err
}

func (w *worker) hung(ctx context.Context, what string) error {
	step, _ := w.step.Load().(string)
	if step == "" {
		step = "look at the host"
	}
	return &host.StepError{
		Step: step, Err: fmt.Errorf("%s%w: %w", what, errHung, context.Cause(ctx)),
		Hint: "see the kernel's log (dmesg); it may be that a disk is frozen or another program holds a lock of the kernel's",
	}
}

// run does a call of the daemon's on the worker, with the end of ctx as the
// sockets' deadline.
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

// ask is run for what has an answer.
func ask[T any](ctx context.Context, p *Backend, do func() (T, error)) (T, error) {
	var answer T
	err := p.run(ctx, func() (err error) {
		answer, err = do()
		return err
	})
	if errors.Is(err, errHung) {
		var none T // a call that was left behind may still write its answer
		return none, err
	}
	return answer, err
}

// bind makes ctx end what waits at the sockets, until unbind is called.
func (p *Backend) bind(ctx context.Context) {
	end, bounded := ctx.Deadline()
	conns := []interface{ SetDeadline(time.Time) error }{p.filter.sock, p.filter.change.wire, p.routes, p.ports.diag, p.flows.dump}
	// They have no deadline before ctx has ended: an exchange that was given up is
	// known by that.
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
			p.outOfSync = true // ctx has ended, and may be at the sockets only now
			return
		}
		for _, c := range conns {
			_ = c.SetDeadline(time.Time{})
		}
	}
}

// socketLimit bounds one answer of the kernel where no context does.
const socketLimit = time.Minute

// closing does what closes, also after ctx has ended.
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

// reopen makes the sockets of nftables and of routes anew where an exchange was
// given up: an answer that comes late would be taken for the next one's. (nl leaves
// out answers to other questions by itself.) Whether a transaction that was given up
// has been done isn't known.
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
