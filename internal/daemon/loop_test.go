package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/reconcile"
	"github.com/meshhelper/meshhelper/internal/retry"
	"github.com/meshhelper/meshhelper/internal/tunnel"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

func TestToggle(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		if s := r.d.Status(); s.State != api.Enforcing || s.Enforced != s.Generation {
			t.Fatalf("state %s, enforced %d of %d", s.State, s.Enforced, s.Generation)
		}
		r.add("phone")
		r.wantLoaded("phone", 0)
		r.mustAllow("phone", "routing", "")
		r.wantLoaded("phone", mesh.Routing)
		if changed, err := r.allow("phone", "routing", ""); err != nil || !changed.Already {
			t.Errorf("allow again: already %v, error %v", changed.Already, err)
		}
		r.mustAllow("phone", "lan", "")
		r.wantLoaded("phone", mesh.Routing|mesh.LAN)
		if _, err := r.deny("phone", "routing"); err != nil {
			t.Fatal(err)
		}
		r.wantLoaded("phone", 0) // lan without routing has no effect
		if p, _ := r.d.Peer("phone"); p.Permissions.Of(mesh.LAN).Effective == nil || *p.Permissions.Of(mesh.LAN).Effective {
			t.Error("lan without routing isn't marked as without effect")
		}
		cuts := r.host.Cuts()
		last := cuts[len(cuts)-1]
		if len(last) != 1 || last[0].Name != "phone" || last[0].Lost != mesh.Routing|mesh.LAN {
			t.Errorf("cut %+v, want phone's routing and lan", last)
		}
	})
}

// TestOrder checks the order of a change: the rules are loaded, read back, then flows are
// cut, and only then the command is answered.
func TestOrder(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		before := len(r.host.Calls())
		if _, err := r.deny("phone", "routing"); err != nil {
			t.Fatal(err)
		}
		got := strings.Join(r.host.Calls()[before:], " ")
		if want := "observe enforce inspect cut"; got != want {
			t.Errorf("steps %q, want %q", got, want)
		}
	})
}

// TestGuard sends a peer's packet to the internet at each moment of a change. The guard
// must be narrowed before the packet filter is, and stay closed until the filter is known
// to enforce the change.
func TestGuard(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		phone := r.add("phone")
		passes := func() bool {
			before := r.host.Delivered()
			r.tunnel.dev.Write([][]byte{packetTo(phone.Addresses[0], netip.MustParseAddr("192.0.2.1"))}, 0)
			return r.host.Delivered() > before
		}
		if passes() {
			t.Error("a packet passes before anything was allowed")
		}
		r.mustAllow("phone", "routing", "")
		if !passes() {
			t.Fatal("no packet passes although routing is allowed")
		}
		var mu sync.Mutex
		var seen []bool
		// during returns what was seen at the enforcing steps since it was last asked.
		during := func() []bool {
			mu.Lock()
			defer mu.Unlock()
			got := seen
			seen = nil
			return got
		}
		var broken atomic.Bool
		r.host.SetFault(func(step string) error {
			if step != "enforce" {
				return nil
			}
			now := passes()
			mu.Lock()
			seen = append(seen, now)
			mu.Unlock()
			if broken.Load() {
				return errors.New("no")
			}
			return nil
		})
		if _, err := r.deny("phone", "routing"); err != nil {
			t.Fatal(err)
		}
		if got := during(); passes() || slices.Contains(got, true) {
			t.Errorf("a packet passes after deny, or while the filter is narrowed: %v", got)
		}
		broken.Store(true)
		if _, err := r.allow("phone", "routing", ""); err == nil {
			t.Fatal("what failed is said to be in force")
		}
		r.after(time.Minute)
		if got := during(); passes() || len(got) < 3 || slices.Contains(got[1:], true) {
			t.Errorf("a packet passes while the host is closed: %v", got)
		}
		broken.Store(false)
		r.after(retry.New().Max)
		if !passes() {
			t.Error("no packet passes after the host recovered")
		}
	})
}

// packetTo returns an IPv4 packet with an empty UDP datagram (RFC 791, RFC 768).
func packetTo(src, dst netip.Addr) []byte {
	p := []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0}
	p = append(append(p, src.AsSlice()...), dst.AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(p); i += 2 {
		sum += uint32(p[i])<<8 | uint32(p[i+1])
	}
	sum = ^(sum&0xffff + sum>>16)
	p[10], p[11] = byte(sum>>8), byte(sum)
	return append(p, 0xc0, 0, 0, 7, 0, 8, 0, 0)
}

func TestExpiry(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "2h")
		r.after(2*time.Hour - time.Second)
		r.wantLoaded("phone", mesh.Routing)
		r.after(time.Second)
		r.wantLoaded("phone", 0)
		// The second says that the configuration doesn't fit any more.
		if got := r.events(events.Expired); len(got) != 2 || got[0] != "routing of phone ended" {
			t.Errorf("events %q", got)
		}
		s := r.d.Status()
		if s.Peers[0].Permissions.Of(mesh.Routing).Allowed || s.Enforced != s.Generation {
			t.Errorf("status says %+v, enforced %d of %d", s.Peers[0].Permissions, s.Enforced, s.Generation)
		}
	})
}

func TestExpiryReplaced(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "2h")
		r.mustAllow("phone", "routing", "10m")
		r.mustAllow("phone", "incoming", "1h")
		r.mustAllow("phone", "incoming", "")
		r.after(11 * time.Minute)
		r.wantLoaded("phone", mesh.Incoming)
		r.after(3 * time.Hour)
		r.wantLoaded("phone", mesh.Incoming)
	})
}

// TestExpiryByEitherClock sets the wall clock while a permission is timed: it ends by the
// wall clock or the monotonic clock, whichever reaches the end first.
func TestExpiryByEitherClock(t *testing.T) {
	for _, c := range []struct {
		name   string
		jump   time.Duration
		after  time.Duration // from the jump
		within time.Duration
	}{
		{"forward past the end", 3 * time.Hour, 0, DefaultTick},
		{"forward, half way", time.Hour, time.Hour, DefaultTick},
		{"back", -5 * time.Hour, 2 * time.Hour, DefaultTick},
		{"back by years", -10 * 365 * 24 * time.Hour, 2 * time.Hour, DefaultTick},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.add("phone")
				r.mustAllow("phone", "routing", "2h")
				r.setWall(c.jump)
				if c.after > time.Minute {
					r.after(c.after - time.Minute)
					r.wantLoaded("phone", mesh.Routing)
					r.after(time.Minute)
				}
				r.after(c.within)
				r.wantLoaded("phone", 0)
			})
		})
	}
}

// TestExpiryAcrossRestart restarts the helper while a permission is timed.
func TestExpiryAcrossRestart(t *testing.T) {
	for _, c := range []struct {
		name string
		down time.Duration // how long nothing runs
		set  time.Duration // how far the wall clock is set meanwhile
		left time.Duration // what must be left, at most, of 2h after 1h
	}{
		{"at once", 0, 0, time.Hour},
		{"half an hour later", 30 * time.Minute, 0, 30 * time.Minute},
		{"after the end", 2 * time.Hour, 0, 0},
		// Behind the last time saved counts as that: what ran by then is over.
		{"clock set back", 0, -100 * time.Hour, time.Hour + clockInterval},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.add("phone")
				r.mustAllow("phone", "routing", "2h")
				r.after(time.Hour)
				r.stop()
				r.after(c.down)
				r.setWall(c.set)
				r.start()
				if c.left > 0 {
					r.wantLoaded("phone", mesh.Routing)
				}
				r.after(c.left + DefaultTick)
				r.wantLoaded("phone", 0)
			})
		})
	}
}

// TestExpiryWithoutDisk lets a permission end while nothing can be saved.
func TestExpiryWithoutDisk(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "2h")
		r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
		r.after(2*time.Hour + DefaultTick)
		r.wantLoaded("phone", 0)
		if len(r.events(events.Problem)) == 0 {
			t.Error("no event says that nothing could be saved")
		}
	})
}

// TestClosed lets each step fail in turn: nothing may stay open, the command and status
// name the failed step, and it is retried with growing pauses.
func TestClosed(t *testing.T) {
	for _, step := range []string{"enforce", "inspect", "cut"} {
		t.Run(step, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.add("phone")
				r.mustAllow("phone", "routing", "")
				var broken atomic.Bool
				broken.Store(true)
				var tries []time.Time
				r.host.SetFault(func(now string) error {
					if now != step || !broken.Load() {
						return nil
					}
					tries = append(tries, time.Now())
					return &host.StepError{Step: "load table", Err: errors.New("no"), Hint: "make it so"}
				})
				_, err := r.deny("phone", "routing")
				e := wantCode(t, err, api.CodeNotInForce)
				if want := "saved, not in force: load table: no"; e.Message != want || e.Hint != "make it so" {
					t.Errorf("error %q, want %q", e, want)
				}
				s := r.d.Status()
				if s.State != api.Closed || s.Enforced >= s.Generation || len(s.Problems) == 0 || s.Problems[0].Step != "load table" {
					t.Errorf("state %s, enforced %d of %d, problems %v", s.State, s.Enforced, s.Generation, s.Problems)
				}
				if step != "enforce" {
					r.wantLoaded("phone", 0)
				}
				r.after(2 * time.Minute)
				each := map[string]int{"inspect": reconcile.ReadTries}[step]
				if n := len(tries) / max(1, each); n < 5 || n > 40 {
					t.Errorf("tried %d times in two minutes", n)
				}
				broken.Store(false)
				r.after(retry.New().Max)
				if s := r.d.Status(); s.State != api.Enforcing || s.Enforced != s.Generation || len(s.Problems) != 0 {
					t.Errorf("afterwards: state %s, enforced %d of %d, problems %v", s.State, s.Enforced, s.Generation, s.Problems)
				}
				r.wantLoaded("phone", 0)
			})
		})
	}
}

// TestLookThatFails lets observations and inspections fail while the host doesn't change:
// the ruleset stays in force, a revoked permission is revoked, and status has the problem.
func TestLookThatFails(t *testing.T) {
	for _, step := range []string{"observe", "inspect"} {
		t.Run(step, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.add("phone")
				r.mustAllow("phone", "routing", "")
				r.host.SetFault(func(now string) error {
					if now == step {
						return errors.New("interrupted")
					}
					return nil
				})
				r.after(time.Minute)
				r.wantLoaded("phone", mesh.Routing)
				s := r.d.Status()
				if s.State != api.Enforcing || len(s.Problems) == 0 || !strings.Contains(s.Problems[0].Message, "interrupted") {
					t.Errorf("state %s, problems %v", s.State, s.Problems)
				}
				if step == "observe" {
					if _, err := r.deny("phone", "routing"); err != nil {
						t.Errorf("deny: %v", err)
					}
					r.wantLoaded("phone", 0)
				}
				r.host.SetFault(nil)
				r.after(retry.New().Max)
				if s := r.d.Status(); s.State != api.Enforcing || len(s.Problems) != 0 {
					t.Errorf("afterwards: state %s, problems %v", s.State, s.Problems)
				}
			})
		})
	}
}

// TestReadBackAgain lets the first attempts to read the rules back fail: they are read
// again, and nothing closes. The command returns once they were read.
func TestReadBackAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "incoming", "")
		fail := 1
		r.host.SetFault(func(step string) error {
			if fail < reconcile.ReadTries && step == "inspect" {
				fail++
				return errors.New("can't be read")
			}
			return nil
		})
		r.mustAllow("phone", "routing", "")
		r.wantLoaded("phone", mesh.Incoming|mesh.Routing)
		if got := r.events(events.State); fail != reconcile.ReadTries || slices.Contains(got, "enforcing became closed") {
			t.Errorf("%d reads failed: %q", fail-1, got)
		}
	})
}

// TestCloseOnWidening lets the host refuse a wider ruleset: nothing may be left open, not
// even what was open before.
func TestCloseOnWidening(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "incoming", "")
		fail := reconcile.ReadTries
		r.host.SetFault(func(step string) error {
			// Only what has permissions is refused, as by a full set.
			if fail > 0 && step == "inspect" && r.d.wanted.Document().Generation == 4 {
				fail--
				return errors.New("not as enforced")
			}
			return nil
		})
		r.mustAllow("phone", "routing", "") // succeeds by the second try
		r.wantLoaded("phone", mesh.Incoming|mesh.Routing)
		if got := r.events(events.State); !slices.Contains(got, "enforcing became closed") {
			t.Errorf("it never closed: %q", got)
		}
	})
}

func TestRepair(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		start := time.Now()
		r.host.Drift("the table was flushed")
		for r.d.Status().Repairs == 0 && time.Since(start) < time.Minute {
			r.after(10 * time.Millisecond)
		}
		if took := time.Since(start); took >= time.Second {
			t.Errorf("repaired after %v, want under a second", took)
		}
		if got := r.events(events.Repair); len(got) != 1 || got[0] != "load filter: the table was flushed" {
			t.Errorf("events %q", got)
		}
		cuts := r.host.Cuts()
		if last := cuts[len(cuts)-1]; len(last) != 1 || last[0].Name != "phone" {
			t.Errorf("flows that came to be meanwhile weren't cut: %v", last)
		}
	})
}

// TestDriftWithoutReport changes the host's rules without a report from its watcher: the
// tick finds it.
func TestDriftWithoutReport(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.host.DriftQuietly("a rule is gone")
		r.after(DefaultTick)
		if got := r.d.Status().Repairs; got != 1 {
			t.Errorf("%d repairs within a tick, want 1", got)
		}
	})
}

func TestHostChanges(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		r.host.Change(func(h *policy.Host) { h.Uplink4 = "eth1" })
		r.after(time.Second)
		if got := r.host.Loaded().Host().Uplink4; got != "eth1" {
			t.Errorf("loaded for uplink %q", got)
		}
		if r.tunnel.rebinds != 1 {
			t.Errorf("%d rebinds, want 1", r.tunnel.rebinds)
		}
		s := r.d.Status()
		if s.Uplink != "eth1" || s.Repairs != 0 {
			t.Errorf("uplink %q, repairs %d", s.Uplink, s.Repairs)
		}
	})
}

// TestRebind changes the facts about the host's uplink, and others.
func TestRebind(t *testing.T) {
	a := netip.MustParseAddr
	for _, tt := range []struct {
		about  string
		change func(*policy.Host)
		want   int
	}{
		{"uplink", func(h *policy.Host) { h.Uplink6 = "eth0" }, 1},
		{"source", func(h *policy.Host) { h.Source4 = a("198.51.100.3") }, 1},
		{"source6", func(h *policy.Host) { h.Source6 = a("2001:db8::3") }, 1},
		{"router", func(h *policy.Host) { h.Router4 = a("198.51.100.9") }, 1},
		{"router6", func(h *policy.Host) { h.Router6 = a("fe80::9") }, 1},
		{"uplinks change places", func(h *policy.Host) { h.Uplink4, h.Uplink6 = h.Uplink6, h.Uplink4 }, 1},
		{"resolver", func(h *policy.Host) { h.Resolvers = []netip.Addr{a("9.9.9.9")} }, 0},
		{"another interface's address", func(h *policy.Host) {
			h.Interfaces[1].Addresses = []netip.Prefix{netip.MustParsePrefix("192.168.77.2/24")}
		}, 0},
	} {
		t.Run(tt.about, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.host.Change(tt.change)
				r.after(time.Second)
				if r.tunnel.rebinds != tt.want {
					t.Errorf("%d rebinds, want %d", r.tunnel.rebinds, tt.want)
				}
			})
		})
	}
}

// TestPortLost lets the tunnel lose its port and get it back: status reports it in between,
// and nothing closes.
func TestPortLost(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		want := func(problems int) {
			t.Helper()
			r.after(2 * DefaultTick)
			s := r.d.Status()
			if len(s.Problems) != problems || s.State != api.Enforcing {
				t.Errorf("%s, problems %v, want %d", s.State, s.Problems, problems)
			}
			if problems > 0 && (s.Problems[0].Step != "tunnel" || !strings.HasPrefix(s.Problems[0].Message, "bind UDP port: 51820")) {
				t.Errorf("problem %+v", s.Problems[0])
			}
		}
		want(0)
		r.tunnel.setSilent(errors.New("bind UDP port: 51820 over udp4: address already in use"))
		want(1)
		r.tunnel.setSilent(nil)
		want(0)
	})
}

// TestRemovedStaysIn removes a peer and changes the address of another: for a day nothing
// is sent to the addresses that they had, even after a restart.
func TestRemovedStaysIn(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		want := func(when string, want ...netip.Addr) {
			t.Helper()
			var got []netip.Addr
			for _, p := range r.host.Loaded().Sets().Former {
				got = append(got, p.Addr())
			}
			slices.SortFunc(got, netip.Addr.Compare)
			slices.SortFunc(want, netip.Addr.Compare)
			if !slices.Equal(got, want) {
				t.Errorf("%s: %v stay in, want %v", when, got, want)
			}
			if s := r.d.Status(); s.Enforced != s.Generation {
				t.Errorf("%s: enforced %d of %d", when, s.Enforced, s.Generation)
			}
		}
		phone, tv := r.add("phone"), r.add("tv")
		want("before")
		if _, err := r.d.RemovePeer(t.Context(), "phone"); err != nil {
			t.Fatal(err)
		}
		want("removed", phone.Addresses...)
		r.after(time.Hour)
		r.add("phone")
		want("there again")
		if _, err := r.d.RemovePeer(t.Context(), "phone"); err != nil {
			t.Fatal(err)
		}
		r.after(time.Hour)
		if _, err := r.d.RemovePeer(t.Context(), "tv"); err != nil {
			t.Fatal(err)
		}
		r.after(time.Hour)
		r.stop()
		r.start()
		want("after a restart", slices.Concat(phone.Addresses, tv.Addresses)...)
		r.setWall(-time.Hour) // gains nothing, and loses nothing
		r.after(22*time.Hour - DefaultTick)
		r.setWall(time.Hour)
		want("shortly before", slices.Concat(phone.Addresses, tv.Addresses)...)
		r.after(2 * DefaultTick)
		want("a day after the first", tv.Addresses...)
		r.after(time.Hour)
		want("a day after the second")
		r.stop()
		r.start()
		want("in the end")
	})
}

// TestForeign reports an obstacle from the host: status shows it, and the helper stays
// enforcing.
func TestForeign(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.host.Foreign(host.Problem{Step: "look at other rules", Message: "chain FORWARD drops", Hint: "see docs"})
		r.after(time.Second)
		s := r.d.Status()
		if s.State != api.Enforcing || len(s.Problems) != 1 || s.Problems[0].Message != "chain FORWARD drops" {
			t.Errorf("state %s, problems %v", s.State, s.Problems)
		}
	})
}

// TestTunnelDies removes the mesh interface under the tunnel.
func TestTunnelDies(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		old := r.tunnel
		r.portTaken.Store(true) // another program is quick to take its port
		old.Close()
		r.after(time.Minute)
		if s := r.d.Status(); s.State != api.Closed || len(s.Problems) != 1 || s.Problems[0].Step != "tunnel" || !strings.HasPrefix(s.Problems[0].Message, "start WireGuard: ") {
			t.Errorf("state %s, problems %v", s.State, s.Problems)
		}
		r.portTaken.Store(false)
		r.after(retry.New().Max)
		if r.tunnel == old || len(r.tunnel.peers) != 1 {
			t.Fatal("no new tunnel with the peer")
		}
		r.wantLoaded("phone", mesh.Routing)
		if s := r.d.Status(); s.State != api.Enforcing || s.Enforced != s.Generation {
			t.Errorf("state %s, enforced %d of %d", s.State, s.Enforced, s.Generation)
		}
	})
}

// TestDeadTunnelHangs ends the tunnel, and lets it hang while it is closed: the guard
// passes nothing, a new tunnel is made nevertheless, changes are answered, and the helper
// stops when it should.
func TestDeadTunnelHangs(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		phone := r.add("phone")
		r.mustAllow("phone", "routing", "")
		old := r.tunnel
		old.hang = make(chan struct{})
		old.once.Do(func() { close(old.done) })
		defer close(old.hang)
		synctest.Wait()
		before := r.host.Delivered()
		old.dev.Write([][]byte{packetTo(phone.Addresses[0], netip.MustParseAddr("192.0.2.1"))}, 0)
		if r.host.Delivered() != before {
			t.Error("a packet passes the guard of the dead tunnel")
		}
		if err := old.dev.Close(); err != nil { // another program took the interface away
			t.Error(err)
		}
		r.after(2 * reconcile.TunnelLimit)
		if r.tunnel == old || len(r.tunnel.peers) != 1 {
			t.Fatal("no new tunnel with the peer")
		}
		r.wantLoaded("phone", mesh.Routing)
		if _, err := r.deny("phone", "routing"); err != nil {
			t.Error(err)
		}
		r.stop()
	})
}

// TestTunnelEndsDuringRebind ends the tunnel during a Rebind, and changes the host's
// network again while the next tunnel is in one: the end isn't reported as a problem of the
// rebind, and no change is lost.
func TestTunnelEndsDuringRebind(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		n := byte(10)
		move := func() {
			n++
			r.host.Change(func(h *policy.Host) { h.Source4 = netip.AddrFrom4([4]byte{198, 51, 100, n}) })
			r.after(time.Second)
		}
		old := r.tunnel
		old.rebinding = make(chan struct{})
		move()
		move() // waits, for the old tunnel
		old.Close()
		r.after(DefaultTick)
		for _, m := range r.events(events.Problem) {
			if strings.Contains(m, context.Canceled.Error()) {
				t.Errorf("a problem: %q", m)
			}
		}
		next := r.tunnel
		if next == old {
			t.Fatal("no new tunnel")
		}
		begun := next.rebinds
		next.mu.Lock()
		next.rebinding = make(chan struct{})
		next.mu.Unlock()
		for range 3 {
			move()
		}
		close(next.rebinding)
		synctest.Wait()
		if got := next.rebinds - begun; got != 2 {
			t.Errorf("%d rebinds, want the first, and one for those that came during it", got)
		}
	})
}

func TestWakeFromSleep(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.after(10 * DefaultTick)
		if r.tunnel.rebinds != 0 {
			t.Fatalf("%d rebinds without a sleep", r.tunnel.rebinds)
		}
		r.setWall(time.Hour)
		r.after(DefaultTick)
		if r.tunnel.rebinds != 1 {
			t.Errorf("%d rebinds after a sleep, want 1", r.tunnel.rebinds)
		}
	})
}

// TestTunnelRefuses lets the tunnel refuse a peer: the others stay in force, and the
// command doesn't report success.
func TestTunnelRefuses(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		r.tunnel.mu.Lock()
		r.tunnel.refuse = errors.New("set peer: no")
		r.tunnel.mu.Unlock()
		_, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "tablet", PublicKey: keyOf("tablet")})
		wantCode(t, err, api.CodeNotInForce)
		r.wantLoaded("phone", mesh.Routing)
		if s := r.d.Status(); s.State != api.Enforcing || s.Enforced >= s.Generation {
			t.Errorf("state %s, enforced %d of %d", s.State, s.Enforced, s.Generation)
		}
	})
}

func TestHandshakeEvents(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		for range 10 { // sessions are renewed every two minutes
			r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{
				LastHandshake: time.Now(), Endpoint: netip.MustParseAddrPort("203.0.113.9:1"),
			})
			r.after(2 * time.Minute)
		}
		r.after(time.Hour)
		r.tunnel.setStats(keyOf("phone"), tunnel.PeerStats{LastHandshake: time.Now(), Spoofed: 3})
		r.after(DefaultTick)
		if got := r.events(events.Handshake); len(got) != 2 || got[0] != "phone connected from 203.0.113.9:1" {
			t.Errorf("events %q", got)
		}
		if got := r.events(events.Refused); len(got) != 1 || got[0] != "refused of phone so far: 3 from other addresses than its own" {
			t.Errorf("events %q", got)
		}
	})
}

// TestRoundAsksTheTunnelOnce counts how often a round reads the tunnel's statistics, for
// which the device prints all peers.
func TestRoundAsksTheTunnelOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		asked := func() int {
			r.tunnel.mu.Lock()
			defer r.tunnel.mu.Unlock()
			return r.tunnel.reads
		}
		rounds := func() (n int) {
			for _, call := range r.host.Calls() {
				if call == "observe" {
					n++
				}
			}
			return n
		}
		r.add("phone")
		r.after(time.Second)
		wasAsked, before := asked(), rounds()
		r.host.Change(func(h *policy.Host) { h.Source4 = netip.MustParseAddr("198.51.100.9") })
		r.after(5 * time.Second)
		if n := rounds() - before; n == 0 || asked()-wasAsked != n {
			t.Errorf("%d looks at the tunnel in %d rounds", asked()-wasAsked, n)
		}
	})
}

// TestOwnPlacesFollowAddresses changes the host's addresses: the tunnel, and the next one,
// gets the host's own endpoints.
func TestOwnPlacesFollowAddresses(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		place := netip.MustParseAddrPort("[2001:db8:5::1]:51820")
		knows := func() bool {
			r.tunnel.mu.Lock()
			defer r.tunnel.mu.Unlock()
			return slices.Contains(r.tunnel.self, place)
		}
		set := func(change func(all []netip.Prefix) []netip.Prefix) {
			r.host.Change(func(h *policy.Host) {
				h.Interfaces = slices.Clone(h.Interfaces)
				for i := range h.Interfaces {
					if h.Interfaces[i].Name == h.Uplink4 {
						h.Interfaces[i].Addresses = change(slices.Clone(h.Interfaces[i].Addresses))
					}
				}
			})
			r.after(5 * time.Second)
		}
		if knows() {
			t.Error("the tunnel knows a place that isn't the host's")
		}
		own := netip.PrefixFrom(place.Addr(), 64)
		set(func(all []netip.Prefix) []netip.Prefix { return append(all, own) })
		if !knows() {
			t.Error("the tunnel doesn't know the host's new address")
		}
		r.tunnel.Close()
		r.after(5 * time.Second)
		if !knows() {
			t.Error("another tunnel doesn't know the host's address")
		}
		set(func(all []netip.Prefix) []netip.Prefix {
			return slices.DeleteFunc(all, func(p netip.Prefix) bool { return p == own })
		})
		if knows() {
			t.Error("the tunnel knows a place that is the host's no more")
		}
	})
}

// TestNoInterface runs where the mesh interface can't be made: Run fails and leaves the
// host alone, as the interface may be another helper's.
func TestNoInterface(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.host.SetFault(func(string) error { return &host.StepError{Step: "open TUN", Err: errors.New("no")} })
		d, err := New(r.options())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "open TUN: no") {
			t.Errorf("Run: %v", err)
		}
		if got := r.host.Calls(); !slices.Equal(got, []string{"open"}) {
			t.Errorf("steps %q, want only open", got)
		}
	})
}

// TestNoTunnel starts while the port is in use: Run fails and restores the host.
func TestNoTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.portTaken.Store(true)
		d, err := New(r.options())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("Run: %v", err)
		}
		if got := r.host.Calls(); !slices.Equal(got, []string{"open", "close"}) {
			t.Errorf("steps %q, want open and close", got)
		}
	})
}

func TestLeave(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		r.stop()
		calls := r.host.Calls()
		if r.host.Loaded() != nil || calls[len(calls)-1] != "close" {
			t.Errorf("after the end: loaded %v, last step %q", r.host.Loaded(), calls[len(calls)-1])
		}
		select {
		case <-r.tunnel.done:
		default:
			t.Error("the tunnel is still there")
		}
	})
}

// TestLeaveInTime lets the tunnel hang at the end, and then the host, too: the helper goes
// on without the tunnel, and gives the host up in time.
func TestLeaveInTime(t *testing.T) {
	for name, tt := range map[string]struct {
		platformHangs bool
		limit         time.Duration
	}{
		"the tunnel hangs":             {false, reconcile.TunnelLimit},
		"the tunnel and the host hang": {true, host.LeaveLimit},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.add("phone")
				r.mustAllow("phone", "routing", "")
				r.tunnel.hang = make(chan struct{})
				defer close(r.tunnel.hang)
				if tt.platformHangs {
					r.host.HangAt("close")
				}
				begin := time.Now()
				err := r.stopped()
				if d := time.Since(begin); d != tt.limit {
					t.Errorf("left after %v, want %v", d, tt.limit)
				}
				if failed := err != nil; failed != tt.platformHangs || !failed && r.host.Loaded() != nil {
					t.Errorf("error %v, loaded %v", err, r.host.Loaded())
				}
				if got := r.events(events.Problem); len(got) == 0 || !strings.Contains(got[0], "the tunnel didn't end") {
					t.Errorf("problems %q", got)
				}
			})
		})
	}
}

// TestStorm lets many clients toggle many peers at once. Every ruleset that was loaded must
// be one that a client asked for, and the last one the wanted one.
func TestStorm(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		const clients, toggles, peers = 8, 25, 10
		for i := range peers {
			r.add(fmt.Sprint("p", i))
		}
		var wg sync.WaitGroup
		for c := range clients {
			wg.Go(func() {
				for i := range toggles {
					name, do := fmt.Sprint("p", (c+i)%peers), r.deny
					if i%2 == 0 {
						do = func(n, p string) (api.Changed, error) { return r.allow(n, p, "") }
					}
					if _, err := do(name, "routing"); err != nil {
						t.Errorf("toggle: %v", err)
					}
				}
			})
		}
		wg.Wait()
		s := r.d.Status()
		if s.State != api.Enforcing || s.Enforced != s.Generation {
			t.Errorf("state %s, enforced %d of %d", s.State, s.Enforced, s.Generation)
		}
		for _, p := range s.Peers {
			if got := r.loaded(p.Name) == mesh.Routing; got != p.Permissions.Of(mesh.Routing).Allowed {
				t.Errorf("%s: loaded %v, wanted %v", p.Name, got, p.Permissions.Of(mesh.Routing).Allowed)
			}
		}
	})
}

// TestExpiryWhileClosed lets a permission end while the host can't be observed: the loop
// must neither spin nor forget it.
func TestExpiryWhileClosed(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "1m")
		var looks atomic.Int64
		r.host.SetFault(func(step string) error {
			if step == "observe" {
				looks.Add(1)
				return errors.New("no")
			}
			return nil
		})
		r.after(10 * time.Minute)
		if n := looks.Load(); n > 100 {
			t.Errorf("looked %d times in ten minutes", n)
		}
		r.wantLoaded("phone", 0)
		r.host.SetFault(nil)
		r.after(time.Minute)
		r.wantLoaded("phone", 0)
		if s := r.d.Status(); s.State != api.Enforcing || s.Enforced != s.Generation {
			t.Errorf("state %s, enforced %d of %d", s.State, s.Enforced, s.Generation)
		}
	})
}

// TestStopWhileWaiting stops the helper while a command waits for its change.
func TestStopWhileWaiting(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.host.SetFault(func(step string) error {
			if step == "enforce" {
				return errors.New("no")
			}
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		answered := make(chan error, 1)
		go func() {
			_, err := r.d.ChangePeer(ctx, "phone", api.PeerChange{Permissions: map[string]api.PermissionChange{"lan": {Allowed: true}}})
			answered <- err
		}()
		r.after(time.Second)
		cancel()
		var e *api.Error
		if err := <-answered; !errors.As(err, &e) || e.Code != api.CodeNotInForce {
			t.Errorf("answered %v", err)
		}
		r.host.SetFault(nil)
	})
}

// TestTakenOverAddress gives a peer's address to another key. While the old permissions of
// the address are still in force, neither key may be in the tunnel.
func TestTakenOverAddress(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		_, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "phone", PublicKey: keyOf("old"), Addresses: []string{"100.64.9.9"}})
		if err != nil {
			t.Fatal(err)
		}
		r.mustAllow("phone", "routing", "")
		var during atomic.Int64
		during.Store(-1)
		r.host.SetFault(func(step string) error {
			if step == "enforce" {
				during.Store(int64(r.tunnel.count()))
			}
			return nil
		})
		if _, err := r.d.ChangePeer(t.Context(), "phone", api.PeerChange{PublicKey: keyOf("new")}); err != nil {
			t.Fatal(err)
		}
		if after := r.tunnel.count(); during.Load() != 0 || after != 1 {
			t.Errorf("%d peers in the tunnel while the change is enforced and %d after it, want 0 and 1", during.Load(), after)
		}
	})
}

// TestChangesLeaveTimeForOthers changes a host every 10 ms on which an observation takes 50
// ms: observations take a fifth of the time at most.
func TestChangesLeaveTimeForOthers(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		const look, between, turns = 50 * time.Millisecond, 10 * time.Millisecond, 1000
		r.host.SetFault(func(step string) error {
			if step == "observe" {
				time.Sleep(look)
			}
			return nil
		})
		before := len(r.host.Calls())
		for range turns {
			r.d.loop.Moved()
			time.Sleep(between)
		}
		rounds := 0
		for _, call := range r.host.Calls()[before:] {
			if call == "observe" {
				rounds++
			}
		}
		if most := int(turns * between / (look * 5)); rounds < most/2 || rounds > most+2 {
			t.Errorf("%d looks in %v, want %d", rounds, turns*between, most)
		}
	})
}

// TestOpenThatHangs lets the making of the mesh interface hang. At the start the helper
// stops and restores the host; later it reports the problem and tries again.
func TestOpenThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.host.HangAt("open")
		r.start()
		r.after(reconcile.StepLimit)
		calls := r.host.Calls()
		if err := r.stopped(); !errors.Is(err, context.DeadlineExceeded) || !slices.Equal(calls, []string{"open", "close"}) {
			t.Errorf("%v after the calls %q", err, calls)
		}
	})
	inBubble(t, func(t *testing.T, r *rig) {
		r.host.HangAt("open")
		r.tunnel.Close()
		r.after(reconcile.StepLimit)
		if got := r.events(events.Problem); len(got) == 0 || !strings.HasPrefix(got[len(got)-1], "open mesh interface: ") {
			t.Errorf("problems %q", got)
		}
		r.host.HangAt("")
		r.after(reconcile.StepLimit)
		if s := r.d.Status(); s.State != api.Enforcing {
			t.Errorf("the state is %s when nothing hangs any more", s.State)
		}
	})
}

// TestTunnelHangs has the WireGuard device not return from any call: what is taken away is
// refused at once, nothing passes once the device counts as hung, and a change is answered
// and in force on the next one.
func TestTunnelHangs(t *testing.T) {
	for what, take := range map[string]func(r *rig) error{
		"deny":   func(r *rig) error { _, err := r.deny("phone", "routing"); return err },
		"remove": func(r *rig) error { _, err := r.d.RemovePeer(context.Background(), "phone"); return err },
	} {
		t.Run(what, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				phone := r.add("phone")
				r.mustAllow("phone", "routing", "")
				if !r.passes(phone) {
					t.Fatal("nothing passes before")
				}
				free := r.tunnel.getStuck()
				defer free()
				answered := make(chan error, 1)
				go func() { answered <- take(r) }()
				synctest.Wait()
				if r.passes(phone) {
					t.Error("the guard passes what was taken away")
				}
				r.after(2 * reconcile.StepLimit)
				select {
				case err := <-answered:
					t.Logf("answered: %v", err)
				default:
					t.Error("not answered")
				}
				r.after(2 * DefaultTick)
				if s := r.d.Status(); s.State != api.Enforcing || s.Enforced != s.Generation || r.loaded("phone") != 0 {
					t.Errorf("%s, %d of %d, and the filter has %v", s.State, s.Enforced, s.Generation, r.loaded("phone"))
				}
				if told := r.events(events.Problem); !slices.ContainsFunc(told, func(e string) bool { return strings.Contains(e, "doesn't answer; making it again") }) {
					t.Errorf("no event says that the tunnel hung: %q", told)
				}
			})
		})
	}
}
