package reconcile

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/retry"
)

// failingObserver is an observer whose Watch fails each time, after the duration in lasts.
type failingObserver struct {
	host.Observer
	lasts func(call int) time.Duration
	began []time.Time
}

func (f *failingObserver) Watch(ctx context.Context, changed func()) error {
	f.began = append(f.began, time.Now())
	if !retry.Sleep(ctx, f.lasts(len(f.began))) {
		return ctx.Err()
	}
	return errors.New("watch host: socket failed")
}

// TestWatchersRestart: a watcher that fails is started again each time, after growing pauses,
// which begin anew after one that worked for long.
func TestWatchersRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &failingObserver{lasts: func(call int) time.Duration {
			if call == 20 {
				return time.Hour
			}
			return 0
		}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		l := &Loop{o: Options{Host: host.Host{Observer: f}, Record: func(events.Event) {}}, moved: make(chan struct{}, 1)}
		go func() { done <- l.watch(ctx) }()
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(f.began) < 200 {
			t.Fatalf("started %d times in three hours", len(f.began))
		}
		pause := func(i int) time.Duration { return f.began[i].Sub(f.began[i-1]) }
		b := retry.New()
		if first, later, after := pause(1), pause(18), pause(20)-time.Hour; first != b.Min || later != b.Max || after != b.Min {
			t.Errorf("pauses %v, %v, and %v after it worked for an hour; want %v, %v, %v", first, later, after, b.Min, b.Max, b.Min)
		}
	})
}
