package linux

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Mesh addresses that no peer has.
var (
	unassigned4 = netip.MustParseAddr("100.64.0.99")
	unassigned6 = netip.MustParseAddr("fd6d:6573:6800::99")
)

func TestMain(m *testing.M) { os.Exit(netlab.Main(m.Run)) }

const meshName = "wgtest0"

// rig is a host with the backend under test. The test takes WireGuard's part: it writes
// peers' packets to the TUN device and reads what comes out.
type rig struct {
	t     testing.TB
	pic   *netlab.Picture
	p     *Backend
	dev   tun.Device
	state string
	steps []string
	// What the helper knows of the router in front.
	outside     []netip.Addr
	outsidePort uint16
	killAt      int // call of Options.Step to be killed in, from 1; 0: never

	mu     sync.Mutex
	out    [][]byte
	more   chan struct{}
	onMesh func([]byte) // sees each packet to the mesh; may be nil
}

func newRig(t testing.TB) *rig {
	t.Helper()
	if err := netlab.Unavailable(); err != nil {
		t.Skip("no hosts to try things on:", err)
	}
	lab, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error("close lab:", err)
		}
	})
	pic, err := netlab.NewPicture(lab)
	if err != nil {
		t.Fatal(err)
	}
	return &rig{t: t, pic: pic, state: t.TempDir(), more: make(chan struct{}, 1)}
}

// do runs f on the host and fails the test on an error.
func (g *rig) do(f func() error) {
	g.t.Helper()
	if err := g.pic.B.Do(f); err != nil {
		g.t.Fatal(err)
	}
}

// start creates a backend and its interface on the host.
func (g *rig) start() (err error) {
	if g.p, err = New(Options{StateDir: g.state, Step: g.step, ResolverFiles: []string{g.resolvers()}}); err != nil {
		return err
	}
	g.dev, err = g.p.Open(context.Background(), host.Interface{
		Name: meshName, MTU: testMTU, Addresses: []netip.Addr{own4, own6}, Prefixes: meshPrefixes(),
	})
	return err
}

// resolvers is the path of the host's resolv.conf, which only exists if a test writes it.
func (g *rig) resolvers() string { return filepath.Join(g.state, "resolv.conf") }

// step is Options.Step: it records the call, and kills the backend in one of them.
func (g *rig) step(name string) {
	g.steps = append(g.steps, name)
	if len(g.steps) == g.killAt {
		panic(killed{g.killAt})
	}
}

// open starts the backend and reads what comes out of its device.
func (g *rig) open() {
	g.t.Helper()
	g.do(g.start)
	go g.read(g.dev)
}

// read collects what the kernel sends to the mesh until the device is closed.
func (g *rig) read(dev tun.Device) {
	const headroom = 16
	bufs := make([][]byte, dev.BatchSize())
	for i := range bufs {
		bufs[i] = make([]byte, 1<<16)
	}
	sizes := make([]int, len(bufs))
	for {
		n, err := dev.Read(bufs, sizes, headroom)
		g.mu.Lock()
		for i := range n {
			b := bytes.Clone(bufs[i][headroom : headroom+sizes[i]])
			g.out = append(g.out, b)
			if g.onMesh != nil {
				g.onMesh(b)
			}
		}
		g.mu.Unlock()
		select {
		case g.more <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// inject delivers a peer's packet, as WireGuard does after decryption.
func (g *rig) inject(packet []byte) {
	g.t.Helper()
	const headroom = 16
	buf := append(make([]byte, headroom, headroom+len(packet)), packet...)
	if _, err := g.dev.Write([][]byte{buf}, headroom); err != nil {
		g.t.Fatal("write to TUN:", err)
	}
}

// close closes the backend.
func (g *rig) close() []host.Problem {
	g.t.Helper()
	var left []host.Problem
	g.do(func() (err error) {
		left, err = g.p.Close(context.Background())
		return err
	})
	return left
}

// enforce observes, compiles and enforces.
func (g *rig) enforce(m policy.Mesh) *policy.Ruleset {
	g.t.Helper()
	var r *policy.Ruleset
	g.do(func() (err error) {
		r, err = g.round(m)
		return err
	})
	return r
}

func (g *rig) round(m policy.Mesh) (*policy.Ruleset, error) {
	h, err := g.p.Observe(context.Background())
	if err != nil {
		return nil, err
	}
	h.Outside, h.OutsidePort = g.outside, g.outsidePort
	r, err := policy.Compile(m, h, time.Unix(0, 0))
	if err != nil {
		return nil, err
	}
	return r, g.p.Enforce(context.Background(), r)
}

func (g *rig) inspect(r *policy.Ruleset) host.Report {
	g.t.Helper()
	var report host.Report
	g.do(func() (err error) {
		report, err = g.p.Inspect(context.Background(), r)
		return err
	})
	return report
}

// others returns what other software has that stands in r's way.
func (g *rig) others(r *policy.Ruleset, outer ...netip.AddrPort) []host.Problem {
	g.t.Helper()
	found, err := g.p.Others(context.Background(), r, outer)
	if err != nil {
		g.t.Error(err)
	}
	return found
}

func (g *rig) snapshot() netlab.Snapshot {
	g.t.Helper()
	s, err := g.pic.B.Snapshot()
	if err != nil {
		g.t.Fatal(err)
	}
	return s
}

// journalExists reports whether the journal is on disk.
func (g *rig) journalExists() bool {
	_, err := os.Stat(filepath.Join(g.state, journalName))
	return err == nil
}
