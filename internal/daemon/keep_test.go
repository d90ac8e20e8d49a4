package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
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

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/logfile"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/resolve"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// countingDisk counts what is written, by the files' names.
type countingDisk struct {
	wanted.FileSystem
	mu    sync.Mutex
	files map[string]int
	bytes int
}

func (c *countingDisk) WriteTemp(dir, name string, content []byte) (string, error) {
	c.mu.Lock()
	c.bytes += len(content)
	c.mu.Unlock()
	return c.FileSystem.WriteTemp(dir, name, content)
}

func (c *countingDisk) Rename(from, to string) error {
	c.mu.Lock()
	c.files[filepath.Base(to)]++
	c.mu.Unlock()
	return c.FileSystem.Rename(from, to)
}

// TestOneTimedGrantWritesLittle lets one permission of one peer among many run for an hour:
// the clock's mark is written for it, the document isn't.
func TestOneTimedGrantWritesLittle(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		for i := range 50 {
			r.add(fmt.Sprint("p", i))
		}
		r.mustAllow("p1", "routing", "2h")
		disk := &countingDisk{FileSystem: wanted.DiskFiles{}, files: map[string]int{}}
		r.setDisk(disk)
		r.after(time.Hour)
		disk.mu.Lock()
		defer disk.mu.Unlock()
		if n := disk.files["clock.json"]; n < 50 || n > 61 || len(disk.files) != 1 {
			t.Errorf("written in an hour: %v", disk.files)
		}
		if disk.bytes > 61*256 {
			t.Errorf("%d bytes in an hour", disk.bytes)
		}
	})
}

// TestMark starts with the wall clock set back and with marks of every kind: the later of
// the mark's and the document's time counts, and an invalid mark is ignored.
func TestMark(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(path string) error
		left time.Duration // of 2h, after 1h
	}{
		"as written":  {func(string) error { return nil }, time.Hour + clockInterval},
		"gone":        {os.Remove, 2 * time.Hour},
		"garbage":     {func(p string) error { return os.WriteFile(p, []byte("{"), 0o600) }, 2 * time.Hour},
		"too long":    {func(p string) error { return os.WriteFile(p, make([]byte, 1<<20), 0o600) }, 2 * time.Hour},
		"older":       {func(p string) error { return os.WriteFile(p, []byte(`{"saved":"1999-01-01T00:00:00Z"}`), 0o600) }, 2 * time.Hour},
		"a link":      {func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/dev/zero", p)) }, 2 * time.Hour},
		"not ours":    {func(p string) error { return os.Chmod(p, 0o666) }, 2 * time.Hour},
		"a directory": {func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) }, 2 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.add("phone")
				r.mustAllow("phone", "routing", "2h")
				r.after(time.Hour)
				r.stop()
				if err := c.do(filepath.Join(r.dir, "clock.json")); err != nil {
					t.Fatal(err)
				}
				r.setWall(-100 * time.Hour)
				r.start()
				r.after(c.left - 2*clockInterval)
				r.wantLoaded("phone", mesh.Routing)
				r.after(2*clockInterval + DefaultTick)
				r.wantLoaded("phone", 0)
			})
		})
	}
}

// TestLearned restarts the helper: the tunnel gets a peer with the endpoint where it was
// last heard, whatever is configured; nothing of a removed peer is kept.
func TestLearned(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		heard := func(name, at string) {
			t.Helper()
			key, err := mesh.ParsePublicKey(keyOf(name))
			if err != nil {
				t.Fatal(err)
			}
			r.tunnel.mu.Lock()
			defer r.tunnel.mu.Unlock()
			if r.tunnel.stats == nil {
				r.tunnel.stats = map[mesh.PublicKey]tunnel.PeerStats{}
			}
			r.tunnel.stats[key] = tunnel.PeerStats{LastHandshake: time.Now(), Endpoint: netip.MustParseAddrPort(at)}
		}
		learned := func() map[string]string {
			r.tunnel.mu.Lock()
			defer r.tunnel.mu.Unlock()
			out := map[string]string{}
			doc := r.d.wanted.Document()
			for _, p := range r.tunnel.peers {
				if p.Learned.IsValid() {
					out[doc.Peers[doc.ByKey(p.PublicKey)].Name] = p.Learned.String()
				}
			}
			return out
		}
		r.add("phone")
		r.add("tablet")
		r.add("silent")
		if _, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "mac", PublicKey: keyOf("mac"), Endpoint: "203.0.113.1:7"}); err != nil {
			t.Fatal(err)
		}
		heard("phone", "203.0.113.9:1")
		heard("tablet", "[2001:db8::9]:2")
		heard("mac", "203.0.113.2:8")
		r.stop()
		r.start()
		if got := fmt.Sprint(learned()); got != "map[mac:203.0.113.2:8 phone:203.0.113.9:1 tablet:[2001:db8::9]:2]" {
			t.Errorf("learned %s", got)
		}
		// Nothing is heard of phone this time; tablet moves, and goes.
		heard("tablet", "[2001:db8::9]:3")
		r.after(learnInterval + DefaultTick)
		if text := contents(t, r.dir)[learnedFile]; !strings.Contains(text, "203.0.113.9:1") || !strings.Contains(text, "[2001:db8::9]:3") {
			t.Errorf("on disk: %s", text)
		}
		if _, err := r.d.RemovePeer(t.Context(), "tablet"); err != nil {
			t.Fatal(err)
		}
		r.stop()
		r.start()
		if got := fmt.Sprint(learned()); got != "map[mac:203.0.113.2:8 phone:203.0.113.9:1]" {
			t.Errorf("learned %s", got)
		}
		if text := contents(t, r.dir)[learnedFile]; strings.Contains(text, "2001:db8::9") {
			t.Errorf("on disk: %s", text)
		}
		r.stop()
		if err := os.WriteFile(filepath.Join(r.dir, learnedFile), []byte("}"), 0o600); err != nil {
			t.Fatal(err)
		}
		r.start() // it is never needed
		if got := learned(); len(got) != 0 {
			t.Errorf("learned %v of garbage", got)
		}
	})
}

// stuckLog is a log whose reader is stuck until it goes on.
type stuckLog struct {
	goOn chan struct{}
	mu   sync.Mutex
	text strings.Builder
}

func (s *stuckLog) Write(p []byte) (int, error) {
	<-s.goOn
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

// TestStuckLog blocks the log: permissions are granted, revoked and end as usual, status
// answers, and the number of dropped lines is logged afterwards.
func TestStuckLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		log := &stuckLog{goOn: make(chan struct{})}
		o := r.options()
		o.Logger = slog.New(slog.NewTextHandler(logfile.NewQueue(log), nil))
		r.startWith(o)
		phone := r.add("phone")
		r.mustAllow("phone", "routing", "1m")
		for range 3 << 10 { // three times what waits at most
			r.d.Record(events.Event{Kind: events.Denied, Message: strings.Repeat("no", 512)})
		}
		if !r.passes(phone) {
			t.Error("no packet passes")
		}
		r.after(time.Minute + time.Millisecond)
		if r.passes(phone) {
			t.Error("a packet passes after the end")
		}
		r.mustAllow("phone", "routing", "")
		if _, err := r.deny("phone", "routing"); err != nil || r.passes(phone) {
			t.Errorf("deny: %v", err)
		}
		if s := r.d.Status(); s.State != api.Enforcing {
			t.Errorf("state %s", s.State)
		}
		close(log.goOn)
		synctest.Wait()
		log.mu.Lock()
		text := log.text.String()
		log.mu.Unlock()
		if !strings.Contains(text, "lines were dropped") {
			t.Error("the log doesn't say that lines are missing")
		}
		r.end()
		r.after(time.Second)
	})
}

// TestLeavesWithStuckLog stops the helper while its log blocks.
func TestLeavesWithStuckLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		log := &stuckLog{goOn: make(chan struct{})}
		o := r.options()
		o.Logger = slog.New(slog.NewTextHandler(logfile.NewQueue(log), nil))
		r.startWith(o)
		disk := newFrozenDisk()
		r.setDisk(disk)
		if _, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "phone", PublicKey: keyOf("phone")}); err == nil {
			t.Error("a frozen disk took it")
		}
		began := time.Now()
		r.end()
		if took := time.Since(began); took > 3*flushLimit {
			t.Errorf("left after %v", took)
		}
		close(log.goOn)
		close(disk.thawed)
		synctest.Wait()
	})
}

// TestResolverOneNameStuck lets the lookup of one name hang, and many fail: another name is
// resolved at once, and its changes are followed. Changes of permissions don't cause
// lookups.
func TestResolverOneNameStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		var order atomic.Int64
		o := r.options()
		o.Resolve = func(ctx context.Context, name string) ([]netip.Addr, error) {
			switch {
			case name == "good.example":
				two := []netip.Addr{netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("203.0.113.8")}
				if order.Add(1)%2 == 0 {
					two[0], two[1] = two[1], two[0]
				}
				return two, nil
			case strings.HasPrefix(name, "stuck"):
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return nil, errors.New("no such host")
		}
		logged := &countingLog{}
		o.Logger = slog.New(slog.NewTextHandler(logged, nil))
		r.startWith(o)
		defer r.end()
		for i := range 300 { // but for those whose derived address is taken or reserved
			name := fmt.Sprint("s", i)
			_, _ = r.d.wanted.AddPeer(t.Context(), api.NewPeer{Name: name, PublicKey: keyOf(name), Endpoint: fmt.Sprintf("stuck%d.example:1", i)})
		}
		if n := len(r.d.wanted.Document().Peers); n < 250 {
			t.Fatalf("only %d peers", n)
		}
		r.after(time.Minute + time.Second) // all have failed once, and are tried again
		if _, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "mac", PublicKey: keyOf("mac"), Endpoint: "good.example:7"}); err != nil {
			t.Fatal(err)
		}
		r.after(time.Second)
		endpoint := func() string {
			r.tunnel.mu.Lock()
			defer r.tunnel.mu.Unlock()
			return r.tunnel.peers[len(r.tunnel.peers)-1].Endpoint.String()
		}
		first := endpoint()
		if first != "203.0.113.7:7" {
			t.Fatalf("endpoint %s after a second", first)
		}
		for range 5 { // the other address comes first every other time
			r.after(resolve.Interval)
			if got := endpoint(); got != first {
				t.Errorf("endpoint %s, want %s", got, first)
			}
		}
		if n := logged.count.Load(); n > 700 { // one that it was added, one that it isn't found
			t.Errorf("%d lines of log", n)
		}
		r.after(resolve.Interval / 2)
		before := order.Load()
		for i := range 20 {
			name := "mac"
			if i%2 == 0 {
				r.mustAllow(name, "routing", "")
			} else if _, err := r.deny(name, "routing"); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if n := order.Load() - before; n > 0 {
			t.Errorf("the name was looked up %d times for permissions", n)
		}
	})
}

type countingLog struct{ count atomic.Int64 }

func (c *countingLog) Write(p []byte) (int, error) {
	c.count.Add(1)
	return io.Discard.Write(p)
}

// TestSuspend stops the monotonic clock for an hour, as on a suspended Linux host:
// permissions that ended meanwhile are gone after the next round, and the sockets are
// opened again.
func TestSuspend(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		phone := r.add("phone")
		r.mustAllow("phone", "routing", "30m")
		r.mustAllow("phone", "incoming", "2h")
		r.after(time.Minute)
		r.setWall(time.Hour) // the host sleeps
		r.after(DefaultTick)
		if r.passes(phone) {
			t.Error("a packet passes after the end")
		}
		r.wantLoaded("phone", mesh.Incoming)
		if r.tunnel.rebinds != 1 {
			t.Errorf("%d rebinds", r.tunnel.rebinds)
		}
		r.setWall(-time.Hour) // NTP sets it right, or a person sets it back
		r.after(time.Hour + DefaultTick)
		r.wantLoaded("phone", 0)
	})
}

// TestEachFullDiskIsTold fills the disk twice. An allow saves what a deny couldn't: that is
// recorded as a repair, and the next full disk as a problem.
func TestEachFullDiskIsTold(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		for n, permission := range []string{"routing", "lan"} {
			r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
			_, err := r.deny("phone", permission)
			wantCode(t, err, api.CodeNotSaved)
			r.setDisk(wanted.DiskFiles{})
			r.mustAllow("phone", "lan", "")
			r.after(time.Minute)
			if p, f := r.events(events.Problem), r.events(events.Repair); len(p) != n+1 || len(f) != n+1 {
				t.Errorf("after full disk %d: problems %q, repairs %q", n+1, p, f)
			}
		}
	})
}

// TestLearnedIsSavedAgain learns an endpoint while the disk is full.
func TestLearnedIsSavedAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{LastHandshake: time.Now(), Endpoint: netip.MustParseAddrPort("203.0.113.9:1")})
		r.after(learnInterval + DefaultTick)
		r.setDisk(wanted.DiskFiles{})
		r.after(2 * (learnInterval + DefaultTick))
		r.stop()
		if text := contents(t, r.dir)[learnedFile]; !strings.Contains(text, "203.0.113.9:1") {
			t.Errorf("on disk: %q", text)
		}
		r.start()
	})
}
