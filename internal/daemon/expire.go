package daemon

import (
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
)

// expire takes the grants and removed peers' addresses that ended out of the
// wanted state. They end also
// where the disk is full: then they are taken out in memory only, and a restart
// finds by the clock that they ended.
func (d *Daemon) expire() *document {
	d.changing.Lock()
	defer d.changing.Unlock()
	doc := d.wanted.Load()
	now := d.clock.now()
	next, gone := doc.expire(now)
	if next == doc && !(doc.timed() && now.Sub(doc.Saved) >= clockInterval) {
		return doc
	}
	for _, e := range gone {
		d.journal.Record(api.Event{Kind: api.EventExpired, Peer: e.peer, Message: fmt.Sprintf("%s of %s ended", e.permission, e.peer)})
	}
	if next == doc {
		next = doc.clone() // only to save the time
	}
	if err := d.commit(next, now); err != nil {
		d.journal.Record(api.Event{Kind: api.EventProblem, Message: err.Error()})
		if next.Generation != doc.Generation {
			d.wanted.Store(next)
		}
	}
	return d.wanted.Load()
}

// clockInterval is how often the time is saved while a grant is to end by
// itself: what setting the clock back across a restart could gain at most.
const clockInterval = time.Minute

// commit saves doc and makes it the wanted state. The caller holds changing.
func (d *Daemon) commit(doc *document, now time.Time) error {
	doc.Saved = now
	if err := d.store.save(doc); err != nil {
		return err
	}
	d.clock.keep(now, doc.timed())
	d.wanted.Store(doc)
	return nil
}
