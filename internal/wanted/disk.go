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

// disk writes the files of the state directory, one after the other, in a goroutine
// that exists while there is something to write: a disk may be full, and it may not
// answer at all (a frozen file system, a server that is away). Only a caller that
// chose to wait for it does, and for as long as it chose.
type disk struct {
	store store
	// wanted returns what is to be on disk, and saved hears of what was saved.
	wanted func() *Document
	saved  func(*Document)
	record func(events.Event)
	limit  time.Duration // after which a disk that doesn't answer is a problem

	mu      sync.Mutex
	queue   []*Job
	running bool
	// kept is the document that is on disk, whole and synced; nil where that isn't known.
	// placed is the one that took the place of the one before, synced or not.
	kept, placed *Document
	// failure is why the last attempt to save what is wanted failed, and since when
	// something else than what is wanted is on disk; zero while it isn't.
	failure error
	since   time.Time
	told    bool  // an event said so
	mark    error // why the clock's mark couldn't be written
}

// Job is something to write. err is to be read when done is closed.
type Job struct {
	name string
	run  func() error
	done chan struct{}
	err  error
}

// errUnsynced is in the chain of the store's error when the document was replaced, but
// the folder couldn't be synced: whether the new one outlasts a loss of power isn't
// known.
var errUnsynced = errors.New("whether it outlasts a loss of power isn't known")

// Done is closed when the job has run.
func (j *Job) Done() <-chan struct{} { return j.done }

// Err returns what a job that is done came to.
func (j *Job) Err() error { return j.err }

// submit has run called. A job of that name that hasn't begun yet stands for the new
// one, too; a job without a name stands for itself alone.
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

// work does what is queued, until nothing is.
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

// forget takes a job out of the queue that its caller gave up; one that runs goes on.
func (d *disk) forget(j *Job) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queue = slices.DeleteFunc(d.queue, func(q *Job) bool { return q == j })
}

// wait waits for a job, and returns its error, or that the disk didn't answer while the
// caller waited.
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
		return errors.New("it isn't known yet whether it is saved: the caller left, or the helper is stopping")
	}
	return fmt.Errorf("the disk of %q doesn't answer", d.store.dir)
}

// saveWanted has what is wanted then saved.
func (d *disk) saveWanted() *Job {
	return d.submit("wanted", func() error {
		doc := d.wanted()
		if d.holds(doc) {
			return nil
		}
		return d.note(doc, d.store.save(context.Background(), doc), true)
	})
}

// saveAhead saves a document that isn't wanted until it is saved, where base is still
// wanted when its turn comes: what was put in force since may be on disk already, and
// said to be, and must not be replaced by a document without it (errOvertaken). An error
// that isn't errUnsynced says that the one before is still there, or will be again.
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

// note keeps what an attempt to save came to, and returns the error: of a document that
// is in its place already and couldn't be written once more, with errUnsynced.
func (d *disk) note(doc *Document, err error, wanted bool) error {
	d.mu.Lock()
	switch {
	case err == nil:
		d.kept, d.placed = doc, doc
		d.mark = nil // the document has the time, too
	case errors.Is(err, errUnsynced):
		d.kept, d.placed = nil, doc
	case d.placed == doc:
		err = unsyncedIf(true, err)
	}
	if wanted {
		d.failure = err
	}
	d.mu.Unlock()
	if err == nil {
		d.saved(doc)
	}
	d.tell()
	return err
}

// saveMark has the clock's mark saved.
func (d *disk) saveMark(at time.Time, c *clock) {
	d.submit("mark", func() error {
		err := d.store.writeMark(at)
		if err == nil {
			c.keep(at)
		}
		d.mu.Lock()
		d.mark = err
		d.mu.Unlock()
		d.tell()
		return err
	})
}

// holds reports whether doc is on disk.
func (d *disk) holds(doc *Document) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kept == doc
}

// late notes that a caller gave up to wait until what is wanted was saved.
func (d *disk) late(err error) {
	d.mu.Lock()
	if d.failure == nil && d.kept != d.wanted() {
		d.failure = err
	}
	d.mu.Unlock()
	d.tell()
}

// problem returns what is wrong with what is on disk: what is wanted isn't there, and
// not only because it is being saved just now.
func (d *disk) problem() (api.Problem, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.problemLocked()
}

// problemLocked is problem. d.mu is held.
func (d *disk) problemLocked() (api.Problem, bool) {
	if d.kept == d.wanted() {
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

// hint says what to do about a disk that takes nothing.
func (d *disk) hint() string {
	return fmt.Sprintf("make room or make %q writable; saving is tried again, and at once when the command is repeated", d.store.dir)
}

// notSaved says what holds although it couldn't be saved.
func notSaved(cause error) string {
	if errors.Is(cause, errUnsynced) {
		return fmt.Sprintf("in force now, and saved, but %v", cause)
	}
	return fmt.Sprintf("in force now, but not saved: after a restart it is back: %v", cause)
}

// tell notes since when what is wanted isn't on disk, and records once that it couldn't be
// saved, and once that it is again, however often it is tried in between.
func (d *disk) tell() {
	d.mu.Lock()
	switch {
	case d.kept == d.wanted():
		d.since, d.failure = time.Time{}, nil
	case d.since.IsZero():
		d.since = time.Now()
	}
	p, bad := d.problemLocked()
	was := d.told
	d.told = bad
	d.mu.Unlock()
	switch {
	case bad && !was:
		d.record(events.Event{Kind: events.Problem, Message: p.Step + ": " + p.Message})
	case was && !bad:
		d.record(events.Event{Kind: events.Repair, Message: "the wanted state is saved"})
	}
}
