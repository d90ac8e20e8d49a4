package daemon

import (
	"context"
	"time"
)

// keep has permissions end in time, whatever the loop waits for, and has saved what
// isn't: it never waits for the disk itself.
func (d *Daemon) keep(ctx context.Context) error {
	k := keeper{d: d, again: newBackoff()}
	for {
		wait := k.look()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		case <-d.timed:
		}
	}
}

// keeper is what keep remembers.
type keeper struct {
	d        *Daemon
	again    backoff   // between attempts to save
	due      time.Time // when to save again
	marked   time.Time // when the mark was written last, or tried
	learning time.Time // when what was learned was last put in the queue to be saved
}

// look does what is due, and returns when to look again.
func (k *keeper) look() time.Duration {
	d := k.d
	before := d.wanted.Load()
	doc := d.expire()
	if doc.Generation != before.Generation {
		poke(d.wake)
	}
	now := time.Now()
	k.save(doc, now)
	if doc.timed() && d.clock.unsaved() >= clockInterval && now.Sub(k.marked) >= clockInterval {
		k.marked = now
		d.disk.saveMark(d.clock.now(), d.clock)
	}
	if now.Sub(k.learning) >= learnInterval && d.learned.Changed() {
		k.learning = now
		d.saveLearned()
	}
	wait := d.opts.Tick
	if end, ok := doc.nextEnd(); ok {
		if left := end.Sub(d.clock.now()); left > 0 {
			wait = min(wait, left)
		}
	}
	return wait
}

// save tries again to save what is wanted, with growing pauses.
func (k *keeper) save(doc *document, now time.Time) {
	if k.d.disk.holds(doc) {
		k.d.disk.tell() // an allow may have saved what a deny couldn't
		k.again.reset()
		k.due = time.Time{}
		return
	}
	k.d.disk.tell()
	if now.Before(k.due) {
		return
	}
	if !k.due.IsZero() { // the first attempt is that of the change
		k.d.disk.saveWanted()
	}
	k.due = now.Add(k.again.next())
}

// finish waits, for a moment, until what isn't on disk is.
func (d *Daemon) finish() {
	limit, cancel := context.WithTimeout(context.Background(), flushLimit)
	defer cancel()
	if j := d.saveUnlessKept(); j != nil {
		_ = d.disk.wait(limit, j) // it was said while the helper ran
	}
	if d.learned.Changed() {
		d.saveLearned()
	}
	_ = d.disk.wait(limit, d.disk.submit("", func() error { return nil })) // the last in the queue
	d.journal.Flush(limit.Done())
}
