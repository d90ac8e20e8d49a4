package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
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
	Settings wanted.StartSettings // optional: nothing was set

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
		Addresses: d.id.Own.List(), Bind: d.sockets,
	})
}

// Daemon keeps one host equal to its wanted state. It is the api.Service of the
// socket.
type Daemon struct {
	opts    Options
	dir     *wanted.Dir
	wanted  *wanted.State
	id      wanted.Identity
	gate    gate
	journal *events.Journal
	learned *learned.Book
	// sockets keep the UDP port from one tunnel to the next.
	sockets *tunnel.Sockets

	// full says that the state folder takes nothing, or is nil.
	full atomic.Pointer[host.Problem]
	// looking is held, by a value in it, during a look at other software.
	looking chan struct{}

	// wake wakes the loop for a change, moved for something on the host, and renamed the
	// resolver for endpoints given by name.
	wake, moved, renamed chan struct{}

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
		opts:    o,
		looking: make(chan struct{}, 1),
		wake:    make(chan struct{}, 1),
		moved:   make(chan struct{}, 1),
		renamed: make(chan struct{}, 1),
		changed: make(chan struct{}),
		now:     condition{state: api.Starting},

		unresolved: map[string]error{},
	}
	d.journal = events.NewJournal(o.Wall, d.logEvent)
	d.gate.compile = d.compile
	d.gate.failed = func(err error) {
		d.journal.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("narrow at the guard, which is closed now: %v", err)})
	}
	d.sockets = tunnel.NewSockets(o.Logger.With("part", "wireguard"))
	if d.opts.NewTunnel == nil {
		d.opts.NewTunnel = d.wireguard
	}
	dir, err := wanted.Lock(o.StateDir)
	if err != nil {
		return nil, err
	}
	d.dir = dir
	d.journal.Open(filepath.Join(o.StateDir, eventsFile), o.Logger)
	d.wanted, err = wanted.Open(wanted.Options{
		Dir: dir, Logger: o.Logger, Record: d.journal.Record,
		Narrow: d.gate.limit,
		Changed: func(before, doc *wanted.Document) {
			if before != nil && namesChanged(before, doc) {
				poke(d.renamed)
			}
		},
		SettingsChanged: func() {
			poke(d.renamed)
			poke(d.wake)
		},
		Prefixes: o.Prefixes, Addresses: o.Addresses, Renumber: o.Renumber,
		Settings: o.Settings, Endpoint: o.Endpoint, DNS: o.DNS, ListenPort: o.ListenPort,
		Wait: d.saveWithin(), Tick: o.Tick, Wall: o.Wall, Random: o.Random,
	})
	if err != nil {
		return nil, errors.Join(err, dir.Release())
	}
	d.id = d.wanted.Identity()
	d.openLearned()
	return d, nil
}

// The daemon's files in the state directory, beside what is wanted: the journal, and what
// was learned of peers.
const (
	eventsFile  = "events.jsonl"
	learnedFile = "learned.json"
)

// flushLimit is how long the end waits for a disk that hangs.
const flushLimit = time.Second

// Close gives the UDP port and the state directory back. Call it after Run.
func (d *Daemon) Close() error {
	d.sockets.Release()
	d.journal.Close(flushLimit)
	return d.dir.Release()
}

// Run keeps the host equal to the wanted state until ctx ends, and then leaves
// it as it was found. It ends earlier, with an error, only when the mesh
// interface can't be made in the first place.
func (d *Daemon) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	l := newLoop(d)
	g.Go(func() error { return l.run(ctx) })
	g.Go(func() error { return l.rebinds(ctx) })
	g.Go(func() error { return d.wanted.Run(ctx, func() { poke(d.wake) }) })
	g.Go(func() error { return d.keepLearned(ctx) })
	g.Go(func() error { return d.resolve(ctx) })
	g.Go(func() error { return d.watch(ctx, d.opts.Host.Observer) })
	if d.opts.Host.Others != nil {
		g.Go(func() error { return d.lookAtOthers(ctx) })
	}
	return g.Wait()
}

// compile compiles for the time now, and at less cost what before was compiled of, too.
func (d *Daemon) compile(before *policy.Ruleset, m policy.Mesh, h policy.Host) (*policy.Ruleset, error) {
	return before.Recompile(m, h, d.wanted.Now())
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
