package learned

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
)

// maxFile limits the size of the file in bytes; a peer takes at most 900.
const maxFile = 16 << 20

// file is the JSON form of a Book on disk. Unknown fields are dropped.
type file struct {
	Endpoints map[mesh.PublicKey]netip.AddrPort `json:"endpoints"`
	Seen      map[mesh.PublicKey]time.Time      `json:"seen,omitempty"`
	Counts    map[mesh.PublicKey]Totals         `json:"counts,omitempty"`
	Names     map[string]netip.Addr             `json:"names,omitempty"`
	Outside   Outside                           `json:"outside,omitzero"`
}

// Open returns the Book in the file at path, or an empty one if the file doesn't exist. The
// Book is never nil: if the file can't be used, it is empty and the error says why.
func Open(path string) (*Book, error) {
	text, err := owned.Read(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return newBook(), nil
	}
	if err != nil {
		return newBook(), fmt.Errorf("read learned endpoints: %w", err)
	}
	return decode(text)
}

// newBook returns an empty Book.
func newBook() *Book {
	return &Book{peers: map[mesh.PublicKey]entry{}, names: map[string]netip.Addr{}}
}

// maxYear is the last year that time.Time.MarshalJSON accepts (RFC 3339).
const maxYear = 9999

// decode returns the Book in text. It drops entries that don't make sense, such as an endpoint
// without a port.
func decode(text []byte) (*Book, error) {
	b := newBook()
	var f file
	if err := json.Unmarshal(text, &f); err != nil {
		return b, fmt.Errorf("read learned endpoints: %w", err)
	}
	for key, at := range f.Endpoints {
		if at.IsValid() && at.Port() != 0 && mesh.ValidZone(at.Addr().Zone()) {
			e := entry{endpoint: at}
			if seen := toSecond(f.Seen[key]); seen.Year() <= maxYear {
				e.seen = seen
			}
			b.peers[key] = e
		}
	}
	for key, counted := range f.Counts {
		e := b.peers[key]
		e.before = counted
		b.peers[key] = e
	}
	for name, a := range f.Names {
		if mesh.IsPlain(a) && (mesh.Endpoint{Host: name, Port: 1}).Validate() == nil {
			b.names[name] = a
		}
	}
	b.outside = f.Outside // [policy.Host] refuses addresses that aren't plain
	b.outside.Addresses = slices.DeleteFunc(b.outside.Addresses, func(a netip.Addr) bool { return !mesh.IsPlain(a) })
	b.outside.Addresses = b.outside.Addresses[:min(len(b.outside.Addresses), MaxOutside)]
	return b, nil
}

// Save encodes the Book and calls write with it, without the lock held. write must replace the
// file atomically. After an error the Book still counts as changed.
func (b *Book) Save(write func(content []byte) error) error {
	b.mu.Lock()
	peers, f := maps.Clone(b.peers), file{Names: b.names, Outside: b.outside}
	b.changed = false
	b.mu.Unlock()
	text, err := f.encode(peers)
	if err == nil {
		err = write(text)
	}
	if err != nil {
		b.mu.Lock()
		b.changed = true
		b.mu.Unlock()
		return fmt.Errorf("save learned endpoints: %w", err)
	}
	return nil
}

// encode returns the content of the file, with peers.
func (f file) encode(peers map[mesh.PublicKey]entry) ([]byte, error) {
	f.Endpoints, f.Seen, f.Counts = map[mesh.PublicKey]netip.AddrPort{}, map[mesh.PublicKey]time.Time{}, map[mesh.PublicKey]Totals{}
	for key, e := range peers {
		if e.endpoint.IsValid() {
			f.Endpoints[key] = e.endpoint
		}
		if !e.seen.IsZero() {
			f.Seen[key] = e.seen
		}
		if t := e.totals(); t != (Totals{}) {
			f.Counts[key] = t
		}
	}
	text, err := json.Marshal(f)
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("%d bytes, the limit is %d", len(text), maxFile)
	}
	return append(text, '\n'), err
}
