package api

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
)

// TestDenialsAreBounded has 1,100 users send refused requests for a day: the number of events
// is bounded, and every request counts in one of them.
func TestDenialsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDenials()
		var sums []events.Event
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- d.run(ctx, func(e events.Event) { sums = append(sums, e) }) }()
		told, asked := 0, 0
		flood := func() {
			for uid := range uint32(1100) {
				for range 3 {
					asked++
					if d.shouldRecord(denial{uid, toRead}, time.Now()) {
						told++
					}
				}
			}
		}
		flood()
		if told != denialBurst {
			t.Errorf("%d events at once, want %d", told, denialBurst)
		}
		synctest.Wait()
		if len(sums) != 0 {
			t.Errorf("a sum is recorded at once: %v", sums)
		}
		const day = 24 * time.Hour
		for start := time.Now(); time.Since(start) < day; time.Sleep(2 * time.Minute) {
			flood()
		}
		time.Sleep(2 * denialInterval)
		synctest.Wait()
		if most := denialBurst + int(day/denialInterval) + 3; told+len(sums) > most {
			t.Errorf("%d events in a day, want at most %d", told+len(sums), most)
		}
		summed := 0
		for _, e := range sums {
			n := 0
			if _, err := fmt.Sscanf(e.Message, "%d more requests were refused, of 1024 users or more", &n); err != nil || e.Kind != events.Denied {
				t.Fatalf("%+v: %v", e, err)
			}
			summed += n
		}
		if told+summed != asked {
			t.Errorf("%d requests recorded by themselves and %d in sums, want %d in total", told, summed, asked)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestDenialsOfOneUser has one user send refused requests again and again: one event per
// interval and right names the user, and a sum gives the number of the other requests.
func TestDenialsOfOneUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDenials()
		var sums []string
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- d.run(ctx, func(e events.Event) { sums = append(sums, e.Message) }) }()
		told := 0
		for range 6 {
			for _, needs := range []right{toRead, toChange} {
				if d.shouldRecord(denial{7, needs}, time.Now()) {
					told++
				}
			}
		}
		time.Sleep(denialGather)
		synctest.Wait()
		if told != 2 || len(sums) != 1 || sums[0] != "10 more requests of user 7 were refused" {
			t.Errorf("%d events, then the sums %q", told, sums)
		}
		time.Sleep(denialInterval)
		if !d.shouldRecord(denial{7, toRead}, time.Now()) {
			t.Error("an interval later a refusal of the user isn't recorded")
		}
		cancel()
		<-ended
	})
}
