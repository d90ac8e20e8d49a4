package pfsim

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/internal/vectors"
)

// TestShownRulesJudgeTheSame checks that a machine that loads what pfctl would show of
// another judges as that one does. The rules of a real host are judged in this way.
func TestShownRulesJudgeTheSame(t *testing.T) {
	scenarios, packets := 0, 0
	for _, f := range vectors.Files(t, "testdata") {
		vectors.Each(t, f, func(s *vectors.Scenario) {
			if s.Text != nil || setsOptions(s) {
				return
			}
			scenarios++
			packets += compareShown(t, s)
		})
	}
	t.Logf("%d scenarios, %d packets", scenarios, packets)
	if packets == 0 {
		t.Error("nothing was compared")
	}
}

// setsOptions reports whether a scenario's main ruleset sets options that pfctl doesn't
// show with the rules.
func setsOptions(s *vectors.Scenario) bool {
	return s.Main != nil && (strings.HasPrefix(*s.Main, "set ") || strings.Contains(*s.Main, "\nset "))
}

// compareShown sends a scenario's packets through its machine and through one that loads
// what the first shows, until an event changes that.
func compareShown(t *testing.T, s *vectors.Scenario) int {
	quiet := &judge{t: t, scenario: s.Name}
	a := &packetRun{j: quiet, m: NewPF(Options{}), sent: map[string]sentPacket{}}
	b := &packetRun{j: quiet, m: NewPF(Options{}), sent: map[string]sentPacket{}}
	for _, i := range hostInterfaces(s) {
		a.m.AddInterface(i)
		b.m.AddInterface(i)
	}
	main := stockMain
	if s.Main != nil {
		main = *s.Main
	}
	a.mustLoad("", main)
	for _, n := range s.Anchors {
		a.mustLoad(n.Name, n.Rules)
	}
	rebuild(t, s.Name, a.m, b.m, "")
	_, _ = a.m.Enable(), b.m.Enable()
	n := 0
	for _, raw := range s.Events {
		var e vectorEvent
		if err := json.Unmarshal(raw, &e); err != nil {
			t.Fatal(err)
		}
		if e.Event != "packet" || e.About != "" {
			break
		}
		p := a.fromVector(&e)
		x, y := pass(a.m, p, e.In, e.Out), pass(b.m, p, e.In, e.Out)
		if describeJudgement(&x) != describeJudgement(&y) {
			t.Errorf("%s: %s:\n %s\nas shown:\n %s", s.Name, p, describeJudgement(&x), describeJudgement(&y))
		}
		n++
	}
	return n
}

// rebuild loads into b what a shows of an anchor and of those below it.
func rebuild(t *testing.T, name string, a, b *PF, path string) {
	l, err := a.Snapshot(path)
	if err != nil {
		t.Fatal(err)
	}
	rules, nat := pfconf.ParseShown(strings.Join(l.ShowRules(), "\n")), pfconf.ParseShown(strings.Join(l.ShowNat(), "\n"))
	for _, u := range append(rules.Unknown, nat.Unknown...) {
		t.Errorf("%s: anchor %q: %v", name, path, u)
	}
	rs := rules.Ruleset(nat)
	for _, tb := range l.Tables {
		rs.Statements = append([]pfconf.Statement{tb}, rs.Statements...)
	}
	if path == "" {
		err = b.LoadMain(rs)
	} else {
		err = b.LoadAnchor(path, rs)
	}
	if err != nil {
		t.Errorf("%s: anchor %q as shown: %v", name, path, err)
	}
	for _, child := range a.Anchors(path) {
		if !strings.Contains("/"+child, "/_") {
			rebuild(t, name, a, b, child)
		}
	}
}

// describeJudgement returns a judgement as text, without the parts that differ between two
// machines.
func describeJudgement(j *Judgement) string {
	var out strings.Builder
	out.WriteString(j.Verdict.String())
	for _, h := range []*Hook{&j.In, &j.Out} {
		if h.Seen {
			out.WriteString("; " + h.State.String() + " by " + ruleName(h) + " in " + h.Anchor + ": " + h.Packet.String())
		}
	}
	return out.String()
}
