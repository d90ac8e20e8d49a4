package macos

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// sockets returns the ports from first to last, step apart.
func sockets(first, last, step int) (out []uint16) {
	for p := first; p <= last; p += step {
		out = append(out, uint16(p))
	}
	return out
}

// TestChoosePorts checks the source port range for different ephemeral ranges and
// sockets. A range without sockets stays; an overlap with a socket moves it.
func TestChoosePorts(t *testing.T) {
	stock := []darwin.PortRange{{First: 49152, Last: 65535}, {First: 49152, Last: 65535}}
	for name, tt := range map[string]struct {
		now       darwin.PortRange
		ephemeral []darwin.PortRange
		taken     []uint16
		want      darwin.PortRange
		none      bool
	}{
		"as macOS ships":                {ephemeral: stock, want: defaultPorts},
		"low sockets":                   {ephemeral: stock, taken: []uint16{22, 500, 5353, 19999, 60000}, want: defaultPorts},
		"Tailscale":                     {ephemeral: stock, taken: []uint16{41641}, want: darwin.PortRange{First: 20000, Last: 41640}},
		"two programs":                  {ephemeral: stock, taken: []uint16{25000, 41641, 25000}, want: darwin.PortRange{First: 25001, Last: 41640}},
		"the edges":                     {ephemeral: stock, taken: []uint16{20000, 49151}, want: darwin.PortRange{First: 20001, Last: 49150}},
		"stays":                         {now: darwin.PortRange{First: 20000, Last: 25000}, ephemeral: stock, want: darwin.PortRange{First: 20000, Last: 25000}},
		"moves":                         {now: darwin.PortRange{First: 20000, Last: 25000}, ephemeral: stock, taken: []uint16{22000}, want: darwin.PortRange{First: 22001, Last: 49151}},
		"ephemeral ports from 10000 on": {ephemeral: []darwin.PortRange{{First: 10000, Last: 65535}, {First: 49152, Last: 65535}}, none: true},
		"ephemeral ports below":         {ephemeral: []darwin.PortRange{{First: 10000, Last: 30000}, {First: 49152, Last: 65535}}, want: darwin.PortRange{First: 30001, Last: 49151}},
		"ephemeral ports above only":    {ephemeral: []darwin.PortRange{{First: 65000, Last: 65535}, {First: 65000, Last: 65535}}, want: darwin.PortRange{First: 20000, Last: 64999}},
		"sockets all over":              {ephemeral: stock, taken: sockets(20000, 49151, 500), want: defaultPorts},
		"up to the last port":           {ephemeral: []darwin.PortRange{{First: 1024, Last: 30000}}, want: darwin.PortRange{First: 30001, Last: 65535}},
	} {
		got, ok := choosePorts(tt.now, tt.ephemeral, tt.taken)
		if ok == tt.none || ok && got != tt.want {
			t.Errorf("%s: %v, %v, want %v", name, got, ok, tt.want)
		}
	}
	for _, tt := range []struct {
		port uint16
		want darwin.PortRange
	}{
		{0, defaultPorts}, {51820, defaultPorts}, {20000, darwin.PortRange{First: 20001, Last: 49151}}, {49151, darwin.PortRange{First: 20000, Last: 49150}},
		{21000, darwin.PortRange{First: 21001, Last: 49151}}, {48000, darwin.PortRange{First: 20000, Last: 47999}},
	} {
		if got := withoutPort(defaultPorts, tt.port); got != tt.want {
			t.Errorf("without %d: %v, want %v", tt.port, got, tt.want)
		}
	}
}

// TestPortsFollowSockets has programs bind ports that peers' packets leave from: the
// rules follow at most once a minute, and at once for ports that the kernel assigns
// itself. If no port is left, nothing leaves, and that is reported.
func TestPortsFollowSockets(t *testing.T) { synctest.Test(t, testPortsFollowSockets) }

func testPortsFollowSockets(t *testing.T) {
	g := newRig(t)
	g.open()
	m := testMesh(2, everything)
	round := func() *policy.Ruleset {
		time.Sleep(tick)
		r := g.compile(m)
		if len(g.inspect(r).Drift) > 0 {
			g.must(g.p.Enforce(t.Context(), r))
			if d := g.inspect(r).Drift; len(d) > 0 {
				t.Fatalf("drift after Enforce: %v", d)
			}
			g.must(g.p.Cut(t.Context(), r, policy.Diff(nil, r)))
		}
		return r
	}
	port := uint16(0)
	leaves := func(want darwin.PortRange) {
		t.Helper()
		if _, text, err := g.p.Renderer()(g.p.enforced); err != nil || text != g.p.loaded.anchor.Ruleset().String() || !strings.Contains(text, fmt.Sprintf("port %d:%d", want.First, want.Last)) {
			t.Errorf("%v; the loaded anchor isn't the recorded one, or lacks the ports %v:\n%s", err, want, text)
		}
		for range 50 {
			p := syn(first, "9.9.9.9")
			port++
			p.SrcPort = 1000 + port
			if o := g.mac.Receive(p, g.p.name); !want.Contains(o.Packet.SrcPort) || o.Packet.Src != addrOf("203.0.113.1") {
				t.Fatalf("left from %v port %d, want %v", o.Packet.Src, o.Packet.SrcPort, want)
			}
		}
	}
	g.must(g.p.Enforce(t.Context(), g.compile(m)))
	round()
	leaves(defaultPorts)
	g.mac.Kernel.BindUDP(30000)
	round()
	leaves(defaultPorts) // less than a minute passed
	time.Sleep(minPortsAge)
	round()
	leaves(darwin.PortRange{First: 30001, Last: 49151})
	before := g.p.loaded.rules
	g.mac.Kernel.BindUDP(25000)
	round()
	if g.p.loaded.rules != before {
		t.Error("a socket outside the range reloads the anchor")
	}
	g.mac.Kernel.SetVariable("net.inet.ip.portrange.first", "40000")
	round()
	leaves(darwin.PortRange{First: 30001, Last: 39999})

	g.mac.Kernel.SetVariable("net.inet.ip.portrange.first", "1024")
	r := round()
	o := g.mac.Receive(syn(first, "9.9.9.9"), g.p.name)
	if o.Out.Pass() {
		t.Errorf("without a port a packet left as %v", o.Packet)
	}
	if ps := g.inspect(r).Problems; len(ps) != 1 || ps[0].Step != StepPorts || !strings.Contains(ps[0].Message, "no 1024 ports") {
		t.Errorf("problems %v", ps)
	}
	g.mac.Kernel.SetVariable("net.inet.ip.portrange.first", "49152")
	r = round()
	g.clean(r)
	for _, p := range sockets(20000, 49151, 900) {
		g.mac.Kernel.BindTCP(p)
	}
	for _, d := range []time.Duration{0, minPortsAge} { // also too early for a change of range
		time.Sleep(d)
		r = round()
		if ps := g.inspect(r).Problems; len(ps) != 1 || ps[0].Step != StepPorts || !strings.Contains(ps[0].Message, "among all ports") {
			t.Errorf("after %v: problems %v", d, ps)
		}
	}
	leaves(defaultPorts)
}

// TestFlowsLeaveTakenPorts has a socket of the host bind the port of a peer's running
// flow: that flow ends, and no other does.
func TestFlowsLeaveTakenPorts(t *testing.T) { synctest.Test(t, testFlowsLeaveTakenPorts) }

func testFlowsLeaveTakenPorts(t *testing.T) {
	g := newRig(t)
	g.open()
	r := g.compile(testMesh(2, everything))
	g.must(g.p.Enforce(t.Context(), r))
	g.must(g.p.Cut(t.Context(), r, policy.Diff(nil, r)))
	flow := func(from string) uint16 { return g.mac.Receive(syn(from, "9.9.9.9"), g.p.name).Packet.SrcPort }
	taken, other := flow(first), flow(second) // one destination, so two ports
	runs := func(port uint16) bool {
		states, err := g.p.pf.States(t.Context())
		g.must(err)
		return slices.ContainsFunc(states, func(s pfconf.ShownState) bool { return s.Inner != s.Translated && s.Translated.Port() == port })
	}
	if !runs(taken) || !runs(other) {
		t.Fatalf("no flow leaves from %d or %d, so the test proves nothing", taken, other)
	}
	g.mac.Kernel.BindTCP(taken)
	for range minPortsAge / (10 * time.Second) {
		time.Sleep(10 * time.Second)
		if a, b := flow(first), flow(second); a != taken || b != other {
			t.Fatalf("the flows leave from %d and %d now", a, b)
		}
	}
	g.p.observePorts()
	if len(g.inspect(r).Drift) == 0 {
		t.Fatal("the taken port isn't reported as drift")
	}
	r = g.compile(testMesh(2, everything))
	g.must(g.p.Enforce(t.Context(), r))
	g.must(g.p.Cut(t.Context(), r, nil))
	if runs(taken) || !runs(other) {
		t.Errorf("flows go on: from the taken port %v, from the other %v", runs(taken), runs(other))
	}
}

// TestUnknownSockets has the kernel's socket list fail: the default range applies, or the
// ports known before, and the failure is reported.
func TestUnknownSockets(t *testing.T) {
	g := newRig(t)
	p := &Backend{o: Options{Kernel: noTables{g.mac}, Now: time.Now}}
	p.sysctl = darwin.NewSysctl(g, p.o.Kernel)
	p.observePorts()
	if p.ports.nat != defaultPorts || len(p.portProblems()) != 1 || !p.ports.ike(time.Now()) {
		t.Errorf("without a socket list, the ports are %+v", p.ports)
	}
	p.o.Kernel = g.mac
	g.mac.Kernel.BindTCP(40000)
	g.mac.Kernel.BindUDP(ikePort)
	p.ports.nat = darwin.PortRange{}
	p.observePorts()
	known := p.ports.nat
	p.o.Kernel = noTables{g.mac}
	p.observePorts()
	if p.ports.nat != known || known.Contains(40000) || len(p.portProblems()) != 1 {
		t.Errorf("without a socket list, the ports are %+v, and were %v before", p.ports, known)
	}
	if !p.ports.ike(time.Now().Add(2 * minPortsAge)) {
		t.Error("port 500 counts as free while the sockets can't be read")
	}
}

type noTables struct{ darwin.Kernel }

func (noTables) Table(string) ([]byte, error) { return nil, errors.New("not permitted") }
