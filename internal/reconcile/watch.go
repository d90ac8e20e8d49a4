package reconcile

import (
	"context"
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/retry"
)

// watch signals the loop after each change of the host, until ctx ends. A watcher that fails is
// started again after growing pauses, which begin anew after one that worked for longer than
// the longest pause. Meanwhile the tick finds what the watcher would have reported.
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

// signal sends to c, which has room for one, unless a signal already waits there.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
