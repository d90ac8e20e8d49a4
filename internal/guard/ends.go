package guard

import (
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow"
)

// endClock tells the time that grants end by: the later of a clock that can be set
// and of what a monotonic one makes of the time when the grants came into force. So a
// grant ends at the earlier of both. A clock that is set back gains nothing; and the
// monotonic clock, which on Linux and macOS stands still while the host sleeps
// (CLOCK_MONOTONIC in clock_gettime(2); mach_absolute_time), makes a grant no longer.
type endClock struct {
	wall   func() time.Time
	passed func() time.Duration // monotonic

	mu   sync.Mutex
	from time.Time // what now was
	at   time.Duration
}

// init sets the clocks. mono is a test's instead of the monotonic one.
func (c *endClock) init(wall, mono func() time.Time) {
	if mono == nil {
		mono = time.Now
	}
	if wall == nil {
		wall = time.Now
	}
	start := mono()
	c.passed = func() time.Duration { return mono().Sub(start) }
	// Without its monotonic part, by which Go would compare otherwise.
	c.wall = func() time.Time { return wall().Round(0) }
}

// begin is called before grants come into force. Where no grant was to end before,
// the time is what the settable clock says now, also if that is earlier than before.
func (c *endClock) begin(timed bool) {
	if timed {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.from, c.at = c.wall(), c.passed()
}

// now returns the time.
func (c *endClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	passed := c.passed()
	now := c.from.Add(passed - c.at)
	if wall := c.wall(); wall.After(now) {
		now = wall
	}
	c.from, c.at = now, passed
	return now
}

// begin begins a batch: it takes d.batch for reading, which the caller gives back,
// and returns the view to judge by, which holds nothing that has ended. Nil lets
// nothing pass. The clock is read for grants that are to end only.
func (d *Device) begin() *flow.View {
	for {
		d.batch.RLock()
		v := d.view.Load()
		if v == nil || !d.isOver(v) {
			return v
		}
		d.batch.RUnlock()
		d.end(v)
	}
}

// isOver reports whether a grant has ended that v holds.
func (d *Device) isOver(v *flow.View) bool {
	end := v.Ruleset().Expires()
	return !end.IsZero() && !d.clock.now().Before(end)
}

// end puts in force what is left of v, unless something else is in force already.
func (d *Device) end(v *flow.View) {
	d.setting.Lock()
	defer d.setting.Unlock()
	if d.view.Load() == v {
		d.force(v.Ruleset().At(d.clock.now()))
	}
}
