package macos

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// tick is the interval of the daemon's loop.
const tick = 3 * time.Second

// A quietMac is one on which the daemon only inspects.
type quietMac struct {
	*rig
	processes int
	r         *policy.Ruleset
}

func newQuietMac(t *testing.T) *quietMac {
	q := &quietMac{rig: newRig(t)}
	q.ran = func() { q.processes++ }
	q.open()
	for range 2 { // the second time, the facts have the tunnel's addresses
		q.r = q.enforce(testMesh(3, everything, mesh.Routing, mesh.Incoming))
	}
	for range 3 { // the looks that follow a change
		q.look()
	}
	q.processes = 0
	return q
}

// look does what the daemon does at a tick without a change, and returns the drift that
// it found.
func (q *quietMac) look() (found []string) {
	q.t.Helper()
	time.Sleep(tick)
	if h, err := q.p.Observe(q.t.Context()); err != nil || !sameHost(h, q.r.Host()) {
		q.t.Fatalf("observed %+v, %v", h, err)
	}
	for _, d := range q.inspect(q.r).Drift {
		found = append(found, d.Step)
	}
	return found
}

// traffic sends a packet that matches no state.
func (q *quietMac) traffic() {
	q.mac.Receive(syn("203.0.113.9", "203.0.113.1"), "en0")
}

// TestQuietMac counts the processes in fifteen minutes of nothing but traffic: one per
// tick, and every three minutes those of a full read.
func TestQuietMac(t *testing.T) { synctest.Test(t, testQuietMac) }

func testQuietMac(t *testing.T) {
	q := newQuietMac(t)
	judged := 0
	q.p.findForeign = func(ctx context.Context, m *pfsim.Machine, a *Anchor, r *policy.Ruleset) ([]Foreign, error) {
		judged++
		return FindForeign(ctx, m, a, r)
	}
	for range 15 * time.Minute / tick {
		q.traffic()
		before := q.processes
		if found := q.look(); found != nil {
			t.Fatalf("drift %v although nothing changed", found)
		}
		if n := q.processes - before; n > 1 && !q.p.lastFull.Equal(time.Now()) {
			t.Fatalf("%d processes at one tick", n)
		}
	}
	if q.p.most != MaxStates {
		t.Errorf("the looks read %d as the limit of states", q.p.most)
	}
	if perMinute := float64(q.processes) / 15; perMinute > 30 {
		t.Errorf("%.1f processes a minute, want at most 30", perMinute)
	}
	if judged > 0 {
		t.Errorf("foreign rules were judged %d times without a change", judged)
	}
	t.Logf("%d processes in a quarter of an hour", q.processes)
}

// TestQuietMacSeesDrift has other software change what we enforce while the kernel
// reports no event: the next look finds it, after a packet where only packets reveal it.
func TestQuietMacSeesDrift(t *testing.T) {
	for what, tt := range map[string]struct {
		step string
		do   func(q *quietMac)
	}{
		"the anchor is flushed":         {StepAnchor, func(q *quietMac) { q.mac.FlushAnchor(q.p.path) }},
		"the anchor is replaced":        {StepAnchor, func(q *quietMac) { q.must(q.mac.LoadAnchor(q.p.path, "pass all\n")) }},
		"the packet filter is off":      {StepEnable, func(q *quietMac) { q.mac.PF.Disable() }},
		"off and on again":              {StepEnable, func(q *quietMac) { q.mac.PF.Disable(); q.enableByOthers() }},
		"the main ruleset is flushed":   {StepAnchor, func(q *quietMac) { q.mac.FlushMain() }},
		"the main ruleset has no hooks": {StepAnchor, func(q *quietMac) { q.must(q.mac.LoadMain("pass all\n")) }},
		"forwarding is off":             {StepForwarding, func(q *quietMac) { q.mac.Kernel.SetVariable("net.inet.ip.forwarding", "0") }},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				q := newQuietMac(t)
				q.traffic()
				if found := q.look(); found != nil {
					t.Fatalf("found %v before the change", found)
				}
				tt.do(q)
				q.traffic()
				if found := q.look(); len(found) == 0 || found[0] != tt.step {
					t.Errorf("drift %v, want %q", found, tt.step)
				}
			})
		})
	}
}

// TestQuietMacSeesOthers has other software change its own rules while the kernel reports
// no event. A reload of the main ruleset is found at the next look, everything else at
// the next full read.
func TestQuietMacSeesOthers(t *testing.T) {
	const (
		open  = "pass in quick on en5 from <them> to any no state\n"
		them  = "table <them> persist { 192.168.77.0/24 }\n"
		other = "com.apple/200.x"
	)
	for what, tt := range map[string]struct {
		before string // rules of the anchor "other"
		within time.Duration
		do     func(q *quietMac)
	}{
		"the main ruleset": {"", tick, func(q *quietMac) {
			q.must(q.mac.LoadMain(them + strings.Replace(simmac.StockMain, "\nanchor", "\n"+open+"anchor", 1)))
		}},
		"an anchor": {"pass in on lo9 all\n", fullReadEvery + tick, func(q *quietMac) { q.must(q.mac.LoadAnchor(other, them+open)) }},
		"a table": {"table <them> persist { }\n" + open, fullReadEvery + tick, func(q *quietMac) {
			q.must(darwin.NewPF(q.mac).ReplaceTable(q.t.Context(), other, "them",
				[]pfconf.Address{{Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("192.168.77.0/24")}}))
		}},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				q := newQuietMac(t)
				q.must(q.mac.LoadAnchor(other, tt.before))
				q.p.hostChanged.Store(true)
				for range 2 {
					if found := q.look(); found != nil {
						t.Fatalf("found %v before the change", found)
					}
				}
				tt.do(q)
				for at := time.Now(); ; {
					found := q.look()
					if waited := time.Since(at); len(found) > 0 {
						if waited > tt.within {
							t.Errorf("the change was found after %v", waited)
						}
						break
					} else if waited > 2*fullReadEvery {
						t.Fatal("the change was never found")
					}
				}
			})
		})
	}
}

// enableByOthers enables pf with another program's token.
func (q *quietMac) enableByOthers() {
	q.t.Helper()
	_, err := darwin.NewPF(q.mac).Enable(context.Background())
	q.must(err)
}

// TestWholeLooks checks what triggers a full read of pf: an event of the routing socket,
// a change of ours, and the passing of three minutes.
func TestWholeLooks(t *testing.T) { synctest.Test(t, testWholeLooks) }

func testWholeLooks(t *testing.T) {
	q := newQuietMac(t)
	table := func() {
		q.must(darwin.NewPF(q.mac).ReplaceTable(t.Context(), q.p.path, tableLAN, (set{in: prefixes("100.64.0.0/10")}).table(tableLAN).Addrs))
	}
	table() // no event shows it
	if found := q.look(); found != nil {
		t.Fatalf("drift %v before an event", found)
	}
	q.p.hostChanged.Store(true)
	if found := q.look(); len(found) == 0 {
		t.Error("an event doesn't trigger a full read")
	}
	q.must(q.p.Enforce(t.Context(), q.r))
	if found := q.look(); found != nil {
		t.Errorf("not repaired: %v", found)
	}
	table()
	for at := time.Now(); ; {
		found := q.look()
		if waited := time.Since(at); len(found) > 0 {
			if waited > fullReadEvery+tick {
				t.Errorf("the change was found after %v", waited)
			}
			break
		} else if waited > 2*fullReadEvery {
			t.Fatal("the change was never found")
		}
	}
}

// TestSourceOfIPv6 gives the uplink temporary, deprecated and unique local addresses
// beside a permanent global one that is still tentative (duplicate address detection):
// peers' packets leave with the permanent one once it is settled.
func TestSourceOfIPv6(t *testing.T) {
	g := newRig(t)
	g.must(g.mac.Kernel.RemoveAddress("en0", addrOf("2001:db8:1::1")))
	const permanent = "2001:db8:1::7"
	for _, a := range []struct {
		address string
		flags   darwin.AddressFlags
	}{
		{"fd00:1::1/64", darwin.AddressAutoconf | darwin.AddressSecured},
		{"2001:db8:1::6/64", darwin.AddressAutoconf | darwin.AddressDeprecated},
		{"2001:db8:1::5/64", darwin.AddressAutoconf | darwin.AddressTemporary},
		{permanent + "/64", darwin.AddressAutoconf | darwin.AddressTentative},
	} {
		g.must(g.mac.Kernel.AddAddress6("en0", netip.MustParsePrefix(a.address), a.flags))
	}
	g.open()
	look := func() netip.Addr {
		t.Helper()
		r := g.compile(testMesh(2, everything))
		g.must(g.p.Enforce(t.Context(), r))
		g.clean(r)
		o := g.arrives(g.p.name, first6, "2620:fe::fe", simmac.Forwarded)
		g.must(g.p.Cut(t.Context(), r, policy.Diff(nil, r)))
		g.mac.Judge(func(m *pfsim.PF) { m.FlushStates() })
		return o.Packet.Src
	}
	if got := look(); got != addrOf("fd00:1::1") {
		t.Errorf("at first: %v, want the only settled one", got)
	}
	g.must(g.mac.Kernel.SetAddressFlags("en0", addrOf(permanent), darwin.AddressAutoconf|darwin.AddressSecured))
	if got := look(); got != addrOf(permanent) { // no event reports it
		t.Errorf("once it is settled: %v, want %s", got, permanent)
	}
	if got := look(); got != addrOf(permanent) || g.p.tentative {
		t.Errorf("at the next look: %v", got)
	}
	// Lasting, the addresses that devices may use to reach the Mac, follows the same
	// rule.
	h, err := g.p.Observe(t.Context())
	g.must(err)
	if want := []netip.Addr{h.Source4, addrOf(permanent), addrOf("fd00:1::1")}; !slices.Equal(h.Lasting, want) {
		t.Errorf("lasting %v, want %v", h.Lasting, want)
	}
	g.must(g.mac.Kernel.RemoveAddress("en0", addrOf("2001:db8:1::5")))
	loaded := g.p.loaded
	if got := look(); got != addrOf(permanent) || g.p.loaded != loaded {
		t.Errorf("without the temporary one: %v, anchor reloaded: %v", got, g.p.loaded != loaded)
	}
}

// TestLinkLocalIsNoFact adds link-local addresses to the system's own interfaces, as
// happens many times an hour: the observed facts don't change.
func TestLinkLocalIsNoFact(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, everything))
	before, err := g.p.Observe(t.Context())
	g.must(err)
	g.mac.Kernel.AddInterface("awdl0", darwin.InterfaceUp|darwin.InterfaceRunning|darwin.InterfaceMulticast, 1500)
	g.must(g.mac.Kernel.AddAddress("awdl0", netip.MustParsePrefix("fe80::77/64")))
	g.must(g.mac.Kernel.AddAddress("en0", netip.MustParsePrefix("fe80::78/64")))
	after, err := g.p.Observe(t.Context())
	g.must(err)
	if d := cmp.Diff(before, after, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
		t.Errorf("the facts changed: %s", d)
	}
}

// TestOwnAddress has the Mac send to its own mesh address: the packet may enter the
// tunnel, and what the tunnel turns back arrives.
func TestOwnAddress(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, everything, 0))
	for _, own := range testMesh(0).Addresses {
		p := syn(own.String(), own.String())
		o := g.mac.Send(p)
		if o.Fate == simmac.Sent && o.Link == g.p.name {
			o = g.mac.Receive(o.Packet, g.p.name)
		}
		if o.Fate != simmac.Delivered {
			t.Errorf("%v to itself: %v (%s)", own, o.Fate, o.Why)
		}
	}
	// A forged packet from the host's own address is stopped before pf: by WireGuard and
	// the guard, which require a peer's address.
	g.arrives("en5", "100.64.0.1", "100.64.0.1", simmac.Dropped)
}

func sameHost(a, b policy.Host) bool {
	return cmp.Equal(a, b, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}))
}

// TestUnexamined stops WireGuard's own packets, which this host doesn't check: it reports
// that it doesn't. While our anchor isn't loaded, it reports the same about foreign rules
// that stop peers.
func TestUnexamined(t *testing.T) {
	g := newRig(t)
	g.open()
	m := testMesh(1, mesh.Incoming)
	m.ListenPort = listenPort
	g.must(g.mac.LoadAnchor("com.apple/100.other", fmt.Sprintf("block drop quick proto udp from any to any port %d\n", listenPort)))
	unexamined := func(m policy.Mesh) []host.ProblemKind {
		t.Helper()
		r := g.enforce(m)
		g.inspect(r) // the first one only reads back
		report := g.inspect(r)
		if slices.ContainsFunc(report.Problems, func(p host.Problem) bool { return p.Kind == host.KindHostFirewall }) {
			t.Errorf("the rule is reported: %+v", report.Problems)
		}
		return slices.Sorted(maps.Keys(report.Unexamined))
	}
	if g.p.Host().Unexamined[host.KindHostFirewall] == "" {
		t.Error("the host doesn't report that it never checks for rules that stop WireGuard")
	}
	if got := unexamined(m); !slices.Equal(got, []host.ProblemKind{host.KindOtherFilters}) {
		t.Errorf("without an anchor: %v", got)
	}
	m.Peers[0].Permissions = mesh.Granted(mesh.Routing)
	if got := unexamined(m); len(got) > 0 {
		t.Errorf("with an anchor: %v", got)
	}
}
