package darwin_test

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// newLaptop returns a Mac with Wi-Fi and a wired LAN, a default route by each,
// peer-to-peer Wi-Fi, and one of Apple's tunnels with its own default route.
func newLaptop(t testing.TB) *darwintest.Kernel {
	t.Helper()
	k := darwintest.NewKernel()
	broadcast := darwin.InterfaceUp | darwin.InterfaceBroadcast | darwin.InterfaceRunning | darwin.InterfaceMulticast
	en0 := k.AddInterface("en0", broadcast, 1500)
	en5 := k.AddInterface("en5", broadcast, 1500)
	awdl := k.AddInterface("awdl0", broadcast, 1484)
	for name, p := range map[string]string{"en0": "203.0.113.5/24", "en5": "192.168.77.2/24"} {
		if err := k.AddAddress(name, netip.MustParsePrefix(p)); err != nil {
			t.Fatal(err)
		}
	}
	for name, p := range map[string]string{"en0": "2001:db8:1::5/64", "awdl0": "fe80::1/64"} {
		if err := k.AddAddress(name, netip.MustParsePrefix(p)); err != nil {
			t.Fatal(err)
		}
	}
	utun, err := k.CreateTunnel("utun", 1380)
	if err != nil {
		t.Fatal(err)
	}
	n, err := darwin.Observe(k)
	if err != nil {
		t.Fatal(err)
	}
	tunnel := n.Interface(utun).Index
	for _, r := range []darwin.Route{
		{Dst: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fe80::1"), Index: awdl, Flags: darwin.RouteUp | darwin.RouteGateway},
		{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("192.168.77.1"), Index: en5, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteScoped},
		{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("203.0.113.1"), Index: en0, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteStatic},
		{Dst: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fe80::9"), Index: en0, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteScoped},
		{Dst: netip.MustParsePrefix("10.9.0.0/16"), Gateway: netip.MustParseAddr("192.168.77.9"), Index: en5, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteStatic},
		{Dst: netip.MustParsePrefix("203.0.113.1/32"), Index: en0, Flags: darwin.RouteUp | darwin.RouteHost | darwin.RouteLLInfo | darwin.RouteCloned},
		{Dst: netip.MustParsePrefix("224.0.0.0/4"), Gateway: netip.MustParseAddr("203.0.113.5"), Index: en0, Flags: darwin.RouteUp | darwin.RouteMulticast},
		{Dst: netip.MustParsePrefix("198.51.100.0/24"), Gateway: netip.MustParseAddr("127.0.0.1"), Index: 1, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteBlackhole},
		{Dst: netip.MustParsePrefix("100.100.0.0/16"), Gateway: netip.MustParseAddr("100.100.0.1"), Index: tunnel, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteStatic},
	} {
		if err := k.AddRoute(r); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

func observe(t testing.TB, k darwin.Kernel) *darwin.Network {
	t.Helper()
	n, err := darwin.Observe(k)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestObserve(t *testing.T) {
	n := observe(t, newLaptop(t))
	en0 := n.Interface("en0")
	want := &darwin.Interface{Name: "en0", Index: 2, MTU: 1500,
		Flags: darwin.InterfaceUp | darwin.InterfaceBroadcast | darwin.InterfaceRunning | darwin.InterfaceMulticast,
		Addresses: []darwin.Address{
			{Prefix: netip.MustParsePrefix("203.0.113.5/24")},
			{Prefix: netip.MustParsePrefix("2001:db8:1::5/64")},
		}}
	if diff := cmp.Diff(want, en0, compareNetip); diff != "" {
		t.Errorf("en0 (-want +got):\n%s", diff)
	}
	if n.Interface("en9") != nil {
		t.Error("found an interface that doesn't exist")
	}
}

// TestUplink checks that only an unscoped default route by a suitable interface makes an
// uplink.
func TestUplink(t *testing.T) {
	k := newLaptop(t)
	i, gateway := observe(t, k).Uplink(darwin.IPv4)
	if i == nil || i.Name != "en0" || gateway != netip.MustParseAddr("203.0.113.1") {
		t.Errorf("IPv4 uplink %+v by %v: the unscoped default is en0's", i, gateway)
	}
	// The only unscoped IPv6 default route is that of peer-to-peer Wi-Fi.
	if i, _ := observe(t, k).Uplink(darwin.IPv6); i != nil {
		t.Errorf("IPv6 uplink %+v", i)
	}
	// Wi-Fi disconnects. Then macOS makes the wired LAN's default route unscoped.
	k.RemoveInterface("en0")
	if i, _ := observe(t, k).Uplink(darwin.IPv4); i != nil {
		t.Errorf("uplink %+v, although only a scoped default route remains", i)
	}
	en5 := observe(t, k).Interface("en5").Index
	if err := k.AddRoute(darwin.Route{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("192.168.77.1"), Index: en5, Flags: darwin.RouteUp | darwin.RouteGateway}); err != nil {
		t.Fatal(err)
	}
	if i, _ := observe(t, k).Uplink(darwin.IPv4); i == nil || i.Name != "en5" {
		t.Errorf("uplink %+v, want en5", i)
	}
}

// TestLeadsOut checks which kinds of interfaces can be an uplink.
func TestLeadsOut(t *testing.T) {
	for name, want := range map[string]bool{
		"en0": true, "en12": true, "pdp_ip0": true, "ppp0": true, "utun3": true, "ipsec0": true, "bridge0": true, "gif0": false,
		"awdl0": false, "llw0": false, "stf0": false, "ap1": false, "anpi0": false, "lo0": false, "XHC20": false,
	} {
		if got := darwin.LeadsOut(&darwin.Interface{Name: name, Flags: darwin.InterfaceUp}); got != want {
			t.Errorf("%s leads out: %v", name, got)
		}
	}
	if darwin.LeadsOut(&darwin.Interface{Name: "en0"}) || darwin.LeadsOut(nil) {
		t.Error("an interface that is down, or a nil one, leads out")
	}
}

// TestRouted checks which routes Routed lists, with their interfaces.
func TestRouted(t *testing.T) {
	var got []string
	for _, r := range observe(t, newLaptop(t)).Routed() {
		got = append(got, r.Prefix.String()+" "+r.Interface)
	}
	slices.Sort(got)
	want := []string{
		"0.0.0.0/0 en0", "10.9.0.0/16 en5", "100.100.0.0/16 utun0", "192.168.77.0/24 en5",
		"198.51.100.0/24 lo0", "2001:db8:1::/64 en0", "203.0.113.0/24 en0", "::/0 awdl0",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// prefixes parses a list of prefixes.
func prefixes(list ...string) (p []netip.Prefix) {
	for _, s := range list {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

// marked returns the destinations of routes with our mark.
func marked(t *testing.T, k darwin.Kernel) (list []string) {
	for _, r := range observe(t, k).Routes {
		if darwin.Ours(r) {
			list = append(list, r.Dst.String())
		}
	}
	slices.Sort(list)
	return list
}

func newTunnel(t *testing.T, k *darwintest.Kernel) int {
	t.Helper()
	name, err := k.CreateTunnel("utun", 1420)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"100.64.0.1/32", "fd00::1/128"} {
		if err := k.AddAddress(name, netip.MustParsePrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	return observe(t, k).Interface(name).Index
}

// TestRouterThroughStates sets different routes one after another: each time exactly the
// wanted ones have our mark, and foreign routes don't change.
func TestRouterThroughStates(t *testing.T) {
	k := newLaptop(t)
	before := observe(t, k).Routes
	tun := newTunnel(t, k)
	r := darwin.NewRouter(k)
	for _, want := range [][]netip.Prefix{
		prefixes("100.64.0.2/32", "fd00::2/128"),
		prefixes("100.64.0.2/32", "fd00::2/128"), // again
		prefixes("100.64.0.3/32", "fd00::2/128", "0.0.0.0/1", "128.0.0.0/1"),
		nil,
	} {
		if err := r.Set(tun, want); err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, p := range want {
			names = append(names, p.String())
		}
		slices.Sort(names)
		if diff := cmp.Diff(names, marked(t, k)); diff != "" {
			t.Errorf("routes of ours (-want +got):\n%s", diff)
		}
	}
	k.RemoveInterface("utun1")
	if diff := cmp.Diff(before, observe(t, k).Routes, compareNetip); diff != "" {
		t.Errorf("foreign routes changed (-before +after):\n%s", diff)
	}
}

// TestRouterRepairs has another program delete a route of ours: the next Set adds it
// again.
func TestRouterRepairs(t *testing.T) {
	k := newLaptop(t)
	tun := newTunnel(t, k)
	r := darwin.NewRouter(k)
	want := prefixes("100.64.0.2/32", "100.64.0.3/32")
	if err := r.Set(tun, want); err != nil {
		t.Fatal(err)
	}
	if err := k.DeleteRoute(want[0]); err != nil {
		t.Fatal(err)
	}
	if err := r.Set(tun, want); err != nil || len(marked(t, k)) != 2 {
		t.Errorf("after another program's deletion: %v, %q", err, marked(t, k))
	}
}

// TestRouterTaken has another program hold a wanted route: Set reports it, adds the
// others, and never deletes the foreign one.
func TestRouterTaken(t *testing.T) {
	k := newLaptop(t)
	tun := newTunnel(t, k)
	en5 := observe(t, k).Interface("en5").Index
	foreign := darwin.Route{Dst: netip.MustParsePrefix("100.64.0.2/32"), Index: en5, Flags: darwin.RouteUp | darwin.RouteHost | darwin.RouteStatic}
	if err := k.AddRoute(foreign); err != nil {
		t.Fatal(err)
	}
	r := darwin.NewRouter(k)
	err := r.Set(tun, prefixes("100.64.0.2/32", "100.64.0.3/32"))
	if !errors.Is(err, darwin.ErrRouteTaken) || !strings.Contains(err.Error(), "100.64.0.2/32") {
		t.Errorf("Set returned %v", err)
	}
	if got := marked(t, k); !slices.Equal(got, []string{"100.64.0.3/32"}) {
		t.Errorf("the routes of ours are %q", got)
	}
	if err := r.Set(tun, nil); err != nil {
		t.Error(err)
	}
	if !slices.Contains(observe(t, k).Routes, foreign) {
		t.Error("the foreign route was deleted")
	}
}

// TestRouterRefuses sets routes that are invalid or would replace a default route.
func TestRouterRefuses(t *testing.T) {
	k := newLaptop(t)
	tun := newTunnel(t, k)
	before := observe(t, k).Routes
	for _, bad := range [][]netip.Prefix{
		prefixes("0.0.0.0/0"), prefixes("::/0"), {netip.Prefix{}}, prefixes("10.0.0.1/8"), prefixes("::ffff:10.0.0.0/104"),
	} {
		if err := darwin.NewRouter(k).Set(tun, bad); err == nil {
			t.Errorf("created the routes %v", bad)
		}
	}
	// The interface doesn't exist, or has no address of the family.
	if err := darwin.NewRouter(k).Set(99, prefixes("100.64.0.2/32")); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("route by an unusable interface: %v", err)
	}
	if diff := cmp.Diff(before, observe(t, k).Routes, compareNetip); diff != "" {
		t.Errorf("routes changed (-before +after):\n%s", diff)
	}
}

// TestSweepAfterCrash sweeps a pinned endpoint's route after a crash: only a route of
// ours is deleted.
func TestSweepAfterCrash(t *testing.T) {
	k := newLaptop(t)
	en0 := observe(t, k).Interface("en0").Index
	foreign := darwin.NewRoute(netip.MustParsePrefix("198.51.100.8/32"), en0) // NetBird's
	if err := k.AddRoute(foreign); err != nil {
		t.Fatal(err)
	}
	before := observe(t, k).Routes
	// A pinned route to an endpoint by the uplink outlives the tunnel.
	pin, router := netip.MustParsePrefix("198.51.100.7/32"), netip.MustParseAddr("203.0.113.1")
	r := darwin.NewRouter(k)
	for range 2 {
		if err := r.Add(pin, router, en0); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Add(pin, netip.MustParseAddr("203.0.113.2"), en0); !errors.Is(err, darwin.ErrRouteTaken) {
		t.Errorf("by another router: %v", err)
	}
	gone, err := darwin.NewRouter(k).Sweep([]netip.Prefix{pin, netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("0.0.0.0/0")})
	if err != nil || !slices.Equal(gone, []netip.Prefix{pin}) {
		t.Errorf("swept %v, %v", gone, err)
	}
	if diff := cmp.Diff(before, observe(t, k).Routes, compareNetip); diff != "" {
		t.Errorf("foreign routes changed (-before +after):\n%s", diff)
	}
	for dst, gateway := range map[string]string{"0.0.0.0/0": "203.0.113.1", "2001:db8::/32": "203.0.113.1", "10.0.0.1/8": "203.0.113.1"} {
		if err := r.Add(netip.MustParsePrefix(dst), netip.MustParseAddr(gateway), en0); err == nil {
			t.Errorf("added %s by %s", dst, gateway)
		}
	}
	if err := r.Add(netip.MustParsePrefix("192.0.2.0/24"), netip.MustParseAddr("172.16.0.1"), en0); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("by an off-link router: %v", err)
	}
}

// TestFakeDeletesWhateverHasTheDestination checks that the fake, like the kernel
// (tailscale#21395), deletes a route by its destination alone, whatever its interface.
// Otherwise the tests above would prove nothing.
func TestFakeDeletesWhateverHasTheDestination(t *testing.T) {
	k := newLaptop(t)
	tun := newTunnel(t, k)
	conn, err := k.OpenRoute()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	m := darwin.AppendRoute(nil, xnu.RTMDelete, 1, darwin.Route{Dst: netip.MustParsePrefix("0.0.0.0/0"), Index: tun, Flags: darwin.RouteUp | darwin.RouteStatic})
	if _, err := conn.Write(m); err != nil {
		t.Fatal(err)
	}
	if i, _ := observe(t, k).Uplink(darwin.IPv4); i != nil {
		t.Errorf("the physical default survived: %+v", i)
	}
	if _, err := conn.Write(m); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("deleted twice: %v", err)
	}
	for name, bad := range map[string][]byte{"short": m[:20], "length": append(slices.Clone(m), 0, 0, 0, 0)} {
		if _, err := conn.Write(bad); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkParseRoutes10000(b *testing.B) {
	k := newLaptop(b)
	want := make([]netip.Prefix, 10000)
	for i := range want {
		want[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i)}), 32)
	}
	list, err := k.Routes()
	if err != nil {
		b.Fatal(err)
	}
	for _, p := range want {
		list = append(list, dump(darwin.NewRoute(p, 2))...)
	}
	for b.Loop() {
		if got, err := darwin.ParseRoutes(list); err != nil || len(got) < len(want) {
			b.Fatal(len(got), err)
		}
	}
}
