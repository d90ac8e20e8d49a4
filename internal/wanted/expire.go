package wanted

import (
	"fmt"

	"github.com/meshhelper/meshhelper/internal/events"
)

// Expire takes the grants and removed peers' addresses that ended out of the wanted
// state, which is in force at the guard when it returns, and returns that state. It
// doesn't wait for the disk: what couldn't be saved by then, a restart finds by the
// clock.
func (s *State) Expire() *Document {
	s.changing.Lock()
	doc := s.doc.Load()
	now := s.clock.Now()
	next, gone := doc.expire(now)
	if next != doc {
		next.Saved = now
		s.publishWanted(next)
	}
	s.changing.Unlock()
	if next == doc {
		return doc
	}
	for _, e := range gone {
		s.opts.Record(events.Event{Kind: events.Expired, Peer: e.peer, Message: fmt.Sprintf("%s of %s ended", e.permission, e.peer)})
	}
	for i := range doc.Peers {
		p := &doc.Peers[i] // with what ended now
		if text := outdatedConfig(p.Name, p.Sends(p.Permissions.Allowed()), Sends(&next.Peers[i], now)); text != "" {
			s.opts.Record(events.Event{Kind: events.Expired, Peer: p.Name, Message: text})
		}
	}
	s.disk.saveWanted()
	return next
}

// publishWanted makes doc the wanted state. What it takes away is gone at the guard
// when this returns. The caller holds changing.
func (s *State) publishWanted(doc *Document) {
	before := s.doc.Swap(doc)
	s.clock.pend(doc.timed())
	s.opts.Narrow(doc)
	s.opts.Changed(before, doc)
	select {
	case s.timed <- struct{}{}:
	default:
	}
}
