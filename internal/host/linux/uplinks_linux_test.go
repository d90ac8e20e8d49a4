package linux

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// far returns addresses of the internet that the uplinks' routers only know not to be
// theirs.
func far(v4 bool, n int) (out []netip.Addr) {
	a := netip.MustParseAddr("198.51.100.10")
	if !v4 {
		a = netip.MustParseAddr("2001:db8:9::10")
	}
	for range n {
		out = append(out, a)
		a = a.Next()
	}
	return out
}

// reaches sends packets of ann to each address, has the first one answer, and returns the
// uplinks by which the packets left. Each packet must leave with the source that sources
// has for its uplink, and its answer must come back.
func (w *world) reaches(to []netip.Addr, n *int, sources map[string]netip.Addr) (by []string) {
	w.t.Helper()
	for _, a := range to {
		ann := ann4
		if a.Is6() {
			ann = ann6
		}
		there := netip.AddrPortFrom(a, 443)
		*n++
		w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann, uint16(20000+*n)), there, word(*n)))
		w.settle([][]byte{word(*n)})
		got := w.arrivals(word(*n))
		if len(got) != 1 {
			w.t.Errorf("to %v: came out at %v", a, got)
			continue
		}
		p := got[0].packet
		if want := sources[got[0].where]; p.Src != want {
			w.t.Errorf("to %v: left by %s from %v, want %v", a, got[0].where, p.Src, want)
		}
		*n++
		w.send(got[0].where, netlab.UDPPacket(there, netip.AddrPortFrom(p.Src, p.SrcPort), word(*n)))
		w.settle([][]byte{word(*n)})
		if got := w.captures(word(*n)); !once(got, "mesh") {
			w.t.Errorf("the answer of %v came out at %v", a, got)
		}
		by = append(by, got[0].where)
	}
	slices.Sort(by)
	return slices.Compact(by)
}

// TestEqualUplinks has default routes of equal cost, among which the kernel chooses per
// flow: peers reach all of the internet.
func TestEqualUplinks(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	a := netlab.Addresses()
	b := w.pic.B
	w.ip(b, `route replace default nexthop via `+a.W.V4.String()+` dev wan0 nexthop via 203.0.113.130 dev pub0
		-6 route add default metric 10 nexthop via 2001:db8:1::1 dev wan0 nexthop via 2001:db8:2::2 dev pub0`)
	r := w.enforce(meshOf(grants{ann: mesh.Routing}))
	if h := r.Host(); len(h.Uplinks(own4)) != 2 || len(h.Uplinks(own6)) != 2 {
		t.Errorf("uplinks %v and %v", h.Uplinks(own4), h.Uplinks(own6))
	}
	n := 0
	for _, v4 := range []bool{true, false} {
		sources := map[string]netip.Addr{netlab.Uplink: a.BUplink.List()[map[bool]int{true: 0, false: 1}[v4]], netlab.Public: netip.MustParseAddr("203.0.113.129")}
		if !v4 {
			sources[netlab.Public] = netip.MustParseAddr("2001:db8:2::1")
		}
		if by := w.reaches(far(v4, 24), &n, sources); len(by) != 2 {
			t.Errorf("24 flows left by %v alone", by)
		}
	}
	// A route of another cost isn't an uplink.
	w.ip(b, "route replace default via "+a.W.V4.String()+" dev wan0\nroute add default via 203.0.113.130 dev pub0 metric 50")
	if h := w.enforce(meshOf(grants{ann: mesh.Routing})).Host(); len(h.Uplinks(own4)) != 1 {
		t.Errorf("uplinks %v", h.Uplinks(own4))
	}
}

// TestSourceOfTheRoute has a default route with a preferred source other than the address
// that masquerade takes: peers' packets leave with it, and their answers come back.
func TestSourceOfTheRoute(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	a := netlab.Addresses()
	second, second6 := netip.MustParseAddr("203.0.113.60"), netip.MustParseAddr("2001:db8:1::60")
	n := 0
	check := func(about string, want, want6 netip.Addr) {
		t.Helper()
		r := w.enforce(meshOf(grants{ann: mesh.Routing}))
		if drift := w.inspect(r).Drift; len(drift) > 0 {
			t.Errorf("%s: %v", about, drift)
		}
		w.reaches(far(true, 2), &n, map[string]netip.Addr{netlab.Uplink: want})
		w.reaches(far(false, 2), &n, map[string]netip.Addr{netlab.Uplink: want6})
	}
	check("without", a.BUplink.V4, a.BUplink.V6)
	w.ip(w.pic.B, `addr add 203.0.113.60/26 dev wan0
		-6 addr add 2001:db8:1::60/64 dev wan0 nodad
		route replace default via `+a.W.V4.String()+` dev wan0 src 203.0.113.60
		-6 route add default via 2001:db8:1::1 dev wan0 metric 10 src 2001:db8:1::60`)
	check("with another", second, second6)
	w.ip(w.pic.B, "route replace default via "+a.W.V4.String()+" dev wan0 src "+a.BUplink.V4.String())
	check("with the interface's own", a.BUplink.V4, second6)
	if s := w.p.sources[true]; s.IsValid() {
		t.Errorf("%v isn't masqueraded, although that is the same", s)
	}
}

// TestFullTunnelsOfOthers has another program take all of the host's traffic by policy
// rules, as wg-quick and an exit node of Tailscale do. Peers' packets go the same way.
// Their answers come back, or the problem is reported with its remedy.
func TestFullTunnelsOfOthers(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	a := netlab.Addresses()
	n := 0
	check := func(about, link string, v4, v6 netip.Addr, takes bool) {
		t.Helper()
		r := w.enforce(meshOf(grants{ann: mesh.Routing}))
		h := r.Host()
		if h.Uplink4 != link || h.Uplink6 != link {
			t.Errorf("%s: uplinks %q and %q, want %q", about, h.Uplink4, h.Uplink6, link)
		}
		named := slices.ContainsFunc(w.others(r), func(p host.Problem) bool { return p.Step == "find the way to the peers" })
		if named != takes {
			t.Errorf("%s: that answers leave by another way is named: %v, want %v", about, named, takes)
		}
		if takes { // until the suggested rule is added
			w.ip(w.pic.B, "rule add to 100.64.0.0/10 lookup main pref 100\n-6 rule add to fd6d:6573:6800::/48 lookup main pref 100")
			defer w.ip(w.pic.B, "rule del pref 100\n-6 rule del pref 100")
		}
		w.reaches(far(true, 2), &n, map[string]netip.Addr{link: v4})
		w.reaches(far(false, 2), &n, map[string]netip.Addr{link: v6})
	}
	check("before", netlab.Uplink, a.BUplink.V4, a.BUplink.V6, false)
	tunnel4, tunnel6 := netip.MustParseAddr("203.0.113.129"), netip.MustParseAddr("2001:db8:2::1")
	for _, tt := range []struct {
		about, table, rules string
		// takes is set if packets for peers go there, too.
		takes bool
	}{
		// net/tsaddr and wgengine/router of Tailscale: its own packets by main, all
		// others by 52.
		{"an exit node", "52", `rule add pref 5210 fwmark 0x80000/0xff0000 table main
			rule add pref 5230 fwmark 0x80000/0xff0000 table default
			rule add pref 5250 fwmark 0x80000/0xff0000 unreachable
			rule add pref 5270 table 52`, true},
		// wg-quick(8), "Table".
		{"wg-quick", "51821", `rule add pref 32764 table main suppress_prefixlength 0
			rule add pref 32765 not fwmark 51821 table 51821`, false},
		{"without suppressing", "51821", "rule add pref 32765 not fwmark 51821 table 51821", true},
	} {
		routes := "route add table " + tt.table + " default via 203.0.113.130 dev pub0\n-6 route add table " + tt.table + " default via 2001:db8:2::2 dev pub0\n"
		both := tt.rules + "\n" + strings.ReplaceAll(tt.rules, "rule add", "-6 rule add")
		w.ip(w.pic.B, routes+both)
		check(tt.about, netlab.Public, tunnel4, tunnel6, tt.takes)
		w.ip(w.pic.B, regexp.MustCompile(`rule add pref (\d+).*`).ReplaceAllString(both, "rule del pref $1")+"\n"+strings.ReplaceAll(routes, "add", "del"))
		check("after "+tt.about, netlab.Uplink, a.BUplink.V4, a.BUplink.V6, false)
	}
}

// TestWayIsNamed has a policy rule send peers' packets by another interface than the
// uplink.
func TestWayIsNamed(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	r := g.enforce(meshOf(grants{ann: mesh.Routing}))
	named := func() int {
		return len(slices.DeleteFunc(g.others(r), func(p host.Problem) bool { return p.Step != "find the way to the internet" }))
	}
	if n := named(); n != 0 {
		t.Errorf("%d problems without a rule", n)
	}
	g.ip(g.pic.B, "rule add priority 90 iif "+meshName+" to 198.51.100.0/24 unreachable")
	if n := named(); n != 1 {
		t.Errorf("%d problems with a rule, want 1", n)
	}
}
