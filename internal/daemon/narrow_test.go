package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
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
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// frozenDisk is a disk that doesn't answer, as a file system does after fsfreeze(8),
// until it thaws.
type frozenDisk struct {
	wanted.FileSystem
	thawed chan struct{}
}

func newFrozenDisk() *frozenDisk {
	return &frozenDisk{wanted.DiskFiles{}, make(chan struct{})}
}

func (f *frozenDisk) WriteTemp(dir, name string, content []byte) (string, error) {
	<-f.thawed
	return f.FileSystem.WriteTemp(dir, name, content)
}

// passes reports whether a packet of the peer to the internet passes the guard.
func (r *rig) passes(p api.Peer) bool {
	before := r.host.Delivered()
	r.tunnel.dev.Write([][]byte{packetTo(p.Addresses[0], netip.MustParseAddr("192.0.2.1"))}, 0)
	return r.host.Delivered() > before
}

// onDisk returns what a restart would find of a peer.
func (r *rig) onDisk(name string) (p mesh.Peer, ok bool) {
	r.t.Helper()
	doc, err := readDocument(filepath.Join(r.dir, "state.json"))
	if err != nil {
		r.t.Fatal(err)
	}
	if i, err := doc.Find(name); err == nil {
		return doc.Peers[i], true
	}
	return mesh.Peer{}, false
}

// takings are the ways to take routing away from a peer called phone.
var takings = map[string]func(*rig) error{
	"deny": func(r *rig) error {
		_, err := r.deny("phone", "routing")
		return err
	},
	"remove": func(r *rig) error {
		_, err := r.d.RemovePeer(context.Background(), "phone")
		return err
	},
	"new key": func(r *rig) error {
		_, err := r.d.ChangePeer(context.Background(), "phone", api.PeerChange{PublicKey: keyOf("new phone")})
		return err
	},
	"deny and rename": func(r *rig) error {
		_, err := r.d.ChangePeer(context.Background(), "phone", api.PeerChange{
			Name: "mobile", Permissions: map[string]api.PermissionChange{"routing": {}},
		})
		return err
	},
	"one for another": func(r *rig) error {
		_, err := r.d.ChangePeer(context.Background(), "phone", api.PeerChange{
			Permissions: map[string]api.PermissionChange{"routing": {}, "incoming": {Allowed: true}},
		})
		return err
	},
}

// TestNarrowingDoesntWait revokes routing while something hangs that a change otherwise
// waits for: the guard passes nothing from that moment on, and the command is answered in
// time with what isn't in force or saved.
func TestNarrowingDoesntWait(t *testing.T) {
	full := func(r *rig) func() {
		r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
		return func() {}
	}
	frozen := func(r *rig) func() {
		disk := newFrozenDisk()
		r.setDisk(disk)
		return sync.OnceFunc(func() { close(disk.thawed) })
	}
	for stuck, have := range map[string]struct {
		stick func(*rig) (end func())
		code  string
		says  string
	}{
		"full disk":   {full, api.CodeNotSaved, ", but this isn't saved: after a restart phone is "},
		"frozen disk": {frozen, api.CodeNotSaved, ", but this isn't saved: after a restart phone is "},
		"slow look": {func(r *rig) func() {
			r.host.HangAt("observe")
			return func() { r.host.HangAt("") }
		}, api.CodeNotInForce, "saved, not in force"},
		"slow filter": {func(r *rig) func() {
			r.host.HangAt("enforce")
			return func() { r.host.HangAt("") }
		}, api.CodeNotInForce, "saved, not in force"},
		"slow filter, full disk": {func(r *rig) func() {
			r.host.HangAt("enforce")
			full(r)
			return func() { r.host.HangAt("") }
		}, api.CodeNotSaved, ", but this isn't saved: after a restart phone is "},
	} {
		for way, take := range takings {
			t.Run(stuck+"/"+way, func(t *testing.T) {
				inBubble(t, func(t *testing.T, r *rig) {
					phone := r.add("phone")
					r.mustAllow("phone", "routing", "")
					if !r.passes(phone) {
						t.Fatal("no packet passes although routing is allowed")
					}
					end := have.stick(r)
					defer end()
					r.after(DefaultTick) // the loop is in the step that hangs
					began := time.Now()
					answered := make(chan error, 1)
					go func() { answered <- take(r) }()
					synctest.Wait()
					if r.passes(phone) {
						t.Error("a packet passes while the command waits")
					}
					err := <-answered
					if took := time.Since(began); took > DefaultWait {
						t.Errorf("answered after %v, want within %v", took, DefaultWait)
					}
					e := wantCode(t, err, have.code)
					if have.code == api.CodeNotSaved && way == "one for another" {
						if !strings.Contains(e.Message, "what the change takes away is in force now, but not saved") {
							t.Errorf("message %q", e.Message)
						}
					} else if !strings.Contains(e.Message, have.says) {
						t.Errorf("message %q, want %q", e.Message, have.says)
					}
					did := map[string]string{"deny": "phone may no longer route", "remove": "phone is no longer a peer", "new key": "phone has another key now"}[way]
					if have.code == api.CodeNotSaved && !strings.HasPrefix(e.Message, did) {
						t.Errorf("message %q, want first what was done: %q", e.Message, did)
					}
					if ended := strings.Contains(e.Message, "its connections have ended"); ended != (way == "remove" && have.code == api.CodeNotSaved && stuck != "slow filter, full disk") {
						t.Errorf("message %q: connections have ended: %v", e.Message, ended)
					}
					for range 10 {
						r.after(time.Second)
						if r.passes(phone) {
							t.Fatal("a packet passes after the answer")
						}
					}
					if have.code == api.CodeNotSaved {
						if p := r.d.Status().Problems; len(p) == 0 || p[0].Step != "save wanted state" || strings.Contains(p[0].Message, p[0].Step) {
							t.Errorf("problems %v don't say what isn't saved", p)
						}
						if n := len(r.events(events.Problem)); n > 3 {
							t.Errorf("%d events of problems: %q", n, r.events(events.Problem))
						}
					}
					end()
					r.setDisk(wanted.DiskFiles{})
					r.after(2 * time.Minute)
					if r.passes(phone) {
						t.Error("a packet passes after everything is well again")
					}
					s := r.d.Status()
					if len(s.Problems) != 0 || s.State != api.Enforcing || s.Enforced != s.Generation {
						t.Errorf("afterwards: state %s, enforced %d of %d, problems %v", s.State, s.Enforced, s.Generation, s.Problems)
					}
					if kept, ok := r.onDisk("phone"); ok && kept.Permissions.Of(mesh.Routing).Allowed && kept.PublicKey.String() == phone.PublicKey {
						t.Error("a restart would bring the permission back")
					}
				})
			})
		}
	}
}

// TestKeyChangeIsWhole gives a peer another key while nothing can be saved: the new key has
// the permissions of the old one, the old one has none from that moment on, and the command
// says that a restart brings the old one back. Whatever else the change grants waits for
// the disk.
func TestKeyChangeIsWhole(t *testing.T) {
	for name, stick := range map[string]func(*rig) (end func()){
		"full disk": func(r *rig) func() {
			r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
			return func() {}
		},
		"frozen disk": func(r *rig) func() {
			disk := newFrozenDisk()
			r.setDisk(disk)
			return func() { close(disk.thawed) }
		},
	} {
		for _, more := range []bool{false, true} {
			for _, renamed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, more %v, renamed %v", name, more, renamed), func(t *testing.T) {
					inBubble(t, func(t *testing.T, r *rig) {
						old := r.add("phone")
						r.add("tablet")
						r.mustAllow("phone", "routing", "")
						end := stick(r)
						c := api.PeerChange{PublicKey: keyOf("new phone")}
						says := ", but this isn't saved: after a restart phone is as before"
						if more {
							c.Permissions = map[string]api.PermissionChange{"incoming": {Allowed: true}, "lan": {Allowed: true}}
							says = "the new key and what the change takes away are in force now, but not saved"
						}
						name := "phone"
						if renamed {
							name, c.Name = "mobile", "mobile"
						}
						_, err := r.d.ChangePeer(t.Context(), "phone", c)
						if e := wantCode(t, err, api.CodeNotSaved); !strings.Contains(e.Message, says) {
							t.Errorf("message %q, want %q", e.Message, says)
						}
						is, err := r.d.Peer(name)
						if err != nil || is.PublicKey != keyOf("new phone") || is.Addresses[0] == old.Addresses[0] {
							t.Fatalf("the peer is %+v, %v", is, err)
						}
						if may := is.Permissions; !may.Of(mesh.Routing).Allowed || may.Of(mesh.Incoming).Allowed || may.Of(mesh.LAN).Allowed {
							t.Errorf("it may %+v", may)
						}
						r.wantLoaded(name, mesh.Routing)
						if !r.passes(is) || r.passes(old) {
							t.Errorf("a packet passes of the new key: %v, of the old one: %v", r.passes(is), r.passes(old))
						}
						if got := r.host.Loaded().Sets().Former; len(got) != 2 {
							t.Errorf("given up are %v, want the addresses %v", got, old.Addresses)
						}
						if s := r.d.Status(); s.Enforced != s.Generation || s.State != api.Enforcing {
							t.Errorf("state %s, enforced %d of %d", s.State, s.Enforced, s.Generation)
						}
						end()
						r.setDisk(wanted.DiskFiles{})
						r.after(2 * time.Minute)
						if kept, ok := r.onDisk(name); !ok || kept.PublicKey.String() != keyOf("new phone") || !kept.Permissions.Of(mesh.Routing).Allowed || kept.Permissions.Of(mesh.LAN).Allowed {
							t.Errorf("on disk: %+v, %v", kept, ok)
						}
						if s := r.d.Status(); len(s.Problems) != 0 || len(s.Peers) != 2 {
							t.Errorf("problems %v, %d peers", s.Problems, len(s.Peers))
						}
					})
				})
			}
		}
	}
}

// TestRemoveAgainSaves repeats a removal that couldn't be saved.
func TestRemoveAgainSaves(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
		for range 3 {
			_, err := r.d.RemovePeer(t.Context(), "phone")
			wantCode(t, err, api.CodeNotSaved)
		}
		r.setDisk(wanted.DiskFiles{})
		_, err := r.d.RemovePeer(t.Context(), "phone")
		wantCode(t, err, api.CodeAlreadyRemoved)
		if _, found := r.onDisk("phone"); found {
			t.Error("it says removed before, and a restart would bring the peer back")
		}
	})
}

// TestDenyAgainSaves repeats a deny that couldn't be saved.
func TestDenyAgainSaves(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
		for range 3 {
			_, err := r.deny("phone", "routing")
			wantCode(t, err, api.CodeNotSaved)
			r.wantLoaded("phone", 0)
		}
		if p, _ := r.onDisk("phone"); !p.Permissions.Of(mesh.Routing).Allowed {
			t.Fatal("a full disk took it")
		}
		r.setDisk(wanted.DiskFiles{})
		if changed, err := r.deny("phone", "routing"); err != nil || !changed.Already {
			t.Errorf("once more: already %v, error %v", changed.Already, err)
		}
		if p, _ := r.onDisk("phone"); p.Permissions.Of(mesh.Routing).Allowed {
			t.Error("it says done, and a restart would bring the permission back")
		}
		if s := r.d.Status(); len(s.Problems) != 0 {
			t.Errorf("problems %v", s.Problems)
		}
	})
}

// TestFullDiskForLong leaves the disk full for an hour: one event reports it, and one the
// end of it.
func TestFullDiskForLong(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "10m")
		r.mustAllow("phone", "incoming", "50m")
		r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
		r.after(time.Hour)
		r.wantLoaded("phone", 0)
		if got := r.events(events.Problem); len(got) > 2 {
			t.Errorf("%d events: %q", len(got), got)
		}
		if got := r.d.Status().Problems; len(got) != 1 {
			t.Errorf("problems %v", got)
		}
		r.setDisk(wanted.DiskFiles{})
		r.after(time.Minute)
		if got := r.d.Status().Problems; len(got) != 0 {
			t.Errorf("problems that stay: %v", got)
		}
		if p, _ := r.onDisk("phone"); p.Permissions.Of(mesh.Routing).Allowed || p.Permissions.Of(mesh.Incoming).Allowed {
			t.Errorf("on disk: %+v", p.Permissions)
		}
	})
}

// TestWideningWaits freezes the disk: a grant isn't in force before it is saved, its
// command is answered in time, and it doesn't come into force later by itself.
func TestWideningWaits(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		phone := r.add("phone")
		disk := newFrozenDisk()
		r.setDisk(disk)
		began := time.Now()
		answers := make(chan error, 3)
		for range 3 {
			go func() {
				_, err := r.allow("phone", "routing", "")
				answers <- err
			}()
		}
		for range 3 {
			e := wantCode(t, <-answers, api.CodeNotSaved)
			if !strings.Contains(e.Message, "nothing was changed") || time.Since(began) > DefaultWait {
				t.Errorf("after %v: %q", time.Since(began), e.Message)
			}
		}
		if r.passes(phone) {
			t.Error("what wasn't saved is in force")
		}
		close(disk.thawed)
		r.after(time.Minute)
		if p, _ := r.onDisk("phone"); r.passes(phone) || p.Permissions.Of(mesh.Routing).Allowed {
			t.Error("what was given up came in force, or would by a restart")
		}
		r.mustAllow("phone", "routing", "")
		if !r.passes(phone) {
			t.Error("no packet passes after the disk is back")
		}
	})
}

// TestOlderRulesetStaysOut revokes a permission while the loop is in each step of enforcing
// an older ruleset: the guard doesn't get the permission back from that.
func TestOlderRulesetStaysOut(t *testing.T) {
	for _, at := range []string{"observe", "enforce", "inspect"} {
		t.Run(at, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				phone := r.add("phone")
				r.mustAllow("phone", "routing", "")
				var armed, begun atomic.Bool
				armed.Store(true)
				denied := make(chan error, 1)
				var late atomic.Int64
				r.host.SetFault(func(step string) error {
					if begun.Load() && r.passes(phone) {
						late.Add(1)
					}
					if step == at && armed.CompareAndSwap(true, false) {
						go func() {
							_, err := r.deny("phone", "routing")
							denied <- err
						}()
						for r.d.wanted.Document().Peers[0].Permissions.Of(mesh.Routing).Allowed {
							time.Sleep(time.Millisecond)
						}
						r.d.wanted.Expire() // waits for the change: the guard is narrow then
						begun.Store(true)
						if r.passes(phone) {
							late.Add(1)
						}
					}
					return nil
				})
				r.mustAllow("phone", "lan", "")
				if err := <-denied; err != nil {
					t.Errorf("deny: %v", err)
				}
				if n := late.Load(); n != 0 || r.passes(phone) {
					t.Errorf("%d packets passed at steps after deny", n)
				}
			})
		})
	}
}

// TestNarrowingCompilesOnce revokes permissions: the host enforces the ruleset that the
// guard was given at once, which isn't compiled a second time.
func TestNarrowingCompilesOnce(t *testing.T) {
	for _, way := range []string{"deny", "remove"} {
		t.Run(way, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				r.add("gone")
				r.add("phone")
				r.add("tablet")
				if _, err := r.d.RemovePeer(t.Context(), "gone"); err != nil {
					t.Fatal(err)
				}
				r.mustAllow("phone", "routing", "")
				r.mustAllow("tablet", "routing", "1h")
				before := r.host.Loaded()
				var atOnce atomic.Pointer[policy.Ruleset]
				r.host.SetFault(func(step string) error {
					if step == "observe" {
						atOnce.CompareAndSwap(nil, r.d.gate.InForce())
					}
					return nil
				})
				if err := takings[way](r); err != nil {
					t.Fatal(err)
				}
				r.wantLoaded("phone", 0)
				if got := r.host.Loaded(); got == before || got != atOnce.Load() {
					t.Error("the host enforces another ruleset than the guard was given at once")
				}
			})
		})
	}
}

// TestExpiryDuringSlowLook lets a permission end while the loop waits for the host.
func TestExpiryDuringSlowLook(t *testing.T) {
	for _, step := range []string{"observe", "enforce"} {
		t.Run(step, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				phone := r.add("phone")
				r.mustAllow("phone", "routing", "10s")
				r.host.HangAt(step)
				r.after(10*time.Second - time.Millisecond)
				if !r.passes(phone) {
					t.Error("it ended early")
				}
				r.after(2 * time.Millisecond)
				if r.passes(phone) {
					t.Error("a packet passes after the end")
				}
				r.host.HangAt("")
				r.after(time.Minute)
			})
		})
	}
}

// TestExpiryOnFrozenDisk lets a permission and the day of a removed peer's addresses end
// while the disk doesn't answer.
func TestExpiryOnFrozenDisk(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		phone := r.add("phone")
		r.mustAllow("phone", "routing", "1m")
		disk := newFrozenDisk()
		r.setDisk(disk)
		r.after(time.Minute + time.Millisecond)
		if r.passes(phone) {
			t.Error("a packet passes after the end")
		}
		r.wantLoaded("phone", 0)
		r.after(DefaultWait)
		if p := r.d.Status().Problems; len(p) != 1 || !strings.Contains(p[0].Message, "doesn't answer") {
			t.Errorf("problems %v", p)
		}
		close(disk.thawed)
		r.after(time.Minute)
		if p := r.d.Status().Problems; len(p) != 0 {
			t.Errorf("problems that stay: %v", p)
		}
	})
}

// obstinate is a host whose filter doesn't take permissions, and hangs over it.
type obstinate struct {
	host.Enforcer
	closing atomic.Int64 // the time that closing was given, in ns
	hangs   atomic.Bool
}

func (o *obstinate) Enforce(ctx context.Context, r *policy.Ruleset) error {
	gives := slices.ContainsFunc(r.Peers(), func(p policy.PeerRules) bool { return p.Permissions != 0 })
	if gives && o.hangs.Load() {
		<-ctx.Done()
		return ctx.Err()
	}
	if until, ok := ctx.Deadline(); ok && !gives {
		o.closing.Store(int64(time.Until(until)))
	}
	return o.Enforcer.Enforce(ctx, r)
}

// TestClosingHasItsOwnTime lets enforcing use up its whole time limit: closing, which comes
// next, has its full limit, and the host is closed by the first attempt.
func TestClosingHasItsOwnTime(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "incoming", "")
		r.stop()
		o := r.options()
		slow := &obstinate{Enforcer: r.host}
		o.Host.Enforcer = slow
		r.startWith(o)
		r.wantLoaded("phone", mesh.Incoming)
		slow.hangs.Store(true)
		if _, err := r.allow("phone", "routing", ""); err == nil {
			t.Error("what hangs is said to be in force")
		}
		r.after(reconcile.StepLimit)
		r.wantLoaded("phone", 0)
		if got := time.Duration(slow.closing.Load()); got < reconcile.StepLimit/2 {
			t.Errorf("closing was given %v", got)
		}
		if s := r.d.Status(); s.State != api.Closed {
			t.Errorf("state %s", s.State)
		}
		slow.hangs.Store(false)
		r.after(time.Minute)
		r.wantLoaded("phone", mesh.Incoming|mesh.Routing)
	})
}

// TestSlowLookClosesNothing lets an observation or inspection use up its whole time limit,
// while a change is to be enforced and while nothing changes: the ruleset stays in force,
// and the change comes into force with the facts of the last observation.
func TestSlowLookClosesNothing(t *testing.T) {
	for step, want := range map[string]mesh.Permissions{"observe": mesh.Routing | mesh.LAN, "inspect": mesh.Routing} {
		t.Run(step, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *rig) {
				phone := r.add("phone")
				r.mustAllow("phone", "routing", "")
				r.host.HangAt(step)
				if step == "observe" {
					_, err := r.allow("phone", "lan", "")
					wantCode(t, err, api.CodeNotInForce)
				}
				r.after(r.d.opts.Tick + 2*reconcile.ObserveLimit) // it hangs for as long
				r.wantLoaded("phone", want)
				if !r.passes(phone) {
					t.Error("what was allowed doesn't pass")
				}
				if s := r.d.Status(); s.State != api.Enforcing || len(s.Problems) != 1 {
					t.Errorf("state %s, problems %v", s.State, s.Problems)
				}
				r.host.HangAt("")
				r.after(r.d.opts.Tick + 2*reconcile.ObserveLimit)
				r.wantLoaded("phone", want)
				if s := r.d.Status(); s.State != api.Enforcing || len(s.Problems) > 0 {
					t.Errorf("after it: state %s, problems %v", s.State, s.Problems)
				}
				if got := r.events(events.State); slices.Contains(got, "enforcing became closed") {
					t.Errorf("it closed: %q", got)
				}
			})
		})
	}
}

// TestFilterAway flushes the filter as another program: until it is known to be complete
// again, the guard only passes packets that need none. Running flows go on afterwards.
func TestFilterAway(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		phone := r.add("phone")
		r.mustAllow("phone", "routing", "")
		r.mustAllow("phone", "incoming", "")
		own := r.d.id.Own[0]
		toHost := func() bool {
			before := r.host.Delivered()
			r.tunnel.dev.Write([][]byte{packetTo(phone.Addresses[0], own)}, 0)
			return r.host.Delivered() > before
		}
		if !r.passes(phone) || !toHost() {
			t.Fatal("no packet passes although everything is allowed")
		}
		var routed, local, cut []bool
		var mu sync.Mutex
		r.host.SetFault(func(step string) error {
			if step == "enforce" || step == "cut" {
				mu.Lock()
				defer mu.Unlock()
				routed, local = append(routed, r.passes(phone)), append(local, toHost())
				c, _ := r.d.loop.State()
				cut = append(cut, c.Guard.Stats()[r.d.wanted.Document().Peers[0].PublicKey].Cut > 0)
			}
			return nil
		})
		r.host.Drift("the table was flushed")
		r.after(time.Second)
		mu.Lock()
		defer mu.Unlock()
		if len(routed) != 2 || slices.Contains(routed, true) || slices.Contains(local, false) || slices.Contains(cut, true) {
			t.Errorf("while the filter was away: routed %v, to the host %v, cut %v", routed, local, cut)
		}
		r.host.SetFault(nil)
		if !r.passes(phone) || !toHost() {
			t.Error("no packet passes after the repair")
		}
	})
}

// TestProblemThatComesAndGoes lets every other observation of the host fail.
func TestProblemThatComesAndGoes(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		n := 0
		r.host.SetFault(func(step string) error {
			if step == "inspect" {
				if n++; n%2 == 0 {
					return &host.StepError{Step: "look", Err: errors.New("interrupted")}
				}
			}
			return nil
		})
		r.after(5 * time.Minute)
		if got := r.events(events.Problem); len(got) != 1 {
			t.Errorf("%d events, want 1", len(got))
		}
	})
}
