package macos

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// stock is pfctl's listing of Apple's main ruleset.
var stock = shownAnchor{
	rules: "scrub-anchor \"com.apple/*\" all fragment reassemble\nanchor \"com.apple/*\" all\n",
	nat:   "nat-anchor \"com.apple/*\" all\nrdr-anchor \"com.apple/*\" all\n",
}

// TestUnreadMatchesEverything gives the backend foreign rules that can't be parsed, of
// each kind and in each position: a rule that may pass transit counts as passing it.
func TestUnreadMatchesEverything(t *testing.T) {
	x := func(rules, nat string, tables ...shownTable) []shownAnchor {
		return []shownAnchor{stock, {path: "com.apple/100.x", rules: rules, nat: nat, tables: tables}}
	}
	bad := shownTable{name: "bad", entries: "read table entry on line 1: \"magic\" is no address", unparsed: true}
	const open = "pass in quick on en5 all no state\n"
	for name, c := range map[string]struct {
		all []shownAnchor
		// named must occur in the report about it.
		named   string
		transit bool
	}{
		"a pass rule":                        {x("pass in quick on en5 by-magic all no state\n", ""), "by-magic", true},
		"not a quick one":                    {x("pass in on en5 by-magic all no state\n", ""), "by-magic", false},
		"in braces":                          {x("anchor all {\n  pass in quick on en5 by-magic all no state\n}\n", ""), "by-magic", true},
		"in braces within braces":            {x("anchor all {\n  anchor all {\n    pass quick by-magic all\n  }\n}\n", ""), "by-magic", true},
		"a block rule in braces, read":       {x("anchor all {\n  block drop in quick all\n}\n"+open, ""), "100.x", true},
		"a call":                             {x("anchor \"in\" by-magic all\n", ""), "by-magic", false},
		"of a kind that isn't known":         {x("conjure all\n", ""), "conjure", true},
		"a block rule":                       {x("block drop in quick on en0 by-magic all\n", ""), "by-magic", false},
		"a block rule ahead of a pass rule":  {x("block drop in quick on lo9 by-magic all\n"+open, ""), "100.x", true},
		"a block rule in braces ahead of it": {x("anchor all {\n  block drop in quick on lo9 by-magic all\n}\n"+open, ""), "100.x", true},
		"a redirection":                      {x("", "rdr on en5 by-magic all -> 10.0.0.1\n"), "by-magic", false},
		"a redirection that passes":          {x("", "rdr pass on en5 by-magic all -> 10.0.0.1\n"), "by-magic", true},
		"a translation":                      {x("", "nat on en0 by-magic all -> (en0)\n"), "by-magic", false},
		"a translation that passes":          {x("", "nat pass on en0 by-magic all -> (en0)\n"), "by-magic", true},
		"both ways":                          {x("", "binat pass on en0 by-magic from 192.168.77.9 to any -> 203.0.113.9\n"), "by-magic", true},
		"a translation that isn't known":     {x("", "conjure all -> (en0)\n"), "conjure", true},
		"a table":                            {x("pass in quick on en5 from <bad> to any no state\n", "", bad), "<bad>", true},
		"a table, negated":                   {x("pass in quick on en5 from ! <bad> to any no state\n", "", bad), "<bad>", true},
		"a table to go to":                   {x("pass in quick on en5 from any to <bad> no state\n", "", bad), "<bad>", true},
		"a table of a block rule":            {x("block drop in quick from <bad> to any\n"+open, "", bad), "100.x", true},
		"a table of a redirection":           {x("", "rdr pass on en5 inet from <bad> to any -> 10.0.0.1\n", bad), "<bad>", true},
		"a table in braces":                  {x("anchor all {\n  pass in quick on en5 from <bad> to any no state\n}\n", "", bad), "<bad>", true},
		"a table that no rule asks for":      {x("", "", bad), "", false},
		"a table of the main ruleset": {[]shownAnchor{{rules: stock.rules, nat: stock.nat, tables: []shownTable{bad}},
			{path: "com.apple/100.x", rules: "pass in quick on en5 from <bad> to any no state\n"}}, "<bad>", true},
		"what pf refuses": {x("pass in quick on en5 all no state\n", "", shownTable{name: strings.Repeat("n", 40)}), "100.x", true},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.open()
			r := g.enforce(testMesh(2, everything))
			n, err := darwin.Observe(g.mac)
			g.must(err)
			found, err := g.p.judgeForeign(t.Context(), n, r, c.all)
			g.must(err)
			transit := slices.ContainsFunc(found, func(f Foreign) bool { return f.Transit })
			named := slices.ContainsFunc(found, func(f Foreign) bool { return strings.Contains(f.String(), c.named) })
			if transit != c.transit || named != (c.named != "") && len(found) > 0 {
				t.Errorf("transit %v, found %v", transit, found)
			}
		})
	}
}

// TestUnreadIsUnclear asks for a packet's fate among rules that can't be parsed: no
// packet is reported as certain to pass.
func TestUnreadIsUnclear(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(testMesh(1, everything))
	n, err := darwin.Observe(g.mac)
	g.must(err)
	ours, err := g.p.readAnchor(t.Context(), g.p.path)
	g.must(err)
	bad := shownTable{name: "bad", unparsed: true}
	web := packetsToJudge(g.p.name)["web"]
	for about, c := range map[string]struct {
		other   shownAnchor
		unclear bool
	}{
		"nothing":                    {shownAnchor{}, false},
		"a rule that is read":        {shownAnchor{rules: "block drop in quick on lo9 all\n"}, false},
		"a block rule":               {shownAnchor{rules: "block drop in quick on lo9 by-magic all\n"}, true},
		"a block rule in braces":     {shownAnchor{rules: "anchor all {\n  block drop in quick on lo9 by-magic all\n}\n"}, true},
		"a redirection":              {shownAnchor{nat: "rdr on lo9 by-magic all -> 10.0.0.1\n"}, true},
		"a translation":              {shownAnchor{nat: "nat on lo9 by-magic all -> 10.0.0.1\n"}, true},
		"of a kind that isn't known": {shownAnchor{rules: "conjure all\n"}, true},
		"a table":                    {shownAnchor{rules: "block drop quick from any to <bad>\n", tables: []shownTable{bad}}, true},
		"a table of a redirection":   {shownAnchor{nat: "rdr on lo9 inet from <bad> to any -> 10.0.0.1\n", tables: []shownTable{bad}}, true},
	} {
		c.other.path = "com.apple/100.x"
		by, err := judgeOne(n, []shownAnchor{stock, c.other}, ours, nil, probe{packet: asShown(web.Packet.Packet), in: web.In, out: web.out})
		if err != nil || by.Unclear != c.unclear || c.unclear && !strings.Contains(by.Where, "com.apple/100.x") {
			t.Errorf("%s: %+v, %v", about, by, err)
		}
	}
}

// TestInlineAnchors has foreign rules in braces, which pfctl lists as separate anchors:
// they are judged at the point of their call.
func TestInlineAnchors(t *testing.T) {
	g := newRig(t)
	g.must(g.mac.LoadAnchor("com.apple/100.x", "anchor on en5 {\n  pass in on en5 from 192.168.77.0/24 to any no state\n}\n"))
	g.open()
	g.clean(g.enforce(testMesh(2, everything)))
	g.must(g.mac.LoadAnchor("com.apple/100.x", "anchor on en5 {\n  pass in quick on en5 from 192.168.77.0/24 to any no state\n}\n"))
	if report := g.lookAtAll(); len(report.Drift) == 0 || !strings.Contains(report.Drift[0].Message, "192.168.77.0/24") {
		t.Errorf("drift %v", report.Drift)
	}
}

// TestJudgingPanics has the evaluator panic on foreign rules: nothing is forwarded, the
// helper reports it, and enforces again once it can judge.
func TestJudgingPanics(t *testing.T) {
	panics := func(context.Context, *pfsim.Machine, *Anchor, *policy.Ruleset) ([]Foreign, error) {
		panic("index out of range")
	}
	for name, before := range map[string]bool{"before the start": true, "later": false} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.open()
			if before {
				g.p.findForeign = panics
			}
			r := g.compile(testMesh(2, everything))
			err := g.p.Enforce(t.Context(), r)
			if !before {
				g.must(err)
				g.p.findForeign = panics
				g.must(g.mac.LoadAnchor("com.apple/100.x", "pass in on en5 all\n"))
				if report := g.lookAtAll(); len(report.Drift) == 0 || !strings.Contains(report.Drift[0].Message, "can't be judged") {
					t.Errorf("drift %v", report.Drift)
				}
				err = g.p.Enforce(t.Context(), r)
			}
			if err == nil || !strings.Contains(err.Error(), "can't be judged") {
				t.Errorf("Enforce returned %v", err)
			}
			g.arrives(g.p.name, first, "9.9.9.9", simmac.Dropped)
			if v := g.mac.Kernel.Variable("net.inet.ip.forwarding"); v != "0" {
				t.Error("forwarding is on")
			}
			g.p.findForeign = FindForeign
			g.clean(g.enforce(testMesh(2, everything)))
			g.arrives(g.p.name, first, "9.9.9.9", simmac.Forwarded)
		})
	}
}

// TestLookAtOthersThatFails has pfctl fail while foreign rules are read: that isn't drift,
// Inspect reports it, and the next look succeeds.
func TestLookAtOthersThatFails(t *testing.T) {
	g := newRig(t)
	g.open()
	for range 2 {
		g.enforce(testMesh(2, everything))
	}
	g.lookAtAll()
	g.p.pf = darwin.NewPF(failing{g.mac, "Anchors"})
	report := g.lookAtAll()
	if len(report.Drift) > 0 || !slices.ContainsFunc(report.Problems, func(p host.Problem) bool { return strings.Contains(p.Message, "can't be judged") }) {
		t.Errorf("drift %v, problems %v", report.Drift, report.Problems)
	}
	g.p.pf = darwin.NewPF(g)
	if report := g.lookAtAll(); len(report.Drift)+len(report.Problems) > 0 {
		t.Errorf("drift %v, problems %v", report.Drift, report.Problems)
	}
}

// A flat runner has a pfctl that lists only direct child anchors, even with -v.
type flat struct{ darwin.Runner }

func (f flat) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if slices.Contains(args, "Anchors") {
		args = slices.DeleteFunc(slices.Clone(args), func(a string) bool { return a == "-v" })
	}
	return f.Runner.Run(ctx, stdin, path, args...)
}

// TestAnchorsOfOthers lists the same anchors with a pfctl that descends and one that
// doesn't.
func TestAnchorsOfOthers(t *testing.T) {
	g := newRig(t)
	g.must(g.mac.LoadAnchor("com.apple/100.x/deeper/still", "pass all\n"))
	g.must(g.mac.LoadAnchor("vpn", "anchor {\n  pass all\n}\n"))
	g.open()
	g.enforce(testMesh(2, everything))
	want := []string{"com.apple", "com.apple/100.x", "com.apple/100.x/deeper", "com.apple/100.x/deeper/still",
		"com.apple/200.AirDrop", "com.apple/250.ApplicationFirewall", "vpn",
		"vpn/vpn"} // pfctl's name for an inline anchor
	for name, r := range map[string]darwin.Runner{"descends": g.mac, "lists those below": flat{g.mac}} {
		g.p.pf = darwin.NewPF(r)
		got, err := g.p.foreignAnchors(t.Context())
		slices.Sort(got)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}
