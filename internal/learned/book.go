package learned

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// Peer is the observed state of one peer.
type Peer struct {
	Endpoint netip.AddrPort // that it was last heard from; zero if never
	Seen     time.Time      // its last handshake, in seconds; zero if unknown
	Totals   Totals         // of its counters, since they were last zero
}

// entry is what a Book knows of a peer.
type entry struct {
	endpoint netip.AddrPort
	seen     time.Time
	// counted is the last reading of the counters, and before the sum of all readings just
	// before they were reset. A peer's totals are the sum of both.
	counted, before Totals
}

// count returns the entry after a reading of the counters. They start at zero with each
// tunnel, so a number lower than the last reading means that it was reset.
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

// totals returns the totals over all tunnels.
func (e entry) totals() Totals { return e.before.merge(e.counted, sum) }

// Totals has a peer's counters. In a Book they continue across restarts; if the process is
// killed, those since the last save are lost.
type Totals struct {
	Rx       uint64  `json:"rx"` // bytes, encrypted
	Tx       uint64  `json:"tx"`
	RoutedRx uint64  `json:"routedRx"`
	RoutedTx uint64  `json:"routedTx"`
	Refused  Refused `json:"refused"`
}

// Refused counts refused packets by the class of their destination. Spoofed counts those with
// a source address that isn't the peer's.
type Refused struct {
	Martian  uint64 `json:"martian"`
	Self     uint64 `json:"self"`
	Mesh     uint64 `json:"mesh"`
	LAN      uint64 `json:"lan"`
	Internet uint64 `json:"internet"`
	Spoofed  uint64 `json:"spoofed"`
}

// merge returns f applied to each pair of numbers of t and u.
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

// sum returns a + b, for merge.
func sum(a, b uint64) uint64 { return a + b }

// Age is how long a learned endpoint takes precedence over a configured one. After a day NAT
// mappings are gone, and devices often have other addresses.
const Age = 24 * time.Hour

// Book holds what was found out about peers. Its methods are safe for concurrent use.
type Book struct {
	mu      sync.Mutex
	peers   map[mesh.PublicKey]entry
	names   map[string]netip.Addr // replaced as a whole, never modified
	outside Outside               // likewise
	changed bool                  // since the last Save
}

// Endpoint returns the learned endpoint to try first for a peer, or zero if there is none.
// For a peer with a configured endpoint it must not be older than Age.
func (b *Book) Endpoint(key mesh.PublicKey, configured bool, now time.Time) netip.AddrPort {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.peers[key]
	if configured && now.Sub(e.seen) >= Age {
		return netip.AddrPort{}
	}
	return e.endpoint
}

// Totals returns a peer's totals over all tunnels. now is a reading of its counters that may
// be slightly older than the last one that Note got; so a lower number doesn't count as a
// reset here.
func (b *Book) Totals(key mesh.PublicKey, now Totals) Totals {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.peers[key]
	e.counted = e.counted.merge(now, func(a, b uint64) uint64 { return max(a, b) })
	return e.totals()
}

// Note records the present state of peers, and forgets all other peers. now returns a peer's
// endpoint, last handshake and counters. Without a handshake the endpoint wasn't heard from in
// this tunnel, and the learned one stays. Readings must be passed in the order in which they
// were taken.
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

// toSecond returns t with the precision in which it is saved.
func toSecond(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

// forgetOthers deletes all peers except the given ones. The caller holds b.mu.
func (b *Book) forgetOthers(peers []mesh.PublicKey) {
	known := make(map[mesh.PublicKey]bool, len(peers))
	for _, key := range peers {
		known[key] = true
	}
	had := len(b.peers)
	maps.DeleteFunc(b.peers, func(key mesh.PublicKey, _ entry) bool { return !known[key] })
	b.changed = b.changed || len(b.peers) != had
}

// Names returns the addresses to which the names in endpoints last resolved. The caller must
// not change the map.
func (b *Book) Names() map[string]netip.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.names
}

// SetNames replaces the addresses of names. The Book owns the map from then on.
func (b *Book) SetNames(names map[string]netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !maps.Equal(names, b.names) {
		b.names, b.changed = names, true
	}
}

// Outside returns the addresses of this host's own name. The caller must not change them.
func (b *Book) Outside() Outside {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.outside
}

// SetOutside replaces the addresses of this host's own name, and reports whether the part of
// them that is saved differs. The Book owns the list from then on.
func (b *Book) SetOutside(o Outside) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	differs := b.outside.Name != o.Name || !slices.Equal(b.outside.Addresses, o.Addresses)
	b.outside, b.changed = o, b.changed || differs
	return differs
}

// Changed reports whether the Book has changed since it was last saved.
func (b *Book) Changed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}
