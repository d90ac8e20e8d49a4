package macos

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// rig is a backend on a simulated Mac with an uplink and a LAN. A test may load another
// product's rules.
type rig struct {
	t    *testing.T
	mac  *simmac.Mac
	p    *Backend
	dir  string
	dev  tun.Device
	step func(string) // called by a simmac.Stepper
	ran  func()       // after each command
	// lost is an argument of a command that runs but whose result is lost: Run returns a
	// deadline error for it, once.
	lost string
}

// Run implements darwin.Runner.
func (g *rig) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	stdout, stderr, status, err := g.mac.Run(ctx, stdin, path, args...)
	if g.ran != nil {
		g.ran()
	}
	if g.lost != "" && slices.Contains(args, g.lost) {
		g.lost = ""
		return nil, nil, 0, context.DeadlineExceeded
	}
	return stdout, stderr, status, err
}

func newRig(t *testing.T) *rig {
	t.Helper()
	g := &rig{t: t, mac: simmac.New(simmac.Options{Seed: 1}), dir: t.TempDir()}
	g.must(g.mac.AddEthernet("en0", []string{"203.0.113.1/24", "2001:db8:1::1/64"}, "203.0.113.254", "2001:db8:1::fe"))
	g.must(g.mac.AddEthernet("en5", []string{"192.168.77.1/24"}))
	g.renew()
	return g
}

// renew replaces the backend, as a restart of the helper does.
func (g *rig) renew() {
	g.t.Helper()
	s := simmac.NewStepper(g, g.mac, func(name string) {
		if g.step != nil {
			g.step(name)
		}
	})
	var err error
	g.p, err = New(Options{StateDir: g.dir, Runner: s, Kernel: s, CreateTUN: g.mac.CreateTUN, Step: s.Step})
	g.must(err)
	p := g.p
	g.t.Cleanup(func() { p.cuts.save(time.Minute) }) // before the directory is removed
}

func (g *rig) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *rig) open() {
	g.t.Helper()
	m := testMesh(0)
	dev, err := g.p.Open(g.t.Context(), host.Interface{MTU: 1420, Addresses: m.Addresses, Prefixes: m.Prefixes})
	g.must(err)
	g.dev = dev
}

// compile compiles a mesh for the host in its current state.
func (g *rig) compile(m policy.Mesh) *policy.Ruleset {
	g.t.Helper()
	h, err := g.p.Observe(g.t.Context())
	g.must(err)
	return mustRuleset(g.t, m, h)
}

func (g *rig) enforce(m policy.Mesh) *policy.Ruleset {
	g.t.Helper()
	r := g.compile(m)
	g.must(g.p.Enforce(g.t.Context(), r))
	return r
}

func (g *rig) inspect(r *policy.Ruleset) host.Report {
	g.t.Helper()
	report, err := g.p.Inspect(g.t.Context(), r)
	g.must(err)
	return report
}

// clean checks that Inspect reports neither drift nor problems.
func (g *rig) clean(r *policy.Ruleset) {
	g.t.Helper()
	if report := g.inspect(r); len(report.Drift)+len(report.Problems) > 0 {
		g.t.Errorf("drift %v, problems %v", report.Drift, report.Problems)
	}
}

func (g *rig) close() []host.Problem {
	g.t.Helper()
	left, err := g.p.Close(g.t.Context())
	g.must(err)
	return left
}

func (g *rig) journalExists() bool {
	_, err := os.Stat(filepath.Join(g.dir, journalName))
	return err == nil
}

func addrOf(s string) netip.Addr { return netip.MustParseAddr(s) }

func syn(src, dst string) pfsim.Packet {
	return pfsim.Packet{Src: addrOf(src), Dst: addrOf(dst), Proto: pfconf.ProtoTCP, SrcPort: 4000, DstPort: 443, Flags: pfconf.FlagSYN, Seq: 1000, Window: 65535}
}

// arrives sends a packet in by a link and checks its fate.
func (g *rig) arrives(link, src, dst string, want simmac.Fate) simmac.Outcome {
	g.t.Helper()
	o := g.mac.Receive(syn(src, dst), link)
	if o.Fate != want {
		g.t.Errorf("%s to %s by %s: %v (%s), want %v", src, dst, link, o.Fate, o.Why, want)
	}
	return o
}

// The addresses of testMesh's first two peers.
const (
	first, second   = "100.64.0.2", "100.64.0.3"
	first6, second6 = "fd6d:6573:6800::2", "fd6d:6573:6800::3"
)

// TestHostIsLeftAsFound enforces several meshes and closes, with forwarding initially off
// and on: the host is restored, including another program's pf token.
func TestHostIsLeftAsFound(t *testing.T) {
	for _, found := range []string{"0", "1"} {
		t.Run("forwarding found "+found, func(t *testing.T) {
			g := newRig(t)
			g.mac.Kernel.SetVariable("net.inet.ip.forwarding", found)
			_, err := darwin.NewPF(g.mac).Enable(t.Context()) // another program's token
			g.must(err)
			before := g.mac.Dump()
			g.open()
			for _, m := range []policy.Mesh{testMesh(2, everything), testMesh(3, mesh.Routing), testMesh(1, mesh.Incoming)} {
				g.clean(g.enforce(m))
			}
			r := g.enforce(testMesh(2, everything))
			g.must(g.p.Cut(t.Context(), r, nil))
			g.clean(r)
			if left := g.close(); len(left) > 0 {
				t.Errorf("not restored: %v", left)
			}
			if d := cmp.Diff(before, g.mac.Dump()); d != "" {
				t.Errorf("the host wasn't restored: %s", d)
			}
			if g.journalExists() {
				t.Error("the journal still exists")
			}
		})
	}
}

// TestPicture checks, by pf alone, which packets between peers, the LAN, the internet and
// this Mac are forwarded, delivered and dropped.
func TestPicture(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, mesh.Routing|mesh.LAN, everything))
	utun := g.p.name
	if o := g.arrives(utun, first, "9.9.9.9", simmac.Forwarded); o.Link != "en0" || o.Packet.Src != addrOf("203.0.113.1") {
		t.Errorf("to the internet by %s from %v", o.Link, o.Packet.Src)
	}
	if o := g.arrives(utun, first6, "2620:fe::fe", simmac.Forwarded); o.Link != "en0" || o.Packet.Src != addrOf("2001:db8:1::1") {
		t.Errorf("to the internet by %s from %v", o.Link, o.Packet.Src)
	}
	if o := g.arrives(utun, first, "192.168.77.9", simmac.Forwarded); o.Link != "en5" || o.Packet.Src != addrOf("192.168.77.1") {
		t.Errorf("to the LAN by %s from %v", o.Link, o.Packet.Src)
	}
	for _, p := range [][3]string{
		{utun, first, second}, {utun, first6, second6}, {utun, second, first}, {utun, first, "100.64.0.1"},
		{utun, "192.168.77.9", "9.9.9.9"}, {"en5", first, "203.0.113.9"},
		{"en5", "192.168.77.9", first}, {"en5", "192.168.77.9", "100.64.0.1"}, {"en5", "192.168.77.9", "9.9.9.9"},
		{"en0", "203.0.113.9", "100.64.9.9"}, {"en0", "2001:db8:1::9", first6},
	} {
		g.arrives(p[0], p[1], p[2], simmac.Dropped)
	}
	g.arrives(utun, second, "100.64.0.1", simmac.Delivered)
	g.arrives("en5", "192.168.77.9", "192.168.77.1", simmac.Delivered)
}

// TestOnlyWhileNeeded checks that pf and forwarding keep their original state while no
// peer has the routing permission.
func TestOnlyWhileNeeded(t *testing.T) {
	g := newRig(t)
	g.open()
	for _, have := range []mesh.Permissions{mesh.Incoming, mesh.Routing, mesh.Incoming, mesh.LAN} {
		g.clean(g.enforce(testMesh(2, have)))
		want := have.Has(mesh.Routing)
		forwards := g.mac.Kernel.Variable("net.inet.ip.forwarding") == "1"
		if on := g.mac.PF.Enabled(); on != want || forwards != want || g.journalExists() != want {
			t.Errorf("with %v: packet filter %v, forwarding %v, journal exists %v", have, on, forwards, g.journalExists())
		}
	}
}

// TestCutEndsFlows revokes a peer's routing: its flow's answers no longer arrive, and
// another peer's still do.
func TestCutEndsFlows(t *testing.T) {
	g := newRig(t)
	g.open()
	old := g.enforce(testMesh(2, everything))
	g.must(g.p.Cut(t.Context(), old, nil))
	utun := g.p.name
	out := g.arrives(utun, first, "9.9.9.9", simmac.Forwarded)
	other := g.arrives(utun, second, "9.9.9.9", simmac.Forwarded)
	next := g.enforce(testMesh(2, mesh.Incoming, everything))
	g.must(g.p.Cut(t.Context(), next, policy.Diff(old, next)))
	answer := func(o simmac.Outcome) simmac.Outcome {
		a := o.Packet
		a.Src, a.Dst, a.SrcPort, a.DstPort = a.Dst, a.Src, a.DstPort, a.SrcPort
		a.Flags, a.Seq, a.Ack, a.Tag = pfconf.FlagSYN|pfconf.FlagACK, 5000, 1001, ""
		return g.mac.Receive(a, "en0")
	}
	if o := answer(out); o.Fate == simmac.Forwarded {
		t.Errorf("an answer reached a peer without routing: %+v", o)
	}
	g.arrives(utun, first, "9.9.9.9", simmac.Dropped)
	if o := answer(other); o.Fate != simmac.Forwarded || o.Packet.Dst != addrOf(second) {
		t.Errorf("the other peer's answer: %+v", o)
	}
}

// TestCutStaysDead cuts a connection that a peer opened: neither end can revive it, and
// this Mac can still open another to the peer.
func TestCutStaysDead(t *testing.T) {
	g := newRig(t)
	g.open()
	old := g.enforce(testMesh(2, everything))
	g.must(g.p.Cut(t.Context(), old, nil))
	g.arrives(g.p.name, first, "100.64.0.1", simmac.Delivered)
	segment := syn("100.64.0.1", first)
	segment.SrcPort, segment.DstPort = 443, 4000
	segment.Flags, segment.Seq, segment.Ack = pfconf.FlagSYN|pfconf.FlagACK, 5000, 1001
	if o := g.mac.Send(segment); o.Fate != simmac.Sent {
		t.Fatalf("the answer: %+v", o)
	}
	next := g.enforce(testMesh(2, mesh.Routing))
	g.must(g.p.Cut(t.Context(), next, policy.Diff(old, next)))
	g.clean(next)
	segment.Flags, segment.Seq, segment.Len = pfconf.FlagPSH|pfconf.FlagACK, 5001, 10
	if o := g.mac.Send(segment); o.Fate != simmac.Dropped {
		t.Errorf("this Mac's next segment: %+v", o)
	}
	back := syn(first, "100.64.0.1")
	back.Flags, back.Seq, back.Ack = pfconf.FlagACK, 1001, 5011
	if o := g.mac.Receive(back, g.p.name); o.Fate != simmac.Dropped {
		t.Errorf("the peer's next segment: %+v", o)
	}
	own := syn("100.64.0.1", first)
	own.SrcPort = 50000
	if o := g.mac.Send(own); o.Fate != simmac.Sent {
		t.Errorf("a connection of this Mac's: %+v", o)
	}
	now := time.Now().Add(cutLifetime + time.Minute)
	g.p.o.Now = func() time.Time { return now }
	g.enforce(testMesh(2, mesh.Routing))
	if text := g.p.loaded.anchor.text(); strings.Contains(text, "<cut>") {
		t.Errorf("the cut outlived its time:\n%s", text)
	}
}

// TestOwnFlowsGoOn revokes all permissions of a peer while this Mac has a connection of
// its own to it: both ends keep sending, even after a day.
func TestOwnFlowsGoOn(t *testing.T) {
	for what, m := range map[string]policy.Mesh{"nothing left": testMesh(2, 0, everything), "incoming left": testMesh(2, mesh.Incoming, everything)} {
		t.Run(what, func(t *testing.T) {
			g := newRig(t)
			g.open()
			old := g.enforce(testMesh(2, everything))
			g.must(g.p.Cut(t.Context(), old, nil))
			own := syn("100.64.0.1", first)
			if o := g.mac.Send(own); o.Fate != simmac.Sent {
				t.Fatalf("this Mac's connection: %+v", o)
			}
			answer := syn(first, "100.64.0.1")
			answer.SrcPort, answer.DstPort, answer.Flags, answer.Seq, answer.Ack = 443, 4000, pfconf.FlagSYN|pfconf.FlagACK, 5000, 1001
			if o := g.mac.Receive(answer, g.p.name); o.Fate != simmac.Delivered {
				t.Fatalf("its answer: %+v", o)
			}
			next := g.enforce(m)
			g.must(g.p.Cut(t.Context(), next, policy.Diff(old, next)))
			own.Flags, own.Seq, own.Ack, own.Len = pfconf.FlagPSH|pfconf.FlagACK, 1001, 5001, 10
			if o := g.mac.Send(own); o.Fate != simmac.Sent {
				t.Errorf("its next segment: %+v", o)
			}
			answer.Flags, answer.Seq, answer.Ack = pfconf.FlagACK, 5001, 1011
			if o := g.mac.Receive(answer, g.p.name); o.Fate != simmac.Delivered {
				t.Errorf("the peer's next segment: %+v", o)
			}
		})
	}
}

// TestServices sends to the port of each service, from a peer with each set of
// permissions, while the service is on and while it is off. Where the service alone let
// the peer in, its permissions are then revoked: no pending answer leaves.
func TestServices(t *testing.T) {
	for _, service := range policy.AllServices {
		for _, proto := range service.Protos {
			t.Run(fmt.Sprintf("%s/%v", service.Name, pfconf.Proto(proto)), func(t *testing.T) {
				g := newRig(t)
				g.open()
				port := uint16(20000)
				for may := range mesh.All + 1 {
					for _, serves := range []policy.Services{policy.EveryService &^ service.Set, service.Set} {
						m := testMesh(2, may, everything)
						m.Serves = serves
						old := g.enforce(m)
						g.must(g.p.Cut(t.Context(), old, nil))
						for _, dst := range []string{"100.64.0.1", "203.0.113.1"} {
							port++
							ask := syn(first, dst)
							if ask.SrcPort, ask.DstPort = port, service.Port; proto == policy.ProtoUDP {
								ask.Proto, ask.Flags, ask.Seq, ask.Window, ask.Len = pfconf.ProtoUDP, 0, 0, 0, 30
							}
							want := old.FromPeer(policy.Packet{Src: ask.Src, Dst: ask.Dst, Proto: proto, SrcPort: port, DstPort: service.Port})
							o := g.mac.Receive(ask, g.p.name)
							if got := o.Fate == simmac.Delivered; got != want.Pass {
								t.Fatalf("with %v, serving %v, to %s: %+v, but the policy's rule is %v", may, serves.List(), dst, o, want.Rule)
							}
							if want.Rule != service.Rule || service.Needs == 0 {
								continue
							}
							taken := testMesh(2, 0, everything)
							taken.Serves = serves
							next := g.enforce(taken)
							g.must(g.p.Cut(t.Context(), next, policy.Diff(old, next)))
							if o := g.mac.Send(reverse(ask)); o.Fate != simmac.Dropped {
								t.Errorf("after %v was revoked, the answer: %+v", may, o)
							}
							own := ask
							own.Src, own.Dst, own.SrcPort, own.DstPort = ask.Dst, ask.Src, 5000, 6000
							if o := g.mac.Send(own); o.Fate != simmac.Sent {
								t.Errorf("after %v was revoked, this Mac's own packet to the peer: %+v", may, o)
							}
							g.must(g.p.Cut(t.Context(), g.enforce(m), nil))
						}
					}
				}
			})
		}
	}
}

// TestDrift has another program change what the backend enforces: Inspect finds it, and
// Enforce repairs it.
func TestDrift(t *testing.T) {
	for what, drift := range map[string]struct {
		step string
		do   func(g *rig)
	}{
		"the anchor is flushed":  {StepAnchor, func(g *rig) { g.mac.FlushAnchor(g.p.path) }},
		"the anchor is replaced": {StepAnchor, func(g *rig) { g.must(g.mac.LoadAnchor(g.p.path, "pass all\n")) }},
		"a table is changed": {StepAnchor, func(g *rig) {
			g.must(darwin.NewPF(g.mac).ReplaceTable(g.t.Context(), g.p.path, tableLAN, (set{in: prefixes("100.64.0.0/10")}).table(tableLAN).Addrs))
		}},
		"the packet filter is off": {StepEnable, func(g *rig) { g.mac.PF.Disable() }},
		"IPv4 forwarding is off":   {StepForwarding, func(g *rig) { g.mac.Kernel.SetVariable("net.inet.ip.forwarding", "0") }},
		"IPv6 forwarding is off":   {StepForwarding, func(g *rig) { g.mac.Kernel.SetVariable("net.inet6.ip6.forwarding", "0") }},
		"an address is taken":      {StepAddresses, func(g *rig) { g.must(g.mac.Kernel.RemoveAddress(g.p.name, addrOf("100.64.0.1"))) }},
		"a route is deleted":       {StepRoutes, func(g *rig) { g.must(g.mac.Kernel.DeleteRoute(netip.MustParsePrefix(first + "/32"))) }},
		"translation is all that changed": {StepAnchor, func(g *rig) {
			g.must(g.mac.LoadAnchor(g.p.path, strings.Replace(g.p.loaded.anchor.text(), "-> (en5:0)", "-> 192.0.2.1", 1)))
		}},
		"rules are all that changed": {StepAnchor, func(g *rig) {
			g.must(g.mac.LoadAnchor(g.p.path, strings.Replace(g.p.loaded.anchor.text(), "mesh-martian", "mesh-other", 1)))
		}},
	} {
		t.Run(what, func(t *testing.T) {
			g := newRig(t)
			g.open()
			m := testMesh(2, everything)
			r := g.enforce(m)
			drift.do(g)
			report := g.inspect(r)
			if len(report.Drift) == 0 || report.Drift[0].Step != drift.step {
				t.Fatalf("Inspect found the drift %v", report.Drift)
			}
			g.must(g.p.Enforce(t.Context(), r))
			g.clean(g.compile(m))
		})
	}
}

// TestObstacles has other software keep our anchor from being evaluated: nothing is
// forwarded, and the error names the cause.
func TestObstacles(t *testing.T) {
	for what, tt := range map[string]struct{ main, message string }{
		"no hooks":       {"pass all\n", `the main ruleset doesn't call anchor "com.apple/*"`},
		"no translation": {"anchor \"com.apple/*\"\n", `the main ruleset doesn't call nat-anchor "com.apple/*"`},
		"a partial hook": {"nat-anchor \"com.apple/*\"\nanchor \"com.apple/*\" in on en0\n", `the main ruleset doesn't call anchor "com.apple/*"`},
		"tunnel skipped": {"set skip on utun0\n" + simmac.StockMain, "the packet filter is told to skip utun0"},
		"uplink skipped": {"set skip on en0\n" + simmac.StockMain, "the packet filter is told to skip en0"},
	} {
		t.Run(what, func(t *testing.T) {
			g := newRig(t)
			g.open()
			g.enforce(testMesh(2, everything))
			g.must(g.mac.LoadMain(tt.main))
			r := g.compile(testMesh(2, everything))
			err := g.p.Enforce(t.Context(), r)
			var step *host.StepError
			if !errors.As(err, &step) || !strings.Contains(err.Error(), tt.message) || step.Hint == "" {
				t.Errorf("Enforce returned %v", err)
			}
			if g.mac.Kernel.Variable("net.inet.ip.forwarding") != "0" {
				t.Error("forwarding is still on")
			}
			g.must(g.mac.LoadMain(simmac.StockMain))
			g.clean(g.enforce(testMesh(2, everything)))
		})
	}
}

// TestForeignRuleIsReported checks that Inspect reports another program's rule that
// overrides ours.
func TestForeignRuleIsReported(t *testing.T) {
	g := newRig(t)
	g.must(g.mac.LoadAnchor("com.apple/100.other", "table <friends> { 192.168.77.9 }\npass in quick on en5 from <friends> to 100.64.0.1\n"))
	g.open()
	g.enforce(testMesh(2, everything))
	if report := g.lookAtAll(); len(report.Problems) != 0 {
		t.Errorf("a rule for an unrelated address is reported: %v", report.Problems)
	}
	g.must(g.mac.LoadAnchor("com.apple/100.other", "pass in quick on en5 from any to 100.64.0.1\n"))
	report := g.lookAtAll()
	if len(report.Problems) != 1 || !strings.Contains(report.Problems[0].Message, "of the anchor com.apple/100.other lets through") {
		t.Errorf("the rule isn't reported: %v", report.Problems)
	}
}

// lookAtAll inspects twice after an event of the routing socket: first our own anchor,
// then other software's rules.
func (g *rig) lookAtAll() host.Report {
	g.t.Helper()
	g.p.hostChanged.Store(true)
	r := g.compile(testMesh(2, everything))
	g.inspect(r)
	return g.inspect(r)
}

// TestTransitByOthersCloses has another product's rule pass transit that our anchor
// blocks: forwarding isn't enabled, or is disabled again.
func TestTransitByOthersCloses(t *testing.T) {
	const open = "pass in quick on en5 from 192.168.77.0/24 to any\n"
	for name, before := range map[string]bool{"before the start": true, "later": false} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			if before {
				g.must(g.mac.LoadAnchor("com.apple/100.other", open))
			}
			g.open()
			r := g.compile(testMesh(2, everything))
			err := g.p.Enforce(t.Context(), r)
			if !before {
				g.must(err)
				g.must(g.mac.LoadAnchor("com.apple/100.other", open))
				if report := g.lookAtAll(); len(report.Drift) == 0 {
					t.Error("the rule isn't reported as drift")
				}
				err = g.p.Enforce(t.Context(), r)
			}
			var named *host.StepError
			if !errors.As(err, &named) || !strings.Contains(err.Error(), "com.apple/100.other") || named.Hint == "" {
				t.Errorf("Enforce returned %v, want an error that names the anchor", err)
			}
			g.arrives("en5", "192.168.77.9", "9.9.9.9", simmac.Dropped)
			g.must(g.mac.LoadAnchor("com.apple/100.other", "pass in on en5 all\n"))
			g.clean(g.enforce(testMesh(2, everything)))
			g.arrives(g.p.name, first, "9.9.9.9", simmac.Forwarded)
		})
	}
}

// TestRuleThatIsNotUnderstood checks that a foreign rule that can't be parsed doesn't
// hide the other rules, is reported, and counts as matching every packet.
func TestRuleThatIsNotUnderstood(t *testing.T) {
	shown := "pass in quick on en5 by-magic all\npass in on en5 all no state\n"
	u := unparsed{}
	read := u.parse("com.apple/100.other", shown)
	if len(read.Rules) != 2 || !read.Rules[0].Quick || read.Rules[0].Interfaces != nil {
		t.Fatalf("parsed as %+v", read.Rules)
	}
	found := u.resolve([]Foreign{{Anchor: "com.apple/100.other", Rule: read.Rules[0].String(), Wider: true, Transit: true, Example: "a packet"}})
	if len(found) != 1 || !strings.Contains(found[0].String(), "by-magic") || !strings.Contains(found[0].String(), "isn't understood") {
		t.Errorf("reported as %q", found)
	}
	if found = u.resolve(nil); len(found) != 1 || !strings.Contains(found[0].String(), "by-magic") {
		t.Errorf("not reported: %q", found)
	}
	for rule, want := range map[string]string{
		"block drop out quick log on en0 proto magic": `block drop quick all label "unparsed-0"`,
		"pass all by-magic":                           `pass all flags any keep state (floating) allow-opts label "unparsed-0"`,
		"pass in log (all, user) quick all by-magic":  `pass quick all flags any keep state (floating) allow-opts label "unparsed-0"`,
		"anchor \"vpn\" all by-magic":                 `anchor "vpn" all`,
	} {
		u := unparsed{}
		read := u.parse("x", rule)
		if len(read.Rules) != 1 || read.Rules[0].Rule.String() != want || len(u) != 1 {
			t.Errorf("%q: %+v, want %q", rule, read.Rules, want)
		}
	}
	mullvad, err := os.ReadFile("../../../pfconf/testdata/mac/pfctl-mullvad-rules-15.txt")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(mullvad), "\n")
	u = unparsed{}
	if read := u.parse("mullvad", text); len(u) > 0 || len(read.Rules) != 4 {
		t.Errorf("Mullvad's rules: %d, not understood: %v", len(read.Rules), u)
	}
}

// TestTakenRoute has another program route a peer's address elsewhere: Inspect reports
// that the peer can't be reached, and no packet for it leaves unencrypted.
func TestTakenRoute(t *testing.T) {
	g := newRig(t)
	g.open()
	n, err := darwin.Observe(g.mac)
	g.must(err)
	g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: netip.MustParsePrefix(first + "/32"), Gateway: addrOf("192.168.77.254"),
		Index: n.Interface("en5").Index, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteHost | darwin.RouteStatic}))
	r := g.enforce(testMesh(2, everything))
	report := g.inspect(r)
	if len(report.Drift) != 0 || len(report.Problems) != 1 || !strings.Contains(report.Problems[0].Message, first) {
		t.Errorf("the route isn't reported: %+v", report)
	}
	if o := g.mac.Send(syn("100.64.0.1", first)); o.Fate != simmac.Dropped {
		t.Errorf("the packet to the peer left by %s", o.Link)
	}
	if o := g.mac.Send(syn("100.64.0.1", second)); o.Fate != simmac.Sent || o.Link != g.p.name {
		t.Errorf("the packet to the other peer: %+v", o)
	}
}

// TestInternetSharing enables Internet Sharing while peers route: its guests are
// forwarded, can't reach peers, and forwarding stays on after Close.
func TestInternetSharing(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, everything))
	g.must(g.mac.InternetSharing("en0"))
	r := g.enforce(testMesh(2, everything))
	g.clean(r)
	if !r.Host().FoundForwarding.IPv4 {
		t.Error("Internet Sharing's transit counts as to be closed")
	}
	if o := g.arrives("bridge100", "192.168.2.9", "9.9.9.9", simmac.Forwarded); o.Packet.Src != addrOf("203.0.113.1") {
		t.Errorf("a guest's packet: %+v", o)
	}
	g.arrives("bridge100", "192.168.2.9", first, simmac.Dropped)
	left := g.close()
	if len(left) != 1 || g.mac.Kernel.Variable("net.inet.ip.forwarding") != "1" {
		t.Errorf("left %v, forwarding %s", left, g.mac.Kernel.Variable("net.inet.ip.forwarding"))
	}
}

// TestBusyTableIsTriedAgain has pf refuse a table as busy once: Enforce retries and
// succeeds.
func TestBusyTableIsTriedAgain(t *testing.T) {
	g := newRig(t)
	g.open()
	g.mac.Busy(1)
	g.clean(g.enforce(testMesh(2, everything)))
}

// killed is the value that step panics with, to stand for a SIGKILL.
type killed struct{}

// until runs do and kills the backend in the nth call of step. The kernel closes the
// device; no cleanup runs.
func (g *rig) until(nth int, do func()) (step string, died bool) {
	n := 0
	g.step = func(name string) {
		step = name
		if n++; n == nth {
			panic(killed{})
		}
	}
	defer func() {
		g.step = nil
		if r := recover(); r != nil {
			if _, died = r.(killed); !died {
				panic(r)
			}
			if g.p.dev != nil {
				g.p.dev.Close()
			}
			g.dev = nil
		}
	}()
	do()
	return step, false
}

// life is one run of the helper, from start to stop.
func (g *rig) life() {
	g.dev = nil
	g.open()
	g.enforce(testMesh(2, everything))
	g.enforce(testMesh(3, everything)) // changes only tables
	old := g.enforce(testMesh(2, everything))
	g.must(g.p.Cut(g.t.Context(), old, policy.Diff(nil, old)))
	g.arrives(g.p.name, first, "9.9.9.9", simmac.Forwarded)
	next := g.enforce(testMesh(2, mesh.Incoming, mesh.Routing))
	g.must(g.p.Cut(g.t.Context(), next, policy.Diff(old, next)))
	g.enforce(testMesh(2, mesh.Incoming))
	g.enforce(testMesh(2, everything))
	g.close()
}

// TestKilledAtEachStep kills the helper before and after each of its steps, and after
// each of its commands and routing messages. While it is dead the Mac forwards nothing
// that it didn't forward before, and the next start or uninstall restores the host.
func TestKilledAtEachStep(t *testing.T) {
	kills, steps := 0, map[string]bool{}
	for nth := 1; ; nth++ {
		g := newRig(t)
		before := g.mac.Dump()
		step, died := g.until(nth, g.life)
		if !died {
			break
		}
		kills++
		steps[step] = true
		g.closedWhileDead(step)
		g.renew()
		if nth%2 == 0 {
			g.open()
			g.clean(g.enforce(testMesh(2, everything)))
		}
		g.close()
		if d := cmp.Diff(before, g.mac.Dump()); d != "" {
			t.Errorf("killed at %q (%d): the host wasn't restored: %s", step, nth, d)
		}
		if g.journalExists() {
			t.Errorf("killed at %q (%d): the journal still exists", step, nth)
		}
	}
	for _, s := range Steps {
		if !steps[s] {
			t.Errorf("no kill at step %q", s)
		}
	}
	t.Logf("killed %d times", kills)
}

// TestEachChangeIsSeen checks that a test can kill the helper between any two changes to
// the Mac: at most one change comes between two calls of step, none before the first call
// or after the last.
func TestEachChangeIsSeen(t *testing.T) {
	g := newRig(t)
	last, changes, unseen := g.mac.Dump(), 0, ""
	g.ran = func() {
		now := g.mac.Dump()
		if now == last {
			return
		}
		if changes++; unseen != "" {
			t.Errorf("no call of step between this change and the next: %s", unseen)
		}
		last, unseen = now, cmp.Diff(last, now)
	}
	calls := 0
	g.step = func(string) {
		calls++
		g.ran()
		unseen = ""
	}
	g.life()
	if g.ran(); unseen != "" || changes < 10 || calls < changes {
		t.Errorf("%d changes, %d calls of step; after the last call: %s", changes, calls, unseen)
	}
}

// closedWhileDead sends packets that must not be forwarded while the helper is dead.
func (g *rig) closedWhileDead(step string) {
	g.t.Helper()
	for _, p := range [][3]string{
		{"en5", "192.168.77.9", "9.9.9.9"}, {"en5", "192.168.77.9", first},
		{"en0", "203.0.113.9", "192.168.77.9"}, {"en0", "203.0.113.9", second}, {"en0", "2001:db8:1::9", first6},
	} {
		if o := g.mac.Receive(syn(p[1], p[2]), p[0]); o.Fate == simmac.Forwarded {
			g.t.Errorf("killed at %q: %s reached %s", step, p[1], p[2])
		}
	}
}

// TestTokenOfAKilledHelper has the helper killed between taking its pf token and
// recording it: the next helper releases the token if it can be identified, and reports
// it otherwise.
func TestTokenOfAKilledHelper(t *testing.T) {
	for came, want := range map[int]int{0: 0, 1: 0, 2: 2} {
		g := newRig(t)
		g.open()
		for range came {
			g.mac.PF.Hold("pfctl")
		}
		g.p.j.Token, g.p.j.Enabling, g.p.j.Others = 0, true, nil
		left := g.close()
		if said := len(left) == 1 && left[0].Step == StepRelease; said != (came > 1) || len(left) > 1 {
			t.Errorf("%d unknown tokens: problems %+v", came, left)
		}
		if n := len(g.mac.PF.Tokens()); n != want {
			t.Errorf("%d unknown tokens: %d remain, want %d", came, n, want)
		}
	}
}

// TestTokenOfARunThatFailed has pfctl take a token and then time out before it reports
// it: the next try adopts that token, and Close releases it.
func TestTokenOfARunThatFailed(t *testing.T) {
	g := newRig(t)
	g.open()
	g.mac.PF.Hold("pfctl")
	r := g.compile(testMesh(1, mesh.Routing))
	g.lost = "-E"
	if err := g.p.Enforce(t.Context(), r); err == nil || g.lost != "" {
		t.Fatalf("Enforce returned %v, lost %q", err, g.lost)
	}
	g.must(g.p.Enforce(t.Context(), r))
	g.clean(g.p.enforced)
	if n := len(g.mac.PF.Tokens()); n != 2 {
		t.Errorf("%d tokens while enforcing, want ours and the other program's", n)
	}
	g.close()
	if n := len(g.mac.PF.Tokens()); n != 1 {
		t.Errorf("%d tokens remain, want the other program's", n)
	}
}

// TestRebootForgets checks that the journal of an earlier boot has no effect.
func TestRebootForgets(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, everything))
	for _, err := range g.mac.Boot() {
		t.Error(err)
	}
	before := g.mac.Dump()
	g.renew()
	if left := g.close(); len(left) > 0 || before != g.mac.Dump() {
		t.Errorf("left %v: %s", left, cmp.Diff(before, g.mac.Dump()))
	}
}

// failing is a runner that fails every command with a given argument.
type failing struct {
	darwin.Runner
	arg string
}

func (f failing) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if slices.Contains(args, f.arg) {
		return nil, []byte("pfctl: Operation not supported\n"), 1, nil
	}
	return f.Runner.Run(ctx, stdin, path, args...)
}

// TestFailuresClose checks that a failed step leaves forwarding off and that the error
// names the step.
func TestFailuresClose(t *testing.T) {
	for arg, step := range map[string]string{
		"-f": StepAnchor, "-E": StepEnable, "rules": StepAnchor, "info": StepEnable, "net.inet.ip.forwarding=1": StepForwarding,
		"References": StepEnable, "Interfaces": StepAnchor,
	} {
		t.Run(arg, func(t *testing.T) {
			g := newRig(t)
			var err error
			g.p, err = New(Options{StateDir: g.dir, Runner: failing{g.mac, arg}, Kernel: g.mac, CreateTUN: g.mac.CreateTUN})
			g.must(err)
			t.Cleanup(func() { g.p.cuts.save(time.Minute) }) // before the directory is removed
			g.open()
			err = g.p.Enforce(t.Context(), g.compile(testMesh(2, everything)))
			var named *host.StepError
			if !errors.As(err, &named) || named.Step != step {
				t.Errorf("got %v, want an error of %q", err, step)
			}
			if v := g.mac.Kernel.Variable("net.inet.ip.forwarding"); v != "0" {
				t.Error("forwarding is on")
			}
			g.arrives(g.p.name, first, "9.9.9.9", simmac.Dropped)
		})
	}
}

// TestJournal writes a journal and reads it back. A journal of another boot is empty, and
// one that names an anchor that isn't ours is refused.
func TestJournal(t *testing.T) {
	dir := t.TempDir()
	j := &journal{Version: journalVersion, Boot: "A", Anchor: "com.apple/org.meshhelper", Token: 7, Others: []uint64{1, 2}}
	if err := j.write(dir); err != nil {
		t.Fatal(err)
	}
	got, err := readJournal(dir, "A")
	if err != nil || cmp.Diff(j, got) != "" {
		t.Errorf("the journal reads back differently: %v %s", err, cmp.Diff(j, got))
	}
	if got, err = readJournal(dir, "B"); err != nil || !got.IsEmpty() {
		t.Errorf("journal of another boot: %+v %v", got, err)
	}
	info, err := os.Stat(filepath.Join(dir, journalName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the journal's mode is %v, want 0600: %v", info.Mode(), err)
	}
	for text, want := range map[string]string{
		`{"version":2}`:                          "version 2 is unknown",
		`{"version":1,"anchor":"com.apple"}`:     "is not ours",
		`{"version":1,"anchor":"com.apple/a/b"}`: "is not ours",
		`{"version":1,"anchor":"x"}`:             "is not ours",
		`[]`:                                     "cannot unmarshal",
	} {
		if _, err := parseJournal([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("journal %s: %v", text, err)
		}
	}
}

// FuzzParseJournal checks that no journal names an anchor that isn't ours, which the next
// start would flush.
func FuzzParseJournal(f *testing.F) {
	f.Add([]byte(`{"version":1,"boot":"A","forwarding":{"ipv4":true},"anchor":"com.apple/org.meshhelper","token":7}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := parseJournal(b)
		if err != nil || j.Anchor == "" {
			return
		}
		if label, ok := strings.CutPrefix(j.Anchor, anchorParent); !ok || label == "" || strings.Contains(label, "/") {
			t.Errorf("anchor %q would be flushed", j.Anchor)
		}
	})
}
