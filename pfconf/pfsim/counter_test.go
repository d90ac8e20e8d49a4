package pfsim

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/pfconf"
)

// countedHost returns a host whose rules have skip steps, with an anchor and nat.
func countedHost(t *testing.T) *PF {
	t.Helper()
	m := machineHost(t, `nat on en0 inet from 100.64.0.0/10 to any -> (en0)
block in on utun7 label "a"
pass in on en1 label "b"
pass in on en1 proto tcp label "c"
anchor "mesh"
pass out on en0 keep state label "d"
`)
	mustLoad(t, m, "mesh", "pass in quick on utun7 inet proto udp from any to any port 443 keep state label \"e\"\nblock in on utun7 label \"f\"\n")
	return m
}

func wantCounters(t *testing.T, m *PF, anchor string, want map[string]RuleCounters) {
	t.Helper()
	rules, err := m.CountedRules(anchor)
	if err != nil {
		t.Fatal(err)
	}
	nat, err := m.CountedNat(anchor)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range append(nat, rules...) {
		name := "anchor"
		if i := strings.Index(r.Text, `label "`); i >= 0 {
			name = r.Text[i+7 : i+8]
		} else if strings.HasPrefix(r.Text, "nat ") {
			name = "nat"
		}
		if got := r.RuleCounters; got != want[name] {
			t.Errorf("%s: got %+v, want %+v", r.Text, got, want[name])
		}
	}
}

// TestCounters checks counters against the kernel's: evaluations of each rule that is
// compared with a packet, with skip steps, and packets and bytes of the rule that decides,
// its states, its anchor and its translation.
func TestCounters(t *testing.T) {
	m := countedHost(t)
	p := Packet{
		Src: netip.MustParseAddr("100.64.0.5"), Dst: netip.MustParseAddr("198.51.100.1"), Proto: pfconf.ProtoUDP,
		SrcPort: 1000, DstPort: 443, Len: 100,
	}
	for range 3 {
		if j := m.Forward(p, "utun7", "en0"); j.Verdict != VerdictPass {
			t.Fatalf("%+v", j)
		}
	}
	p.DstPort = 80
	m.Forward(p, "utun7", "en0") // blocked in the anchor
	// In on utun7: rules a, b (which skips c) and the anchor, there e and for the
	// blocked one f too, and d after it. Out on en0: a skips none, b skips c.
	wantCounters(t, m, "", map[string]RuleCounters{
		"nat": {Evaluations: 1, Packets: 3, Bytes: 3 * 128, States: 1},
		"a":   {Evaluations: 3}, "b": {Evaluations: 3},
		"anchor": {Evaluations: 3, Packets: 4, Bytes: 4 * 128, States: 1},
		"d":      {Evaluations: 2, Packets: 3, Bytes: 3 * 128, States: 1},
	})
	wantCounters(t, m, "mesh", map[string]RuleCounters{
		"e": {Evaluations: 3, Packets: 3, Bytes: 3 * 128, States: 1},
		"f": {Evaluations: 1, Packets: 1, Bytes: 128},
	})
	got := m.Counters()
	// The second and third packet belonged to states at both hooks.
	if got["match"] != 3 || got["inserts"] != 2 || got["removals"] != 0 || got["searches"] < 7 {
		t.Errorf("totals %v", got)
	}
	m.FlushStates()
	if got := m.Counters(); got["removals"] != 2 {
		t.Errorf("totals %v", got)
	}
	// A load resets the counters.
	mustLoad(t, m, "mesh", "pass in quick on utun7 label \"e\"\n")
	wantCounters(t, m, "mesh", map[string]RuleCounters{})
}

// TestFirstRuleCountsWhatComes checks that the first filter rule of an anchor is evaluated
// for each packet without a state that reaches the anchor. So if nothing calls the anchor
// any more, its counter stays the same while packets pass.
func TestFirstRuleCountsWhatComes(t *testing.T) {
	m := countedHost(t)
	first := func() uint64 {
		rules, err := m.CountedRules("mesh")
		if err != nil {
			t.Fatal(err)
		}
		return rules[0].Evaluations
	}
	p := Packet{Src: netip.MustParseAddr("203.0.113.5"), Dst: netip.MustParseAddr("192.0.2.10"), Proto: pfconf.ProtoTCP, SrcPort: 1, DstPort: 2, Flags: pfconf.FlagACK}
	for i := range uint64(10) {
		m.Receive(p, "en0")
		if got := first(); got != i+1 || m.Counters()["match"] != i+1 {
			t.Fatalf("%d evaluations, %d matches after %d packets", got, m.Counters()["match"], i+1)
		}
	}
	mustLoad(t, m, "", "pass all flags any keep state\n")
	before := m.Counters()["match"]
	m.Receive(p, "en0")
	if first() != 10 || m.Counters()["match"] != before+1 {
		t.Errorf("%d evaluations, %d matches, without a call", first(), m.Counters()["match"])
	}
}

// TestCountersOfDrops checks the counters of each reason for a drop.
func TestCountersOfDrops(t *testing.T) {
	m := machineHost(t, `set limit src-nodes 0
scrub in on en0 no-df
pass in on en0 proto udp to port 1 keep state (max 1)
pass in on en0 proto udp to port 2 keep state (source-track rule, max-src-states 1)
`)
	p := Packet{Src: netip.MustParseAddr("203.0.113.5"), Dst: netip.MustParseAddr("192.0.2.10"), Proto: pfconf.ProtoUDP, SrcPort: 1, DstPort: 1}
	for _, port := range []uint16{1, 2} {
		for p.SrcPort = range uint16(4) {
			p.SrcPort++
			p.DstPort = port
			m.Receive(p, "en0")
		}
	}
	q := p
	q.SrcPort, q.Options = 99, true
	m.Receive(q, "en0")
	q = Packet{Src: p.Src, Dst: p.Dst, Proto: pfconf.ProtoTCP, SrcPort: 5, DstPort: 6, Flags: pfconf.FlagSYN | pfconf.FlagRST}
	m.Receive(q, "en0")
	q = Packet{Src: p.Src, Dst: p.Dst, Proto: pfconf.ProtoUDP, Fragment: true, FragmentLen: 9, MoreFragments: true}
	m.Receive(q, "en0")
	got := m.Counters()
	for name, want := range map[string]uint64{"state-limit": 3, "src-limit": 4, "normalize": 1, "fragment": 1, "inserts": 2} {
		if got[name] != want {
			t.Errorf("%s is %d, want %d", name, got[name], want)
		}
	}
}

// TestCountersAreReadBack prints rules as pfctl -v does and parses them.
func TestCountersAreReadBack(t *testing.T) {
	m := countedHost(t)
	p := Packet{Src: netip.MustParseAddr("100.64.0.5"), Dst: netip.MustParseAddr("198.51.100.1"), Proto: pfconf.ProtoUDP, SrcPort: 1000, DstPort: 443, Len: 100}
	m.Forward(p, "utun7", "en0")
	rules, err := m.CountedRules("")
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	var want []string
	for _, r := range rules {
		text.WriteString(r.Text + "\n" + r.RuleCounters.String() + "\n  [ Inserted: uid 0 pid 77 ]\n")
		want = append(want, r.Text)
	}
	s := pfconf.ParseShown(text.String())
	if len(s.Rules) != len(rules) || len(s.Unknown) != 0 {
		t.Fatalf("read %+v", s)
	}
	for i, r := range s.Rules {
		if got := (RuleCounters{r.Evaluations, r.Packets, r.Bytes, r.States}); got != rules[i].RuleCounters {
			t.Errorf("rule %d: read %+v, want %+v", i, got, rules[i].RuleCounters)
		}
	}
	if err := pfconf.EqualShown(want, text.String()); err != nil {
		t.Error(err)
	}
	const line = "  [ Evaluations: 20        Packets: 0         Bytes: 0           States: 0     ]"
	if got := (RuleCounters{Evaluations: 20}).String(); got != line {
		t.Errorf("got %q", got)
	}
	if _, err := m.CountedRules("nowhere"); err == nil {
		t.Error("a missing anchor has rules")
	}
}

// TestSkipsChangeNothing checks that skip steps don't change which rule decides: it sends
// the same packets through two machines with the same rules, one without skip steps.
func TestSkipsChangeNothing(t *testing.T) {
	for i, r := range fuzzRulesets {
		for seed := range uint64(20) {
			var out [2][]string
			for j := range out {
				m := machineHost(t, r.main)
				mustLoad(t, m, "a", r.anchor)
				if j == 1 {
					stepByStep(m.main)
				}
				in := &byteReader{fuzzBytes(seed<<8|uint64(i), 3000)}
				var last Packet
				for len(in.b) > 0 {
					last = in.packet(last)
					got := m.Forward(last, "utun7", "en0")
					out[j] = append(out[j], got.Verdict.String()+ruleName(&got.In)+ruleName(&got.Out)+got.Packet().String())
				}
			}
			if strings.Join(out[0], "\n") != strings.Join(out[1], "\n") {
				t.Fatalf("ruleset %d, seed %d: skipping changes the verdicts", i, seed)
			}
		}
	}
}

// stepByStep removes the skip steps of all rules.
func stepByStep(a *anchorNode) {
	for _, l := range a.lists {
		for _, r := range l {
			for f := range r.skips {
				r.skips[f] = 1
			}
		}
	}
	for _, c := range a.children {
		stepByStep(c)
	}
}
