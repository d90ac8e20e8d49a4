package trial

// Many clients that change permissions at once while flows run.

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

const (
	stormPeers   = 50
	stormClients = 8
)

// window is a time in which a peer certainly lacked a permission: from the return of the
// command that revoked it to the start of the next command that grants it.
type window struct{ from, to time.Time }

// toggler is a client that changes only its own peers, so that it knows their
// permissions.
type toggler struct {
	client  *http.Client
	random  *rand.Rand
	peers   []string
	may     map[string]map[string]bool // by peer, then permission
	closed  map[string][]window        // windows of routing, by peer
	changes int
	slowest time.Duration
}

// run toggles as fast as it can, with a short pause after a change to a peer whose flows
// are watched, so that packets are sent in between.
func (c *toggler) run(until time.Time) error {
	for time.Now().Before(until) {
		peer := c.peers[c.random.IntN(len(c.peers))]
		for _, name := range stormEnds {
			if slices.Contains(c.peers, name) && c.random.IntN(2) == 0 {
				peer = name
			}
		}
		permission := []string{"incoming", "routing", "lan"}[c.random.IntN(3)]
		if slices.Contains(stormEnds, peer) {
			permission = "routing"
		}
		if err := c.set(peer, permission, !c.may[peer][permission]); err != nil {
			return err
		}
		if permission == "routing" && slices.Contains(stormEnds, peer) {
			time.Sleep(time.Duration(c.random.IntN(40)) * time.Millisecond)
		}
	}
	return nil
}

// stormEnds are the peers with a WireGuard end and flows.
var stormEnds = []string{"C", "D"}

func (c *toggler) set(peer, permission string, allowed bool) error {
	start := time.Now()
	if windows := c.closed[peer]; permission == "routing" && allowed && len(windows) > 0 && windows[len(windows)-1].to.IsZero() {
		windows[len(windows)-1].to = start
	}
	var answer struct{}
	err := ask(c.client, "PATCH", "/v1/peers/"+peer, toggle(permission, allowed), &answer)
	// A change waits for the disk, and for the changes before it. On a machine with a
	// busy disk it may be refused for that.
	for range 10 {
		if err == nil || !allowed || !strings.Contains(err.Error(), "nothing was changed") {
			break
		}
		err = ask(c.client, "PATCH", "/v1/peers/"+peer, toggle(permission, allowed), &answer)
	}
	if err != nil {
		return err
	}
	c.slowest = max(c.slowest, time.Since(start))
	c.changes++
	if c.may[peer] == nil {
		c.may[peer] = map[string]bool{}
	}
	c.may[peer][permission] = allowed
	if permission == "routing" && !allowed {
		c.closed[peer] = append(c.closed[peer], window{from: time.Now()})
	}
	return nil
}

// load is the resources that a process holds.
type load struct{ fds, threads, kilobytes int }

func loadOf(t *testing.T, pid int) (l load) {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	l.fds = len(fds)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		switch {
		case len(words) > 1 && words[0] == "Threads:":
			l.threads, _ = strconv.Atoi(words[1])
		case len(words) > 1 && words[0] == "VmRSS:":
			l.kilobytes, _ = strconv.Atoi(words[1])
		}
	}
	return l
}

var goroutine = regexp.MustCompile(`(?m)^goroutine \d+ .*\[`)

// goroutines ends the helper with SIGABRT, which makes Go's runtime list them.
func goroutines(t *testing.T, m *Mesh) int {
	t.Helper()
	if err := m.Helper.Signal(unix.SIGABRT); err != nil {
		t.Fatal(err)
	}
	<-m.Helper.Done()
	n := len(goroutine.FindAllString(m.Helper.Output(), -1))
	if n == 0 {
		t.Fatal("the helper listed no goroutines")
	}
	return n
}

// stormMesh returns a mesh of 50 peers, of which C and D have WireGuard ends.
func stormMesh(t *testing.T) (*Mesh, []string) {
	m := newMesh(t)
	names := []string{"A", "C", "D"}
	client := m.client(t)
	for len(names) < stormPeers {
		_, public, err := netlab.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("peer%d", len(names))
		var answer struct{}
		err = ask(client, "POST", "/v1/peers", map[string]any{"name": name, "publicKey": public.String()}, &answer)
		switch {
		case err == nil:
			names = append(names, name)
		case !strings.Contains(err.Error(), "address_taken"): // one key in a hundred collides: try another
			t.Fatal(err)
		}
	}
	client.CloseIdleConnections()
	return m, names
}

// TestToggleStorm has 8 clients toggle permissions of 50 peers as fast as they can while
// flows run. A packet that an end sends while it certainly lacks permission must not
// arrive. At the end the helper enforces the last changes, and holds no more resources
// than before.
func TestToggleStorm(t *testing.T) {
	long := 5 * time.Second
	if *soak {
		long = 30 * time.Second
	}
	m, names := stormMesh(t)
	quiet := loadOf(t, m.Helper.PID())
	p := startProber(t, m)
	p.guarded(true)
	p.set(p.onlyMesh(status(t, m).Address()))

	random := rand.New(rand.NewPCG(8, 50))
	clients := make([]*toggler, stormClients)
	for i := range clients {
		clients[i] = &toggler{client: m.client(t), random: rand.New(rand.NewPCG(uint64(i), random.Uint64())),
			may: map[string]map[string]bool{}, closed: map[string][]window{}}
	}
	for i, name := range names {
		clients[i%stormClients].peers = append(clients[i%stormClients].peers, name)
	}
	// C and D start with routing, and their flows run.
	watched := map[string][]*netlab.Flow{}
	for _, name := range stormEnds {
		if err := clients[slices.Index(names, name)%stormClients].set(name, "routing", true); err != nil {
			t.Fatal(err)
		}
		watched[name] = flows(t, m, m.Peers[name].Host, m.I, netlab.Addresses().I)
	}

	var run errgroup.Group
	until := time.Now().Add(long)
	for _, c := range clients {
		run.Go(func() error { return c.run(until) })
	}
	if err := run.Wait(); err != nil {
		t.Fatal(err)
	}
	mustBeSubset(t, clients, names, watched)
	p.rounds(t, 1)
	p.mustHold(t, "in the storm")
	mustHoldWanted(t, m, clients)
	changes, slowest := 0, time.Duration(0)
	for _, c := range clients {
		changes, slowest = changes+c.changes, max(slowest, c.slowest)
		c.client.CloseIdleConnections()
	}
	t.Logf("%d changes in %s, the slowest took %s; %d packets that must not pass", changes, long, slowest.Round(time.Millisecond), p.sent.Load())
	for _, list := range watched {
		for _, f := range list {
			f.Stop()
		}
	}
	mustHaveNothingLeft(t, m, quiet)
}

// onlyMesh returns the packets that must not pass whatever the peers' permissions: to
// peers and between them.
func (p *prober) onlyMesh(own netlab.Pair) []shot {
	return slices.DeleteFunc(p.never(own, true), func(s shot) bool {
		if s.by == p.m.B {
			return false
		}
		packet, _ := netlab.ParsePacket(s.packet)
		mesh := netlab.MeshPrefixes()
		toMesh := mesh[0].Contains(packet.Dst) || mesh[1].Contains(packet.Dst)
		return s.link == "wg0" && !toMesh || packet.Dst == own.V4 || packet.Dst == own.V6
	})
}

// mustBeSubset reports packets of flows that were sent in a window and arrived. They may
// arrive after its end: TCP retransmits.
func mustBeSubset(t *testing.T, clients []*toggler, names []string, watched map[string][]*netlab.Flow) {
	t.Helper()
	windows, sent := 0, 0
	for name, list := range watched {
		closed := clients[slices.Index(names, name)%stormClients].closed[name]
		windows += len(closed)
		for _, f := range list {
			for _, way := range []netlab.Way{netlab.Forth, netlab.Back} {
				arrived := f.Arrivals(way)
				sent += len(arrived)
				for _, a := range arrived {
					for _, w := range closed {
						if a.Sent.After(w.from) && (w.to.IsZero() || a.Received.Before(w.to)) {
							t.Fatalf("%s: packet %d %s was sent %s after routing was revoked, and arrived", f, a.Number, way, a.Sent.Sub(w.from))
						}
					}
				}
			}
		}
	}
	if windows == 0 || sent == 0 {
		t.Fatalf("%d windows, %d packets arrived: the test proves nothing", windows, sent)
	}
	t.Logf("%d packets of %d watched peers arrived, none of them sent in one of %d windows without permission", sent, len(watched), windows)
}

// mustHoldWanted compares the helper's state with the last changes.
func mustHoldWanted(t *testing.T, m *Mesh, clients []*toggler) {
	t.Helper()
	s := status(t, m)
	if s.State != "enforcing" || s.Enforced != s.Generation {
		t.Errorf("after the storm: %s, enforced %d of %d", s.State, s.Enforced, s.Generation)
	}
	routing := 0
	for _, p := range s.Peers {
		if p.Permissions["routing"].Allowed {
			routing++
		}
		for _, c := range clients {
			for permission, want := range c.may[p.Name] {
				if p.Permissions[permission].Allowed != want {
					t.Errorf("%s of %s is %t, but was last set to %t", permission, p.Name, !want, want)
				}
			}
		}
	}
	lines, err := m.B.Ruleset()
	if err != nil {
		t.Fatal(err)
	}
	have := 0
	for _, l := range lines {
		if strings.HasPrefix(l, "element") && strings.Contains(l, `"may_routing4"`) {
			have++
		}
	}
	if have != routing {
		t.Errorf("the kernel lets %d peers route, want %d", have, routing)
	}
}

// mustHaveNothingLeft waits until the helper holds no more files than before the storm,
// and compares its goroutines with those of an idle helper.
func mustHaveNothingLeft(t *testing.T, m *Mesh, quiet load) {
	t.Helper()
	var now load
	for until := time.Now().Add(generous); ; time.Sleep(50 * time.Millisecond) {
		if now = loadOf(t, m.Helper.PID()); now.fds <= quiet.fds {
			break
		}
		if time.Now().After(until) {
			t.Errorf("the helper had %d files open before the storm, and %d after it", quiet.fds, now.fds)
			break
		}
	}
	after := goroutines(t, m)
	start(t, m)
	if s := status(t, m); s.State != "enforcing" || s.Enforced != s.Generation {
		t.Errorf("restarted: %s, enforced %d of %d", s.State, s.Enforced, s.Generation)
	}
	idle := goroutines(t, m)
	// A connection that is being closed and a peer's timer each have a goroutine.
	if slack := runtime.NumCPU() + 4; after > idle+slack {
		t.Errorf("%d goroutines after the storm, %d in an idle helper", after, idle)
	}
	t.Logf("before and after: %d and %d files, %d and %d threads, %d and %d KiB; %d goroutines after, %d in an idle helper",
		quiet.fds, now.fds, quiet.threads, now.threads, quiet.kilobytes, now.kilobytes, after, idle)
	start(t, m)
	client := m.client(t)
	for _, p := range status(t, m).Peers {
		var answer struct{}
		if err := ask(client, "DELETE", "/v1/peers/"+p.Name, nil, &answer); err != nil {
			t.Fatal(err)
		}
	}
	lines, err := m.B.Ruleset()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if strings.HasPrefix(l, "element") && (strings.Contains(l, `"peers`) || strings.Contains(l, `"may_`)) {
			t.Errorf("all peers are removed, but the kernel still has %s", l)
		}
	}
}
