package wanted

import (
	"cmp"
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

// errHeld is returned by lockDir while another helper has the lock. Callers prefix it with the
// directory.
var errHeld = errors.New("another helper holds it")

// Options configures Open.
type Options struct {
	Dir *Dir // required
	// Logger must not block.
	Logger *slog.Logger // required
	// Record records an event. It must not block.
	Record func(events.Event) // required

	// Narrow restricts the guard to what a document allows before it returns. It is called
	// with each document that is published, before Changed. No other change is made meanwhile,
	// so it may wait for the guard to judge its current packets by the new rules, but not for
	// the disk or the network.
	Narrow func(*Document) // required
	// Changed is called after Narrow with the published document and the one before, which
	// is nil the first time. It must not block.
	Changed func(before, doc *Document) // required

	// SettingsChanged is called when other settings are in force. It must not block.
	SettingsChanged func() // required

	Prefixes  mesh.Prefixes // required
	Addresses []netip.Addr  // optional: the host's own, at most one per family; the rest is derived from its key
	// Renumber gives peers outside the prefixes other addresses, and keeps the old ones in
	// Document.Removed: the prefixes were changed on purpose. Without it Open refuses such
	// peers, because the prefixes are probably a mistake.
	Renumber bool // optional

	// Settings has the settings at the start by source. Endpoint, DNS and ListenPort are
	// their resolved values.
	Settings   StartSettings // optional
	Endpoint   mesh.Endpoint // optional
	DNS        []netip.Addr  // optional
	ListenPort uint16        // optional: the port of an endpoint without one; 0 is DefaultListenPort

	Wait   time.Duration    // required: how long a change waits for the disk
	Tick   time.Duration    // required: the longest pause between two checks of Run
	Wall   func() time.Time // required: the wall clock
	Random io.Reader        // required: a cryptographic source
	Files  FileSystem       // optional: where the state is saved, DiskFiles
}

// State holds the wanted state and is its only writer. Its methods are safe for concurrent
// use.
type State struct {
	opts  Options
	key   mesh.PrivateKey
	id    Identity
	disk  disk
	clock *clock

	// changing serializes changes. While it is held, only Options.Narrow may wait, for the
	// guard. Readers need no lock, as a published document is immutable.
	changing sync.Mutex
	doc      atomic.Pointer[Document]
	// revoked has the generations in which edits last revoked permissions, by the peer's key,
	// in the order of mesh.AllPermissions; 0 for never. See redo. changing guards it.
	revoked map[mesh.PublicKey][len(mesh.AllPermissions)]uint64
	// widening is a semaphore of one, which holds a value while a change is saved before it is
	// published. Unlike a mutex, it can be waited for with a time limit.
	widening chan struct{}
	// timed wakes Run when the ends of permissions may have changed.
	timed chan struct{}

	// settings has those in force. setting is a semaphore like widening, for changes of them.
	settings atomic.Pointer[Settings]
	setting  chan struct{}
}

// Dir is a state directory that this process has locked.
type Dir struct {
	path    string
	release func() error // unlocks it
}

// Lock locks the state directory at path for this process, until Release or the end of the
// process. A directory that doesn't exist is made, with mode 0700. One that other users may
// write to, or replace, is refused.
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

// Release unlocks the directory.
func (d *Dir) Release() error { return d.release() }

// Open reads the wanted state, or makes a key and an empty mesh if the directory never had
// one. It publishes the document before it returns, so Narrow and Changed are called.
//
// Errors are *api.Error with a hint where a person can repair the cause: a damaged document
// or key, or peers that don't fit the prefixes.
func Open(o Options) (*State, error) {
	s := &State{
		opts:     o,
		widening: make(chan struct{}, 1),
		setting:  make(chan struct{}, 1),
		timed:    make(chan struct{}, 1),
		revoked:  make(map[mesh.PublicKey][len(mesh.AllPermissions)]uint64),
	}
	s.disk.store.dir, s.disk.store.files = o.Dir.path, cmp.Or[FileSystem](o.Files, DiskFiles{})
	s.disk.wanted = s.doc.Load
	s.disk.saved = func(doc *Document) { s.clock.setSaved(doc.Saved) }
	s.disk.record = o.Record
	s.disk.limit = o.Wait
	first := &Settings{start: o.Settings, kept: maps.Clone(o.Settings.Kept)}
	if err := s.resolveLive(first); err != nil {
		return nil, err
	}
	s.settings.Store(first)
	return s, s.load()
}

// Document returns the wanted state. The caller must not change it.
func (s *State) Document() *Document { return s.doc.Load() }

// Identity returns this host's key, addresses and mesh prefixes.
func (s *State) Identity() Identity { return s.id }

// Key returns the host's private key.
func (s *State) Key() mesh.PrivateKey { return s.key }

// Now returns the time by which permissions end; see clock.
func (s *State) Now() time.Time { return s.clock.Now() }

// Queue runs a function in the goroutine that writes to the state directory, after the jobs
// queued before. If a job of the same name is still waiting, Queue returns that one and drops
// run; jobs with an empty name are never merged.
func (s *State) Queue(name string, run func() error) *Job { return s.disk.submit(name, run) }

// Write replaces the file name in the state directory, atomically. It may block for as long
// as the disk does, so call it from a job of Queue.
func (s *State) Write(content []byte, name string) error {
	return s.disk.store.replace(context.Background(), content, name)
}

// Problem returns the present problem of saving the wanted state, if there is one.
func (s *State) Problem() (api.Problem, bool) { return s.disk.problem() }

// load reads or makes the host's key and the document, and publishes the document.
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
	if s.opts.Renumber && doc.checkFits(s.id) != nil {
		if doc, err = s.renumber(doc); err != nil {
			return err
		}
		if err := s.disk.store.save(context.Background(), doc); err != nil {
			return fmt.Errorf("save wanted state: %w", err)
		}
	}
	if err := doc.checkFits(s.id); err != nil {
		return api.Errorf(api.CodeInternal, "the wanted state doesn't fit this mesh: %v", err).
			WithHint("start with the --mesh-prefix4, --mesh-prefix6 and --address of before")
	}
	owned.Tidy(s.disk.store.dir) // with the lock held, temporary files are those of a killed helper
	s.disk.synced = doc
	s.publish(doc)
	return nil
}

// savedTime returns the latest time on disk: the document's or the mark's. A mark that can't
// be read is only logged, since the document has a time, too.
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

// loadKey reads the host's key. It makes one only for a new mesh (fresh), because peers know
// the host by its key.
func (s *State) loadKey(fresh bool) error {
	path := filepath.Join(s.disk.store.dir, keyFile)
	var key mesh.PrivateKey
	f, err := owned.Open(path)
	switch {
	case err == nil:
		key, err = readPrivateKey(f) // from the file that Open checked, even if the name has another by now
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

// writeKey writes the host's key, in base64, with mode 0600.
func writeKey(path string, key mesh.PrivateKey) error {
	if err := owned.Replace(path, []byte(key.Reveal()+"\n")); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	return nil
}

// IdentityIn returns the host's identity under other mesh prefixes: its addresses are those
// of Options.Addresses, and for the rest derived from its key. An address outside the
// prefixes, and a second one of a family, are refused.
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
		slot := &m.Own[0]
		if a.Is6() {
			slot = &m.Own[1]
		}
		if given[slot] {
			return m, api.Errorf(api.CodeBadAddress, "the host's own address %v is a second of its family", a).
				WithHint("give one --address per family")
		}
		*slot, given[slot] = a, true
	}
	return m, nil
}
