package mactrial

// Situations in which packets could leak: no helper runs, no tunnel exists, or pf doesn't
// translate.

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// segments has the Mac send segments of a connection that a peer opened to it, and counts
// those that reach the peer.
func (g *rig) segments(w way, f flow, n int) (arrived int) {
	for range n {
		if g.answer(w, f.first, netlab.ACK|netlab.PSH).at == "peer" {
			arrived++
		}
	}
	return arrived
}

// TestCutStaysDeadOverACrash revokes a peer's incoming permission, kills the helper, and
// starts another: segments that the Mac sends on the cut connections don't reach the
// peer, neither past the guard nor past pf, whether or not the filter is needed for
// another permission. The same holds after an orderly restart.
func TestCutStaysDeadOverACrash(t *testing.T) {
	for name, kept := range map[string]mesh.Permissions{"with routing": mesh.Routing, "without": 0} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.start()
			g.add("C", "external")
			g.add("D", "own")
			g.permit("C", mesh.Incoming|mesh.Routing)
			g.permit("D", mesh.Incoming)
			var cut, kepts []flow
			for family := range 2 {
				for _, proto := range []netlab.Proto{netlab.TCP, netlab.ICMP} {
					w := alone
					if kept == 0 { // without a filter only the guard knows the flow
						w = guarded
					}
					cut = append(cut, g.run(w, "C", g.own[family], proto, family))
				}
				kepts = append(kepts, g.run(guarded, "D", g.own[family], netlab.TCP, family))
			}
			g.permit("C", kept)
			for round := range 3 {
				if round == 1 {
					g.proc.Kill()
				}
				if round > 0 {
					g.stop()
					g.start()
				}
				for _, f := range cut {
					for _, w := range []way{alone, guarded} {
						if w == alone && kept == 0 && round == 0 {
							continue
						}
						if got := g.segments(w, f, 5); got > 0 {
							t.Errorf("round %d: %d of 5 segments of the Mac reached C by %s, %v", round, got, f.name, w)
						}
					}
					if got := g.send(guarded, f.opened, netlab.ACK|netlab.PSH, false); got.at != "" {
						t.Errorf("round %d: C's packet of %s got to %q", round, f.name, got.at)
					}
				}
				for _, f := range kepts {
					if got := g.segments(guarded, f, 5); got != 5 {
						t.Errorf("round %d: %d of 5 segments of %s arrived", round, got, f.name)
					}
				}
			}
		})
	}
}

// TestCutByNoHelper has incoming end without a helper that cuts: a deny is killed at each
// of its steps, and in one more case the permission expires while no helper runs. If the
// next helper doesn't permit it, the Mac's segments on the connection reach the peer past
// neither guard nor pf.
func TestCutByNoHelper(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	denied := 0
	dead := func(when string, flows []flow) {
		t.Helper()
		for _, f := range flows {
			for _, w := range []way{alone, guarded} {
				if got := g.segments(w, f, 5); got > 0 {
					t.Errorf("%s: %d of 5 segments of %s arrived, %v", when, got, f.name, w)
				}
			}
		}
	}
	for step := 1; ; step++ {
		g.permit("C", mesh.Incoming|mesh.Routing)
		flows := []flow{g.run(guarded, "C", g.own[0], netlab.TCP, 0), g.run(guarded, "C", g.own[1], netlab.TCP, 1)}
		g.killIn(step)
		_ = g.try("C", mesh.Routing)
		killed := g.proc.Killed()
		if killed {
			g.stop()
			g.start()
		}
		if !g.d.Status().Peers[0].Permissions.Of(mesh.Incoming).Allowed {
			denied++
			dead(fmt.Sprintf("killed in call %d of Step of a deny", step), flows)
		}
		if !killed {
			g.killIn(0)
			break
		}
		if step > 50 {
			t.Fatal("the permission doesn't end")
		}
	}
	if denied < 3 {
		t.Errorf("only %d denies", denied)
	}
	hour := "1h"
	_, err := g.d.ChangePeer(t.Context(), "C", api.PeerChange{Permissions: map[string]api.PermissionChange{
		mesh.Incoming.String(): {Allowed: true, For: &hour}}})
	g.must(err)
	flows := []flow{g.run(guarded, "C", g.own[0], netlab.TCP, 0), g.run(guarded, "C", g.own[1], netlab.TCP, 1)}
	g.proc.Kill()
	g.stop()
	g.mac.Sleep(2 * time.Hour)
	g.start()
	dead("ended while there was no helper", flows)
	t.Logf("%d denies", denied)
}

// TestMeshAddressClosedWithoutFilter has hosts on other networks send to the Mac's mesh
// addresses while no peer routes and no anchor is loaded: the kernel drops the packets.
// If the kernel is configured to accept them, the anchor drops them.
func TestMeshAddressClosedWithoutFilter(t *testing.T) {
	g := newRig(t)
	found := g.mac.Dump()
	g.start()
	g.add("A", "own")
	g.permit("A", mesh.Incoming)
	closed := func(when string) {
		t.Helper()
		for family := range 2 {
			for in, src := range map[string][]netip.Addr{uplink: server, lan: printer, vpn: behind} {
				for _, proto := range protos {
					if a := g.open(guarded, g.opening(in, src[family], g.own[family], proto)); a.at != "" {
						t.Errorf("%s: %v to %v by %s got to %q", when, src[family], g.own[family], in, a.at)
					}
				}
			}
			if a := g.open(guarded, g.opening(g.device().name, g.peers["A"][family], g.own[family], netlab.TCP)); a.at != "host" {
				t.Errorf("%s: A got to %q (%s)", when, a.at, a.o.Why)
			}
		}
	}
	loaded := func() bool { return strings.Contains(g.mac.Dump(), "["+anchor+"]") }
	if loaded() {
		t.Error("the anchor is loaded without need")
	}
	closed("as macOS ships")
	for _, name := range []string{"net.inet.ip.check_interface", "net.inet6.ip6.check_interface"} {
		g.mac.Kernel.SetVariable(name, "0")
		g.wait("the anchor is in force", func() bool { return loaded() && g.d.Status().State == api.Enforcing })
		rounds := g.rounds.Load()
		g.wait("it is enforced", func() bool { return g.rounds.Load() > rounds+2 })
		closed(name + " 0")
		g.mac.Kernel.SetVariable(name, "1")
		g.wait("the anchor is gone", func() bool { return !loaded() })
		closed(name + " 1 again")
	}
	g.stop()
	g.asFound(found)
}

// TestNothingLeavesWhileTheTunnelIsMadeAgain removes the tunnel and keeps both this
// helper and the next from creating another: at no moment does a packet from the Mac to a
// peer leave by another interface. Once a tunnel can be created, everything works as
// before.
func TestNothingLeavesWhileTheTunnelIsMadeAgain(t *testing.T) {
	g := newRig(t)
	found := g.mac.Dump()
	g.start()
	g.add("A", "own")
	g.add("C", "external")
	g.permit("A", everything)
	g.permit("C", mesh.Routing)
	sent := 0
	probe := func(when string) {
		t.Helper()
		for _, name := range []string{"A", "C"} {
			for family := range 2 {
				for _, src := range [][]netip.Addr{g.own, both("203.0.113.1", "2001:db8:1::1")} {
					p := g.opening("", src[family], g.peers[name][family], netlab.UDP)
					sent++
					o := g.mac.Emit(bytesOf(p, 0, false))
					switch {
					case o.Fate == simmac.Sent && !strings.HasPrefix(o.Link, "utun"):
						t.Errorf("%s: the packet to %s left by %s", when, name, o.Link)
					case o.Fate == simmac.Sent && o.Link == g.device().name:
						g.wg.Load().read(g.own)
					}
				}
				p := g.opening(lan, printer[family], g.peers[name][family], netlab.UDP)
				sent++
				if o := g.mac.Inject(lan, bytesOf(p, 0, false)); o.Fate != simmac.Dropped {
					t.Errorf("%s: the LAN's packet to %s got to %q", when, name, o.Link)
				}
			}
		}
	}
	closed := func() bool {
		return g.mac.Kernel.Variable("net.inet.ip.forwarding") == "0" && g.mac.Kernel.Variable("net.inet6.ip6.forwarding") == "0"
	}
	g.noTunnel.Store(true)
	g.watchSteps(func() { probe("while the tunnel is gone") })
	g.wg.Load().Close()
	g.wait("the helper can't make another", func() bool {
		g.probing.Lock()
		probe("the tunnel is gone")
		g.probing.Unlock()
		return len(g.d.Status().Problems) > 0 && g.tunnelsRefused.Load() > 2
	})
	if !closed() {
		t.Error("forwarding is on without a tunnel")
	}
	// Another program gets the former tunnel's name.
	name := g.device().name
	if _, err := g.mac.Kernel.CreateTunnel(name, 1400); err != nil {
		t.Fatal(err)
	}
	g.must(g.mac.Kernel.AddAddress(name, netip.MustParsePrefix("10.77.0.1/32")))
	for family := range 2 {
		for _, dst := range []netip.Addr{g.own[family], both("203.0.113.1", "2001:db8:1::1")[family], printer[family], server[family]} {
			p := g.opening(name, g.peers["A"][family], dst, netlab.UDP)
			if o := g.mac.Inject(name, bytesOf(p, 0, false)); o.Fate != simmac.Dropped {
				t.Errorf("the packet from A's address by another program's %s to %v: %v", name, dst, o.Fate)
			}
		}
	}
	g.mac.Kernel.RemoveInterface(name)

	// The helper is killed, and the next one can't start.
	g.proc.Kill()
	g.stop()
	probe("the helper is dead")
	g.watchSteps(nil)
	g.must(g.begin())
	g.watchSteps(func() { probe("another helper starts, and can't make the tunnel") })
	if err := g.d.Run(t.Context()); err == nil {
		t.Error("a helper without a tunnel runs")
	}
	g.must(g.d.Close())
	g.d = nil
	g.watchSteps(nil)
	probe("the next helper didn't start")
	g.noTunnel.Store(false)
	g.start()
	probe("it did")
	j := &judge{g: g}
	j.few(g.rules(g.may, policy.Families{}))
	g.stop()
	g.asFound(found)
	t.Logf("%d packets to peers while there was no tunnel", sent)
}

// errNoTunnel is the error of a tunnel that can't be created.
var errNoTunnel = errors.Join(errors.New("create utun"), syscall.EBUSY)

// TestUntranslatedStatesEnd has another program replace the main ruleset with one that
// keeps states, until a peer's packets have left with the peer's own address, and restore
// it before the helper inspects. The states made in between would pass all further
// packets untranslated: they end, and the flow goes on translated. Other flows lose
// nothing.
func TestUntranslatedStatesEnd(t *testing.T) {
	for name, whole := range map[string]bool{"the main ruleset replaced": false, "and pf switched off and on": true} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.start()
			g.add("C", "external")
			g.add("D", "own")
			g.permit("C", mesh.Routing)
			g.permit("D", mesh.Routing|mesh.Incoming)
			var others []flow
			for family := range 2 {
				others = append(others, g.run(guarded, "D", server[family], netlab.TCP, family), g.run(guarded, "D", g.own[family], netlab.TCP, family))
			}
			var opened []host.Packet
			g.mac.Hang("/sbin/pfctl", true) // the helper must not see it at once
			g.must(g.mac.LoadMain("pass out all keep state\npass in all keep state\n"))
			for family := range 2 {
				p := g.udp(g.device().name, g.peers["C"][family], server[family], 5000, 443)
				a := g.open(alone, p)
				if a.at != uplink || a.o.Packet.Src != p.Src {
					t.Fatalf("the packet left by %q from %v: nothing to repair", a.at, a.o.Packet.Src)
				}
				opened = append(opened, p)
				// Also a packet from the LAN to the Mac's mesh address.
				in := g.udp(lan, printer[family], g.own[family], 5000, 443)
				if a := g.open(alone, in); a.at != "host" {
					t.Fatalf("the LAN's packet got to %q: nothing to repair", a.at)
				}
				opened = append(opened, in)
			}
			g.must(g.mac.LoadMain(simmac.StockMain))
			if whole {
				g.mac.PF.Disable()
			}
			g.mac.Hang("/sbin/pfctl", false)
			g.must(g.mac.Kernel.AddAddress(lan, netip.MustParsePrefix("192.168.77.99/24"))) // an event
			// wrong names the packet that still goes where it must not. The states of one
			// kind and family end after those of another.
			wrong := func() string {
				for _, p := range opened {
					a := g.open(alone, p)
					switch {
					case p.In == lan && a.at != "":
						return fmt.Sprintf("the LAN's packet to the mesh address got to %q", a.at)
					case p.In != lan && (a.at != uplink || a.o.Packet.Src == p.Src):
						return fmt.Sprintf("C's packet left by %q from %v (%s)", a.at, a.o.Packet.Src, a.o.Why)
					}
				}
				return ""
			}
			g.wait("the helper has put it right", func() bool {
				return g.d.Status().State == api.Enforcing && wrong() == ""
			})
			for _, f := range others {
				if got := g.ends(f, 2); got != 4 {
					t.Errorf("%d of 4 packets of %s arrived", got, f.name)
				}
			}
		})
	}
}
