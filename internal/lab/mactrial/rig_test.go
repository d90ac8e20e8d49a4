package mactrial

// The rig of all tests here: a simulated Mac, and the helper that runs on it.

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/host/macos"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/reconcile"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// generous is how long a test waits for an expected event.
const generous = 30 * time.Second

const (
	uplink, lan, vpn = "en0", "en5", "utun9"
	anchor           = "com.apple/org.meshhelper"
	everything       = mesh.Incoming | mesh.Routing | mesh.LAN
)

// foreignAnchor is another product's anchor, which must not change.
const foreignAnchor, foreignRules = "com.apple/200.other", "block drop in quick on en7 all\npass out on en7 all\n"

// A rig is a Mac, with or without a running helper.
type rig struct {
	t   testing.TB
	mac *simmac.Mac
	dir string

	// onStep is called in each call of step, which blocks the helper meanwhile. steps
	// holds the step names of the helper's process, and killAt is the number of the call
	// in which it is killed.
	onStep func()
	steps  []string
	killAt int
	// probing is held while packets are sent, and protects the three fields above.
	probing sync.Mutex
	// dead ends the waits for a helper that was killed.
	dead   context.Context
	buried context.CancelFunc
	rounds atomic.Int64 // of the daemon's loop
	// tick is the interval of the daemon's loop, which notices sleep on its ticks.
	tick time.Duration

	proc *simmac.Process
	d    *daemon.Daemon
	tun  atomic.Pointer[tap]          // the newest device, on the Mac's side of the guard
	wg   atomic.Pointer[tunnelDevice] // and the other side
	stop func()                       // ends the helper; nil if none runs

	peers map[string][]netip.Addr
	may   map[string]mesh.Permissions
	own   []netip.Addr
	port  uint16 // of the last flow
	binds atomic.Int32
	// hang, if not nil, delays the close of the tunnel device until it is closed.
	hang chan struct{}
	// noTunnel makes the creation of a tunnel fail; tunnelsRefused counts the failures.
	noTunnel       atomic.Bool
	tunnelsRefused atomic.Int32
}

// newRig returns a Mac with Wi-Fi to the internet, a wired LAN, another VPN and
// another product's rules. No helper runs.
func newRig(t testing.TB) *rig {
	t.Helper()
	g := &rig{t: t, dir: filepath.Join(t.TempDir(), "state"), tick: 20 * time.Millisecond,
		mac: simmac.New(simmac.Options{Seed: 5}), peers: map[string][]netip.Addr{}, may: map[string]mesh.Permissions{}}
	g.must(g.mac.AddEthernet(uplink, []string{"203.0.113.1/24", "2001:db8:1::1/64"}, "203.0.113.254", "2001:db8:1::fe"))
	g.must(g.mac.AddEthernet(lan, []string{"192.168.77.1/24", "2001:db8:5::1/64"}))
	g.must(g.mac.LoadAnchor(foreignAnchor, foreignRules))
	g.addVPN()
	t.Cleanup(func() {
		if g.stop != nil {
			g.stop()
		}
		if bad := g.mac.PF.Misuse(); bad != nil {
			t.Errorf("misuse of pfctl: %q", bad)
		}
	})
	return g
}

// addVPN adds another VPN's tunnel with a network behind it.
func (g *rig) addVPN() {
	g.t.Helper()
	_, err := g.mac.Kernel.CreateTunnel(vpn, 1400)
	g.must(err)
	n, err := darwin.Observe(g.mac)
	g.must(err)
	for _, a := range []string{"10.99.0.1/32", "2001:db8:99ff::1/128"} {
		g.must(g.mac.Kernel.AddAddress(vpn, netip.MustParsePrefix(a)))
	}
	for _, a := range []string{"198.18.0.0/16", "2001:db8:9900::/48"} {
		g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: netip.MustParsePrefix(a), Index: n.Interface(vpn).Index,
			Flags: darwin.RouteUp | darwin.RouteStatic}))
	}
}

func (g *rig) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

// step is called by a [simmac.Stepper]: it kills the helper in the call that killAt
// names, and then calls onStep.
func (g *rig) step(name string) {
	g.probing.Lock()
	defer g.probing.Unlock()
	g.steps = append(g.steps, name)
	if len(g.steps) == g.killAt {
		g.proc.Kill()
	}
	if g.onStep != nil {
		g.onStep()
	}
}

// killIn has the helper killed in the nth call of step from now on, or never if n is 0.
// It returns the number of calls so far.
func (g *rig) killIn(n int) int {
	g.probing.Lock()
	defer g.probing.Unlock()
	if g.killAt = 0; n > 0 {
		g.killAt = len(g.steps) + n
	}
	return len(g.steps)
}

// watchSteps sets onStep.
func (g *rig) watchSteps(f func()) {
	g.probing.Lock()
	defer g.probing.Unlock()
	g.onStep = f
}

// begin creates a process whose daemon isn't running yet.
func (g *rig) begin() error {
	g.proc = g.mac.Process()
	g.probing.Lock()
	g.steps, g.killAt = nil, 0
	g.probing.Unlock()
	g.dead, g.buried = context.WithCancel(context.Background())
	log := slog.New(slog.DiscardHandler)
	stepper := simmac.NewStepper(g.proc, g.proc, g.step)
	platform, err := macos.New(macos.Options{
		StateDir: g.dir, Runner: stepper, Kernel: stepper, CreateTUN: g.createTUN, Log: log, Step: stepper.Step})
	if err != nil {
		return err
	}
	g.d, err = daemon.New(daemon.Options{
		Host: platform.Host(), StateDir: g.dir, Logger: log, Tick: g.tick,
		Wall:      func() time.Time { return g.mac.Now() },
		NewTunnel: g.newTunnel,
	})
	return err
}

// start starts the helper and waits until it enforces or has died.
func (g *rig) start() {
	g.t.Helper()
	if g.d == nil {
		g.must(g.begin())
	}
	d, proc := g.d, g.proc
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	go endWaits(g.dead, proc, g.buried)
	g.stop = func() {
		cancel()
		err := errors.Join(<-ended, d.Close())
		if err != nil && !proc.Killed() {
			g.t.Errorf("the helper ended with %v", err)
		}
		g.buried()
		g.stop, g.d = nil, nil
	}
	g.wait("the helper enforces", func() bool { return proc.Killed() || d.Status().State == api.Enforcing })
	own := d.Status().Addresses
	g.probing.Lock()
	defer g.probing.Unlock()
	g.own = own
}

// endWaits ends the waits for a process once it was killed.
func endWaits(ctx context.Context, proc *simmac.Process, ended func()) {
	for ctx.Err() == nil {
		if time.Sleep(time.Millisecond); proc.Killed() {
			ended()
		}
	}
}

// wait waits until done returns true.
func (g *rig) wait(what string, done func() bool) {
	g.t.Helper()
	for until := time.Now().Add(generous); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			g.t.Fatalf("timed out waiting until %s: %+v", what, g.d.Status())
		}
	}
}

// add adds a peer without permissions.
func (g *rig) add(name string, kind mesh.Kind) {
	g.t.Helper()
	var key mesh.PrivateKey
	copy(key[:], "the key of peer "+name)
	changed, err := g.d.AddPeer(g.t.Context(), api.NewPeer{Name: name, PublicKey: key.Public().String(), Kind: kind})
	g.must(err)
	g.peers[name] = changed.Peer.Addresses
	g.permit(name, 0)
}

// permit sets a peer's permissions to exactly may.
func (g *rig) permit(name string, may mesh.Permissions) {
	g.t.Helper()
	g.must(g.try(name, may))
	g.may[name] = may
}

func (g *rig) try(name string, may mesh.Permissions) error {
	c := map[string]api.PermissionChange{}
	for _, p := range mesh.AllPermissions {
		c[p.Name] = api.PermissionChange{Allowed: may.Has(p.Set)}
	}
	_, err := g.d.ChangePeer(g.dead, name, api.PeerChange{Permissions: c})
	return err
}

// rules compiles the policy from the Mac as the test set it up, not from the facts that
// the helper observed.
func (g *rig) rules(may map[string]mesh.Permissions, found policy.Families) *policy.Ruleset {
	g.t.Helper()
	host := policy.Host{Interface: g.device().name, Forwarding: policy.Families{IPv4: true, IPv6: true}, FoundForwarding: found,
		Interfaces: []policy.Interface{{Name: g.device().name}}}
	for _, a := range g.own {
		host.Interfaces[0].Addresses = append(host.Interfaces[0].Addresses, netip.PrefixFrom(a, a.BitLen()))
	}
	n, err := darwin.Observe(g.mac)
	g.must(err)
	for _, i := range n.Interfaces {
		one := policy.Interface{Name: i.Name}
		for _, a := range i.Addresses {
			one.Addresses = append(one.Addresses, a.Prefix)
		}
		if i.Name != g.device().name && i.Name != "lo0" {
			host.Interfaces = append(host.Interfaces, one)
		}
	}
	for _, r := range n.Routes {
		i := nameOf(n, r.Index)
		switch {
		case r.Flags&darwin.RouteScoped != 0 || i == g.device().name:
		case r.Dst.Bits() > 0:
			if i == vpn {
				host.Routes = append(host.Routes, policy.Route{Prefix: r.Dst, Interface: vpn})
			}
		case r.Dst.Addr().Is4():
			host.Uplink4 = i
		default:
			host.Uplink6 = i
		}
	}
	m := policy.Mesh{Prefixes: []netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6}, Addresses: g.own}
	for i, name := range []string{"A", "C", "D"} {
		if g.peers[name] != nil {
			m.Peers = append(m.Peers, mesh.Peer{
				PublicKey: mesh.PublicKey{byte(i + 1)}, Name: name,
				Addresses: mesh.Addresses(g.peers[name]), Permissions: mesh.Granted(may[name]),
			})
		}
	}
	r, err := policy.Compile(m, host, time.Now())
	g.must(err)
	return r
}

func nameOf(n *darwin.Network, index int) string {
	for _, i := range n.Interfaces {
		if i.Index == index {
			return i.Name
		}
	}
	return ""
}

// A tap is a utun device that records the outcome of each packet written to it.
type tap struct {
	tun.Device
	mac  *simmac.Mac
	name string
	last *simmac.Outcome
}

func (g *rig) createTUN(name string, mtu int) (tun.Device, error) {
	if g.noTunnel.Load() {
		g.tunnelsRefused.Add(1)
		return nil, errNoTunnel
	}
	d, err := g.proc.CreateTUN(name, mtu)
	if err != nil {
		return nil, err
	}
	name, err = d.Name()
	g.tun.Store(&tap{Device: d, mac: g.mac, name: name})
	return g.device(), err
}

// Write makes packets arrive on the interface, as the Mac's own device does.
func (t *tap) Write(bufs [][]byte, offset int) (int, error) {
	if offset < 4 {
		return 0, errors.New("no room for the family")
	}
	for _, b := range bufs {
		o := t.mac.Inject(t.name, b[offset:])
		t.last = &o
	}
	return len(bufs), nil
}

// A tunnelDevice stands for the WireGuard device: the test writes peers' packets to the
// guard, and reads packets to peers from it.
type tunnelDevice struct {
	dev  tun.Device
	rig  *rig
	done chan struct{}
	once sync.Once
}

func (g *rig) newTunnel(dev tun.Device, _ mesh.PrivateKey, _ uint16) (reconcile.Tunnel, error) {
	t := &tunnelDevice{dev: dev, rig: g, done: make(chan struct{})}
	g.wg.Store(t)
	return t, nil
}

// Sync is called once in every round of the daemon's loop.
func (w *tunnelDevice) Sync([]tunnel.Peer) error {
	w.rig.rounds.Add(1)
	return nil
}
func (w *tunnelDevice) ListenPort() uint16               { return 51820 }
func (w *tunnelDevice) SetOwnEndpoints([]netip.AddrPort) {}
func (w *tunnelDevice) Listening() error                 { return nil }
func (w *tunnelDevice) Done() <-chan struct{}            { return w.done }
func (w *tunnelDevice) Rebind(context.Context) error {
	w.rig.binds.Add(1)
	return nil
}

func (w *tunnelDevice) Stats() (map[mesh.PublicKey]tunnel.PeerStats, error) { return nil, nil }

// Close ends the device, as WireGuard's does. WireGuard also calls it when its interface
// disappears.
func (w *tunnelDevice) Close() {
	if w.rig.hang != nil {
		<-w.rig.hang
	}
	w.once.Do(func() {
		close(w.done)
		w.dev.Close()
	})
}

// room is the number of bytes that tun devices need before a packet.
const room = 16

// write sends a peer's packet through the guard.
func (w *tunnelDevice) write(b []byte) {
	_, _ = w.dev.Write([][]byte{append(make([]byte, room), b...)}, room)
}

// read reads the packet that the Mac sent by the interface, and reports whether the guard
// passed it to the peer. The guard's own answers come first.
func (w *tunnelDevice) read(host []netip.Addr) bool {
	buf, sizes := make([]byte, 2048), make([]int, 1)
	for {
		if _, err := w.dev.Read([][]byte{buf}, sizes, room); err != nil {
			return false
		}
		if !isAnswer(buf[room:room+sizes[0]], host) {
			return sizes[0] > 0
		}
	}
}

// isAnswer reports whether a packet is the guard's "administratively prohibited".
func isAnswer(b []byte, host []netip.Addr) bool {
	switch {
	case len(b) > 21 && b[0]>>4 == 4:
		return b[9] == policy.ProtoICMP && b[20] == 3 && bytes.Equal(b[12:16], host[0].AsSlice())
	case len(b) > 41 && b[0]>>4 == 6:
		return b[6] == policy.ProtoICMPv6 && b[40] == 1 && bytes.Equal(b[8:24], host[1].AsSlice())
	}
	return false
}

// device returns the newest tunnel device. The helper may be creating the next one.
func (g *rig) device() *tap { return g.tun.Load() }
