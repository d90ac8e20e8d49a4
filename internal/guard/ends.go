package guard

import (
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow"
)

// endClock tells the time by which grants end: the later of the wall clock and of the time at
// which the grants came into force advanced by the monotonic clock. So setting the wall clock
// back doesn't prolong a grant, and neither does sleep, during which the monotonic clock stands
// still on Linux and macOS (CLOCK_MONOTONIC in clock_gettime(2); mach_absolute_time).
type endClock struct {
	wall   func() time.Time
	passed func() time.Duration // monotonic, since init

	mu   sync.Mutex
	from time.Time     // the last answer of now
	at   time.Duration // passed at that moment
}

// init sets the clocks; nil is the system's. Tests replace the monotonic one by mono.
func (c *endClock) init(wall, mono func() time.Time) {
	if mono == nil {
		mono = time.Now
	}
	if wall == nil {
		wall = time.Now
	}
	start := mono()
	c.passed = func() time.Duration { return mono().Sub(start) }
	// Round strips the monotonic part, which time.After would compare instead.
	c.wall = func() time.Time { return wall().Round(0) }
}

// begin is called before grants come into force. timed says that a grant with an end was in
// force until now. If none was, the clock starts again from the wall clock, even if that is
// earlier than the last answer.
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

// begin begins a batch of packets. It read-locks d.batch, which the caller unlocks, and returns
// the view to judge by, in which no grant has ended; a nil view passes nothing. It reads the
// clock only if a grant has an end, to keep the usual case cheap.
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

// isOver reports whether a grant of v has ended.
func (d *Device) isOver(v *flow.View) bool {
	end := v.Ruleset().Expires()
	return !end.IsZero() && !d.clock.now().Before(end)
}

// end replaces v by a view without the grants that have ended, unless another view has replaced
// it already.
func (d *Device) end(v *flow.View) {
	d.setting.Lock()
	defer d.setting.Unlock()
	if d.view.Load() == v {
		d.force(v.Ruleset().At(d.clock.now()))
	}
}
