package mactrial

// The truth table: each set of permissions against the policy.

import (
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// both returns an address of each family.
func both(v4, v6 string) []netip.Addr {
	return []netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

var (
	server  = both("198.51.100.9", "2600:9000::9")
	printer = both("192.168.77.7", "2001:db8:5::7")
	behind  = both("198.18.5.5", "2001:db8:9900::5")
)

// destinations returns the destinations that a peer tries, by name.
func (g *rig) destinations() map[string][]netip.Addr {
	return map[string][]netip.Addr{
		"the host's mesh address": g.own, "its uplink address": both("203.0.113.1", "2001:db8:1::1"),
		"its LAN address": both("192.168.77.1", "2001:db8:5::1"), "its VPN address": both("10.99.0.1", "2001:db8:99ff::1"),
		"a server": server, "the LAN": printer, "the uplink's neighbour": both("203.0.113.77", "2001:db8:1::77"),
		"behind the VPN": behind, "a private network": both("10.3.3.3", "fd77::3"),
		"A": g.peers["A"], "D": g.peers["D"], "nobody": both("100.64.1.1", "fd6d:6573:6800::1:1"),
		"the carrier's network": both("100.127.0.9", "fe80::9"), "metadata": both("169.254.169.254", "fd00:ec2::254"),
	}
}

// A judge counts the packets that were compared with the policy.
type judge struct {
	g                             *rig
	verdicts, passed, differences int
}

// ask sends the first packet of a flow both ways, and all possible answers to it.
func (j *judge) ask(r *policy.Ruleset, p host.Packet) {
	j.g.t.Helper()
	for _, w := range []way{guarded, alone} {
		p.SrcPort++
		if p.Proto == policy.ProtoICMP || p.Proto == policy.ProtoICMPv6 {
			p.DstPort = p.SrcPort
		}
		v := p.Judge(r)
		a := j.g.open(w, p)
		j.count(w, v.Pass, j.g.differs(p, v, r, a))
		if a.at != "" && v.Pass && v.Exit != policy.ExitAny {
			j.reply(w, r, p, a)
		}
	}
	j.g.port++
}

func (j *judge) count(w way, pass bool, difference string) {
	j.g.t.Helper()
	j.verdicts++
	if pass {
		j.passed++
	}
	if difference != "" {
		j.differences++
		j.g.t.Errorf("%v: %s", w, difference)
	}
}

// reply has the right end answer, after an answer from a host that the flow never
// reached.
func (j *judge) reply(w way, r *policy.Ruleset, opened host.Packet, a arrival) {
	j.g.t.Helper()
	p := j.g.answerTo(a)
	if p.In != "" && p.In != j.g.device().name && p.Proto != policy.ProtoICMP && p.Proto != policy.ProtoICMPv6 {
		forged := p
		forged.SrcPort++
		got, difference := j.g.send(w, forged, netlab.SYN|netlab.ACK, true), ""
		if got.at == "peer" {
			difference = "a forged answer reached the peer"
		}
		j.count(w, false, difference)
	}
	opener := policy.ByPeer
	if opened.In == "" {
		opener = policy.ByHost
	}
	v := r.Reply(opener, opened.Packet, p.In)
	got, difference := j.g.send(w, p, netlab.SYN|netlab.ACK, true), ""
	if (got.at != "") != v.Pass || v.Exit == policy.ExitMesh && got.at != "peer" && v.Pass {
		difference = "the answer to " + j.g.differs(opened, v, r, got) + " got to " + got.at
	}
	j.count(w, v.Pass, difference)
}

// all asks about each packet: a peer's to all destinations, and all hosts' to the peers.
func (j *judge) all(r *policy.Ruleset) {
	j.g.t.Helper()
	g := j.g
	for _, proto := range protos {
		for family := range 2 {
			from := func(in string, src, dst netip.Addr) { g.t.Helper(); j.ask(r, g.opening(in, src, dst, proto)) }
			for _, dst := range g.destinations() {
				from(g.device().name, g.peers["C"][family], dst[family])
			}
			targets := [][]netip.Addr{g.peers["A"], g.peers["C"], g.own, both("100.64.1.1", "fd6d:6573:6800::1:1")}
			for _, dst := range targets {
				from(uplink, server[family], dst[family])
				from(lan, printer[family], dst[family])
				from(vpn, behind[family], dst[family])
			}
			from("", g.own[family], g.peers["C"][family])
			from("", g.own[family], both("100.64.1.1", "fd6d:6573:6800::1:1")[family])
			for _, in := range []string{uplink, lan, vpn} {
				from(in, g.peers["C"][family], server[family])
				from(in, g.peers["A"][family], g.peers["C"][family])
				from(in, g.peers["C"][family], g.own[family])
			}
			from(g.device().name, server[family], printer[family])
			from(g.device().name, g.peers["A"][family], g.peers["C"][family])
		}
	}
}

// TestTruthTable compares every set of C's permissions with the policy. A has all
// permissions, which must not matter.
func TestTruthTable(t *testing.T) {
	g := newRig(t)
	found := g.mac.Dump()
	g.start()
	g.add("A", "own")
	g.add("C", "external")
	g.add("D", "own")
	g.permit("A", everything)
	j := &judge{g: g}
	// The sets are tried in ascending and then descending order, so that each one runs
	// after different leftovers.
	for _, may := range []mesh.Permissions{0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4, 3, 2, 1, 0} {
		g.permit("C", may)
		j.all(g.rules(g.may, policy.Families{}))
	}
	g.stop()
	g.asFound(found)
	t.Logf("%d verdicts, %d to pass: %d differences", j.verdicts, j.passed, j.differences)
}

// asFound checks that the Mac was restored.
func (g *rig) asFound(found string) {
	g.t.Helper()
	if dump := g.mac.Dump(); dump != found {
		g.t.Errorf("found\n%s\nleft\n%s", found, dump)
	}
}
