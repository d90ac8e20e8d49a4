package macos

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// judged is a packet that the policy and our own anchor pass, with how it is sent.
type judged struct {
	host.Packet
	out string
}

// packetsToJudge returns packets of a peer with all permissions, of the Mac itself, and
// of WireGuard.
func packetsToJudge(mesh string) map[string]judged {
	packet := func(in, src, dst string, proto uint8, from, to uint16) host.Packet {
		return host.Packet{In: in, Packet: policy.Packet{Src: addrOf(src), Dst: addrOf(dst), Proto: proto, SrcPort: from, DstPort: to}}
	}
	echo := packet(mesh, first, "9.9.9.9", policy.ProtoICMP, 7, 7)
	echo.ICMPType = 8
	return map[string]judged{
		"web":          {packet(mesh, first, "9.9.9.9", policy.ProtoTCP, 4000, 443), "en0"},
		"web, IPv6":    {packet(mesh, first6, "2620:fe::fe", policy.ProtoTCP, 4000, 443), "en0"},
		"ssh":          {packet(mesh, first, "9.9.9.9", policy.ProtoTCP, 4000, 22), "en0"},
		"a query":      {packet(mesh, first, "9.9.9.9", policy.ProtoUDP, 4000, 53), "en0"},
		"an echo":      {echo, "en0"},
		"to the LAN":   {packet(mesh, first, "192.168.77.9", policy.ProtoTCP, 4000, 445), "en5"},
		"to the Mac":   {packet(mesh, first, "100.64.0.1", policy.ProtoTCP, 4000, 22), ""},
		"from the Mac": {packet("", "100.64.0.1", first, policy.ProtoTCP, 4000, 22), mesh},
		"a handshake":  {packet("en0", "198.51.100.7", "203.0.113.1", policy.ProtoUDP, 4000, listenPort), ""},
		"its answer":   {packet("", "203.0.113.1", "198.51.100.8", policy.ProtoUDP, listenPort, 4000), "en0"},
	}
}

// fate sends the packet on the Mac and returns its outcome.
func (g *rig) fate(j judged) simmac.Outcome {
	if j.In == "" {
		return g.mac.Send(asShown(j.Packet.Packet))
	}
	return g.mac.Receive(asShown(j.Packet.Packet), j.In)
}

// TestByOthers compares ByOthers' answer about foreign rules with the actual fate of each
// packet: it says that a packet passes exactly if it does.
func TestByOthers(t *testing.T) {
	main := func(translation, filter string) map[string]string {
		return map[string]string{"": "scrub-anchor \"com.apple/*\"\n" + translation + "nat-anchor \"com.apple/*\"\nrdr-anchor \"com.apple/*\"\ndummynet-anchor \"com.apple/*\"\n" + filter + "anchor \"com.apple/*\"\n"}
	}
	x := func(rules string) map[string]string { return map[string]string{"com.apple/100.x": rules} }
	for name, c := range map[string]struct {
		anchors map[string]string
		// stopped and redirected name packets. All others pass.
		stopped, redirected []string
	}{
		"nothing":             {},
		"a port":              {anchors: x("block drop quick proto tcp from any to any port 22\n"), stopped: []string{"ssh", "to the Mac", "from the Mac"}},
		"a port, later rules": {anchors: x("block drop proto tcp from any to any port 22\npass proto tcp from any to any port 22\n")},
		"a set of addresses":  {anchors: x("table <bad> { 9.0.0.0/8 }\nblock drop out quick on en0 from any to <bad>\n"), stopped: []string{"web", "ssh", "a query", "an echo"}},
		"handshakes":          {anchors: main("", "block in quick on en0 inet proto udp from any to any port 51820\n"), stopped: []string{"a handshake"}},
		"WireGuard's answers": {anchors: main("", "block out quick on en0 inet proto udp from any port 51820 to any\n"), stopped: []string{"its answer"}},
		"DNS is redirected":   {anchors: main("rdr on utun0 inet proto udp from any to any port 53 -> 203.0.113.1\n", ""), redirected: []string{"a query"}},
		"the tunnel":          {anchors: main("", "block return quick on utun0 all\n"), stopped: []string{"web", "web, IPv6", "ssh", "a query", "an echo", "to the LAN", "to the Mac", "from the Mac"}},
		"IPv6":                {anchors: x("block drop quick inet6 all\n"), stopped: []string{"web, IPv6"}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.open()
			g.enforce(testMesh(1, everything))
			if g.p.name != "utun0" {
				t.Fatalf("the tunnel is %s", g.p.name)
			}
			for path, text := range c.anchors {
				if path == "" {
					g.must(g.mac.LoadMain(text))
				} else {
					g.must(g.mac.LoadAnchor(path, text))
				}
			}
			for about, j := range packetsToJudge(g.p.name) {
				want := ""
				switch {
				case slices.Contains(c.stopped, about):
					want = host.OthersDrop
				case slices.Contains(c.redirected, about):
					want = host.OthersRedirect
				}
				by, err := g.p.ByOthers(t.Context(), j.Packet, j.out, false)
				if err != nil || by.Does != want || by.Unclear || (by.Where == "") != (want == "") {
					t.Errorf("%s: %+v, %v; want %q", about, by, err, want)
				}
				o := g.fate(j)
				redirected := o.Fate != simmac.Dropped && o.Packet.Dst != j.Dst
				if o.Fate == simmac.Dropped != (want == host.OthersDrop) || redirected != (want == host.OthersRedirect) {
					t.Errorf("%s: fate %v to %v (%s); want %q", about, o.Fate, o.Packet.Dst, o.Why, want)
				}
				if by, err := g.p.ByOthers(t.Context(), j.Packet, j.out, true); err != nil || by != (host.ByOthers{}) {
					t.Errorf("%s, as an answer: %+v, %v", about, by, err)
				}
			}
		})
	}
}

// TestByOthersBesideEnforce calls ByOthers while Enforce, Inspect and Cut run: it waits
// for none of their steps, and the race detector finds nothing.
func TestByOthersBesideEnforce(t *testing.T) {
	g := newRig(t)
	var p *Backend
	packet, asking, asked := judged{}, false, false
	ask := func() {
		if _, err := p.ByOthers(t.Context(), packet.Packet, packet.out, false); err != nil {
			t.Error(err)
		}
	}
	p, err := New(Options{StateDir: g.dir, Runner: g, Kernel: g.mac, CreateTUN: g.mac.CreateTUN, Step: func(name string) {
		switch {
		case asking:
			t.Errorf("ByOthers takes part in the step %q", name)
		case name == StepTables && !asked:
			asking, asked = true, true
			ask()
			asking = false
		}
	}})
	g.must(err)
	g.p = p
	t.Cleanup(func() { p.cuts.save(time.Minute) }) // before the directory is removed
	g.open()
	packet = packetsToJudge(p.name)["web"]
	g.enforce(testMesh(2, mesh.Routing))
	g.enforce(testMesh(3, mesh.Routing)) // changes only tables
	if !asked {
		t.Error("ByOthers wasn't called in a step")
	}

	p.o.Step = func(string) {}
	var beside sync.WaitGroup
	beside.Go(func() {
		for range 20 {
			ask()
		}
	})
	for i := range 10 {
		r := g.enforce(testMesh(2+i%2, mesh.Routing))
		g.inspect(r)
		g.must(p.Cut(t.Context(), r, policy.Diff(nil, r)))
	}
	beside.Wait()
}

// TestByOthersApart has a command of ByOthers hang: enforcement doesn't wait for it.
func TestByOthersApart(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(2, everything, everything))
	var asked atomic.Bool
	held, release, answered := make(chan struct{}), make(chan struct{}), make(chan error)
	g.ran = func() {
		if asked.CompareAndSwap(false, true) { // the question's first command
			close(held)
			<-release
		}
	}
	web, out := packetsToJudge(g.p.name)["web"], "en0"
	go func() {
		_, err := g.p.ByOthers(context.Background(), web.Packet, out, false)
		answered <- err
	}()
	<-held
	done := make(chan error)
	go func() {
		h, err := g.p.Observe(context.Background())
		if err != nil {
			done <- err
			return
		}
		r := mustRuleset(t, testMesh(2, mesh.Incoming, everything), h)
		report, ierr := g.p.Inspect(context.Background(), g.p.enforced)
		if len(report.Drift) > 0 {
			t.Errorf("drift %v", report.Drift)
		}
		done <- errors.Join(ierr, g.p.Enforce(context.Background(), r),
			g.p.Cut(context.Background(), r, []policy.Narrowed{{Addresses: []netip.Addr{addrOf(first)}}}))
	}()
	select {
	case err := <-done:
		g.must(err)
	case <-time.After(time.Minute):
		t.Error("enforcement waits for ByOthers' hanging command")
	}
	g.arrives(g.p.name, first, "9.9.9.9", simmac.Dropped)
	if _, err := g.p.Way(context.Background(), web.Packet); err != nil {
		t.Error(err)
	}
	close(release)
	g.must(<-answered)
}

// TestByOthersWithoutFilter calls ByOthers while pf is off, and while pf is on for
// another program and our anchor isn't loaded.
func TestByOthersWithoutFilter(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(1, mesh.Incoming))
	g.must(g.mac.LoadAnchor("com.apple/100.x", "block drop quick proto tcp from any to any port 22\n"))
	ask := func() string {
		t.Helper()
		j := packetsToJudge(g.p.name)["to the Mac"]
		by, err := g.p.ByOthers(t.Context(), j.Packet, j.out, false)
		g.must(err)
		if o := g.fate(j); (o.Fate == simmac.Delivered) != (by.Does == "") {
			t.Errorf("ByOthers says %+v, but the packet's fate is %v", by, o.Fate)
		}
		return by.Does
	}
	if does := ask(); does != "" {
		t.Errorf("while pf is off: %q", does)
	}
	_, err := darwin.NewPF(g.mac).Enable(t.Context())
	g.must(err)
	if does := ask(); does != host.OthersDrop {
		t.Errorf("while pf is on: %q", does)
	}
}

// TestByOthersUnclear has a rule that can't be parsed decide about the packet.
func TestByOthersUnclear(t *testing.T) {
	n := &darwin.Network{Interfaces: []darwin.Interface{{Name: "en0"}, {Name: "utun0"}}}
	u := unparsed{}
	shown := u.parse("", "block drop in quick on utun0 all by-magic\npass all flags S/SA keep state\n")
	m, err := machineWith(n, []foreignRuleset{{"", shown.Ruleset(&pfconf.Shown{})}}, u)
	if err != nil {
		t.Fatal(err)
	}
	alone, err := machineWith(n, nil, unparsed{})
	if err != nil {
		t.Fatal(err)
	}
	j := packetsToJudge("utun0")["to the Mac"]
	one := probe{packet: asShown(j.Packet.Packet), in: j.In}
	by := byOthers(one.send(m), one.send(alone), "com.apple/ours", u)
	if !by.Unclear || by.Does != host.OthersDrop || !strings.Contains(by.Where, "by-magic") {
		t.Errorf("ByOthers says %+v, want an unclear answer", by)
	}
}
