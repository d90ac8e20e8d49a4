package daemon

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/resolve"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// TestOwnAddressFromOutside configures the endpoint of this host by address and by name:
// its addresses are class lan for peers, because this host's networks may be behind them,
// and WireGuard's port there is closed. The addresses of a name are followed, and kept
// while it can't be looked up.
func TestOwnAddressFromOutside(t *testing.T) {
	first, moved, six := netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("192.0.2.99"), netip.MustParseAddr("2001:db8:9::77")
	for endpoint, byName := range map[string]bool{"192.0.2.77": false, "home.example": true} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			o := r.options()
			o.Endpoint = mesh.Endpoint{Host: endpoint, Port: 4500}
			var now atomic.Pointer[[]netip.Addr]
			now.Store(&[]netip.Addr{first, six, first})
			o.Resolve = func(_ context.Context, name string) ([]netip.Addr, error) {
				all := now.Load()
				if name != "home.example" || all == nil {
					return nil, context.DeadlineExceeded
				}
				return slices.Clone(*all), nil
			}
			r.startWith(o)
			defer r.end()
			check := func(when string, want map[netip.Addr]policy.Class) {
				t.Helper()
				for a, class := range want {
					if got := r.host.Loaded().Class(a); got != class {
						t.Errorf("with %s, %s: %v is %v, want %v", endpoint, when, a, got, class)
					}
					p := netip.PrefixFrom(a, a.BitLen())
					if closed := slices.Contains(r.host.Loaded().Sets().Outside, p); closed != (class == policy.OnLAN) {
						t.Errorf("with %s, %s: WireGuard's port at %v is closed: %v", endpoint, when, a, closed)
					}
				}
				if got, want := r.host.Loaded().OutsidePorts(), []uint16{4500, 51820}; !slices.Equal(got, want) {
					t.Errorf("with %s the tunnel's ports are %v, want %v", endpoint, got, want)
				}
			}
			r.after(time.Second)
			if !byName {
				check("at first", map[netip.Addr]policy.Class{first: policy.OnLAN, six: policy.Internet})
				return
			}
			check("at first", map[netip.Addr]policy.Class{first: policy.OnLAN, six: policy.OnLAN, moved: policy.Internet})
			now.Store(&[]netip.Addr{six, moved})
			r.after(resolve.Interval + time.Second)
			check("moved", map[netip.Addr]policy.Class{first: policy.OnLAN, six: policy.OnLAN, moved: policy.OnLAN})
			r.after(learned.OutsideFor)
			check("moved a day ago", map[netip.Addr]policy.Class{first: policy.Internet, six: policy.OnLAN, moved: policy.OnLAN})
			now.Store(nil)
			r.after(10 * time.Minute)
			check("without an answer", map[netip.Addr]policy.Class{first: policy.Internet, six: policy.OnLAN, moved: policy.OnLAN})
		})
	}
}

// outside returns the addresses by which others know the host, as they are in force.
func (r *rig) outside() string {
	c, _ := r.d.loop.State()
	return strings.Trim(fmt.Sprint(c.Host.Outside), "[]")
}

func (r *rig) wantOutside(about, want string) {
	r.t.Helper()
	if got := r.outside(); got != want {
		r.t.Errorf("%s: known by %s, want %s", about, got, want)
	}
}

// TestOutsideOutlastsSilence lets the resolver answer and be silent in turn: an address of
// the host's own name stays one for a day, also over a restart.
func TestOutsideOutlastsSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		named := map[string]string{wanted.SettingEndpoint: "home.example"}
		begin := func() {
			o := r.options()
			o.Endpoint.Host = "home.example"
			o.Settings = wanted.StartSettings{Given: named}
			r.startWith(o)
		}
		begin()
		r.after(time.Second)
		r.wantOutside("before the first answer", "")
		if by, _ := r.doctor(); !strings.Contains(by["endpoint"].Message, "as long as the router's public address isn't known") {
			t.Errorf("doctor says %+v", by["endpoint"])
		}
		r.resolveTo("203.0.113.9")
		r.after(10 * resolve.Interval)
		r.wantOutside("found", "203.0.113.9")
		r.resolveTo("")
		r.end()
		begin()
		r.wantOutside("after a restart without DNS", "203.0.113.9")
		r.after(48 * time.Hour)
		r.wantOutside("as long as none is found", "203.0.113.9")
		r.resolveTo("203.0.113.10")
		r.after(10 * resolve.Interval)
		r.wantOutside("another, long after", "203.0.113.10")
		r.resolveTo("203.0.113.11")
		r.after(10 * resolve.Interval)
		r.wantOutside("another, soon after", "203.0.113.10 203.0.113.11")
		r.after(learned.OutsideFor)
		r.wantOutside("a day later", "203.0.113.11")

		// More than count: those that do already stay.
		all := []string{"203.0.113.11"}
		for i := range learned.MaxOutside + 4 {
			all = append(all, fmt.Sprintf("1.0.0.%d", i))
		}
		r.resolveTo(strings.Join(all, ","))
		r.after(10 * resolve.Interval)
		if got := r.outside(); len(strings.Fields(got)) != learned.MaxOutside || !strings.Contains(got, "203.0.113.11") {
			t.Errorf("of many: %s", got)
		}
		if by, _ := r.doctor(); by["endpoint"].OK || !strings.Contains(by["endpoint"].Message, "5 don't") {
			t.Errorf("doctor says %+v", by["endpoint"])
		}
		r.end()
		// Another name's addresses don't count.
		named[wanted.SettingEndpoint] = "other.example"
		r.resolveTo("")
		o := r.options()
		o.Endpoint.Host = "other.example"
		o.Settings = wanted.StartSettings{Given: named}
		r.startWith(o)
		r.wantOutside("another name", "")
		r.end()
	})
}
