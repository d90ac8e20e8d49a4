package wanted

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/owned"
)

// clock tells the time that grants end by. While one is pending it is the later
// of the wall clock and of what the monotonic clock makes of its last answer,
// so that a grant ends at the earlier of both: setting the wall clock back gains
// nothing, and sleep, which stops the monotonic clock, counts. It never answers
// less than before, nor than what was saved last.
type clock struct {
	wall func() time.Time

	mu      sync.Mutex
	started time.Time // for its monotonic part only
	elapsed time.Duration
	last    time.Time
	saved   time.Time
	pending bool
}

// newClock returns a clock that isn't behind saved.
func newClock(wall func() time.Time, saved time.Time) *clock {
	return &clock{wall: wall, started: time.Now(), last: saved, saved: saved}
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	elapsed := time.Since(c.started)
	next := c.saved
	if c.pending {
		next = c.last.Add(elapsed - c.elapsed)
	}
	// Round strips the monotonic part, by which Go would compare otherwise.
	if wall := c.wall().Round(0).UTC(); wall.After(next) {
		next = wall
	}
	c.last, c.elapsed = next, elapsed
	return next
}

// pend notes whether a grant is to end by itself. While none is, the clock may follow
// the wall clock back to what was saved.
func (c *clock) pend(pending bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending = pending
}

// keep notes a time that was saved.
func (c *clock) keep(saved time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if saved.After(c.saved) {
		c.saved = saved
	}
}

// unsaved returns how long ago, by the clock, a time was saved.
func (c *clock) unsaved() time.Duration {
	now := c.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	return now.Sub(c.saved)
}

// clockInterval is how often the time is saved while a grant is to end by
// itself: what setting the clock back across a restart could gain at most.
const clockInterval = time.Minute

// mark is the clock's, in a file of its own: it is written each minute while a grant
// is to end by itself, and the document may have thousands of peers. The later of it
// and of the document's own time counts.
type mark struct {
	Saved time.Time `json:"saved"`
}

// maxMark bounds what is read of the mark, in bytes.
const maxMark = 256

// readMark returns the mark, or zero where there is none.
func (s *store) readMark() (time.Time, error) {
	text, err := owned.Read(filepath.Join(s.dir, clockFile), maxMark)
	if errors.Is(err, fs.ErrNotExist) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("read the clock's mark: %w", err)
	}
	return decodeMark(text)
}

func decodeMark(text []byte) (time.Time, error) {
	var m mark
	if err := json.Unmarshal(text, &m); err != nil {
		return time.Time{}, fmt.Errorf("read the clock's mark: %w", err)
	}
	return m.Saved.UTC().Round(0), nil
}

func (s *store) writeMark(at time.Time) error {
	text, err := json.Marshal(mark{Saved: at})
	if err != nil {
		return err
	}
	return s.replace(context.Background(), append(text, '\n'), clockFile)
}
