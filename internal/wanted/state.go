package wanted

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
)

// errHeld is the cause when another helper has the state directory.
var errHeld = errors.New("another helper holds it")

// Options are what Open needs.
type Options struct {
	Dir *Dir // required
	// Logger must not block.
	Logger *slog.Logger // required
	// Record records an event. It must not block.
	Record func(events.Event) // required

	// Narrow has the guard pass nothing that a document doesn't allow, before it returns. It
	// is called with each document that comes to be wanted, before anything else is done
	// about it, and must not wait for anything.
	Narrow func(*Document) // required
	// Changed hears, after Narrow, of the document that came to be wanted, and of the one
	// before, which is nil at first. It must not wait for anything.
	Changed func(before, doc *Document) // required

	// SettingsChanged hears that settings count which didn't before. It must not wait for
	// anything.
	SettingsChanged func() // required

	Prefixes  mesh.Prefixes // required
	Addresses []netip.Addr  // optional: derived from the host's key, at most one per family
	// Renumber gives peers that the prefixes have no place for addresses that they have,
	// and keeps the old ones in for a day: the prefixes were changed on purpose. Without
	// it such peers are a mistake, and Open refuses.
	Renumber bool

	// Settings say where what can be set came from; Endpoint, DNS and ListenPort are what
	// they came to at the start.
	Settings   StartSettings
	Endpoint   mesh.Endpoint // optional
	DNS        []netip.Addr  // optional
	ListenPort uint16        // optional

	Wait   time.Duration    // required: how long a change waits for the disk
	Tick   time.Duration    // required: how often Keep looks at least
	Wall   func() time.Time // required: the wall clock
	Random io.Reader        // required: a cryptographic source
}

// State is what is wanted, and its one writer. Its methods may be called by any goroutine.
type State struct {
	opts  Options
	key   mesh.PrivateKey
	id    Identity
	disk  disk
	clock *clock

	// changing serialises changes; nothing is waited for while it is held, the guard
	// excepted. Reading needs no lock: a published document never changes.
	changing sync.Mutex
	doc      atomic.Pointer[Document]
	// taken has the generations in which edits took permissions away, by the peer's key, in
	// the order of mesh.AllPermissions; see again. Under changing.
	taken map[mesh.PublicKey][len(mesh.AllPermissions)]uint64
	// widening is held, by a value in it, while what gives something is saved ahead.
	widening chan struct{}
	// timed wakes Keep for an end of a permission.
	timed chan struct{}

	// settings count now; setting is held, by a value in it, while they are changed.
	settings atomic.Pointer[Settings]
	setting  chan struct{}
}

// Dir is a state directory that is this process's.
type Dir struct {
	path    string
	release func() error
}

// Lock locks the state directory at path for this process, until Release or its end. It is
// made when missing, with mode 0700, and refused where others may write to it.
func Lock(path string) (*Dir, error) {
	if err := openDir(path); err != nil {
		return nil, err
	}
	release, err := lockDir(path)
	if errors.Is(err, errHeld) {
		return nil, api.Errorf(api.CodeInternal, "state directory %q: %v", path, err).
			WithHint("see `meshhelper status`; there is one helper per host")
	}
	if err != nil {
		return nil, err
	}
	return &Dir{path, release}, nil
}

// Release gives the directory back.
func (d *Dir) Release() error { return d.release() }

// Open reads what is wanted, or makes a new mesh where there never was one.
func Open(o Options) (*State, error) {
	s := &State{
		opts:     o,
		widening: make(chan struct{}, 1),
		setting:  make(chan struct{}, 1),
		timed:    make(chan struct{}, 1),
		taken:    make(map[mesh.PublicKey][len(mesh.AllPermissions)]uint64),
	}
	s.disk.store.dir = o.Dir.path
	s.disk.wanted = s.doc.Load
	s.disk.saved = func(doc *Document) { s.clock.keep(doc.Saved) }
	s.disk.record = o.Record
	s.disk.limit = o.Wait
	first := &Settings{start: o.Settings, kept: maps.Clone(o.Settings.Kept)}
	if err := s.settle(first); err != nil {
		return nil, err
	}
	s.settings.Store(first)
	return s, s.load()
}

// Document returns what is wanted now. It must not be changed.
func (s *State) Document() *Document { return s.doc.Load() }

// Identity returns what identifies the host in the mesh.
func (s *State) Identity() Identity { return s.id }

// Key returns the host's private key.
func (s *State) Key() mesh.PrivateKey { return s.key }

// SetFiles replaces the file system under the state directory, for tests of a disk that is
// full, or hangs.
func (s *State) SetFiles(fs FileSystem) { s.disk.store.fs.Store(&fs) }

// Now returns the time that grants end by.
func (s *State) Now() time.Time { return s.clock.Now() }

// Queue has run called after what was queued before, by the goroutine that writes to the
// state directory. A job of that name that hasn't begun yet stands for the new one, too.
func (s *State) Queue(name string, run func() error) *Job { return s.disk.submit(name, run) }

// Write replaces a file in the state directory. It waits for the disk: call it in a job.
func (s *State) Write(content []byte, name string) error {
	return s.disk.store.replace(context.Background(), content, name)
}

// Problem returns what is wrong with what is on disk, and whether something is.
func (s *State) Problem() (api.Problem, bool) { return s.disk.problem() }

// load reads or makes the host's key and the document.
func (s *State) load() error {
	doc, err := s.disk.store.load()
	if err != nil {
		return err
	}
	if err := s.loadKey(doc == nil); err != nil {
		return err
	}
	if s.id, err = s.IdentityIn(s.opts.Prefixes); err != nil {
		return err
	}
	if doc == nil {
		doc = &Document{Version: documentVersion, Generation: 1, Saved: s.opts.Wall().UTC().Round(0), Peers: []mesh.Peer{}}
		if err := s.disk.store.save(context.Background(), doc); err != nil {
			return fmt.Errorf("save wanted state: %w", err)
		}
	}
	s.clock = newClock(s.opts.Wall, s.savedTime(doc))
	if s.opts.Renumber && doc.fits(s.id) != nil {
		if doc, err = s.renumber(doc); err != nil {
			return err
		}
		if err := s.disk.store.save(context.Background(), doc); err != nil {
			return fmt.Errorf("save wanted state: %w", err)
		}
	}
	if err := doc.fits(s.id); err != nil {
		return api.Errorf(api.CodeInternal, "the wanted state doesn't fit this mesh: %v", err).
			WithHint("start with the --mesh-prefix4, --mesh-prefix6 and --address of before")
	}
	owned.Tidy(s.disk.store.dir) // the lock is held: what is there was left by a killed helper
	s.disk.kept = doc
	s.publishWanted(doc)
	return nil
}

// savedTime returns the last time that was saved: the document's or the mark's. A mark
// that can't be read is no reason not to start, since the document has a time, too.
func (s *State) savedTime(doc *Document) time.Time {
	at, err := s.disk.store.readMark()
	if err != nil {
		s.opts.Logger.Warn(err.Error())
	}
	if at.After(doc.Saved) {
		return at
	}
	return doc.Saved
}

// loadKey reads the host's key. A new one is a new host to every peer, so it is
// made for a new mesh only.
func (s *State) loadKey(fresh bool) error {
	path := filepath.Join(s.disk.store.dir, keyFile)
	var key mesh.PrivateKey
	f, err := owned.Open(path)
	switch {
	case err == nil:
		key, err = readPrivateKey(f) // of the file that was checked, whatever has its name by now
		f.Close()
	case !errors.Is(err, fs.ErrNotExist):
		return api.Errorf(api.CodeInternal, "read key file: %v", err).WithHint("nothing was touched; a key that another user wrote isn't used, nor one that others may replace")
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && fresh:
		key, _, err = s.opts.Prefixes.GenerateFree(s.opts.Random, func(netip.Addr) bool { return false })
		if err == nil {
			err = writeKey(path, key)
		}
	case errors.Is(err, fs.ErrNotExist):
		err = api.Errorf(api.CodeInternal, "the host's key %q is missing, but there is a wanted state", path).
			WithHint("put the key back, or move %q and %q away to start anew", stateFile, copyFile)
	case errors.Is(err, mesh.ErrBadKey):
		err = api.Errorf(api.CodeInternal, "%v", err).WithHint("nothing was touched; put the key back, for the peers know this host by it")
	case errors.Is(err, errExposedKey):
		err = api.Errorf(api.CodeInternal, "%v", err).WithHint("a program that read it can pose as this host; run: chmod 600 %q", path)
	}
	s.key = key
	return err
}

func writeKey(path string, key mesh.PrivateKey) error {
	if err := owned.Replace(path, []byte(key.Reveal()+"\n")); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	return nil
}

// IdentityIn is the host's identity with these prefixes.
func (s *State) IdentityIn(prefixes mesh.Prefixes) (m Identity, err error) {
	m = Identity{Prefixes: prefixes, Key: s.key.Public()}
	free := func(netip.Addr) bool { return false }
	if m.Own, err = m.Prefixes.Propose(m.Key, free); err != nil {
		return m, err
	}
	given := map[*netip.Addr]bool{}
	for _, a := range s.opts.Addresses {
		if err := m.Prefixes.Check(a); err != nil {
			return m, api.Errorf(api.CodeBadAddress, "the host's own address: %v", err).
				WithHint("leave --address out, or take %v and %v", m.Own[0], m.Own[1])
		}
		place := &m.Own[0]
		if a.Is6() {
			place = &m.Own[1]
		}
		if given[place] {
			return m, api.Errorf(api.CodeBadAddress, "the host's own address %v is a second of its family", a).
				WithHint("give one --address per family")
		}
		*place, given[place] = a, true
	}
	return m, nil
}
