package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host/hostfake"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/reconcile"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// rig is a daemon on a fake host and with a fake tunnel, in a synctest bubble, with a wall
// clock that a test can set apart from the bubble's time.
type rig struct {
	t      *testing.T
	dir    string
	host   *hostfake.Host
	disk   changingDisk
	tunnel *fakeTunnel // the newest
	d      *Daemon
	stop   func() // stops the daemon; an error fails the test
	// stopped stops the daemon and returns its error.
	stopped func() error
	// portTaken lets NewTunnel fail.
	portTaken atomic.Bool

	mu       sync.Mutex
	offset   time.Duration // of the wall clock from the bubble's time
	resolved string        // see resolveTo
}

// inBubble runs test with a running daemon, in a bubble with its own time.
func inBubble(t *testing.T, test func(t *testing.T, r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.start()
		defer r.end()
		test(t, r)
	})
}

func newRig(t *testing.T) *rig {
	return &rig{t: t, dir: filepath.Join(t.TempDir(), "state"), host: hostfake.New(), disk: changingDisk{fs: wanted.DiskFiles{}}}
}

func (r *rig) options() Options {
	return Options{
		Host: r.host.Host(), StateDir: r.dir, Logger: slog.New(slog.DiscardHandler),
		Wall: r.wall, files: &r.disk,
		NewTunnel: func(dev tun.Device, _ mesh.PrivateKey, _ uint16) (reconcile.Tunnel, error) {
			if r.portTaken.Load() {
				return nil, errors.Join(errors.New("start WireGuard: address already in use"), dev.Close())
			}
			r.tunnel = &fakeTunnel{dev: dev, done: make(chan struct{})}
			return r.tunnel, nil
		},
		Resolve: func(context.Context, string) ([]netip.Addr, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			var out []netip.Addr
			for text := range strings.SplitSeq(r.resolved, ",") {
				a, err := netip.ParseAddr(text)
				if err != nil {
					return nil, err
				}
				out = append(out, a)
			}
			return out, nil
		},
	}
}

// resolveTo sets the addresses that every name resolves to, separated by commas; with "" each
// lookup fails.
func (r *rig) resolveTo(address string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resolved = address
}

func (r *rig) wall() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Round(0).Add(r.offset)
}

// setWall moves the wall clock, as a person or NTP does.
func (r *rig) setWall(by time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.offset += by
}

// start makes and runs the daemon, and waits for its first round.
func (r *rig) start() {
	r.t.Helper()
	r.startWith(r.options())
}

func (r *rig) startWith(o Options) {
	r.t.Helper()
	r.disk.set(wanted.DiskFiles{})
	d, err := New(o)
	if err != nil {
		r.t.Fatal(err)
	}
	r.d = d
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- d.Run(ctx) }()
	r.stopped = func() error {
		cancel()
		r.stop = nil
		return errors.Join(<-ended, d.Close())
	}
	r.stop = func() {
		if err := r.stopped(); err != nil {
			r.t.Errorf("Run: %v", err)
		}
	}
	synctest.Wait()
}

func (r *rig) end() {
	if r.stop != nil {
		r.stop()
	}
}

// add adds a peer with a key made from its name; an error fails the test.
func (r *rig) add(name string) api.Peer {
	r.t.Helper()
	changed, err := r.d.AddPeer(r.t.Context(), api.NewPeer{Name: name, PublicKey: keyOf(name)})
	if err != nil {
		r.t.Fatalf("AddPeer(%s): %v", name, err)
	}
	return changed.Peer
}

// allow grants a permission for a length of time, or without an end if length is "".
func (r *rig) allow(name, permission, length string) (api.Changed, error) {
	c := api.PermissionChange{Allowed: true}
	if length != "" {
		c.For = &length
	}
	return r.d.ChangePeer(r.t.Context(), name, api.PeerChange{Permissions: map[string]api.PermissionChange{permission: c}})
}

func (r *rig) mustAllow(name, permission, length string) {
	r.t.Helper()
	if _, err := r.allow(name, permission, length); err != nil {
		r.t.Fatalf("allow %s %s: %v", name, permission, err)
	}
}

func (r *rig) deny(name, permission string) (api.Changed, error) {
	return r.d.ChangePeer(r.t.Context(), name, api.PeerChange{
		Permissions: map[string]api.PermissionChange{permission: {}},
	})
}

// loaded returns the permissions that the host's ruleset gives a peer, none for an unknown one.
func (r *rig) loaded(name string) mesh.Permissions {
	r.t.Helper()
	rules := r.host.Loaded()
	if rules == nil {
		return 0
	}
	for _, p := range rules.Peers() {
		if p.Name == name {
			return p.Permissions
		}
	}
	return 0
}

func (r *rig) wantLoaded(name string, want mesh.Permissions) {
	r.t.Helper()
	if got := r.loaded(name); got != want {
		r.t.Errorf("the host lets %s do %v, want %v", name, got, want)
	}
}

// after lets time pass, and then waits until all goroutines are blocked.
func (r *rig) after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// setDisk replaces the disk under a running daemon. The next one has a good disk again.
func (r *rig) setDisk(fs wanted.FileSystem) { r.disk.set(fs) }

// changingDisk is a disk that a test replaces.
type changingDisk struct {
	mu sync.Mutex
	fs wanted.FileSystem
}

func (c *changingDisk) set(fs wanted.FileSystem) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fs = fs
}

func (c *changingDisk) get() wanted.FileSystem {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fs
}

func (c *changingDisk) WriteTemp(dir, name string, content []byte) (string, error) {
	return c.get().WriteTemp(dir, name, content)
}
func (c *changingDisk) Rename(from, to string) error { return c.get().Rename(from, to) }
func (c *changingDisk) Remove(path string) error     { return c.get().Remove(path) }
func (c *changingDisk) SyncDir(dir string) error     { return c.get().SyncDir(dir) }

// clockInterval is how often the time is saved while a permission has an end.
const clockInterval = time.Minute

// readDocument reads a document that the daemon saved.
func readDocument(path string) (*wanted.Document, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return wanted.Decode(text)
}

// events returns the messages of one kind.
func (r *rig) events(kind events.Kind) []string {
	all, _ := r.d.Since(0)
	var out []string
	for _, e := range all {
		if e.Kind == kind {
			out = append(out, e.Message)
		}
	}
	return out
}

// keyOf returns a valid public key made from a text.
func keyOf(text string) string {
	var private mesh.PrivateKey
	copy(private[:], text)
	return private.Public().String()
}

func wantCode(t *testing.T, err error, code string) *api.Error {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("error %v, want code %s", err, code)
	}
	if e.Hint == "" {
		t.Errorf("error %q has no hint", e.Message)
	}
	return e
}

// fakeTunnel is a WireGuard device without packets.
type fakeTunnel struct {
	dev  tun.Device
	done chan struct{}
	once sync.Once

	mu      sync.Mutex
	peers   []tunnel.Peer
	stats   map[mesh.PublicKey]tunnel.PeerStats
	reads   int // of Stats
	self    []netip.AddrPort
	rebinds int
	silent  error // Listening's result
	refuse  error // Sync's result
	// hang, if not nil, holds up Close until it is closed.
	hang chan struct{}
	// stuck, if not nil, holds up Sync and Stats until it is closed.
	stuck chan struct{}
	// rebinding, if not nil, is what Rebind waits for, unless the tunnel ends.
	rebinding chan struct{}
}

// waitStuck waits while the tunnel hangs.
func (f *fakeTunnel) waitStuck() {
	f.mu.Lock()
	stuck := f.stuck
	f.mu.Unlock()
	if stuck != nil {
		<-stuck
	}
}

// getStuck has Sync and Stats hang, until free is called.
func (f *fakeTunnel) getStuck() (free func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	stuck := make(chan struct{})
	f.stuck = stuck
	return func() { close(stuck) }
}

func (f *fakeTunnel) Sync(want []tunnel.Peer) error {
	f.waitStuck()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		return f.refuse
	}
	f.peers = want
	return nil
}

func (f *fakeTunnel) Stats() (map[mesh.PublicKey]tunnel.PeerStats, error) {
	f.waitStuck()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads++
	return f.stats, nil
}

func (f *fakeTunnel) setStats(key string, s tunnel.PeerStats) {
	f.mu.Lock()
	defer f.mu.Unlock()
	public, err := mesh.ParsePublicKey(key)
	if err != nil {
		panic(err)
	}
	f.stats = map[mesh.PublicKey]tunnel.PeerStats{public: s}
}

func (f *fakeTunnel) ListenPort() uint16 { return 51820 }

func (f *fakeTunnel) SetOwnEndpoints(endpoints []netip.AddrPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.self = endpoints
}

func (f *fakeTunnel) Listening() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.silent
}

func (f *fakeTunnel) setSilent(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.silent = err
}

func (f *fakeTunnel) Rebind(context.Context) error {
	f.mu.Lock()
	f.rebinds++
	wait := f.rebinding
	f.mu.Unlock()
	if wait == nil {
		return nil
	}
	select {
	case <-wait:
		return nil
	case <-f.done:
		return context.Canceled
	}
}

func (f *fakeTunnel) Done() <-chan struct{} { return f.done }

func (f *fakeTunnel) Close() {
	if f.hang != nil {
		<-f.hang
	}
	f.once.Do(func() {
		close(f.done)
		f.dev.Close()
	})
}

func (f *fakeTunnel) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.peers)
}
