package api

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/events"
)

// The rate of events about refused requests: some at once, then one each ten minutes,
// so that it takes a week to push other events out of the journal that way.
const (
	denialBurst    = 8
	denialInterval = 10 * time.Minute
	// denialGather is how long refusals that aren't told are gathered at least.
	denialGather = time.Minute
	// maxDenials bounds the users that are remembered.
	maxDenials = 1024
)

// denial is what is told once per interval.
type denial struct {
	uid   uint32
	needs right
}

// denials keeps local users who ask again and again, by however many user ids, from
// filling the journal: each is told once in an interval, all together with a bounded
// rate, and the rest as a number.
type denials struct {
	wake chan struct{} // something is untold

	mu     sync.Mutex
	last   map[denial]time.Time
	tokens int       // of the events that may be recorded now
	filled time.Time // when the last token was added
	untold int
	users  map[uint32]bool // of the untold
}

func newDenials() *denials {
	return &denials{wake: make(chan struct{}, 1), last: map[denial]time.Time{}, tokens: denialBurst, users: map[uint32]bool{}}
}

// worthTelling reports whether a refusal is to be recorded by itself, and else counts
// it.
func (d *denials) worthTelling(is denial, now time.Time) bool {
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
	d.untold++
	if len(d.users) < maxDenials {
		d.users[is.uid] = true
	}
	select {
	case d.wake <- struct{}{}:
	default:
	}
	return false
}

// take uses up one event of the rate, if there is one.
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

// sum returns what stands for all that wasn't told, or "" where it isn't time for
// another event yet, or there is nothing to tell (done).
func (d *denials) sum(now time.Time) (text string, done bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.untold == 0 {
		return "", true
	}
	if !d.take(now) {
		return "", false
	}
	return d.rest(), true
}

func (d *denials) rest() string {
	text := fmt.Sprintf("%d more requests were refused, of %d users", d.untold, len(d.users))
	switch {
	case len(d.users) == 1:
		for uid := range d.users {
			text = fmt.Sprintf("%d more requests of user %d were refused", d.untold, uid)
		}
	case len(d.users) == maxDenials:
		text = fmt.Sprintf("%d more requests were refused, of %d users or more", d.untold, len(d.users))
	}
	d.untold = 0
	clear(d.users)
	return text
}

// run records the sums until ctx ends.
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
