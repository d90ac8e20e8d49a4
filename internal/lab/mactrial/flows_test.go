package mactrial

// Running flows, and which of them a change of permissions must end.

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// A flow is one that was opened and answered, and whose ends keep sending.
type flow struct {
	name   string
	w      way
	opened host.Packet
	first  arrival
}

// run opens a flow and has both ends send: every packet must arrive.
func (g *rig) run(w way, peer string, dst netip.Addr, proto netlab.Proto, family int) flow {
	g.t.Helper()
	p := g.opening(g.device().name, g.peers[peer][family], dst, proto)
	f := flow{fmt.Sprintf("%s's %v to %v, %v", peer, proto, dst, w), w, p, g.open(w, p)}
	back := g.answer(w, f.first, netlab.SYN|netlab.ACK)
	if f.first.at == "" || back.at != "peer" {
		g.t.Fatalf("%s doesn't run: got to %q (%s), the answer to %q (%s)", f.name, f.first.at, f.first.o.Why, back.at, back.o.Why)
	}
	if got := g.ends(f, 2); got != 4 {
		g.t.Fatalf("%s: %d of 4 packets arrived", f.name, got)
	}
	return f
}

// ends has each end send n packets on its own, and counts the arrivals.
func (g *rig) ends(f flow, n int) (arrived int) {
	for range n {
		// A packet that isn't translated back stops at the Mac.
		if g.answer(f.w, f.first, netlab.ACK|netlab.PSH).at == "peer" {
			arrived++
		}
		if g.send(f.w, f.opened, netlab.ACK|netlab.PSH, false).at != "" {
			arrived++
		}
	}
	return arrived
}

// deadEnds is ends for a flow that was cut. pf alone can't tell the host's UDP answer to
// a peer from a flow that the host opens, and would pass it, so on such a flow only the
// peer sends.
func (g *rig) deadEnds(f flow, n int) (arrived int) {
	if f.w == alone && f.opened.Proto == policy.ProtoUDP && f.first.at == "host" {
		for range n {
			if g.send(f.w, f.opened, 0, false).at != "" {
				arrived++
			}
		}
		return arrived
	}
	return g.ends(f, n)
}

// TestDenyCutsRunningFlows revokes C's permissions one at a time while flows of C and of
// D run, of the same kinds. Once the command has returned, no packet of a cut flow
// arrives from either end, and D's flows lose nothing.
func TestDenyCutsRunningFlows(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("C", "external")
	g.add("D", "own")
	g.permit("D", everything)
	cut, kept, sent := 0, 0, 0
	for _, lost := range mesh.AllPermissions {
		for _, how := range []string{"deny", "remove"} {
			g.permit("C", everything)
			var ending, staying []flow
			for _, w := range []way{guarded, alone} {
				for family := range 2 {
					for _, proto := range protos {
						dst := map[mesh.Permissions]netip.Addr{
							mesh.Incoming: g.own[family], mesh.Routing: server[family], mesh.LAN: printer[family]}[lost.Set]
						ending = append(ending, g.run(w, "C", dst, proto, family))
						staying = append(staying, g.run(w, "D", dst, proto, family))
						if lost.Set != mesh.Incoming {
							staying = append(staying, g.run(w, "C", g.own[family], proto, family))
						}
						if lost.Set != mesh.Routing {
							staying = append(staying, g.run(w, "C", server[family], proto, family))
						}
					}
				}
			}
			if how == "deny" {
				g.permit("C", everything&^lost.Set)
			} else {
				staying = withoutPeer(staying, g.peers["C"])
				_, err := g.d.RemovePeer(t.Context(), "C")
				g.must(err)
			}
			for _, f := range ending {
				cut++
				sent += 20
				if got := g.deadEnds(f, 10); got != 0 {
					t.Errorf("%v, %s: %d packets of %s arrived", lost, how, got, f.name)
				}
			}
			for _, f := range staying {
				kept++
				if f.opened.Src == g.peers["C"][0] || f.opened.Src == g.peers["C"][1] {
					// A flow that C keeps may need a packet of C's first, to be known
					// again.
					g.ends(f, 1)
				}
				if got := g.ends(f, 2); got != 4 {
					t.Errorf("%v, %s: %d of 4 packets of %s arrived", lost, how, got, f.name)
				}
			}
			if how == "remove" {
				g.add("C", "external")
			}
		}
	}
	t.Logf("%d running flows cut, %d packets sent on them afterwards, of which none may arrive; %d flows must go on", cut, sent, kept)
}

// withoutPeer returns the flows of all other peers.
func withoutPeer(flows []flow, addresses []netip.Addr) (out []flow) {
	for _, f := range flows {
		if f.opened.Src != addresses[0] && f.opened.Src != addresses[1] {
			out = append(out, f)
		}
	}
	return out
}
