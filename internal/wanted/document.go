package wanted

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// documentVersion is the version of the document that this helper writes. A newer one
// isn't read: whatever in a later version narrows what a peer may (an end that isn't a
// time, a permission for single destinations) raises it, so that no older helper opens
// what was meant to be narrow. What a later version adds besides raises nothing: fields
// that aren't known here open nothing, and are kept and written back.
const documentVersion = 1

// maxPeers bounds a mesh, and maxFormer the names that are remembered after
// their peers were removed or renamed.
const (
	maxPeers  = 1 << 14
	maxFormer = 64
	// maxRemoved bounds the removed peers whose addresses are remembered.
	maxRemoved = 4096
)

// removedFor is for how long nothing is sent to a removed peer's addresses: what
// still sends there, an application or a resolver's answer in a cache, is thought
// to have forgotten them by then.
const removedFor = 24 * time.Hour

// document is the wanted state. One that was published is never changed; a
// change makes a new one.
type Document struct {
	Version    int    `json:"version"`
	Generation uint64 `json:"generation"`
	// Saved is the time when it was written. The clock never goes behind it.
	Saved  time.Time   `json:"saved"`
	Peers  []mesh.Peer `json:"peers"`
	Former []Former    `json:"former,omitempty"`
	// Removed are the addresses that peers had until less than a day ago, the
	// oldest first.
	Removed []Removed `json:"removed,omitempty"`

	// extra is what the document has on disk besides, of a later version. It is written
	// back.
	extra *extras
}

// removed are the addresses of a peer that was removed, or got others.
type Removed struct {
	Addresses mesh.Addresses `json:"addresses"`
	// At is when, by the clock that permissions end by.
	At time.Time `json:"at"`
}

// ended reports whether the addresses are free again. A time that is ahead of the
// clock, which no clock of ours gave, counts as ended.
func (r Removed) ended(now time.Time) bool {
	age := now.Sub(r.At)
	return age < 0 || age >= removedFor
}

// former remembers a name that a peer had, so that repeating the command that
// took it away is told from a typing error.
type Former struct {
	Name string `json:"name"`
	// Now is the peer's new name, or empty when it was removed.
	Now string `json:"now,omitempty"`
}

// identity is the fixed part of the wanted state: what the helper was started with.
type Identity struct {
	Prefixes mesh.Prefixes
	Key      mesh.PublicKey
	Own      mesh.Addresses
}

// List returns the mesh prefixes, IPv4 first.
func (m Identity) List() []netip.Prefix { return []netip.Prefix{m.Prefixes.V4, m.Prefixes.V6} }

// maxDocument bounds what is read from disk, in bytes; a peer has some 400.
const maxDocument = 32 << 20

// errNewer is in the chain of Decode's error about a document of a
// newer version.
var errNewer = errors.New("it was written by a newer meshhelper")

// Decode reads a document and refuses what doesn't make sense by
// itself: it must be whole, of a known version and unambiguous.
func Decode(text []byte) (*Document, error) {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return nil, err
	}
	if head.Version > documentVersion {
		return nil, fmt.Errorf("version %d: %w", head.Version, errNewer)
	}
	if head.Version != documentVersion {
		return nil, fmt.Errorf("version %d is unknown", head.Version)
	}
	var doc Document
	if err := json.Unmarshal(text, &doc); err != nil {
		return nil, err
	}
	if err := doc.validate(); err != nil {
		return nil, err
	}
	var err error
	doc.extra, err = extrasOf(text, &doc)
	return &doc, err
}

func (doc *Document) Encode() ([]byte, error) {
	text, err := json.Marshal(doc)
	if err == nil {
		text, err = doc.extra.addTo(text, doc)
	}
	if err != nil {
		return nil, fmt.Errorf("encode wanted state: %w", err)
	}
	return append(text, '\n'), nil
}

// validate checks each peer alone and all of them against each other.
func (doc *Document) validate() error { return doc.validateAfter(&Document{}) }

// validateAfter is validate after a change of a document that was valid: a peer that is
// as it was then needs no look by itself.
func (doc *Document) validateAfter(before *Document) error {
	if len(doc.Peers) > maxPeers {
		return fmt.Errorf("%d peers, at most %d", len(doc.Peers), maxPeers)
	}
	if len(doc.Former) > maxFormer {
		return fmt.Errorf("%d former names, at most %d", len(doc.Former), maxFormer)
	}
	if len(doc.Removed) > maxRemoved {
		return fmt.Errorf("%d removed peers, at most %d", len(doc.Removed), maxRemoved)
	}
	for i, r := range doc.Removed {
		if err := r.Addresses.Validate(); err != nil {
			return fmt.Errorf("removed peer %d: %w", i+1, err)
		}
	}
	names := map[string]bool{}
	keys := map[mesh.PublicKey]bool{}
	taken := map[netip.Addr]bool{}
	for i := range doc.Peers {
		p := &doc.Peers[i]
		if i >= len(before.Peers) || before.Peers[i] != *p {
			if err := p.Validate(); err != nil {
				return fmt.Errorf("peer %d, %.70q: %w", i+1, p.Name, err)
			}
		}
		if names[p.Name] || keys[p.PublicKey] || taken[p.Addresses[0]] || taken[p.Addresses[1]] {
			return fmt.Errorf("peer %d, %q: another peer has its name, key or address", i+1, p.Name)
		}
		names[p.Name], keys[p.PublicKey] = true, true
		taken[p.Addresses[0]], taken[p.Addresses[1]] = true, true
	}
	return nil
}

// fits reports the first peer that this mesh has no place for: outside of its
// prefixes, or with the host's own key or address.
func (doc *Document) fits(m Identity) error {
	for i := range doc.Peers {
		p := &doc.Peers[i]
		if p.PublicKey == m.Key {
			return fmt.Errorf("peer %q has the host's own key", p.Name)
		}
		for _, a := range p.Addresses {
			if !m.Prefixes.V4.Contains(a) && !m.Prefixes.V6.Contains(a) {
				return fmt.Errorf("peer %q has address %v, which is outside %v and %v", p.Name, a, m.Prefixes.V4, m.Prefixes.V6)
			}
			if a == m.Own[0] || a == m.Own[1] {
				return fmt.Errorf("peer %q has the host's own address %v", p.Name, a)
			}
		}
	}
	return nil
}

// Clone returns a copy whose peers may be changed.
func (doc *Document) Clone() *Document {
	c := *doc
	c.Peers = slices.Clone(doc.Peers)
	c.Former = slices.Clone(doc.Former)
	c.Removed = slices.Clone(doc.Removed)
	return &c
}

// retire remembers the addresses that peers of the document before had and none
// has now, and forgets those that a peer has again or whose day is over.
func (doc *Document) retire(before *Document, now time.Time) {
	has := map[mesh.Addresses]bool{}
	for i := range doc.Peers {
		has[doc.Peers[i].Addresses] = true
	}
	for i := range before.Peers {
		if a := before.Peers[i].Addresses; !has[a] {
			doc.Removed = append(doc.Removed, Removed{a, now})
		}
	}
	doc.Removed = slices.DeleteFunc(doc.Removed, func(r Removed) bool { return has[r.Addresses] || r.ended(now) })
	if over := len(doc.Removed) - maxRemoved; over > 0 {
		doc.Removed = slices.Delete(doc.Removed, 0, over)
	}
}

// timed reports whether a grant is to end by itself.
func (doc *Document) timed() bool {
	for i := range doc.Peers {
		for _, g := range doc.Peers[i].Permissions {
			if g.Allowed && !g.Until.IsZero() {
				return true
			}
		}
	}
	return false
}

// nextEnd returns the earliest end of a grant, and whether there is one.
func (doc *Document) nextEnd() (next time.Time, ok bool) {
	for i := range doc.Peers {
		for _, g := range doc.Peers[i].Permissions {
			if g.Allowed && !g.Until.IsZero() && (!ok || g.Until.Before(next)) {
				next, ok = g.Until, true
			}
		}
	}
	return next, ok
}

// less returns what of doc next leaves, and says what next does besides: whether it
// takes something away, and whether it gives something. A peer that is gone, or has
// other addresses, is in what is left without permissions.
//
// Another key takes everything from the old one, and gives the new one nothing that
// the peer didn't have: what is left has the new key, with what both peers may.
// Else a peer whose change can't be saved would have neither.
func (doc *Document) less(next *Document) (left *Document, takes, gives bool) {
	after := next.byKeys()
	left = doc.Clone()
	rekeyed := doc.rekeyed(next)
	for i := range left.Peers {
		p := &left.Peers[i]
		if n := rekeyed[i]; n != nil {
			had := p.Permissions
			*p, takes = *n, true
			p.Permissions = had
			left.Former, left.Removed, left.extra = slices.Clone(next.Former), slices.Clone(next.Removed), next.extra
		}
		n, ok := after[p.PublicKey]
		delete(after, p.PublicKey)
		if !ok || n.Addresses != p.Addresses {
			p.Permissions = mesh.Grants{}
			takes, gives = true, gives || ok
			continue
		}
		for one, has := range p.Permissions {
			to := n.Permissions[one]
			both := has.And(to)
			takes, gives = takes || both != has, gives || both != to
			p.Permissions[one] = both
		}
	}
	return left, takes, gives || len(after) > 0
}

// rekeyed returns the peers of next that have another key than in doc, by their index,
// which such an edit leaves as it is.
func (doc *Document) rekeyed(next *Document) map[int]*mesh.Peer {
	if len(doc.Peers) != len(next.Peers) {
		return nil
	}
	was, is := doc.byKeys(), next.byKeys()
	out := map[int]*mesh.Peer{}
	for i := range doc.Peers {
		if n := &next.Peers[i]; is[doc.Peers[i].PublicKey] == nil && was[n.PublicKey] == nil {
			out[i] = n
		}
	}
	return out
}

// Finder returns a function that finds a peer by its key, or nil. It is fastest where the
// peer has the index i, as it mostly has in two documents of which one was made from the
// other.
func (doc *Document) Finder() func(i int, key mesh.PublicKey) *mesh.Peer {
	byKeys := sync.OnceValue(doc.byKeys)
	return func(i int, key mesh.PublicKey) *mesh.Peer {
		if i < len(doc.Peers) && doc.Peers[i].PublicKey == key {
			return &doc.Peers[i]
		}
		return byKeys()[key]
	}
}

// byKeys returns the peers by their keys, to be looked at or changed in place.
func (doc *Document) byKeys() map[mesh.PublicKey]*mesh.Peer {
	out := make(map[mesh.PublicKey]*mesh.Peer, len(doc.Peers))
	for i := range doc.Peers {
		out[doc.Peers[i].PublicKey] = &doc.Peers[i]
	}
	return out
}

// ended is a grant that ended by itself.
type ended struct {
	peer       string
	permission string
}

// expire returns the document without the grants and the removed peers' addresses
// that have ended, as the next generation, and which grants those were; the
// document itself where nothing has.
func (doc *Document) expire(now time.Time) (*Document, []ended) {
	var gone []ended
	next := doc
	for i := range doc.Peers {
		for one, g := range doc.Peers[i].Permissions {
			if !g.Allowed || g.In(now) {
				continue
			}
			if next == doc {
				next = doc.Clone()
				next.Generation++
			}
			next.Peers[i].Permissions[one] = mesh.Grant{}
			gone = append(gone, ended{doc.Peers[i].Name, mesh.AllPermissions[one].Name})
		}
	}
	over := func(r Removed) bool { return r.ended(now) }
	if slices.ContainsFunc(doc.Removed, over) {
		if next == doc {
			next = doc.Clone()
			next.Generation++
		}
		next.Removed = slices.DeleteFunc(next.Removed, over)
	}
	return next, gone
}

// FormerAddresses returns the addresses of removed peers. The mesh prefixes may have been others
// then.
func (doc *Document) FormerAddresses() (out []netip.Addr) {
	for _, r := range doc.Removed {
		for _, a := range r.Addresses {
			if a.IsGlobalUnicast() {
				out = append(out, a)
			}
		}
	}
	return out
}
