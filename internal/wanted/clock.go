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

// clock tells the time by which permissions end. While a permission with an end exists,
// the time is the later of the wall clock and of the last answer advanced by the monotonic
// clock. So setting the wall clock back doesn't prolong a permission, and neither does
// sleep, during which Go's monotonic clock stands still. It never goes back behind the
// time that was saved last, and, while a permission is pending, behind its last answer.
type clock struct {
	wall func() time.Time

	mu      sync.Mutex
	started time.Time     // only its monotonic part is used
	elapsed time.Duration // from started to the last answer
	last    time.Time     // the last answer
	saved   time.Time     // the latest time on disk
	pending bool          // some permission has an end
}

// newClock returns a clock that isn't behind saved.
func newClock(wall func() time.Time, saved time.Time) *clock {
	return &clock{wall: wall, started: time.Now(), last: saved, saved: saved}
}

// Now returns the time, in UTC and without a monotonic part.
func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	elapsed := time.Since(c.started)
	next := c.saved
	if c.pending {
		next = c.last.Add(elapsed - c.elapsed)
	}
	// Round strips the monotonic part, which time.After would compare instead.
	if wall := c.wall().Round(0).UTC(); wall.After(next) {
		next = wall
	}
	c.last, c.elapsed = next, elapsed
	return next
}

// setPending sets whether some permission has an end. While none has, the clock may follow
// the wall clock back, as far as the saved time: a wall clock that was wrong at boot and
// was corrected since shouldn't stay wrong here.
func (c *clock) setPending(pending bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending = pending
}

// setSaved sets the time that is on disk; an earlier one than before has no effect.
func (c *clock) setSaved(saved time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if saved.After(c.saved) {
		c.saved = saved
	}
}

// unsaved returns how far the clock is ahead of the time on disk.
func (c *clock) unsaved() time.Duration {
	now := c.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	return now.Sub(c.saved)
}

// clockInterval is how often the time is saved while a permission has an end. It bounds
// what setting the wall clock back across a restart can gain.
const clockInterval = time.Minute

// mark is the content of clock.json: a time that the clock never goes behind. It has a
// file of its own because it is written each clockInterval, while the document may have
// thousands of peers. The later one of the mark and Document.Saved counts.
type mark struct {
	Saved time.Time `json:"saved"`
}

// maxMark limits the size of clock.json, in bytes; a mark has about 50.
const maxMark = 256

// readMark returns the time in clock.json, or the zero time if the file doesn't exist.
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

// decodeMark returns the time in the content of clock.json.
func decodeMark(text []byte) (time.Time, error) {
	var m mark
	if err := json.Unmarshal(text, &m); err != nil {
		return time.Time{}, fmt.Errorf("read the clock's mark: %w", err)
	}
	if err := checkTime(m.Saved); err != nil {
		return time.Time{}, fmt.Errorf("read the clock's mark: %w", err)
	}
	return m.Saved.UTC().Round(0), nil
}

// writeMark replaces clock.json.
func (s *store) writeMark(at time.Time) error {
	text, err := json.Marshal(mark{Saved: at})
	if err != nil {
		return err
	}
	return s.replace(context.Background(), append(text, '\n'), clockFile)
}
