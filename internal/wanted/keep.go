package wanted

import (
	"context"
	"time"

	"github.com/meshhelper/meshhelper/internal/retry"
)

// Run has permissions end in time, whatever else waits for the host, and has saved what
// isn't, until ctx ends. It never waits for the disk itself. After what ended it calls
// ended, which must not wait for anything.
func (s *State) Run(ctx context.Context, ended func()) error {
	k := keeper{s: s, ended: ended, again: retry.New()}
	for {
		wait := k.look()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		case <-s.timed:
		}
	}
}

// keeper is what Keep remembers.
type keeper struct {
	s      *State
	ended  func()
	again  retry.Backoff // between attempts to save
	due    time.Time     // when to save again
	marked time.Time     // when the mark was written last, or tried
}

// look does what is due, and returns when to look again.
func (k *keeper) look() time.Duration {
	s := k.s
	before := s.doc.Load()
	doc := s.Expire()
	if doc.Generation != before.Generation {
		k.ended()
	}
	now := time.Now()
	k.save(doc, now)
	if doc.timed() && s.clock.unsaved() >= clockInterval && now.Sub(k.marked) >= clockInterval {
		k.marked = now
		s.disk.saveMark(s.clock.Now(), s.clock)
	}
	wait := s.opts.Tick
	if end, ok := doc.nextEnd(); ok {
		if left := end.Sub(s.clock.Now()); left > 0 {
			wait = min(wait, left)
		}
	}
	return wait
}

// save tries again to save what is wanted, with growing pauses.
func (k *keeper) save(doc *Document, now time.Time) {
	if k.s.disk.holds(doc) {
		k.s.disk.tell() // an allow may have saved what a deny couldn't
		k.again.Reset()
		k.due = time.Time{}
		return
	}
	k.s.disk.tell()
	if now.Before(k.due) {
		return
	}
	if !k.due.IsZero() { // the first attempt is that of the change
		k.s.disk.saveWanted()
	}
	k.due = now.Add(k.again.Next())
}

// Flush waits until what isn't on disk is, and all that was queued is done, or ctx ends.
func (s *State) Flush(ctx context.Context) {
	if j := s.saveUnlessKept(); j != nil {
		_ = s.disk.wait(ctx, j) // it was said while the helper ran
	}
	_ = s.disk.wait(ctx, s.disk.submit("", func() error { return nil })) // the last in the queue
}
