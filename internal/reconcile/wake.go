package reconcile

import "time"

// A sleepWatch finds that the host slept. Neither kernel tells a daemon so in a way that
// works everywhere (IOKit would need cgo, and a container sees no logind), but during sleep
// the wall clock runs on, and Go's monotonic clock stands still: it is CLOCK_MONOTONIC on
// Linux and mach_absolute_time on macOS.
type sleepWatch struct {
	last time.Time // with its monotonic part
	wall time.Time
}

// minSleep is the shortest sleep that is noticed.
const minSleep = 5 * time.Second

// slept returns for how long the host slept since the last call, or 0. A wall clock that was
// set forward looks the same, and costs one needless rebind.
func (w *sleepWatch) slept(now, wall time.Time) time.Duration {
	was := *w
	w.last, w.wall = now, wall.Round(0)
	if was.last.IsZero() {
		return 0
	}
	if d := w.wall.Sub(was.wall) - now.Sub(was.last); d > minSleep {
		return d
	}
	return 0
}
