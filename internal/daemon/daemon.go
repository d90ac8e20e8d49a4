package daemon

import (
	"context"
	"crypto/rand"
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

	"golang.org/x/sync/errgroup"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// Tunnel is the WireGuard device as the daemon drives it; *tunnel.Device is
// one.
type Tunnel interface {
	// Sync makes the tunnel's peers equal to want, touching only those that
	// differ.
	Sync(want []tunnel.Peer) error
	Stats() (map[mesh.PublicKey]tunnel.PeerStats, error)
	ListenPort() uint16
	// SetSelf says where datagrams reach the tunnel itself, which is no peer's endpoint.
	SetSelf(places []netip.AddrPort)
	// Rebind tells the peers where the host is after a change of networks or sleep.
	Rebind(ctx context.Context) error
	// Listening returns why the UDP port isn't served; nil while it is.
	Listening() error
	// Done is closed when the tunnel has ended, by Close or by itself.
	Done() <-chan struct{}
	Close()
}

// errHeld is the cause when another helper has the state directory.
var errHeld = errors.New("another helper holds it")

// Options are what New needs.
type Options struct {
	Host     host.Host // required
	StateDir string    // required: made when missing, with mode 0700
	// Logger must not block, for the guard and the loop write to it: before a file, a
	// pipe or a terminal stands a logfile.Queue.
	Logger *slog.Logger // required

	Version    string        // optional: for status
	Interface  string        // optional: the host chooses
	MTU        int           // optional: DefaultMTU
	ListenPort uint16        // optional: UDP, 0 lets the system choose
	Prefixes   mesh.Prefixes // optional: mesh.DefaultPrefixes
	// Addresses are the host's own, at most one per family.
	Addresses []netip.Addr // optional: derived from the host's key
	// Renumber gives peers that the prefixes have no place for addresses that they have,
	// and keeps the old ones in for a day: the prefixes were changed on purpose. Without
	// it such peers are a mistake, and New refuses.
	Renumber bool
	// Endpoint is where peers reach this host, for their configurations.
	Endpoint mesh.Endpoint // optional: the uplink's address
	// DNS is for the peers' configurations.
	DNS []netip.Addr // optional: public ones of a family that the host reaches

	// Settings say where what above can be set with `settings` came from.
	Settings StartSettings // optional: nothing was set

	// Languages are those that rulesets are enforced in, by name; the host's own is among
	// them.
	Languages map[string]Language // optional

	// NewTunnel starts the WireGuard device around the host's tunnel device.
	NewTunnel func(tun.Device, mesh.PrivateKey, uint16) (Tunnel, error) // optional: tunnel.NewDevice
	Tick      time.Duration                                             // optional: between looks at the host, DefaultTick
	Wait      time.Duration                                             // optional: a command's time limit, DefaultWait
	Wall      func() time.Time                                          // optional: the wall clock, time.Now
	Random    io.Reader                                                 // optional: crypto/rand.Reader
	Resolve   func(context.Context, string) ([]netip.Addr, error)       // optional: the host's resolver
}

// What Options leave out.
const (
	// DefaultMTU is the MTU of the mesh interface in bytes: what is left of 1500
	// by WireGuard over IPv6 (40 + 8 + 32 bytes).
	DefaultMTU = 1420
	// DefaultTick is how long something that the OS doesn't report may go
	// unnoticed.
	DefaultTick = 3 * time.Second
	// DefaultWait is how long a command waits for its change to be in force.
	DefaultWait = 10 * time.Second
)

func (o *Options) complete() error {
	h := &o.Host
	if h.Link == nil || h.Observer == nil || h.Enforcer == nil || h.Name == "" || h.Language == "" || o.StateDir == "" || o.Logger == nil {
		return errors.New("host, its name and language, state directory and logger are required")
	}
	setDefault(&o.MTU, DefaultMTU)
	setDefault(&o.Tick, DefaultTick)
	setDefault(&o.Wait, DefaultWait)
	setDefault(&o.Prefixes, mesh.DefaultPrefixes())
	if o.Wall == nil {
		o.Wall = time.Now
	}
	if o.Random == nil {
		o.Random = rand.Reader
	}
	if o.Resolve == nil {
		o.Resolve = lookup
	}
	return o.Prefixes.Validate()
}

func setDefault[T comparable](value *T, standard T) {
	var zero T
	if *value == zero {
		*value = standard
	}
}

func (d *Daemon) wireguard(dev tun.Device, key mesh.PrivateKey, port uint16) (Tunnel, error) {
	return tunnel.NewDevice(tunnel.Options{
		TUN: dev, PrivateKey: key, ListenPort: port, Logger: d.opts.Logger.With("part", "wireguard"),
		Addresses: d.mesh.own.List(), Bind: d.sockets,
	})
}

// Daemon keeps one host equal to its wanted state. It is the api.Service of the
// socket.
type Daemon struct {
	opts    Options
	key     mesh.PrivateKey
	mesh    identity
	disk    disk
	gate    gate
	clock   *clock
	journal *events.Journal
	release func() error // of the state directory
	learned *learned.Book
	// sockets keep the UDP port from one tunnel to the next.
	sockets *tunnel.Sockets

	// changing serialises changes of the wanted state; nothing is waited for while it is
	// held, the guard excepted. Reading needs no lock: a published document never changes.
	changing sync.Mutex
	wanted   atomic.Pointer[document]
	// taken has the generations in which edits took permissions away, by the peer's key, in
	// the order of mesh.AllPermissions; see again. Under changing.
	taken map[mesh.PublicKey][len(mesh.AllPermissions)]uint64
	// widening is held, by a value in it, while what gives something is saved ahead.
	widening chan struct{}

	// settings count now; setting is held, by a value in it, while they are changed.
	settings atomic.Pointer[settings]
	setting  chan struct{}
	// full says that the state folder takes nothing, or is nil.
	full atomic.Pointer[host.Problem]
	// looking is held, by a value in it, during a look at other software.
	looking chan struct{}

	// wake wakes the loop for a change, moved for something on the host, timed the keeper
	// for an end of a permission, and renamed the resolver for endpoints given by name.
	wake, moved, timed, renamed chan struct{}

	mu  sync.Mutex
	now condition // what the loop found last
	// byOthers is what other software was found to stand in the way with.
	byOthers   []host.Problem
	changed    chan struct{}    // closed when now is replaced
	unresolved map[string]error // why names of endpoints weren't found last time
}

// condition is what the loop publishes after each round.
type condition struct {
	state      string
	enforced   uint64
	iface      string
	listenPort uint16
	host       policy.Host
	// ruleset is the wanted policy on this host, also where it isn't in force.
	ruleset *policy.Ruleset
	// loaded is what the host was last told to enforce.
	loaded *policy.Ruleset
	// read is what the host was last found to enforce, or nil.
	read *policy.Ruleset
	// render writes rulesets as loaded was, or is nil.
	render     func(*policy.Ruleset) (anchor, text string, err error)
	forwarding policy.Families
	repairs    uint64
	// problems are our own, foreign what else the host said of itself.
	problems, foreign []host.Problem
	tunnel            Tunnel
	guard             *guard.Device
	limits            host.Limits // of the host's packet filter, when the guard was made
}

// New reads the wanted state and takes the state directory. It doesn't touch
// the host; Run does. Close gives the directory back.
func New(o Options) (*Daemon, error) {
	if err := o.complete(); err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	d := &Daemon{
		opts:     o,
		widening: make(chan struct{}, 1),
		setting:  make(chan struct{}, 1),
		looking:  make(chan struct{}, 1),
		taken:    make(map[mesh.PublicKey][len(mesh.AllPermissions)]uint64),
		wake:     make(chan struct{}, 1),
		moved:    make(chan struct{}, 1),
		timed:    make(chan struct{}, 1),
		renamed:  make(chan struct{}, 1),
		changed:  make(chan struct{}),
		now:      condition{state: api.Starting},

		unresolved: map[string]error{},
	}
	d.journal = events.NewJournal(o.Wall, d.logEvent)
	d.disk.store.dir = o.StateDir
	d.disk.wanted = d.wanted.Load
	d.disk.saved = func(doc *document) { d.clock.keep(doc.Saved) }
	d.disk.record = d.journal.Record
	d.disk.limit = d.saveWithin()
	d.gate.compile = d.compile
	d.gate.failed = func(err error) {
		d.journal.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("narrow at the guard, which is closed now: %v", err)})
	}
	d.sockets = tunnel.NewSockets(o.Logger.With("part", "wireguard"))
	if d.opts.NewTunnel == nil {
		d.opts.NewTunnel = d.wireguard
	}
	first := &settings{start: o.Settings, kept: maps.Clone(o.Settings.Kept)}
	if err := d.settle(first); err != nil {
		return nil, err
	}
	d.settings.Store(first)
	if err := openDir(o.StateDir); err != nil {
		return nil, err
	}
	release, err := lockDir(o.StateDir)
	if errors.Is(err, errHeld) {
		return nil, api.Errorf(api.CodeInternal, "state directory %q: %v", o.StateDir, err).
			WithHint("see `meshhelper status`; there is one helper per host")
	}
	if err != nil {
		return nil, err
	}
	d.release = release
	d.journal.Open(filepath.Join(o.StateDir, eventsFile), o.Logger)
	if err := d.load(); err != nil {
		return nil, errors.Join(err, release())
	}
	return d, nil
}

// flushLimit is how long the end waits for a disk that hangs.
const flushLimit = time.Second

// Close gives the UDP port and the state directory back. Call it after Run.
func (d *Daemon) Close() error {
	d.sockets.Release()
	d.journal.Close(flushLimit)
	return d.release()
}

// load reads or makes the host's key and the document.
func (d *Daemon) load() error {
	doc, err := d.disk.store.load()
	if err != nil {
		return err
	}
	if err := d.loadKey(doc == nil); err != nil {
		return err
	}
	if err := d.place(); err != nil {
		return err
	}
	if doc == nil {
		doc = &document{Version: documentVersion, Generation: 1, Saved: d.opts.Wall().UTC().Round(0), Peers: []mesh.Peer{}}
		if err := d.disk.store.save(context.Background(), doc); err != nil {
			return fmt.Errorf("save wanted state: %w", err)
		}
	}
	d.clock = newClock(d.opts.Wall, d.savedTime(doc))
	if d.opts.Renumber && doc.fits(d.mesh) != nil {
		if doc, err = d.renumber(doc); err != nil {
			return err
		}
		if err := d.disk.store.save(context.Background(), doc); err != nil {
			return fmt.Errorf("save wanted state: %w", err)
		}
	}
	if err := doc.fits(d.mesh); err != nil {
		return api.Errorf(api.CodeInternal, "the wanted state doesn't fit this mesh: %v", err).
			WithHint("start with the --mesh-prefix4, --mesh-prefix6 and --address of before")
	}
	owned.Tidy(d.opts.StateDir) // the lock is held: what is there was left by a killed helper
	d.disk.kept = doc
	d.publishWanted(doc)
	d.openLearned()
	return nil
}

// savedTime returns the last time that was saved: the document's or the mark's. A mark
// that can't be read is no reason not to start, since the document has a time, too.
func (d *Daemon) savedTime(doc *document) time.Time {
	at, err := d.disk.store.readMark()
	if err != nil {
		d.opts.Logger.Warn(err.Error())
	}
	if at.After(doc.Saved) {
		return at
	}
	return doc.Saved
}

// loadKey reads the host's key. A new one is a new host to every peer, so it is
// made for a new mesh only.
func (d *Daemon) loadKey(fresh bool) error {
	path := filepath.Join(d.opts.StateDir, keyFile)
	var key mesh.PrivateKey
	f, err := owned.Open(path)
	switch {
	case err == nil:
		key, err = ReadKey(f) // of the file that was checked, whatever has its name by now
		f.Close()
	case !errors.Is(err, fs.ErrNotExist):
		return api.Errorf(api.CodeInternal, "read key file: %v", err).WithHint("nothing was touched; a key that another user wrote isn't used, nor one that others may replace")
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && fresh:
		key, _, err = d.opts.Prefixes.GenerateFree(d.opts.Random, func(netip.Addr) bool { return false })
		if err == nil {
			err = writeKey(path, key)
		}
	case errors.Is(err, fs.ErrNotExist):
		err = api.Errorf(api.CodeInternal, "the host's key %q is missing, but there is a wanted state", path).
			WithHint("put the key back, or move %q and %q away to start anew", stateFile, copyFile)
	case errors.Is(err, mesh.ErrBadKey):
		err = api.Errorf(api.CodeInternal, "%v", err).WithHint("nothing was touched; put the key back, for the peers know this host by it")
	case errors.Is(err, ErrExposedKey):
		err = api.Errorf(api.CodeInternal, "%v", err).WithHint("a program that read it can pose as this host; run: chmod 600 %q", path)
	}
	d.key = key
	return err
}

func writeKey(path string, key mesh.PrivateKey) error {
	if err := owned.Replace(path, []byte(key.Reveal()+"\n")); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	return nil
}

// place finds the host's own addresses: those given, else derived from its key.
func (d *Daemon) place() (err error) {
	d.mesh, err = d.placed(d.opts.Prefixes)
	return err
}

// placed is the mesh with these prefixes.
func (d *Daemon) placed(prefixes mesh.Prefixes) (m identity, err error) {
	m = identity{prefixes: prefixes, key: d.key.Public()}
	free := func(netip.Addr) bool { return false }
	if m.own, err = m.prefixes.Propose(m.key, free); err != nil {
		return m, err
	}
	given := map[*netip.Addr]bool{}
	for _, a := range d.opts.Addresses {
		if err := m.prefixes.Check(a); err != nil {
			return m, api.Errorf(api.CodeBadAddress, "the host's own address: %v", err).
				WithHint("leave --address out, or take %v and %v", m.own[0], m.own[1])
		}
		place := &m.own[0]
		if a.Is6() {
			place = &m.own[1]
		}
		if given[place] {
			return m, api.Errorf(api.CodeBadAddress, "the host's own address %v is a second of its family", a).
				WithHint("give one --address per family")
		}
		*place, given[place] = a, true
	}
	return m, nil
}

// Run keeps the host equal to the wanted state until ctx ends, and then leaves
// it as it was found. It ends earlier, with an error, only when the mesh
// interface can't be made in the first place.
func (d *Daemon) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	l := newLoop(d)
	g.Go(func() error { return l.run(ctx) })
	g.Go(func() error { return l.rebinds(ctx) })
	g.Go(func() error { return d.keep(ctx) })
	g.Go(func() error { return d.resolve(ctx) })
	g.Go(func() error { return d.watch(ctx, d.opts.Host.Observer) })
	if d.opts.Host.Others != nil {
		g.Go(func() error { return d.lookAtOthers(ctx) })
	}
	return g.Wait()
}

// compile compiles for the time now, and at less cost what before was compiled of, too.
func (d *Daemon) compile(before *policy.Ruleset, m policy.Mesh, h policy.Host) (*policy.Ruleset, error) {
	return before.Recompile(m, h, d.clock.now())
}

// condition returns what the loop found last, and a channel that is closed when
// there is something newer.
func (d *Daemon) condition() (condition, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now, d.changed
}

func (d *Daemon) publish(c condition) {
	d.mu.Lock()
	before := d.now.state
	d.now = c
	close(d.changed)
	d.changed = make(chan struct{})
	d.mu.Unlock()
	if before != c.state {
		d.journal.Record(events.Event{Kind: events.State, Message: before + " became " + c.state})
	}
}

// logEvent writes an event to the log; what needs a person is a warning.
func (d *Daemon) logEvent(e events.Event) {
	level := slog.LevelInfo
	switch e.Kind {
	case events.Problem, events.Denied, events.Repair:
		level = slog.LevelWarn
	}
	d.opts.Logger.Log(context.Background(), level, e.Message, "event", e.Kind)
}

// Record adds an event to the journal.
func (d *Daemon) Record(e events.Event) { d.journal.Record(e) }

// Since returns the remembered events after seq, and a channel that is closed
// when there are newer ones.
func (d *Daemon) Since(seq uint64) ([]events.Event, <-chan struct{}) { return d.journal.Since(seq) }
