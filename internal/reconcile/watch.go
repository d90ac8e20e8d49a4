package reconcile

import (
	"context"
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/retry"
)

// watch pokes the loop after each change of the host. A watcher that fails is
// started again; meanwhile the tick finds what it would have reported.
func (l *Loop) watch(ctx context.Context) error {
	for wait := retry.New(); ; {
		began := time.Now()
		err := l.o.Host.Observer.Watch(ctx, l.Moved)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > wait.Max {
			wait.Reset()
		}
		l.o.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("watch the host: %v", err)})
		if !retry.Sleep(ctx, wait.Next()) {
			return nil
		}
		l.Moved()
	}
}

// poke wakes the receiver from c, without waiting for it.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
