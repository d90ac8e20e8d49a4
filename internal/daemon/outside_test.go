package daemon

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// TestOwnAddressFromOutside tells the helper where peers reach this host: for them the
// address is class lan, for behind it may be this host's networks, and WireGuard's port
// there is closed.
func TestOwnAddressFromOutside(t *testing.T) {
	for endpoint, class := range map[string]policy.Class{"192.0.2.77": policy.OnLAN, "home.example": policy.Internet} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			o := r.options()
			o.Endpoint = wireguard.Endpoint{Host: endpoint, Port: 4500}
			r.startWith(o)
			defer r.end()
			r.after(0)
			if got := r.host.Loaded().Class(netip.MustParseAddr("192.0.2.77")); got != class {
				t.Errorf("with %s the address is %v, want %v", endpoint, got, class)
			}
			if got, want := r.host.Loaded().OutsidePorts(), []uint16{4500, 51820}; class == policy.OnLAN && !slices.Equal(got, want) {
				t.Errorf("with %s the tunnel's ports are %v, want %v", endpoint, got, want)
			}
		})
	}
}
