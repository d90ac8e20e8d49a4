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
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/explain"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/reconcile"
	"github.com/meshhelper/meshhelper/internal/resolve"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// Options configure a Daemon.
type Options struct {
	Host     host.Host // required
	StateDir string    // required: created if missing, with mode 0700
	// Logger must not block, because the guard and the loop write to it. A file, a pipe or a
	// terminal can, so a logfile.Queue must be in front of it.
	Logger *slog.Logger // required

	Version    string        // optional: shown in status
	Interface  string        // optional: the mesh interface's name; the host chooses one
	MTU        int           // optional: of the mesh interface in bytes; DefaultMTU
	ListenPort uint16        // optional: WireGuard's UDP port; 0 lets the system choose
	Prefixes   mesh.Prefixes // optional: mesh.DefaultPrefixes
	// Addresses are the host's own mesh addresses, at most one per family.
	Addresses []netip.Addr // optional: derived from the host's key
	// Renumber says that the prefixes were changed on purpose: peers with addresses outside
	// them get new ones, and for a day nothing to the old ones leaves the host in clear.
	// Without it New refuses a document with such peers.
	Renumber bool
	// Endpoint is where peers reach this host, for their configurations.
	Endpoint mesh.Endpoint // optional: the uplink's address
	// DNS has the resolvers for the peers' configurations.
	DNS []netip.Addr // optional: public ones of a family that the host reaches

	// Settings say for each setting among the options above whether a flag, the saved
	// settings or the default gave its value.
	Settings wanted.StartSettings // optional: nothing was set

	// Languages are the rule languages by name, including the host's own (Host.Language).
	Languages map[string]explain.Language // optional

	// NewTunnel starts the WireGuard device around the host's tunnel device.
	NewTunnel func(tun.Device, mesh.PrivateKey, uint16) (reconcile.Tunnel, error) // optional: tunnel.NewDevice
	Tick      time.Duration                                                       // optional: the longest time between rounds of the loop, DefaultTick
	Wait      time.Duration                                                       // optional: within which a change is answered, DefaultWait
	Wall      func() time.Time                                                    // optional: the wall clock, time.Now
	Random    io.Reader                                                           // optional: crypto/rand.Reader
	Resolve   func(context.Context, string) ([]netip.Addr, error)                 // optional: the host's resolver

	files wanted.FileSystem // optional: where the wanted state is saved
}

// Defaults of Options.
const (
	// DefaultMTU is the MTU of the mesh interface in bytes: what is left of 1500
	// by WireGuard over IPv6 (40 + 8 + 32 bytes).
	DefaultMTU = 1420
	// DefaultTick is how long a change that the OS doesn't report, such as a rule that another
	// program removed, may stay unnoticed. A round that finds nothing is cheap enough for it.
	DefaultTick = 3 * time.Second
	// DefaultWait is how long a command waits at most until its change is in force.
	DefaultWait = 10 * time.Second
)

// complete sets the defaults, and returns an error if a required option is missing or the
// prefixes can't be used.
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
	return o.Prefixes.Validate()
}

// setDefault sets a zero value to def.
func setDefault[T comparable](value *T, def T) {
	var zero T
	if *value == zero {
		*value = def
	}
}

// newTunnel is the default of Options.NewTunnel: wireguard-go around the guard, over sockets that
// outlast it, so that a tunnel that is made again has the same UDP port.
func (d *Daemon) newTunnel(dev tun.Device, key mesh.PrivateKey, port uint16) (reconcile.Tunnel, error) {
	return tunnel.NewDevice(tunnel.Options{
		TUN: dev, PrivateKey: key, ListenPort: port, Logger: d.opts.Logger.With("part", "wireguard"),
		Addresses: d.id.Own.List(), Bind: d.sockets,
	})
}

// Daemon keeps one host equal to its wanted state. It implements api.Service, by which the
// local socket's clients ask and change it; those methods may be called by any goroutine.
type Daemon struct {
	opts    Options
	dir     *wanted.Dir // the lock on the state directory
	wanted  *wanted.State
	id      wanted.Identity // fixed by New
	journal *events.Journal
	learned *learned.Book
	// sockets keep WireGuard's UDP port from one tunnel to the next.
	sockets *tunnel.Sockets

	gate    *reconcile.Gate
	loop    *reconcile.Loop
	names   *resolve.Resolver
	explain *explain.Explainer
}

// New locks the state directory and reads the wanted state from it. It doesn't touch the host;
// Run does. It fails if another helper has the directory, or if the document in it isn't valid
// or doesn't fit the prefixes. Close releases the lock.
func New(o Options) (*Daemon, error) {
	if err := o.complete(); err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	d := &Daemon{opts: o, sockets: tunnel.NewSockets(o.Logger.With("part", "wireguard"))}
	d.journal = events.NewJournal(o.Wall, d.logEvent)
	d.gate = reconcile.NewGate(func(err error) {
		d.journal.Record(events.Event{Kind: events.Problem, Message: fmt.Sprintf("narrow at the guard, which is closed now: %v", err)})
	})
	dir, err := wanted.Lock(o.StateDir)
	if err != nil {
		return nil, err
	}
	d.dir = dir
	d.journal.Open(filepath.Join(o.StateDir, eventsFile), o.Logger)
	d.wanted, err = wanted.Open(wanted.Options{
		Dir: dir, Logger: o.Logger, Record: d.journal.Record,
		Narrow:          d.gate.Limit, // at once, before the loop knows of the change
		Changed:         d.wantedChanged,
		SettingsChanged: d.settingsChanged,
		Prefixes:        o.Prefixes, Addresses: o.Addresses, Renumber: o.Renumber,
		Settings: o.Settings, Endpoint: o.Endpoint, DNS: o.DNS, ListenPort: o.ListenPort,
		Wait: d.saveLimit(), Tick: o.Tick, Wall: o.Wall, Random: o.Random, Files: o.files,
	})
	if err != nil {
		return nil, errors.Join(err, dir.Release())
	}
	d.id = d.wanted.Identity()
	d.openLearned()
	newTunnel := o.NewTunnel
	if newTunnel == nil {
		newTunnel = d.newTunnel
	}
	d.loop = reconcile.New(reconcile.Options{
		Host: o.Host, Gate: d.gate, Wanted: d.wanted, Learned: d.learned,
		NewTunnel: newTunnel, Record: d.journal.Record, Logger: o.Logger,
		Interface: o.Interface, MTU: o.MTU, ListenPort: o.ListenPort, Tick: o.Tick, Wall: o.Wall,
	})
	d.names = resolve.New(resolve.Options{
		Names: d.endpointNames, Learned: d.learned, Lookup: o.Resolve,
		Mesh: d.id.Prefixes, Device: d.wanted.HasAddress,
		Changed: d.loop.Moved, Save: d.saveLearned, Logger: o.Logger,
	})
	d.explain = explain.New(explain.Options{
		Host: o.Host, Wanted: d.wanted, Learned: d.learned,
		Held: d.loop.State, InForce: d.gate.InForce, NameFailure: d.names.Failure,
		Languages: o.Languages, StateDir: o.StateDir, Wall: o.Wall, Record: d.journal.Record, Logger: o.Logger,
	})
	return d, nil
}

// wantedChanged has names looked up that a change brought into peers' endpoints. wanted.Open
// calls it, too, when there is no resolver yet.
func (d *Daemon) wantedChanged(before, doc *wanted.Document) {
	if d.names != nil && before != nil && !slices.Equal(peerNames(before), peerNames(doc)) {
		d.names.Renamed()
	}
}

// endpointNames returns the names that the resolver looks up: those in peers' endpoints, and
// the one in this host's own endpoint, or "".
func (d *Daemon) endpointNames() (peers []string, own string) {
	return peerNames(d.wanted.Document()), d.wanted.Settings().Endpoint.Name()
}

// peerNames returns the names in the endpoints of peers; they may repeat.
func peerNames(doc *wanted.Document) []string {
	var out []string
	for i := range doc.Peers {
		if doc.Peers[i].Endpoint == "" {
			continue
		}
		if e, err := mesh.ParseEndpoint(doc.Peers[i].Endpoint, 0); err == nil && e.Name() != "" {
			out = append(out, e.Name())
		}
	}
	return out
}

// settingsChanged puts changed settings into force: the resolver looks up this host's own name,
// and the next round compiles the policy with the addresses of the new endpoint.
func (d *Daemon) settingsChanged() {
	d.names.Renamed()
	d.loop.Wake()
}

// The daemon's files in the state directory, besides those of package wanted: the journal of
// events (package events), and what was learned of peers (package learned).
const (
	eventsFile  = "events.jsonl"
	learnedFile = "learned.json"
)

// flushLimit is how long Run and Close each wait at the end for a disk that hangs. What isn't
// written by then is lost: events, learned endpoints and totals.
const flushLimit = time.Second

// Close releases the UDP port and the state directory. Call it once, after Run has returned.
func (d *Daemon) Close() error {
	d.sockets.Release()
	d.journal.Close(flushLimit)
	return d.dir.Release()
}

// Run keeps the host equal to the wanted state until ctx ends, and then restores the host to how
// it was found, for which it has host.LeaveLimit. It ends earlier only with an error: if the mesh
// interface can't be created at the start. Call it once.
func (d *Daemon) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer d.finish()
		return d.loop.Run(ctx)
	})
	g.Go(func() error { return d.wanted.Run(ctx, d.loop.Wake) })
	g.Go(func() error { return d.keepLearned(ctx) })
	g.Go(func() error { return d.names.Run(ctx) })
	g.Go(func() error { return d.explain.Run(ctx) })
	return g.Wait()
}

// logEvent writes an event to the log, at level warning if a person may have to act.
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

// Since returns the events after the sequence number seq, as far as the journal still has them,
// and a channel that is closed when there are newer ones.
func (d *Daemon) Since(seq uint64) ([]events.Event, <-chan struct{}) { return d.journal.Since(seq) }
