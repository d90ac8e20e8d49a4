package daemon

import (
	"context"
	"time"
)

// othersLimit bounds one look at other software. Between two of them is a pause of
// othersPause, or of as many times as long as a look took, so that rulesets that take
// long to judge don't take a core.
const (
	othersLimit  = 10 * time.Second
	othersPause  = 100 * time.Millisecond
	othersFactor = 20
)

// lookAtOthers asks n what of other software stands in the way of what is in force, each
// time that the loop found or changed something. The loop doesn't wait for it: it only
// informs.
func (d *Daemon) lookAtOthers(ctx context.Context, n Neighbours) error {
	for {
		c, changed := d.condition()
		began := time.Now()
		if c.loaded != nil {
			limit, cancel := context.WithTimeout(ctx, othersLimit)
			found, err := n.Others(limit, c.loaded)
			cancel()
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				// What can't be read is said, and is no reason to doubt what is enforced.
				found = append(found, Problem{
					Step: "look at other software", Message: "not all of it can be read: " + err.Error(), Hint: "the helper tries again",
				})
			}
			d.mu.Lock()
			d.byOthers = found
			d.mu.Unlock()
		}
		if !sleep(ctx, max(othersPause, min(othersFactor*time.Since(began), time.Minute))) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// obstacles returns what lookAtOthers found last.
func (d *Daemon) obstacles() []Problem {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.byOthers
}
