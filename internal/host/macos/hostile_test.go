package macos

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// TestTransitOfAnyKind has a foreign rule ahead of ours let one kind of packet through
// per case: forwarding doesn't stay on.
func TestTransitOfAnyKind(t *testing.T) {
	const stranger = "192.168.77.50"
	packet := func(src, dst string, proto pfconf.Proto, from, to uint16, flags pfconf.TCPFlags) pfsim.Packet {
		p := syn(src, dst)
		p.Proto, p.SrcPort, p.DstPort, p.Flags = proto, from, to, flags
		if proto != pfconf.ProtoTCP {
			p.Seq, p.Window = 0, 0
		}
		return p
	}
	udp := func(from, to uint16) pfsim.Packet { return packet(stranger, "9.9.9.9", pfconf.ProtoUDP, from, to, 0) }
	many := map[string]string{"com.apple/1999.z": "pass quick all no state\n"}
	for i := range maxForeignAnchors {
		many[fmt.Sprintf("com.apple/10%02d.x", i)] = "pass in quick on lo9 all no state\n"
	}
	x := func(rules string) map[string]string { return map[string]string{"com.apple/100.x": rules} }
	quick := strings.Replace(simmac.StockMain, "\nanchor \"com.apple/*\"", "\nanchor \"vpn\" quick\nanchor \"com.apple/*\"", 1)
	for name, c := range map[string]struct {
		anchors map[string]string
		p       pfsim.Packet
	}{
		"all":                {x("pass quick all no state\n"), syn(stranger, "9.9.9.9")},
		"one source":         {x("pass quick inet from 192.168.77.50 to any no state\npass out quick on en0 all no state\n"), syn(stranger, "9.9.9.9")},
		"a source port":      {x("pass quick proto udp from any port 500 to any port 500 no state\n"), udp(500, 500)},
		"another protocol":   {x("pass quick proto esp all no state\n"), packet(stranger, "9.9.9.9", protoESP, 0, 0, 0)},
		"between ports":      {x("pass quick proto tcp from any to any port 1000 >< 2000 no state\n"), packet(stranger, "9.9.9.9", pfconf.ProtoTCP, 4000, 1500, pfconf.FlagSYN)},
		"above a port":       {x("pass quick proto udp from any to any port > 1023 no state\n"), udp(4000, 4000)},
		"any port but one":   {x("pass quick proto udp from any port >= 32768 to any port != 22 flags any no state\n"), udp(40000, 4000)},
		"later segments":     {x("pass quick proto tcp all flags A/A no state\n"), packet(stranger, "9.9.9.9", pfconf.ProtoTCP, 4000, 443, pfconf.FlagACK)},
		"a table":            {x("table <good> { 192.168.77.50 }\npass quick from <good> to any no state\n"), syn(stranger, "9.9.9.9")},
		"a table to go to":   {x("table <good> { 8.8.4.4 }\npass quick from any to <good> no state\n"), syn(stranger, "8.8.4.4")},
		"all sources but":    {x("pass quick inet from ! 192.0.2.0/24 to 8.8.4.4 no state\n"), syn(stranger, "8.8.4.4")},
		"a table of main":    {map[string]string{"": "table <wide> persist { 192.168.77.0/24 }\nscrub-anchor \"com.apple/*\"\nnat-anchor \"com.apple/*\"\nrdr-anchor \"com.apple/*\"\npass in quick on en5 from <wide> to any no state\nanchor \"com.apple/*\"\n"}, syn(stranger, "9.9.9.9")},
		"too many anchors":   {many, syn(stranger, "9.9.9.9")},
		"to the LAN":         {x("pass in quick on en0 from any to 192.168.77.0/24 no state\n"), syn("198.51.100.7", "192.168.77.9")},
		"redirected":         {x("rdr pass on en0 inet proto tcp from any to 203.0.113.1 port 8443 -> 192.168.77.9 port 443\n"), packet("198.51.100.7", "203.0.113.1", pfconf.ProtoTCP, 4000, 8443, pfconf.FlagSYN)},
		"redirected (en0)":   {x("rdr pass on en0 proto udp from any to (en0) port 8443 -> 192.168.77.9\n"), packet("198.51.100.7", "203.0.113.1", pfconf.ProtoUDP, 4000, 8443, 0)},
		"redirected quick":   {x("rdr on en0 inet proto tcp from any to 203.0.113.1 port 8443 tag mine -> 192.168.77.9 port 443\npass quick inet from any to 192.168.77.9 tagged mine no state\n"), packet("198.51.100.7", "203.0.113.1", pfconf.ProtoTCP, 4000, 8443, pfconf.FlagSYN)},
		"one to one":         {map[string]string{"": strings.Replace(simmac.StockMain, "nat-anchor", "binat pass on en0 inet from 192.168.77.9 to any -> 203.0.113.50\nnat-anchor", 1)}, syn("198.51.100.7", "203.0.113.50")},
		"below a quick call": {map[string]string{"": quick, "vpn": "pass inet proto udp from any port 500 to any port 500 no state\n"}, udp(500, 500)},
		"two below":          {map[string]string{"": quick, "vpn": "anchor \"deep\"\n", "vpn/deep": "pass inet proto udp from any port 500 to any port 500 no state\n"}, udp(500, 500)},
		"a name of its own":  {map[string]string{"com.apple/1 vpn@work über": "pass quick all no state\n"}, syn(stranger, "9.9.9.9")},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			for path, text := range c.anchors {
				if path == "" {
					g.must(g.mac.LoadMain(text))
				} else {
					g.must(g.mac.LoadAnchor(path, text))
				}
			}
			g.open()
			link := "en5"
			if strings.HasPrefix(c.p.Src.String(), "198.") {
				link = "en0"
			}
			_, err := darwin.NewPF(g.mac).Enable(t.Context()) // the other product enables pf
			g.must(err)
			g.mac.Kernel.SetVariable("net.inet.ip.forwarding", "1")
			if o := g.mac.Receive(c.p, link); o.Fate != simmac.Forwarded {
				t.Fatalf("the packet doesn't pass without our anchor either: %v (%s)", o.Fate, o.Why)
			}
			g.mac.Kernel.SetVariable("net.inet.ip.forwarding", "0")
			if err := g.p.Enforce(t.Context(), g.compile(testMesh(1, mesh.Routing))); err == nil {
				t.Error("Enforce returned no error")
			}
			if o := g.mac.Receive(c.p, link); o.Fate == simmac.Forwarded {
				t.Error("transit passes")
			}
		})
	}
}

// TestHarmlessQuickRules has foreign rules ahead of ours that let no transit through:
// routing stays on.
func TestHarmlessQuickRules(t *testing.T) {
	for name, rules := range map[string]string{
		"loopback":            "pass quick on lo0 all flags any keep state\n",
		"out only":            "pass out quick on en0 all flags S/SA keep state\n",
		"to this Mac":         "pass in quick on en5 proto tcp from any to 192.168.77.1 port 22\n",
		"multicast":           "pass in quick on en0 proto udp from any to 224.0.0.251 port 5353\n",
		"redirected to us":    "rdr pass on en0 inet proto tcp from any to 203.0.113.1 port 8443 -> 203.0.113.1 port 443\n",
		"stopped after it":    "rdr on en0 inet proto tcp from any to 203.0.113.1 port 8443 -> 192.168.77.9 port 443\n",
		"an absent interface": "pass quick on en77 all\n",
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.must(g.mac.LoadAnchor("com.apple/100.x", rules))
			g.open()
			g.enforce(testMesh(2, mesh.Routing))
			g.arrives(g.p.name, first, "9.9.9.9", simmac.Forwarded)
		})
	}
}

// TestAnchorsOfAnyName gives foreign anchors names that pfctl accepts and our own label
// rules refuse: they are read, and routing stays on.
func TestAnchorsOfAnyName(t *testing.T) {
	for _, name := range []string{"com.vendor vpn", "vpn@work", "net:foo", "über", "a+b"} {
		g := newRig(t)
		g.must(g.mac.LoadAnchor(name, "pass in on lo0 all no state\n"))
		g.open()
		g.clean(g.enforce(testMesh(1, mesh.Routing)))
	}
}

// TestInterfacesWithoutAddresses has a foreign rule open an interface for which the facts
// list no address.
func TestInterfacesWithoutAddresses(t *testing.T) {
	t.Run("skipped", func(t *testing.T) {
		g := newRig(t)
		g.must(g.mac.AddEthernet("en9", nil))
		g.must(g.mac.LoadMain("set skip on en9\n" + simmac.StockMain))
		g.open()
		if err := g.p.Enforce(t.Context(), g.compile(testMesh(1, mesh.Routing))); err == nil {
			t.Error("Enforce returned no error")
		}
		g.arrives("en9", "198.51.100.66", "9.9.9.9", simmac.Dropped)
		g.arrives("en9", first, "9.9.9.9", simmac.Dropped)
	})
	t.Run("link-local only", func(t *testing.T) {
		g := newRig(t)
		g.must(g.mac.AddEthernet("awdl0", []string{"fe80::1234/64"}))
		g.must(g.mac.LoadAnchor("com.apple/200.AirDrop", "pass quick on awdl0 all no state\n"))
		g.open()
		if err := g.p.Enforce(t.Context(), g.compile(testMesh(1, mesh.Routing))); err == nil {
			t.Error("Enforce returned no error")
		}
		g.arrives("awdl0", "2001:db8:66::66", "2001:db8:1::77", simmac.Dropped)
		g.arrives("awdl0", first, "9.9.9.9", simmac.Dropped)
	})
}

// TestFactsThatCannotBe gives the Mac a resolver, a route and an address in IPv4-mapped
// form: Enforce still succeeds.
func TestFactsThatCannotBe(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(1, everything))
	n, err := darwin.Observe(g.mac)
	g.must(err)
	mapped := netip.MustParsePrefix("::ffff:0.0.0.0/96")
	g.mac.Kernel.SetResolvers([]darwin.Resolver{{Servers: []netip.Addr{addrOf("::ffff:100.100.2.136"), addrOf("127.0.0.1")}}})
	g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: mapped, Index: n.Interface("lo0").Index, Flags: darwin.RouteUp | darwin.RouteStatic | darwin.RouteReject}))
	g.must(g.mac.Kernel.AddAddress("en5", netip.MustParsePrefix("::ffff:10.1.1.1/128")))
	g.p.hostChanged.Store(true)
	r := g.enforce(testMesh(1, everything))
	if want := []netip.Addr{addrOf("100.100.2.136")}; !slices.Equal(r.Host().Resolvers, want) {
		t.Errorf("resolvers %v, want %v", r.Host().Resolvers, want)
	}
}

// TestLookThatFailsClosesNothing has the programs that report on the host fail: the last
// known facts stay in force, and the failure is reported.
func TestLookThatFailsClosesNothing(t *testing.T) {
	for _, program := range []string{"/usr/sbin/scutil", "/sbin/ifconfig"} {
		synctest.Test(t, func(t *testing.T) {
			g := newRig(t)
			g.open()
			for range 2 {
				g.enforce(testMesh(1, everything))
			}
			before := g.compile(testMesh(1, everything)).Host()
			g.mac.Slow(program, 2*darwin.DefaultTimeout)
			g.p.hostChanged.Store(true)
			after, err := g.p.Observe(t.Context())
			g.must(err)
			if !sameHost(before, after) {
				t.Errorf("the facts changed: %+v", after)
			}
			if report := g.inspect(g.p.enforced); len(report.Drift) > 0 || len(report.Problems) == 0 || !strings.Contains(report.Problems[0].Message, "not all of it can be read") {
				t.Errorf("drift %v, problems %v", report.Drift, report.Problems)
			}
		})
	}
}

// TestManyInterfacesCome adds and removes more interfaces than the backend remembers: the
// loaded anchor still matches the wanted one.
func TestManyInterfacesCome(t *testing.T) {
	g := newRig(t)
	g.open()
	for i := range maxPastEgress * 2 {
		name := fmt.Sprint("vlan", i)
		g.must(g.mac.AddEthernet(name, []string{fmt.Sprintf("10.9.%d.1/24", i), fmt.Sprintf("fd00:9:%d::1/64", i)}))
		if i%3 == 0 {
			g.mac.Kernel.RemoveInterface(name)
		}
	}
	for range 3 {
		g.clean(g.enforce(testMesh(1, everything)))
	}
	now := egressOf(g.p.enforced.Host())
	for _, e := range now {
		if e.name != "en0" && !slices.Contains(g.p.pastEgress, e) {
			t.Errorf("%v exists but isn't remembered", e)
		}
	}
}

// TestKillsOfARange adds a network that starts at the same address as a narrower one: its
// first address keeps its class, the others change theirs, and their flows end.
func TestKillsOfARange(t *testing.T) {
	h := testHost()
	h.Routes = append(h.Routes, policy.Route{Prefix: netip.MustParsePrefix("8.8.8.0/24"), Interface: "en0"})
	old := mustRuleset(t, testMesh(1, mesh.Routing), h)
	h.Routes = append(slices.Clone(h.Routes), policy.Route{Prefix: netip.MustParsePrefix("8.8.8.0/22"), Interface: "en0"})
	next := mustRuleset(t, testMesh(1, mesh.Routing), h)
	kills := Kills(old, next, policy.Diff(old, next))
	if !slices.ContainsFunc(kills, func(k Kill) bool { return k.To.Contains(addrOf("8.8.9.9")) }) {
		t.Errorf("no kill for a flow to 8.8.9.9, which was internet and is lan: %v", kills)
	}
}

// TestLeavingWithManyPeers checks that Close ends flows with few commands, so that it has
// time left to restore the rest.
func TestLeavingWithManyPeers(t *testing.T) {
	g := newRig(t)
	before := g.mac.Dump()
	g.open()
	g.enforce(testMesh(60, mesh.Routing))
	g.mac.PF.Calls()
	g.close()
	kills := 0
	for _, c := range g.mac.PF.Calls() {
		if strings.Contains(c, " -k ") {
			kills++
		}
	}
	if kills == 0 || kills > maxKillsAtEnd {
		t.Errorf("%d commands to end flows, want 1 to %d", kills, maxKillsAtEnd)
	}
	if d := cmp.Diff(before, g.mac.Dump()); d != "" {
		t.Errorf("left behind: %s", d)
	}
}

// TestProbingIsBounded loads one foreign rule more than the helper judges: Enforce
// returns an error that there are too many.
func TestProbingIsBounded(t *testing.T) {
	var b strings.Builder
	for i := range maxTransitRules + 1 {
		fmt.Fprintf(&b, "pass in quick on lo9 inet proto tcp from any to any port %d no state\n", 1+i)
	}
	g := newRig(t)
	g.must(g.mac.LoadAnchor("com.apple/100.x", b.String()))
	g.open()
	start := time.Now()
	err := g.p.Enforce(t.Context(), g.compile(testMesh(1, mesh.Routing)))
	if err == nil || !strings.Contains(err.Error(), errTooManyRules.Error()) {
		t.Errorf("the check returned %v after %v", err, time.Since(start))
	}
	g.arrives("en5", "192.168.77.9", "9.9.9.9", simmac.Dropped)
}
