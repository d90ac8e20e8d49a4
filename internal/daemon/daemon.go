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
	Languages map[string]explain.Language // optional

	// NewTunnel starts the WireGuard device around the host's tunnel device.
	NewTunnel func(tun.Device, mesh.PrivateKey, uint16) (reconcile.Tunnel, error) // optional: tunnel.New
	Tick      time.Duration                                                       // optional: between looks at the host, DefaultTick
	Wait      time.Duration                                                       // optional: a command's time limit, DefaultWait
	Wall      func() time.Time                                                    // optional: the wall clock, time.Now
	Random    io.Reader                                                           // optional: crypto/rand.Reader
	Resolve   func(context.Context, string) ([]netip.Addr, error)                 // optional: the host's resolver
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

// complete fills in the defaults, and refuses options that can't work.
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

// setDefault gives a value that was left out its standard one.
func setDefault[T comparable](value *T, standard T) {
	var zero T
	if *value == zero {
		*value = standard
	}
}

// wireguard makes the real tunnel: wireguard-go around the guard, over sockets that outlast
// it, so that a tunnel that is made again has the same UDP port. It is the place to hand in
// another conn.Bind.
func (d *Daemon) wireguard(dev tun.Device, key mesh.PrivateKey, port uint16) (reconcile.Tunnel, error) {
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
	journal *events.Journal
	learned *learned.Book
	// sockets keep the UDP port from one tunnel to the next.
	sockets *tunnel.Sockets

	gate    *reconcile.Gate
	loop    *reconcile.Loop
	names   *resolve.Resolver
	explain *explain.Explainer
}

// New reads the wanted state and takes the state directory. It doesn't touch
// the host; Run does. Close gives the directory back.
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
		Narrow:          d.gate.Limit,
		Changed:         d.wantedChanged,
		SettingsChanged: d.settingsChanged,
		Prefixes:        o.Prefixes, Addresses: o.Addresses, Renumber: o.Renumber,
		Settings: o.Settings, Endpoint: o.Endpoint, DNS: o.DNS, ListenPort: o.ListenPort,
		Wait: d.saveWithin(), Tick: o.Tick, Wall: o.Wall, Random: o.Random,
	})
	if err != nil {
		return nil, errors.Join(err, dir.Release())
	}
	d.id = d.wanted.Identity()
	d.openLearned()
	newTunnel := o.NewTunnel
	if newTunnel == nil {
		newTunnel = d.wireguard
	}
	d.loop = reconcile.New(reconcile.Options{
		Host: o.Host, Gate: d.gate, Wanted: d.wanted, Learned: d.learned,
		NewTunnel: newTunnel, Record: d.journal.Record, Logger: o.Logger,
		Interface: o.Interface, MTU: o.MTU, ListenPort: o.ListenPort, Tick: o.Tick, Wall: o.Wall,
	})
	d.names = resolve.New(resolve.Options{
		Names: d.endpointNames, Learned: d.learned, Lookup: o.Resolve,
		Mesh: d.id.Prefixes, Device: d.hasDevice,
		Changed: d.loop.Moved, Save: d.saveLearned, Logger: o.Logger,
	})
	d.explain = explain.New(explain.Options{
		Host: o.Host, Wanted: d.wanted, Learned: d.learned,
		Held: d.loop.State, InForce: d.gate.InForce, NameFailure: d.names.Failure,
		Languages: o.Languages, StateDir: o.StateDir, Wall: o.Wall, Record: d.journal.Record,
	})
	return d, nil
}

// wantedChanged has the names of endpoints looked up that came to be wanted. It is called
// while New reads the document, too, when there is no resolver yet.
func (d *Daemon) wantedChanged(before, doc *wanted.Document) {
	if d.names != nil && before != nil && !slices.Equal(peersNames(before), peersNames(doc)) {
		d.names.Renamed()
	}
}

// endpointNames returns the names in peers' endpoints and in this host's own.
func (d *Daemon) endpointNames() (peers []string, own string) {
	return peersNames(d.wanted.Document()), d.wanted.Settings().Endpoint.Name()
}

// hasDevice reports whether this host or a peer has the mesh address a.
func (d *Daemon) hasDevice(a netip.Addr) bool {
	return slices.Contains(d.id.Own[:], a) || slices.ContainsFunc(d.wanted.Document().Peers, func(p mesh.Peer) bool {
		return slices.Contains(p.Addresses[:], a)
	})
}

// peersNames returns the names in the endpoints of peers, which may repeat.
func peersNames(doc *wanted.Document) []string {
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

// settingsChanged has other settings take effect: this host's own name is looked up, and
// the loop asks which of its addresses count as this host's from outside.
func (d *Daemon) settingsChanged() {
	d.names.Renamed()
	d.loop.Wake()
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
