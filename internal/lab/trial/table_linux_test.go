package trial

// The truth table: each set of permissions to each kind of destination.

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// judge compares the fate of real packets with the policy's verdicts.
type judge struct {
	m       *Mesh
	results []netlab.Result // of all probes, to check for late arrivals
	passes  []bool          // the policy's verdict on each
}

// question is a probe, and the interface that it enters B by.
type question struct {
	netlab.Probe
	in  string
	src netip.Addr // as seen by B
}

// ask sends the probes and reports those whose fate differs from the policy.
func (j *judge) ask(t *testing.T, rules *policy.Ruleset, questions []question) {
	t.Helper()
	probes := make([]netlab.Probe, len(questions))
	verdicts := make([]policy.Verdict, len(questions))
	for i, q := range questions {
		verdicts[i] = Opening(q.in, q.src, q.To, q.Proto).Judge(rules)
		q.Wait = netlab.RefuseWait
		if verdicts[i].Pass {
			q.Wait = netlab.PassWait
		}
		probes[i] = q.Probe
	}
	for i, r := range j.m.Lab.Probe(t.Context(), probes...) {
		v := verdicts[i]
		if r.OK != v.Pass {
			t.Errorf("%s, but the policy says pass=%t: %s", r, v.Pass, v.Rule)
		}
		if r.OK && r.Proto != netlab.ICMP {
			if want := j.source(questions[i], v); r.Source.Addr() != want {
				t.Errorf("%s came from %s, want %s", r, r.Source.Addr(), want)
			}
		}
		j.results, j.passes = append(j.results, r), append(j.passes, v.Pass)
	}
}

// source returns the address that a server should see: the opener's own, or that of B's
// outgoing interface.
func (j *judge) source(q question, v policy.Verdict) netip.Addr {
	at := netlab.Addresses()
	by := at.BUplink
	switch {
	case v.Exit == policy.ExitHost || v.Exit == policy.ExitMesh:
		return q.src
	case slices.Contains(at.L.List(), q.To):
		by = at.BLAN
	case slices.Contains(at.P.List(), q.To):
		by = at.BPublic
	case slices.Contains(at.VPNPeer.List(), q.To) || slices.Contains(at.Behind.List(), q.To):
		by = at.BVPN
	}
	if q.To.Is4() {
		return by.V4
	}
	return by.V6
}

// before returns the hosts that a packet crosses unencrypted on its way to B.
var before = map[string][]string{"I": {"R", "W"}}

// finish checks again for refused probes that a host other than B or a server received
// since, and logs how many probes were judged.
func (j *judge) finish(t *testing.T) {
	t.Helper()
	j.m.Lab.Recheck(j.results)
	passed := 0
	for i, r := range j.results {
		if j.passes[i] {
			passed++
			continue
		}
		others := slices.DeleteFunc(slices.Clone(r.SeenBy), func(name string) bool {
			return name == "B" || slices.Contains(before[r.From.Name], name)
		})
		if len(others) > 0 || r.Served {
			t.Errorf("%s: refused by the policy, but received by %v, served=%t", r, r.SeenBy, r.Served)
		}
	}
	t.Logf("judged %d probes: %d to pass, %d to be refused", len(j.results), passed, len(j.results)-passed)
}

// destinations returns the destinations that a peer tries, by name.
func destinations(m *Mesh, own netlab.Pair) map[string]netlab.Pair {
	at := netlab.Addresses()
	return map[string]netlab.Pair{
		"B's mesh address": own, "B's LAN address": at.BLAN, "B's uplink address": at.BUplink,
		"B's public address": at.BPublic, "B's VPN address": at.BVPN,
		"L": at.L, "I": at.I, "P": at.P, "W": at.W, "the VPN's other end": at.VPNPeer, "behind the VPN": at.Behind,
		"A": m.Peers["A"].Addresses, "D": m.Peers["D"].Addresses, "metadata": at.Metadata,
		"unassigned": {V4: netip.MustParseAddr("100.64.1.1"), V6: netip.MustParseAddr("fd6d:6573:6800::1:1")},
	}
}

// TestTruthTable tries every set of C's permissions with every kind of destination, by
// every protocol, in both families. A has every permission meanwhile, which must not
// matter.
func TestTruthTable(t *testing.T) {
	m := newMesh(t)
	var sets []mesh.Permissions
	for may := mesh.Permissions(0); may <= everything; may++ {
		sets = append(sets, may)
	}
	truthTable(t, m, sets)
}

func truthTable(t *testing.T, m *Mesh, sets []mesh.Permissions) {
	t.Helper()
	permit(t, m, "A", everything)
	j := &judge{m: m}
	own := status(t, m).Address()
	for _, may := range sets {
		permit(t, m, "C", may)
		rules := ruleset(t, m, map[string]mesh.Permissions{"A": everything, "C": may, "D": mesh.Incoming})
		var questions []question
		for _, to := range destinations(m, own) {
			for i, addr := range to.List() {
				for _, proto := range protos {
					questions = append(questions, question{
						Probe: netlab.Probe{From: m.C, To: addr, Proto: proto},
						in:    rules.Host().Interface, src: m.Peers["C"].Addresses.List()[i]})
				}
			}
		}
		j.ask(t, rules, questions)
	}
	j.finish(t)
}

// TestWaysBack has every host try to open a flow to the peers and to B's mesh address,
// from every side of B, while the peers have every permission. Only B may.
func TestWaysBack(t *testing.T) {
	m := newMesh(t)
	may := map[string]mesh.Permissions{}
	for name := range m.Peers {
		permit(t, m, name, everything)
		may[name] = everything
	}
	own := status(t, m).Address()
	rules := ruleset(t, m, may)
	at := netlab.Addresses()
	j := &judge{m: m}
	var questions []question
	for _, from := range []struct {
		host *netlab.Host
		addr netlab.Pair
		in   string
	}{
		{m.L, at.L, netlab.LAN}, {m.I, at.I, netlab.Uplink}, {m.W, at.W, netlab.Uplink},
		{m.P, at.P, netlab.Public}, {m.V, at.VPNPeer, netlab.VPN}, {m.B, own, ""},
		{m.A, m.Peers["A"].Addresses, rules.Host().Interface},
		{m.C, m.Peers["C"].Addresses, rules.Host().Interface},
	} {
		for name, to := range map[string]netlab.Pair{
			"A": m.Peers["A"].Addresses, "C": m.Peers["C"].Addresses, "D": m.Peers["D"].Addresses,
			"B": own, "unassigned": {V4: netip.MustParseAddr("100.64.1.1"), V6: netip.MustParseAddr("fd6d:6573:6800::1:1")},
		} {
			if name == from.host.Name {
				continue
			}
			for i, addr := range to.List() {
				for _, proto := range protos {
					questions = append(questions, question{in: from.in, src: from.addr.List()[i],
						Probe: netlab.Probe{From: from.host, To: addr, Proto: proto}})
				}
			}
		}
	}
	j.ask(t, rules, questions)
	j.finish(t)
}
