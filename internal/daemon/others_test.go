package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/explain"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/retry"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// beset is a host beside other software, which takes long to look at.
type beset struct {
	mu    sync.Mutex
	takes time.Duration
	found []host.Problem
	err   error
	bug   any // panicked with, if not nil
	asked []*policy.Ruleset
	outer []netip.AddrPort
}

func (b *beset) set(takes time.Duration, found []host.Problem, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.takes, b.found, b.err = takes, found, err
}

func (b *beset) Others(ctx context.Context, r *policy.Ruleset, outer []netip.AddrPort) ([]host.Problem, error) {
	b.mu.Lock()
	b.asked, b.outer = append(b.asked, r), outer
	takes, found, err, bug := b.takes, b.found, b.err, b.bug
	b.mu.Unlock()
	if bug != nil {
		panic(bug)
	}
	if !retry.Sleep(ctx, takes) {
		return nil, context.Cause(ctx)
	}
	return found, err
}

func (b *beset) ByOthers(context.Context, host.Packet, string, bool) (host.ByOthers, error) {
	return host.ByOthers{}, nil
}

// TestOthersAreWaitedForByNobody lets an examination of other software take for ever:
// changes come into force and are answered as without it, and status has the last result.
func TestOthersAreWaitedForByNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		b := &beset{}
		chain := host.Problem{Step: "look at other packet filters", Message: "chain FORWARD drops it", Hint: "let it", Kind: host.KindOtherFilters}
		b.set(0, []host.Problem{chain}, nil)
		o := r.options()
		o.Host.Others, o.Host.Judge = b, b
		r.startWith(o)
		defer r.end()
		problems := func() []api.Problem { return r.d.Status().Problems }
		r.after(time.Second)
		if got := problems(); len(got) != 1 || got[0] != apiProblem(chain) {
			t.Errorf("problems %v", got)
		}
		b.set(time.Hour, nil, nil)
		r.add("phone")
		r.after(2 * r.d.opts.Tick) // it hangs
		began := time.Now()
		if r.doctor(); time.Since(began) > explain.DoctorOthersLimit {
			t.Errorf("doctor took %v", time.Since(began))
		}
		began = time.Now()
		r.mustAllow("phone", "routing", "")
		r.wantLoaded("phone", mesh.Routing)
		if _, err := r.deny("phone", "routing"); err != nil {
			t.Fatal(err)
		}
		r.wantLoaded("phone", 0)
		if took := time.Since(began); took > time.Second {
			t.Errorf("the changes took %v", took)
		}
		r.after(explain.OthersLimit + time.Minute)
		if got := problems(); len(got) != 1 || got[0].Step != "look at other software" {
			t.Errorf("problems when a look fails: %v", got)
		}
		b.set(0, nil, errors.New("interrupted"))
		r.after(2 * time.Minute)
		if got := problems(); len(got) != 1 || r.d.Status().State != api.Enforcing {
			t.Errorf("problems %v, state %s", got, r.d.Status().State)
		}
		b.set(0, nil, nil)
		r.after(time.Minute)
		if got := problems(); len(got) > 0 {
			t.Errorf("problems afterwards: %v", got)
		}
		b.set(0, []host.Problem{chain}, nil)
		if by, _ := r.doctor(); by["other packet filters"].Message != chain.Message {
			t.Errorf("doctor doesn't look by itself: %+v", by["other packet filters"])
		}
	})
}

// TestOthersAreAskedForKnownDevices has more devices than an examination of other software
// includes: those with the latest handshakes count.
func TestOthersAreAskedForKnownDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		b := &beset{}
		o := r.options()
		o.Host.Others, o.Host.Judge = b, b
		r.startWith(o)
		defer r.end()
		var want []netip.AddrPort
		stats := map[mesh.PublicKey]tunnel.PeerStats{}
		for i := range explain.MaxOuter + 8 {
			name := fmt.Sprintf("peer%d", i)
			r.add(name)
			at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), 4000)
			key, err := mesh.ParsePublicKey(keyOf(name))
			if err != nil {
				t.Fatal(err)
			}
			stats[key] = tunnel.PeerStats{LastHandshake: time.Now().Add(-time.Duration(i) * time.Minute), Endpoint: at}
			if i < explain.MaxOuter {
				want = append(want, at)
			}
		}
		r.add("never-heard")
		r.tunnel.mu.Lock()
		r.tunnel.stats = stats
		r.tunnel.mu.Unlock()
		r.after(2 * DefaultTick)
		b.mu.Lock()
		defer b.mu.Unlock()
		if !slices.Equal(b.outer, want) {
			t.Errorf("asked about %v, want %v", b.outer, want)
		}
	})
}

// TestLongLooksArePaced lets each examination of other software take a second: the pause
// after it is twenty times as long.
func TestLongLooksArePaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		b := &beset{}
		b.set(time.Second, nil, nil)
		o := r.options()
		o.Host.Others, o.Host.Judge = b, b
		r.startWith(o)
		defer r.end()
		r.after(time.Hour)
		b.mu.Lock()
		defer b.mu.Unlock()
		if n := len(b.asked); n > 180 || n < 100 {
			t.Errorf("%d looks of a second in an hour", n)
		}
	})
}

// TestOthersPanic has the code that judges other software's rules panic: the helper goes on,
// and the status says so until it doesn't any more.
func TestOthersPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		b := &beset{bug: "index out of range"}
		o := r.options()
		o.Host.Others, o.Host.Judge = b, b
		r.startWith(o)
		defer r.end()
		told := func() bool {
			return slices.ContainsFunc(r.d.Status().Problems, func(p api.Problem) bool { return strings.Contains(p.Message, "index out of range") })
		}
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		r.after(2 * time.Minute)
		if s := r.d.Status(); s.State != api.Enforcing || !told() {
			t.Errorf("%s, %+v", s.State, s.Problems)
		}
		b.mu.Lock()
		b.bug = nil
		b.mu.Unlock()
		if r.after(2 * time.Minute); told() {
			t.Errorf("still told: %+v", r.d.Status().Problems)
		}
	})
}
