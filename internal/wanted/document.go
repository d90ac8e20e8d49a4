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

// documentVersion is the version of the document that this helper writes; it refuses newer
// ones. A format change that narrows what a peer may do (say, a permission for single
// destinations) must raise the version: an older helper would ignore the restriction and
// open more than was meant. Other additions leave the version as it is. Fields that are
// unknown here open nothing, and are kept and written back; see extras.
const documentVersion = 1

// Limits of a document. They bound memory, the size of the rules made from it and the time
// of a change.
const (
	maxPeers   = 1 << 14
	maxFormer  = 64   // remembered names of removed or renamed peers
	maxRemoved = 4096 // remembered addresses of removed peers
)

// removedFor is how long the host drops packets to the addresses of a removed peer, instead
// of sending them by the default route. Applications and resolver caches that still use the
// addresses are assumed to have dropped them by then.
const removedFor = 24 * time.Hour

// Document is the wanted state, in the JSON format of state.json. A published document is
// immutable; a change publishes a new one.
type Document struct {
	// Version is documentVersion.
	Version int `json:"version"`
	// Generation counts published documents, across restarts, from 1 to maxGeneration.
	// 0 stands for none.
	Generation uint64 `json:"generation"`
	// Saved is the time at which the document was made. The clock never goes behind it.
	Saved time.Time   `json:"saved"`
	Peers []mesh.Peer `json:"peers"`
	// Former are the names of peers that were removed or renamed, the oldest first, at most
	// maxFormer.
	Former []Former `json:"former,omitempty"`
	// Removed are addresses that peers had within the last removedFor, the oldest first, at
	// most maxRemoved.
	Removed []Removed `json:"removed,omitempty"`

	// extra has the fields on disk that this version doesn't know.
	extra *extras
}

// Removed has the addresses of a peer that was removed or got other addresses.
type Removed struct {
	Addresses mesh.Addresses `json:"addresses"`
	// At is when the peer lost them, by State.Now.
	At time.Time `json:"at"`
}

// ended reports whether removedFor is over. A time in the future, which this clock can't
// have given, counts as over, lest the addresses be blocked for years.
func (r Removed) ended(now time.Time) bool {
	age := now.Sub(r.At)
	return age < 0 || age >= removedFor
}

// Former is a name that a peer had. It distinguishes a command that is repeated after a
// removal or a rename from a mistyped name.
type Former struct {
	Name string `json:"name"`
	// Now is the peer's new name, or empty if the peer was removed.
	Now string `json:"now,omitempty"`
}

// Identity is this host in its mesh. It is fixed for the helper's run time.
type Identity struct {
	Prefixes mesh.Prefixes
	Key      mesh.PublicKey
	Own      mesh.Addresses // the host's own mesh addresses
}

// List returns the mesh prefixes, IPv4 first.
func (m Identity) List() []netip.Prefix { return []netip.Prefix{m.Prefixes.V4, m.Prefixes.V6} }

// maxDocument limits the size of the document on disk, in bytes. A peer takes about 400,
// so maxPeers of them need a fifth of it.
const maxDocument = 32 << 20

// errNewer is in the chain of Decode's error for a document with a newer version.
var errNewer = errors.New("it was written by a newer meshhelper")

// Decode decodes a document. It must be complete, of documentVersion, and valid by itself:
// no two peers share a name, a key or an address. Whether the peers fit the mesh prefixes
// isn't checked.
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
	if doc.Generation == 0 || doc.Generation > maxGeneration {
		return nil, fmt.Errorf("generation %d, want 1 to %d", doc.Generation, uint64(maxGeneration))
	}
	if err := doc.checkTimes(); err != nil {
		return nil, err
	}
	if err := doc.validate(); err != nil {
		return nil, err
	}
	var err error
	doc.extra, err = extrasOf(text, &doc)
	return &doc, err
}

// maxGeneration limits the generation of a document that is read. A counter that wraps to 0
// would say of every change that it is in force. Readers of JSON keep integers up to it exact
// (RFC 8259 section 6).
const maxGeneration = 1<<53 - 1

// maxYear is the last year that is read, in UTC. [time.Time.MarshalJSON] writes years up to
// 9999 (RFC 3339), and the clock goes on from a time that was read.
const maxYear = 9998

// checkTime returns an error for a time that can't be written again.
func checkTime(at time.Time) error {
	if year := at.UTC().Year(); year < 1 || year > maxYear {
		return fmt.Errorf("the year of %v isn't in 1 to %d", at, maxYear)
	}
	return nil
}

// checkTimes checks each time of the document.
func (doc *Document) checkTimes() error {
	if err := checkTime(doc.Saved); err != nil {
		return fmt.Errorf("saved: %w", err)
	}
	for _, r := range doc.Removed {
		if err := checkTime(r.At); err != nil {
			return fmt.Errorf("removed: %w", err)
		}
	}
	for i := range doc.Peers {
		for _, g := range doc.Peers[i].Permissions {
			if err := checkTime(g.Until); err != nil {
				return fmt.Errorf("peer %d, %.70q: until: %w", i+1, doc.Peers[i].Name, err)
			}
		}
	}
	return nil
}

// Encode returns the document as one line of JSON, with the fields that Decode didn't know.
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

// validate checks each peer by itself, and all peers against each other.
func (doc *Document) validate() error { return doc.validateAfter(&Document{}) }

// validateAfter is validate for a document made from a valid one. A peer that is the same
// as before, at the same index, isn't checked by itself again: with 10,000 peers that would
// take most of the time of a change.
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
	addresses := map[netip.Addr]bool{}
	for i := range doc.Peers {
		p := &doc.Peers[i]
		if i >= len(before.Peers) || before.Peers[i] != *p {
			if err := p.Validate(); err != nil {
				return fmt.Errorf("peer %d, %.70q: %w", i+1, p.Name, err)
			}
		}
		if names[p.Name] || keys[p.PublicKey] || addresses[p.Addresses[0]] || addresses[p.Addresses[1]] {
			return fmt.Errorf("peer %d, %q: another peer has its name, key or address", i+1, p.Name)
		}
		names[p.Name], keys[p.PublicKey] = true, true
		addresses[p.Addresses[0]], addresses[p.Addresses[1]] = true, true
	}
	return nil
}

// checkFits returns an error for the first peer that doesn't fit the mesh: one with an
// address outside the prefixes, or with the host's own key or address.
func (doc *Document) checkFits(m Identity) error {
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

// Clone returns a copy that may be changed without affecting doc.
func (doc *Document) Clone() *Document {
	c := *doc
	c.Peers = slices.Clone(doc.Peers)
	c.Former = slices.Clone(doc.Former)
	c.Removed = slices.Clone(doc.Removed)
	return &c
}

// retire adds to doc.Removed the addresses that a peer had in the document before and no
// peer has now. It drops those that a peer has again, those that are over, and the oldest
// above maxRemoved.
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

// timed reports whether some permission has an end.
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

// nextEnd returns the earliest end of a permission, and whether some permission has one.
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

// narrowTo returns doc reduced to the permissions that next grants, too, and reports
// whether next takes something away from doc, and whether it gives something. A peer that
// next doesn't have, or has with other addresses, stays in the result without permissions.
//
// A peer that gets another key is in the result with the new one, and the permissions that
// it has in both documents: the old key loses everything, and the new one gains nothing
// that the peer didn't have. With the old key in the result, a change that can't be saved
// would leave the peer with neither key.
func (doc *Document) narrowTo(next *Document) (left *Document, takes, gives bool) {
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

// rekeyed returns the peers of next that have another key than in doc, by index. An edit
// that changes a key keeps the index, so the same index with two keys that are each unknown
// to the other document is the same peer.
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

// Finder returns a function that finds a peer by key; it returns nil if there is none. i is a guess of the
// peer's index, which is nearly always right between two documents made from one another;
// a map is built only for the first wrong guess.
func (doc *Document) Finder() func(i int, key mesh.PublicKey) *mesh.Peer {
	byKeys := sync.OnceValue(doc.byKeys)
	return func(i int, key mesh.PublicKey) *mesh.Peer {
		if i < len(doc.Peers) && doc.Peers[i].PublicKey == key {
			return &doc.Peers[i]
		}
		return byKeys()[key]
	}
}

// byKeys returns the peers by key. The pointers are into doc.Peers.
func (doc *Document) byKeys() map[mesh.PublicKey]*mesh.Peer {
	out := make(map[mesh.PublicKey]*mesh.Peer, len(doc.Peers))
	for i := range doc.Peers {
		out[doc.Peers[i].PublicKey] = &doc.Peers[i]
	}
	return out
}

// ended is a permission that expired.
type ended struct {
	peer       string
	permission string
}

// expire returns a copy of doc, as the next generation, without the permissions and the
// removed addresses that have ended by now, and the list of those permissions. It returns
// doc itself if nothing has ended.
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

// FormerAddresses returns the addresses in Removed, both families. They may be outside the
// present mesh prefixes, which may have changed since.
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
