package linux

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// excludePrivate are the routes that WireGuard's apps install for everything but private
// networks.
const excludePrivate = `0.0.0.0/5 8.0.0.0/7 11.0.0.0/8 12.0.0.0/6 16.0.0.0/4 32.0.0.0/3 64.0.0.0/2 128.0.0.0/3
	160.0.0.0/5 168.0.0.0/6 172.0.0.0/12 172.32.0.0/11 172.64.0.0/10 172.128.0.0/9 173.0.0.0/8 174.0.0.0/7
	176.0.0.0/4 192.0.0.0/9 192.128.0.0/11 192.160.0.0/13 192.169.0.0/16 192.170.0.0/15 192.172.0.0/14
	192.176.0.0/12 192.192.0.0/10 193.0.0.0/8 194.0.0.0/7 196.0.0.0/6 200.0.0.0/5 208.0.0.0/4`

// peerSends sends a SYN from a peer and checks where it comes out; "" is nowhere.
func (w *world) peerSends(n int, src, dst netip.Addr, where string) {
	w.t.Helper()
	w.inject(netlab.TCPPacket(netip.AddrPortFrom(src, uint16(20000+n)), netip.AddrPortFrom(dst, 80), netlab.SYN, 1, 0, word(n)))
	if where == "" {
		w.settle(nil)
	} else {
		w.settle([][]byte{word(n)})
	}
	got := w.arrivals(word(n))
	if where == "" && len(got) > 0 || where != "" && (len(got) != 1 || got[0].where != where) {
		w.t.Errorf("%v to %v: came out at %v, want %q", src, dst, got, where)
	}
}

// TestRoutesThatExcludePrivateIPs has another VPN route everything but private networks:
// together the routes are a default route, so routing alone reaches the internet through
// it, and private networks need lan.
func TestRoutesThatExcludePrivateIPs(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	w.open()
	defer w.close()
	a := netlab.Addresses()
	commands := "-6 route add ::/1 via " + a.VPNPeer.V6.String() + " dev vpn0\n-6 route add 8000::/2 via " + a.VPNPeer.V6.String() + " dev vpn0\n"
	for _, p := range strings.Fields(excludePrivate) {
		commands += "route add " + p + " via " + a.VPNPeer.V4.String() + " dev vpn0\n"
	}
	w.ip(w.pic.B, commands)
	r := w.enforce(meshOf(grants{ann: mesh.Routing, bob: mesh.Routing | mesh.LAN}))
	if h := r.Host(); h.Uplink4 != "vpn0" || h.Uplink6 != "vpn0" || len(h.NearlyDefault()) > 0 {
		t.Errorf("the uplinks are %q and %q, nearly default is %v", h.Uplink4, h.Uplink6, h.NearlyDefault())
	}
	w.peerSends(1, ann4, netip.MustParseAddr("209.85.0.1"), netlab.VPN)
	w.peerSends(2, ann6, netip.MustParseAddr("2a00:1450::1"), netlab.VPN)
	w.peerSends(3, ann4, a.L.V4, "")
	w.peerSends(4, bob4, a.L.V4, netlab.LAN)
	// Without one of them the rest isn't a default route any more, and is reported.
	w.ip(w.pic.B, "route del 208.0.0.0/4 dev vpn0")
	r = w.enforce(meshOf(grants{ann: mesh.Routing, bob: mesh.Routing | mesh.LAN}))
	if near := r.Host().NearlyDefault(); len(near) != 1 || near[0].Interface != "vpn0" {
		t.Errorf("nearly default is %+v", near)
	}
	w.peerSends(5, ann4, netip.MustParseAddr("9.9.9.9"), "")
	w.peerSends(6, bob4, netip.MustParseAddr("9.9.9.9"), netlab.VPN)
}

// TestRouterByItsPublicAddress has a peer open a page at an address that is known to be
// this host's from outside, such as its router's.
func TestRouterByItsPublicAddress(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	w.open()
	defer w.close()
	a := netlab.Addresses()
	m := meshOf(grants{ann: mesh.Routing, bob: mesh.Routing | mesh.LAN})
	w.outside = []netip.Addr{a.I.V4, a.I.V6}
	w.enforce(m)
	w.peerSends(1, ann4, a.I.V4, "")
	w.peerSends(2, ann6, a.I.V6, "")
	w.peerSends(3, ann4, netip.MustParseAddr("8.8.8.8"), netlab.Uplink)
	w.peerSends(4, bob4, a.I.V4, netlab.Uplink)
	w.peerSends(5, bob6, a.I.V6, netlab.Uplink)
	// The address belongs to another host now.
	w.outside = nil
	w.enforce(m)
	w.peerSends(6, ann4, a.I.V4, netlab.Uplink)
	w.peerSends(7, ann6, a.I.V6, netlab.Uplink)
}
