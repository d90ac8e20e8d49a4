package daemon

import (
	"fmt"

	"github.com/meshhelper/meshhelper/internal/events"
)

// expire takes the grants and removed peers' addresses that ended out of the wanted
// state, which is in force at the guard when it returns, and returns that state. It
// doesn't wait for the disk: what couldn't be saved by then, a restart finds by the
// clock.
func (d *Daemon) expire() *document {
	d.changing.Lock()
	doc := d.wanted.Load()
	now := d.clock.now()
	next, gone := doc.expire(now)
	if next != doc {
		next.Saved = now
		d.publishWanted(next)
	}
	d.changing.Unlock()
	if next == doc {
		return doc
	}
	for _, e := range gone {
		d.journal.Record(events.Event{Kind: events.Expired, Peer: e.peer, Message: fmt.Sprintf("%s of %s ended", e.permission, e.peer)})
	}
	for i := range doc.Peers {
		p := &doc.Peers[i] // with what ended now
		if text := misfit(p.Name, p.Sends(p.Permissions.Allowed()), sends(&next.Peers[i], now)); text != "" {
			d.journal.Record(events.Event{Kind: events.Expired, Peer: p.Name, Message: text})
		}
	}
	d.disk.saveWanted()
	return next
}

// publishWanted makes doc the wanted state. What it takes away is gone at the guard
// when this returns. The caller holds changing.
func (d *Daemon) publishWanted(doc *document) {
	before := d.wanted.Swap(doc)
	if before != nil && namesChanged(before, doc) {
		poke(d.renamed)
	}
	d.clock.pend(doc.timed())
	d.gate.limit(doc)
}
