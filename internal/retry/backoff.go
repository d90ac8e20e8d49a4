// Package retry computes the pauses between the attempts of a task that fails, and waits for
// them. A [Backoff] belongs to one task.
package retry

import (
	"context"
	"time"
)

// Backoff is a pause that doubles with each attempt, from Min to Max. It isn't safe for
// concurrent use.
type Backoff struct {
	Min, Max time.Duration // required: 0 < Min <= Max
	last     time.Duration // the pause that Next returned last; 0 before the first
}

// New returns the Backoff of the helper's own tasks, from a quarter of a second to half a
// minute: short enough that a brief failure goes unnoticed, long enough that a lasting one
// doesn't fill the log.
func New() Backoff { return Backoff{Min: 250 * time.Millisecond, Max: 30 * time.Second} }

// Next returns how long to wait before the next attempt.
func (b *Backoff) Next() time.Duration {
	b.last = min(max(b.Min, 2*b.last), b.Max)
	return b.last
}

// Reset makes the next pause Min again, after an attempt that succeeded.
func (b *Backoff) Reset() { b.last = 0 }

// Sleep waits for the duration wait. It returns false if ctx ended before.
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
