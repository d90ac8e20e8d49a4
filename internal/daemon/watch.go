package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/retry"
)

// watch pokes the loop after each change of the host. A watcher that fails is
// started again; meanwhile the tick finds what it would have reported.
func (d *Daemon) watch(ctx context.Context, o host.Observer) error {
	for wait := retry.New(); ; {
		began := time.Now()
		err := o.Watch(ctx, func() { poke(d.moved) })
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > wait.Max {
			wait.Reset()
		}
		d.journal.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("watch the host: %v", err)})
		if !sleep(ctx, wait.Next()) {
			return nil
		}
		poke(d.moved)
	}
}

// poke wakes the receiver from c, without waiting for it.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// sleep reports whether it slept to the end.
func sleep(ctx context.Context, wait time.Duration) bool {
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
