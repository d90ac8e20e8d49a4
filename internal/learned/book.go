package learned

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Peer is what was found out about one peer.
type Peer struct {
	Endpoint netip.AddrPort // where it was last heard; zero if never
	Seen     time.Time      // when, to the second: its last handshake; zero if that isn't known
	Totals   Totals
}

// entry is what a Book has of a peer.
type entry struct {
	endpoint netip.AddrPort
	seen     time.Time
	// counted is what the counters showed last, and before what had been counted when they
	// last began.
	counted, before Totals
}

// count returns what is to be kept when the counters show now. They begin at zero with each
// tunnel: a number that is lower than before is of a new count.
func (e entry) count(now Totals) entry {
	e.before = e.before.merge(e.counted.merge(now, func(last, now uint64) uint64 {
		if now < last {
			return last
		}
		return 0
	}), sum)
	e.counted = now
	return e
}

// totals returns what was counted in all.
func (e entry) totals() Totals { return e.before.merge(e.counted, sum) }

// Totals are what was counted of a peer, over all starts of this host. What was counted
// since the last save is lost where the process is killed.
type Totals struct {
	Rx       uint64  `json:"rx"` // bytes, encrypted
	Tx       uint64  `json:"tx"`
	RoutedRx uint64  `json:"routedRx"`
	RoutedTx uint64  `json:"routedTx"`
	Refused  Refused `json:"refused"`
}

// Refused are refused packets by the class of their destination, and those whose source
// wasn't the peer's.
type Refused struct {
	Martian  uint64 `json:"martian"`
	Self     uint64 `json:"self"`
	Mesh     uint64 `json:"mesh"`
	LAN      uint64 `json:"lan"`
	Internet uint64 `json:"internet"`
	Spoofed  uint64 `json:"spoofed"`
}

// merge returns what f makes of each number of t and of u.
func (t Totals) merge(u Totals, f func(a, b uint64) uint64) Totals {
	return Totals{
		Rx: f(t.Rx, u.Rx), Tx: f(t.Tx, u.Tx),
		RoutedRx: f(t.RoutedRx, u.RoutedRx), RoutedTx: f(t.RoutedTx, u.RoutedTx),
		Refused: Refused{
			Martian: f(t.Refused.Martian, u.Refused.Martian), Self: f(t.Refused.Self, u.Refused.Self),
			Mesh: f(t.Refused.Mesh, u.Refused.Mesh), LAN: f(t.Refused.LAN, u.Refused.LAN),
			Internet: f(t.Refused.Internet, u.Refused.Internet), Spoofed: f(t.Refused.Spoofed, u.Refused.Spoofed),
		},
	}
}

func sum(a, b uint64) uint64 { return a + b }

// Age is for how long an endpoint where a peer was heard comes before a configured one: in
// a day a router forgets whom it translated, and gives devices other addresses.
const Age = 24 * time.Hour

// Book is what was found out. Its methods may be called concurrently.
type Book struct {
	mu      sync.Mutex
	peers   map[mesh.PublicKey]entry
	names   map[string]netip.Addr // replaced, never changed
	outside Outside               // its addresses are replaced, never changed
	changed bool                  // since it was last given to be saved
}

// Endpoint returns where a peer was last heard, as far as that is where to look for it
// first: with a configured endpoint, only if it was heard there within Age.
func (b *Book) Endpoint(key mesh.PublicKey, configured bool, now time.Time) netip.AddrPort {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.peers[key]
	if configured && now.Sub(e.seen) >= Age {
		return netip.AddrPort{}
	}
	return e.endpoint
}

// Totals returns what was counted of a peer in all, where now is what its counters show, or
// showed a moment ago: only Note decides that they began again.
func (b *Book) Totals(key mesh.PublicKey, now Totals) Totals {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.peers[key]
	e.counted = e.counted.merge(now, func(a, b uint64) uint64 { return max(a, b) })
	return e.totals()
}

// Note notes what is known now of peers, and forgets all others. now returns a peer's
// endpoint and last handshake, and what its counters show. Of a peer without a handshake
// nothing was heard since they began: what was known before stays. Calls have to follow each
// other as what they note does.
func (b *Book) Note(peers []mesh.PublicKey, now func(mesh.PublicKey) Peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	known := 0
	for _, key := range peers {
		was, p := b.peers[key], now(key)
		is := was.count(p.Totals)
		if p.Endpoint.IsValid() && !p.Seen.IsZero() {
			is.endpoint, is.seen = p.Endpoint, toSecond(p.Seen)
		}
		if is != was {
			b.peers[key] = is
			b.changed = b.changed || is.endpoint != was.endpoint || is.seen != was.seen || is.totals() != was.totals()
		}
		if is != (entry{}) {
			known++
		}
	}
	if known < len(b.peers) {
		b.forgetOthers(peers)
	}
}

// toSecond returns t as it is kept.
func toSecond(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

// forgetOthers forgets all peers but some.
func (b *Book) forgetOthers(peers []mesh.PublicKey) {
	known := make(map[mesh.PublicKey]bool, len(peers))
	for _, key := range peers {
		known[key] = true
	}
	had := len(b.peers)
	maps.DeleteFunc(b.peers, func(key mesh.PublicKey, _ entry) bool { return !known[key] })
	b.changed = b.changed || len(b.peers) != had
}

// Names returns the addresses that the names in endpoints were last found to stand for. It
// isn't to be changed.
func (b *Book) Names() map[string]netip.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.names
}

// SetNames has other names count, and takes over the map.
func (b *Book) SetNames(names map[string]netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !maps.Equal(names, b.names) {
		b.names, b.changed = names, true
	}
}

// Outside returns how this host is known from outside. It isn't to be changed.
func (b *Book) Outside() Outside {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.outside
}

// SetOutside has others of this host's addresses count, takes over the list, and reports
// whether it differs from what is kept on disk.
func (b *Book) SetOutside(o Outside) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	differs := b.outside.Name != o.Name || !slices.Equal(b.outside.Addresses, o.Addresses)
	b.outside, b.changed = o, b.changed || differs
	return differs
}

// Changed reports whether something isn't saved.
func (b *Book) Changed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}
