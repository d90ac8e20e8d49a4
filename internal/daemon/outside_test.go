package daemon

import (
	"context"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// TestOwnAddressFromOutside tells the helper where peers reach this host, by address and
// by name: for them the addresses are class lan, for behind them may be this host's
// networks, and WireGuard's port there is closed. A name is followed where it goes, and
// keeps what it had while it can't be looked up.
func TestOwnAddressFromOutside(t *testing.T) {
	first, moved, six := netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("192.0.2.99"), netip.MustParseAddr("2001:db8:9::77")
	for endpoint, byName := range map[string]bool{"192.0.2.77": false, "home.example": true} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			o := r.options()
			o.Endpoint = wireguard.Endpoint{Host: endpoint, Port: 4500}
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
			r.after(resolveInterval + time.Second)
			check("moved", map[netip.Addr]policy.Class{first: policy.Internet, six: policy.OnLAN, moved: policy.OnLAN})
			now.Store(nil)
			r.after(10 * time.Minute)
			check("without an answer", map[netip.Addr]policy.Class{first: policy.Internet, six: policy.OnLAN, moved: policy.OnLAN})
		})
	}
}
