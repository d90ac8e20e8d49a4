package api

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
)

// The rate limit of events about refused requests: a token bucket of denialBurst events,
// refilled by one each denialInterval. At this rate it takes a week to push other events out
// of the journal.
const (
	denialBurst    = 8
	denialInterval = 10 * time.Minute
	// denialGather is the least time for which refusals are counted before one event sums
	// them up.
	denialGather = time.Minute
	// maxDenials limits the users that are remembered, as one process may use many uids.
	maxDenials = 1024
)

// denial identifies refusals that count as the same: one event per denialInterval.
type denial struct {
	uid   uint32
	needs right
}

// denials limits the events about refused requests, so that local users can't fill the
// journal by repeating them, under however many uids. A user's refusal is recorded once in
// an interval, all users' together at a bounded rate, and the rest as a number.
type denials struct {
	wake chan struct{} // wakes run: suppressed isn't 0

	mu         sync.Mutex
	last       map[denial]time.Time // when each was last recorded
	tokens     int                  // events that may be recorded now
	filled     time.Time            // when the last token was added
	suppressed int                  // refusals since the last sum that weren't recorded
	users      map[uint32]bool      // of the suppressed refusals, at most maxDenials
}

// newDenials returns denials with a full bucket.
func newDenials() *denials {
	return &denials{wake: make(chan struct{}, 1), last: map[denial]time.Time{}, tokens: denialBurst, users: map[uint32]bool{}}
}

// shouldRecord reports whether a refusal should be recorded by an event of its own.
// Otherwise it counts it for the next sum.
func (d *denials) shouldRecord(is denial, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	last, known := d.last[is]
	if !(known && now.Sub(last) < denialInterval) && d.take(now) {
		if len(d.last) >= maxDenials {
			clear(d.last)
		}
		d.last[is] = now
		return true
	}
	d.suppressed++
	if len(d.users) < maxDenials {
		d.users[is.uid] = true
	}
	select {
	case d.wake <- struct{}{}:
	default:
	}
	return false
}

// take takes a token, and reports whether there was one. The caller holds d.mu.
func (d *denials) take(now time.Time) bool {
	if d.tokens == denialBurst {
		d.filled = now
	}
	for d.tokens < denialBurst && now.Sub(d.filled) >= denialInterval {
		d.tokens++
		d.filled = d.filled.Add(denialInterval)
	}
	if d.tokens == 0 {
		return false
	}
	d.tokens--
	return true
}

// sum returns the message for all suppressed refusals. It is empty if none were suppressed,
// with done set, or if no token is left yet.
func (d *denials) sum(now time.Time) (text string, done bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.suppressed == 0 {
		return "", true
	}
	if !d.take(now) {
		return "", false
	}
	return d.rest(), true
}

// rest returns the message of sum and resets the count. The caller holds d.mu.
func (d *denials) rest() string {
	text := fmt.Sprintf("%d more requests were refused, of %d users", d.suppressed, len(d.users))
	switch {
	case len(d.users) == 1:
		for uid := range d.users {
			text = fmt.Sprintf("%d more requests of user %d were refused", d.suppressed, uid)
		}
	case len(d.users) == maxDenials:
		text = fmt.Sprintf("%d more requests were refused, of %d users or more", d.suppressed, len(d.users))
	}
	d.suppressed = 0
	clear(d.users)
	return text
}

// run records sums of suppressed refusals until ctx ends.
func (d *denials) run(ctx context.Context, record func(events.Event)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.wake:
		}
		for done := false; !done; {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(denialGather):
			}
			var text string
			if text, done = d.sum(time.Now()); text != "" {
				record(events.Event{Kind: events.Denied, Message: text})
			}
		}
	}
}
