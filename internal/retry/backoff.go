// Package retry says how long to wait before the next attempt at what failed.
package retry

import (
	"context"
	"time"
)

// Backoff is a pause that doubles with each attempt, from Min to Max.
type Backoff struct {
	Min, Max time.Duration
	now      time.Duration
}

// New returns the Backoff of the helper's own tasks, from a quarter of a second to half a
// minute.
func New() Backoff { return Backoff{Min: 250 * time.Millisecond, Max: 30 * time.Second} }

// Next returns how long to wait before the next attempt.
func (b *Backoff) Next() time.Duration {
	b.now = min(max(b.Min, 2*b.now), b.Max)
	return b.now
}

// Reset has the next pause be Min again, after an attempt that succeeded.
func (b *Backoff) Reset() { b.now = 0 }

// Sleep waits, and reports whether it did to the end: false means that ctx ended before.
func Sleep(ctx context.Context, wait time.Duration) bool {
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
