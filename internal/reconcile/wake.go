package reconcile

import "time"

// sleepWatch detects that the host slept. Neither kernel reports it to a daemon in a way that
// works everywhere (IOKit would need cgo, and a container has no access to logind). But during
// sleep the wall clock runs on, while Go's monotonic clock stands still: it is CLOCK_MONOTONIC
// on Linux and mach_absolute_time on macOS. The zero value is ready for use.
type sleepWatch struct {
	last time.Time // of the last call, with its monotonic part
	wall time.Time // the wall clock then, without one
}

// minSleep is the shortest sleep that is detected. It is longer than a time daemon's usual
// corrections, and a NAT keeps its UDP mappings for longer (RFC 4787 4.3: two minutes or more).
const minSleep = 5 * time.Second

// slept returns for how long the host slept since the last call, or 0. now has a monotonic part,
// wall is the wall clock. One that was set forward looks like sleep, and causes a needless rebind.
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
