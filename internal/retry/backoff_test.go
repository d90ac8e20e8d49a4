package retry

import (
	"testing"
	"time"
)

// TestBackoff goes up to the longest pause, stays there, and begins anew.
func TestBackoff(t *testing.T) {
	b := Backoff{Min: time.Second, Max: 5 * time.Second}
	for _, again := range []bool{false, true} {
		for i, want := range []time.Duration{1, 2, 4, 5, 5} {
			if got := b.Next(); got != want*time.Second {
				t.Errorf("again %v, attempt %d: %v, want %v s", again, i+1, got, want)
			}
		}
		b.Reset()
	}
}
