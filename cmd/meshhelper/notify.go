package main

import (
	"context"
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/systemd"
)

// announce notifies the service manager (sd_notify(3)) when the helper is ready, of its
// state, that its loop is alive, and that it ends. A sign of life comes with the rounds of
// the loop, so that a loop that hangs gives none and the watchdog restarts the helper. There
// is none before the helper is ready: TimeoutStartSec bounds the start.
func (o *runOptions) announce(ctx context.Context, d *daemon.Daemon, n *systemd.Notifier) error {
	if n == nil {
		return nil
	}
	warned := false // a failure to notify is logged once, and is no reason to end
	tell := func(lines ...string) {
		if err := n.Notify(lines...); err != nil && !warned {
			warned = true
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
		// A tenth of the watchdog's time keeps a burst of rounds from filling the manager's
		// socket, and is far more often than it needs.
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

// checkWatchdog refuses a watchdog's time so short that it would kill a healthy helper,
// whose rounds come once per tick.
func (o *runOptions) checkWatchdog(n *systemd.Notifier) error {
	if limit := n.Watchdog(); limit > 0 && limit < 2*o.tick {
		return fmt.Errorf("the watchdog ends the helper after %v, but it checks the host only every %v: increase WatchdogSec or decrease --tick", limit, o.tick)
	}
	return nil
}
