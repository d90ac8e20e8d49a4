package daemon

import (
	"sync"
	"time"
)

// clock tells the time that grants end by. While one is pending it is the later
// of the wall clock and of what the monotonic clock makes of its last answer,
// so that a grant ends at the earlier of both: setting the wall clock back gains
// nothing, and sleep, which stops the monotonic clock, counts. It never answers
// less than before, nor than what was saved last.
type clock struct {
	wall func() time.Time

	mu      sync.Mutex
	started time.Time // for its monotonic part only
	elapsed time.Duration
	last    time.Time
	saved   time.Time
	pending bool
}

// newClock returns a clock that isn't behind saved.
func newClock(wall func() time.Time, saved time.Time) *clock {
	return &clock{wall: wall, started: time.Now(), last: saved, saved: saved}
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	elapsed := time.Since(c.started)
	next := c.saved
	if c.pending {
		next = c.last.Add(elapsed - c.elapsed)
	}
	// Round strips the monotonic part, by which Go would compare otherwise.
	if wall := c.wall().Round(0).UTC(); wall.After(next) {
		next = wall
	}
	c.last, c.elapsed = next, elapsed
	return next
}

// keep notes what was saved, and whether a grant is to end by itself. While
// none is, the clock may follow the wall clock back to what was saved.
func (c *clock) keep(saved time.Time, pending bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.saved, c.pending = saved, pending
}
