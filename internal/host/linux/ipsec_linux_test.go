package linux

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// secure adds an IPsec policy for packets that leave to a network. Without keys it lets
// them pass unchanged, so the test can see which way packets take on kernels that can't
// encrypt.
func (g *rig) secure(to netip.Prefix) *netlink.XfrmPolicy {
	g.t.Helper()
	ends := []net.IP{net.IPv4(203, 0, 113, 2).To4(), net.IPv4(198, 51, 100, 77).To4()}
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if to.Addr().Is6() {
		ends = []net.IP{net.ParseIP("2001:db8:1::2"), net.ParseIP("2001:db8:2::77")}
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	p := &netlink.XfrmPolicy{
		Src: ipNet(all), Dst: ipNet(to), Dir: netlink.XFRM_DIR_OUT, Priority: 100,
		Tmpls: []netlink.XfrmPolicyTmpl{{
			Src: ends[0], Dst: ends[1], Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TRANSPORT, Optional: 1,
		}},
	}
	err := g.pic.B.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_XFRM)
		if err != nil {
			g.t.Skip("the kernel has no IPsec:", err)
		}
		defer h.Close()
		return h.XfrmPolicyAdd(p)
	})
	if err != nil {
		g.t.Fatal("add IPsec policy:", err)
	}
	return p
}

// TestIPsecNetworks has networks that are reached only by IPsec policies: they are of
// class lan. The kernel reports a policy as soon as it exists.
func TestIPsecNetworks(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all, bob: mesh.Routing}))
	var seen atomic.Int64
	sockets, err := ask(t.Context(), w.p, openWatch)
	if err != nil {
		t.Fatal(err)
	}
	if sockets.ipsec == nil {
		t.Fatal("IPsec policies aren't watched")
	}
	ctx, cancel := context.WithCancel(context.Background())
	var watching errgroup.Group
	watching.Go(func() error {
		return follow(ctx, sockets.ipsec, func() { seen.Add(1) }, func([]mdlayher.Message) bool { return true })
	})
	defer func() {
		cancel()
		sockets.close()
		if err := watching.Wait(); err != nil {
			t.Error(err)
		}
	}()
	n := 0
	for i, secured := range []netip.Prefix{netip.MustParsePrefix("8.8.4.0/24"), netip.MustParsePrefix("2001:4860:1::/48")} {
		beside := []netip.Addr{netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("2001:4860::8888")}[i]
		before := seen.Load()
		w.secure(secured)
		for deadline := time.Now().Add(10 * time.Second); seen.Load() == before && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		if seen.Load() == before {
			t.Error("Watch saw no IPsec policy")
		}
		r := w.enforce(meshOf(grants{ann: all, bob: mesh.Routing}))
		if !slices.Contains(r.Host().IPsec, secured) || r.Class(secured.Addr().Next()) != policy.OnLAN {
			t.Errorf("%v is of class %v; the host's IPsec networks are %v", secured, r.Class(secured.Addr().Next()), r.Host().IPsec)
		}
		for _, tt := range []struct {
			from []netip.Addr
			to   netip.Addr
			pass bool
		}{
			{[]netip.Addr{ann4, ann6}, secured.Addr().Next(), true},
			{[]netip.Addr{bob4, bob6}, secured.Addr().Next(), false},
			{[]netip.Addr{bob4, bob6}, beside, true},
		} {
			n++
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(tt.from[i], 4000), netip.AddrPortFrom(tt.to, 5000), word(n)))
			var want [][]byte
			if tt.pass {
				want = append(want, word(n))
			}
			w.settle(want)
			if got := w.captures(word(n)); len(got) > 0 != tt.pass {
				t.Errorf("from %v to %v: arrived at %v, want %v", tt.from[i], tt.to, got, tt.pass)
			}
		}
	}
}

// TestIPsecForEverything has a policy for all packets that leave: that is how this host
// reaches the internet.
func TestIPsecForEverything(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.secure(netip.MustParsePrefix("0.0.0.0/0"))
	w.secure(netip.MustParsePrefix("8.8.4.0/24"))
	r := w.enforce(meshOf(grants{bob: mesh.Routing}))
	if by := r.Host().InternetByIPsec(); !by.IPv4 || by.IPv6 {
		t.Errorf("by IPsec: %+v", by)
	}
	for i, to := range []string{"8.8.8.8", "8.8.4.4"} {
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(bob4, 4000), netip.AddrPortFrom(netip.MustParseAddr(to), 5000), word(i+1)))
	}
	w.settle([][]byte{word(1)})
	if got := w.arrivals(word(1)); len(got) != 1 {
		t.Errorf("the internet is reached at %v", got)
	}
	if got := w.captures(word(2)); len(got) > 0 {
		t.Errorf("a network with a policy of its own is reached at %v", got)
	}
}

// TestIPsecDestinations selects from the kernel's policies.
func TestIPsecDestinations(t *testing.T) {
	tmpl := []netlink.XfrmPolicyTmpl{{Proto: netlink.XFRM_PROTO_ESP}}
	to := func(s string) *net.IPNet { return ipNet(netip.MustParsePrefix(s)) }
	got := ipsecDestinations([]netlink.XfrmPolicy{
		{Dst: to("192.0.2.0/24"), Dir: netlink.XFRM_DIR_OUT, Tmpls: tmpl},
		{Dst: to("192.0.2.0/24"), Dir: netlink.XFRM_DIR_OUT, Tmpls: tmpl, Priority: 1}, // twice
		{Dst: to("198.51.100.0/24"), Dir: netlink.XFRM_DIR_FWD, Tmpls: tmpl},
		{Dst: to("198.51.100.0/24"), Dir: netlink.XFRM_DIR_IN, Tmpls: tmpl},
		{Dst: to("0.0.0.0/0"), Dir: netlink.XFRM_SOCKET_OUT},
		{Dst: to("203.0.113.0/24"), Dir: netlink.XFRM_DIR_OUT}, // passes unchanged
		{Dst: to("203.0.113.0/24"), Dir: netlink.XFRM_DIR_OUT, Action: netlink.XFRM_POLICY_BLOCK, Tmpls: tmpl},
		{Dst: to("0.0.0.0/0"), Dir: netlink.XFRM_DIR_OUT, Tmpls: tmpl, Ifid: 7},
		{Dst: to("0.0.0.0/0"), Dir: netlink.XFRM_DIR_OUT, Tmpls: tmpl, Mark: &netlink.XfrmMark{Value: 1, Mask: 1}},
		{Dst: to("2001:db8::/32"), Dir: netlink.XFRM_DIR_OUT, Tmpls: tmpl},
		{Dir: netlink.XFRM_DIR_OUT, Tmpls: tmpl},
	})
	want := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
