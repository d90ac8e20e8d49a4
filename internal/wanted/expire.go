package wanted

import (
	"fmt"

	"github.com/meshhelper/meshhelper/internal/events"
)

// Expire removes the permissions and the removed peers' addresses whose time is up, and
// returns the wanted state, which the guard enforces when Expire returns. It doesn't wait
// for the disk: should the save fail, a restart ends the same permissions by the clock.
func (s *State) Expire() *Document {
	s.changing.Lock()
	doc := s.doc.Load()
	now := s.clock.Now()
	next, gone := doc.expire(now)
	if next != doc {
		next.Saved = now
		s.publish(next)
	}
	s.changing.Unlock()
	if next == doc {
		return doc
	}
	for _, e := range gone {
		s.opts.Record(events.Event{Kind: events.Expired, Peer: e.peer, Message: fmt.Sprintf("%s of %s ended", e.permission, e.peer)})
	}
	for i := range doc.Peers {
		p := &doc.Peers[i] // before the end
		if text := outdatedConfig(p.Name, p.Sends(p.Permissions.Allowed()), Sends(&next.Peers[i], now)); text != "" {
			s.opts.Record(events.Event{Kind: events.Expired, Peer: p.Name, Message: text})
		}
	}
	s.disk.saveWanted()
	return next
}

// publish makes doc the wanted state. When it returns, the guard passes nothing that doc
// doesn't allow. The caller holds changing.
func (s *State) publish(doc *Document) {
	before := s.doc.Swap(doc)
	s.clock.setPending(doc.timed())
	s.opts.Narrow(doc)
	s.opts.Changed(before, doc)
	select {
	case s.timed <- struct{}{}:
	default:
	}
}
