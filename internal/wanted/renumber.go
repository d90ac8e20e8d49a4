package wanted

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
)

// Renumbered returns a copy of doc, as the next generation, in which every peer's addresses
// fit the mesh m. An address that fits stays. Any other is replaced by one derived from the
// peer's key; if a peer earlier in the list has that one, the next attempt of the derivation
// counts, so the result is the same each time. Replaced addresses go into Removed.
//
// The error is an *api.Error with code bad_address if the prefixes are too small.
func (doc *Document) Renumbered(m Identity, now time.Time) (*Document, error) {
	next := doc.Clone()
	// The addresses that fit are marked as used before any is derived, so that a peer that keeps
	// its address never loses it to one earlier in the list.
	used := map[netip.Addr]bool{m.Own[0]: true, m.Own[1]: true}
	fits := make([][2]bool, len(next.Peers))
	for i := range next.Peers {
		for n, a := range next.Peers[i].Addresses {
			// Check picks the prefix by the family of the address.
			if m.Prefixes.Check(a) == nil && !used[a] {
				fits[i][n], used[a] = true, true
			}
		}
	}
	for i := range next.Peers {
		p := &next.Peers[i]
		if fits[i] == [2]bool{true, true} {
			continue
		}
		a, err := m.Prefixes.Propose(p.PublicKey, func(a netip.Addr) bool { return used[a] })
		if err != nil {
			return nil, api.Errorf(api.CodeBadAddress, "%v and %v have no room for all %d peers: %v", m.Prefixes.V4, m.Prefixes.V6, len(next.Peers), err).
				WithHint("take a shorter prefix, such as a /16")
		}
		for n, addr := range a.List() {
			if !fits[i][n] {
				p.Addresses[n], used[addr] = addr, true
			}
		}
	}
	next.Generation++
	next.Saved = now
	next.retire(doc, now)
	return next, nil
}

// renumber returns a document from disk with addresses that fit this mesh, and records an
// event for each peer that gets others.
func (s *State) renumber(doc *Document) (*Document, error) {
	next, err := doc.Renumbered(s.id, s.clock.Now())
	if err != nil {
		return nil, err
	}
	for i := range next.Peers {
		if was, is := &doc.Peers[i], &next.Peers[i]; was.Addresses != is.Addresses {
			s.opts.Record(events.Event{Kind: events.Change, Peer: is.Name, Message: fmt.Sprintf(
				"%s changed with the mesh prefixes: it has %v and %v, and had %v and %v; its configuration has to change, too: meshhelper peer config %s",
				is.Name, is.Addresses[0], is.Addresses[1], was.Addresses[0], was.Addresses[1], is.Name)})
		}
	}
	return next, nil
}
