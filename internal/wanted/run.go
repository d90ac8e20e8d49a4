package wanted

import (
	"context"
	"time"

	"github.com/meshhelper/meshhelper/internal/retry"
)

// Run ends permissions on time and retries failed saves, until ctx ends; it returns nil. It
// waits neither for the host nor for the disk, either of which could delay the end of a
// permission. After it ended one it calls ended, which must not block.
func (s *State) Run(ctx context.Context, ended func()) error {
	k := keeper{s: s, ended: ended, backoff: retry.New()}
	for {
		wait := k.tick()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		case <-s.timed:
		}
	}
}

// keeper is the state of Run, which only its goroutine uses.
type keeper struct {
	s       *State
	ended   func()
	backoff retry.Backoff // pauses between attempts to save
	due     time.Time     // of the next attempt; zero while all is saved
	marked  time.Time     // when Run last tried to write the mark
}

// tick does what is due, and returns how long to wait before the next tick: until the next
// permission ends, and at most Options.Tick.
func (k *keeper) tick() time.Duration {
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
	// The tick notices a wall clock that was set forward: a timer runs on the monotonic clock.
	wait := s.opts.Tick
	if end, ok := doc.nextEnd(); ok {
		if left := end.Sub(s.clock.Now()); left > 0 {
			wait = min(wait, left)
		}
	}
	return wait
}

// save retries a failed save, with growing pauses.
func (k *keeper) save(doc *Document, now time.Time) {
	if k.s.disk.isSaved(doc) {
		k.s.disk.report() // a change saved ahead may have ended the problem
		k.backoff.Reset()
		k.due = time.Time{}
		return
	}
	k.s.disk.report()
	if now.Before(k.due) {
		return
	}
	if !k.due.IsZero() { // the change itself makes the first attempt
		k.s.disk.saveWanted()
	}
	k.due = now.Add(k.backoff.Next())
}

// Flush waits until the wanted state is saved and the queue is empty, or ctx ends. The
// helper calls it before it exits.
func (s *State) Flush(ctx context.Context) {
	if j := s.saveIfNeeded(); j != nil {
		_ = s.disk.wait(ctx, j) // the problem was reported while the helper ran
	}
	_ = s.disk.wait(ctx, s.disk.submit("", func() error { return nil })) // the last in the queue
}
