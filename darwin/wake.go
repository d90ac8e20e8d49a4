package darwin

import (
	"context"
	"time"
)

// A Clock returns the time of day and the time that the machine has been awake
// since some moment.
type Clock func() (wall time.Time, awake time.Duration)

// SystemClock returns this machine's. Go's monotonic clock is macOS's
// mach_absolute_time, which stands still during sleep.
func SystemClock() Clock {
	start := time.Now()
	return func() (time.Time, time.Duration) {
		now := time.Now()
		return now.Round(0), now.Sub(start)
	}
}

// WatchWake calls woke with the time slept, at most every after each wake, until
// ctx ends. Without IOKit, which would need cgo, a daemon isn't told of sleep:
// it is seen as the wall clock's running ahead of the clock that stands still. A
// clock set forward looks the same, and costs one needless refresh. every is
// both how often it looks and the shortest sleep that it sees; 5 s is good.
func WatchWake(ctx context.Context, clock Clock, every time.Duration, woke func(asleep time.Duration)) error {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	wall, awake := clock()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		w, a := clock()
		if asleep := w.Sub(wall) - (a - awake); asleep > every {
			woke(asleep)
		}
		wall, awake = w, a
	}
}
