package main

import (
	"context"
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/systemd"
)

// announce tells the service manager when the helper is ready, that its loop turns, and
// that it ends. The loop turns about as often as it looks at the host, and each turn is
// one sign of life: a loop that hangs gives none.
func (o *runOptions) announce(ctx context.Context, d *daemon.Daemon, n *systemd.Notifier) error {
	if n == nil {
		return nil
	}
	told := false // of a failure to tell, which is no reason to end
	tell := func(lines ...string) {
		if err := n.Tell(lines...); err != nil && !told {
			told = true
			o.log.Warn(err.Error())
		}
	}
	ready, before := false, ""
	var last time.Time
	d.EachRound(ctx, func(state string) {
		var lines []string
		if state != api.Starting && !ready {
			ready = true
			lines = append(lines, systemd.Ready)
		}
		if state != before {
			before = state
			lines = append(lines, "STATUS="+state)
		}
		// A burst of rounds needn't fill the manager's queue.
		if now := time.Now(); n.Watchdog() > 0 && state != api.Starting && now.Sub(last) >= n.Watchdog()/10 {
			last = now
			lines = append(lines, systemd.Alive)
		}
		if lines != nil && ctx.Err() == nil {
			tell(lines...)
		}
	})
	tell(systemd.Stopping)
	return nil
}

// checkWatchdog refuses a watchdog's time that a helper that is well wouldn't keep.
func (o *runOptions) checkWatchdog(n *systemd.Notifier) error {
	if limit := n.Watchdog(); limit > 0 && limit < 2*o.tick {
		return fmt.Errorf("the watchdog ends the helper after %v, and it looks at the host each %v: give WatchdogSec more, or --tick less", limit, o.tick)
	}
	return nil
}
