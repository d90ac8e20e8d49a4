package wanted

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
)

// disk writes the files of the state directory, one job at a time, in a goroutine that
// exists while jobs are queued. A write can block for ever (a frozen file system, a network
// file system whose server is down), so no caller writes itself: it waits for a job, with
// its own time limit.
type disk struct {
	store store
	// wanted returns the document that should be on disk. saved is called with each
	// document that was saved.
	wanted func() *Document
	saved  func(*Document)
	record func(events.Event)
	limit  time.Duration // how long a save may take before it counts as a problem

	mu      sync.Mutex
	queue   []*Job
	running bool // work runs
	// synced is the document that is certainly on disk, or nil if none is. written is the
	// one that state.json was last replaced by, synced or not.
	synced, written *Document
	// failure is why the last attempt to save the wanted document failed, or nil. since is
	// when the disk fell behind the wanted document; zero while it isn't behind.
	failure  error
	since    time.Time
	reported bool  // an event reported the present problem
	mark     error // why the clock's mark couldn't be written
}

// Job is a write that was queued. Jobs with the same name, which isn't empty, are merged
// while they wait.
type Job struct {
	name string
	run  func() error
	done chan struct{}
	err  error // valid once done is closed
}

// errUnsynced is in the chain of the store's error when a file was replaced but the
// directory couldn't be synced: a loss of power may bring the old file back.
var errUnsynced = errors.New("whether it outlasts a loss of power isn't known")

// Done returns a channel that is closed when the job has run.
func (j *Job) Done() <-chan struct{} { return j.done }

// Err returns the error of a job. It may be called once Done's channel is closed.
func (j *Job) Err() error { return j.err }

// submit queues run. If a job of the same name is still waiting, submit returns that one
// and drops run; with an empty name it always queues a new one.
func (d *disk) submit(name string, run func() error) *Job {
	d.mu.Lock()
	defer d.mu.Unlock()
	if i := slices.IndexFunc(d.queue, func(j *Job) bool { return name != "" && j.name == name }); i >= 0 {
		return d.queue[i]
	}
	j := &Job{name: name, run: run, done: make(chan struct{})}
	d.queue = append(d.queue, j)
	if !d.running {
		d.running = true
		go d.work()
	}
	return j
}

// work runs jobs until the queue is empty.
func (d *disk) work() {
	for {
		d.mu.Lock()
		if len(d.queue) == 0 {
			d.running = false
			d.mu.Unlock()
			return
		}
		j := d.queue[0]
		d.queue = slices.Delete(d.queue, 0, 1)
		d.mu.Unlock()
		j.err = j.run()
		close(j.done)
	}
}

// forget removes a job from the queue when its caller gave up. A job that already runs
// isn't interrupted.
func (d *disk) forget(j *Job) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queue = slices.DeleteFunc(d.queue, func(q *Job) bool { return q == j })
}

// wait waits for a job and returns its error. When ctx ends first, the error says that the
// disk doesn't respond, or, after a cancellation, that the outcome isn't known.
func (d *disk) wait(ctx context.Context, j *Job) error {
	select {
	case <-j.done:
		return j.err
	case <-ctx.Done():
	}
	select {
	case <-j.done:
		return j.err
	default:
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return errors.New("it isn't known yet whether it is saved: the client disconnected, or the helper is stopping")
	}
	return fmt.Errorf("the disk of %q doesn't answer", d.store.dir)
}

// saveWanted queues a job that saves the document that is wanted when the job runs.
func (d *disk) saveWanted() *Job {
	return d.submit("wanted", func() error {
		doc := d.wanted()
		if d.isSaved(doc) {
			return nil
		}
		return d.note(doc, d.store.save(context.Background(), doc), true)
	})
}

// saveAhead saves a document before it is published. It fails with errOvertaken if base is
// no longer wanted when the job runs: a revocation that was published since may already be
// on disk and acknowledged, and doc doesn't have it. After any other error without
// errUnsynced in the chain, the document on disk is the previous one, or soon will be.
func (d *disk) saveAhead(ctx context.Context, base, doc *Document) error {
	j := d.submit("", func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if d.wanted() != base {
			return errOvertaken
		}
		return d.note(doc, d.store.save(ctx, doc), false)
	})
	err := d.wait(ctx, j)
	if err != nil {
		d.forget(j)
	}
	return err
}

// note records the result of saving doc, which is the wanted document or one saved ahead,
// and returns err. If doc had already replaced state.json in an earlier attempt, err gets
// errUnsynced: the file has the change even though this attempt failed.
func (d *disk) note(doc *Document, err error, wanted bool) error {
	d.mu.Lock()
	switch {
	case err == nil:
		d.synced, d.written = doc, doc
		d.mark = nil // Document.Saved does what the mark does
	case errors.Is(err, errUnsynced):
		d.synced, d.written = nil, doc
	case d.written == doc:
		err = unsyncedIf(true, err)
	}
	if wanted {
		d.failure = err
	}
	d.mu.Unlock()
	if err == nil {
		d.saved(doc)
	}
	d.report()
	return err
}

// saveMark queues a job that writes the clock's mark.
func (d *disk) saveMark(at time.Time, c *clock) {
	d.submit("mark", func() error {
		err := d.store.writeMark(at)
		if err == nil {
			c.setSaved(at)
		}
		d.mu.Lock()
		d.mark = err
		d.mu.Unlock()
		d.report()
		return err
	})
}

// isSaved reports whether doc is on disk and synced.
func (d *disk) isSaved(doc *Document) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.synced == doc
}

// noteTimeout records that a caller stopped waiting for the wanted document to be saved.
func (d *disk) noteTimeout(err error) {
	d.mu.Lock()
	if d.failure == nil && d.synced != d.wanted() {
		d.failure = err
	}
	d.mu.Unlock()
	d.report()
}

// problem returns the problem of saving, if there is one: the wanted document isn't on disk
// and the last attempt failed or takes longer than limit, or the mark can't be written.
func (d *disk) problem() (api.Problem, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.problemLocked()
}

// problemLocked is problem for a caller that holds d.mu.
func (d *disk) problemLocked() (api.Problem, bool) {
	if d.synced == d.wanted() {
		if d.mark != nil {
			return api.Problem{
				Step: "save the clock's mark", Message: d.mark.Error(),
				Hint: "a clock that is set back while the helper is down may give timed permissions more time",
			}, true
		}
		return api.Problem{}, false
	}
	cause := d.failure
	if cause == nil {
		if d.since.IsZero() || time.Since(d.since) < d.limit {
			return api.Problem{}, false
		}
		cause = fmt.Errorf("the disk of %q doesn't answer", d.store.dir)
	}
	return api.Problem{Step: "save wanted state", Message: notSaved(cause), Hint: d.hint()}, true
}

// hint returns the hint for a disk that can't be written to.
func (d *disk) hint() string {
	return fmt.Sprintf("make room or make %q writable; saving is tried again, and at once when the command is repeated", d.store.dir)
}

// notSaved describes a state that is in force although it couldn't be saved.
func notSaved(cause error) string {
	if errors.Is(cause, errUnsynced) {
		return fmt.Sprintf("in force now, and saved, but %v", cause)
	}
	return fmt.Sprintf("in force now, but not saved: after a restart it is back: %v", cause)
}

// report updates since and failure, and records an event when the problem begins and one
// when it ends, however many attempts fail in between.
func (d *disk) report() {
	d.mu.Lock()
	switch {
	case d.synced == d.wanted():
		d.since, d.failure = time.Time{}, nil
	case d.since.IsZero():
		d.since = time.Now()
	}
	p, bad := d.problemLocked()
	was := d.reported
	d.reported = bad
	d.mu.Unlock()
	switch {
	case bad && !was:
		d.record(events.Event{Kind: events.Problem, Message: p.Step + ": " + p.Message})
	case was && !bad:
		d.record(events.Event{Kind: events.Repair, Message: "the wanted state is saved"})
	}
}
