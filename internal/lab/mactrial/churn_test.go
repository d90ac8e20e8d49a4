package mactrial

// Interfaces, addresses and routes that come and go, as on any Mac.

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// churn maps a name to a change that happens on any Mac many times an hour. Each call
// makes the nth change of its kind.
var churn = map[string]func(g *rig, n int){
	"awdl0 has another link-local address": func(g *rig, n int) {
		g.toggle("awdl0", n, fmt.Sprintf("fe80::%x/64", n+2))
	},
	"a tunnel of the system's": func(g *rig, n int) { g.toggle("utun20", n, fmt.Sprintf("fe80::%x/64", n+1000)) },
	"a temporary address of the uplink's": func(g *rig, n int) {
		a := netip.MustParsePrefix("2001:db8:1::7e:1/64")
		if n%2 == 0 {
			g.must(g.mac.Kernel.AddAddress(uplink, a))
		} else {
			g.must(g.mac.Kernel.RemoveAddress(uplink, a.Addr()))
		}
	},
	"another program's route to one host": func(g *rig, n int) {
		dst := netip.MustParsePrefix("192.0.2.99/32")
		if n%2 != 0 {
			g.must(g.mac.Kernel.DeleteRoute(dst))
			return
		}
		o, err := darwin.Observe(g.mac)
		g.must(err)
		g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: dst, Gateway: netip.MustParseAddr("203.0.113.254"), Index: o.Interface(uplink).Index,
			Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteHost | darwin.RouteStatic}))
	},
	"a virtual machine's bridge": func(g *rig, n int) { g.toggle("bridge100", n, "192.168.64.1/24") },
}

// toggle adds an interface with an address, and removes it at the next call.
func (g *rig) toggle(name string, n int, address string) {
	g.t.Helper()
	if n%2 != 0 {
		g.mac.Kernel.RemoveInterface(name)
		return
	}
	g.mac.Kernel.AddInterface(name, darwin.InterfaceUp|darwin.InterfaceRunning|darwin.InterfaceMulticast, 1500)
	g.must(g.mac.Kernel.AddAddress(name, netip.MustParsePrefix(address)))
}

// settled waits until the helper has inspected the Mac's current state.
func (g *rig) settled() {
	g.t.Helper()
	for range 2 {
		at := g.rounds.Load()
		g.wait("a round of the loop", func() bool { return g.rounds.Load() > at })
	}
}

// loads returns how often pfctl loaded our anchor, and how often it ended states, since
// the last call.
func (g *rig) loads() (loads, kills int) {
	for _, c := range g.mac.PF.Calls() {
		if strings.Contains(c, anchor) && strings.Contains(c, "-f -") && !strings.Contains(c, "-T") {
			loads++
		}
		if strings.Contains(c, " -k ") {
			kills++
		}
	}
	return loads, kills
}

// TestChurn adds and removes interfaces, addresses and routes 200 times while peers'
// flows run: the anchor isn't reloaded, and no flow ends.
func TestChurn(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	g.add("D", "own")
	for _, f := range churn { // each once before, because an interface seen for the first time causes a load
		f(g, 0)
	}
	g.permit("C", everything)
	g.permit("D", mesh.Routing|mesh.Incoming)
	g.settled()
	for _, f := range churn {
		f(g, 1)
	}
	g.settled()
	var flows []flow
	for _, w := range []way{guarded, alone} {
		for family := range 2 {
			for _, proto := range protos {
				flows = append(flows, g.run(w, "C", g.own[family], proto, family), g.run(w, "C", server[family], proto, family),
					g.run(w, "C", printer[family], proto, family), g.run(w, "D", server[family], proto, family),
					g.run(w, "D", g.own[family], proto, family))
			}
		}
	}
	g.loads()
	packets := 0
	for n := range 20 {
		for name, f := range churn {
			f(g, n)
			g.settled()
			for _, flow := range flows {
				packets += 2
				if got := g.ends(flow, 1); got != 2 {
					t.Fatalf("%s (%d): %d of 2 packets of %s arrived", name, n, got, flow.name)
				}
			}
			if s := g.d.Status(); s.State != "enforcing" || s.Repairs != 0 {
				t.Fatalf("%s (%d): %s, %d repairs, %v", name, n, s.State, s.Repairs, s.Problems)
			}
		}
	}
	for n := range 100 { // then all of it at once, as on an idle Mac
		g.must(g.mac.Churn(uplink))
		g.settled()
		for _, flow := range flows {
			packets += 2
			if got := g.ends(flow, 1); got != 2 {
				t.Fatalf("churn %d: %d of 2 packets of %s arrived", n, got, flow.name)
			}
		}
	}
	loads, kills := g.loads()
	if loads != 0 {
		t.Errorf("the anchor was loaded %d times", loads)
	}
	t.Logf("200 changes, %d flows, %d packets; %d loads, %d kills", len(flows), packets, loads, kills)
}

// TestOwnMeshAddress has the Mac send to its own mesh addresses through the whole
// product: a packet that comes out of the tunnel device is turned back and not passed to
// WireGuard.
func TestOwnMeshAddress(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	for _, may := range []mesh.Permissions{mesh.Routing, 0} { // pf is needed with routing only
		g.permit("C", may)
		for family := range 2 {
			for _, proto := range protos {
				p := g.opening("", g.own[family], g.own[family], proto)
				d := g.device()
				d.last = nil
				o := g.mac.Emit(bytesOf(p, netlab.SYN, false))
				if family == 1 && o.Fate == simmac.Delivered {
					continue // the kernel routes it by the loopback interface
				}
				if o.Fate != simmac.Sent || o.Link != d.name {
					t.Fatalf("%v to itself: %v by %q (%s)", p.Src, o.Fate, o.Link, o.Why)
				}
				if g.wg.Load().read(g.own) {
					t.Errorf("%v to itself went to WireGuard", p.Src)
				}
				if d.last == nil || d.last.Fate != simmac.Delivered {
					t.Errorf("%v to itself isn't turned back: %+v", p.Src, d.last)
				}
			}
		}
	}
}

// TestNetworkThatWent removes an interface: the flows to its network end, and no others.
func TestNetworkThatWent(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	g.toggle("bridge100", 0, "192.168.64.1/24")
	routed := netip.MustParsePrefix("10.50.0.0/16") // private, so class lan even without the route
	route := func() {
		n, err := darwin.Observe(g.mac)
		g.must(err)
		g.must(g.mac.Kernel.AddRoute(darwin.Route{Dst: routed, Index: n.Interface(vpn).Index, Flags: darwin.RouteUp | darwin.RouteStatic}))
	}
	route()
	g.permit("C", everything)
	g.settled()
	guest, behind := netip.MustParseAddr("192.168.64.9"), netip.MustParseAddr("10.50.0.9")
	var gone, staying []flow
	for _, w := range []way{guarded, alone} {
		for _, proto := range protos {
			gone = append(gone, g.run(w, "C", guest, proto, 0), g.run(w, "C", behind, proto, 0))
			staying = append(staying, g.run(w, "C", server[0], proto, 0), g.run(w, "C", printer[0], proto, 0), g.run(w, "C", g.own[0], proto, 0))
		}
	}
	g.toggle("bridge100", 1, "")
	g.must(g.mac.Kernel.DeleteRoute(routed))
	g.settled()
	for _, f := range staying {
		if got := g.ends(f, 2); got != 4 {
			t.Errorf("%d of 4 packets of %s arrived", got, f.name)
		}
	}
	route()
	g.toggle("bridge100", 0, "192.168.64.1/24") // it may be another network with the same interface name
	g.settled()
	for _, f := range gone {
		if g.answer(f.w, f.first, netlab.ACK|netlab.PSH).at == "peer" {
			t.Errorf("%s goes on when the network is back", f.name)
		}
	}
}
