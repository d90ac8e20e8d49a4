package macos

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/pfconf"
)

// difference is what a comparison panics with when it catches a changed anchor.
type difference string

// catcher turns a comparison's failure into a panic with a difference.
type catcher struct{}

func (catcher) Fatal(args ...any)                 { panic(difference(fmt.Sprint(args...))) }
func (catcher) Fatalf(format string, args ...any) { panic(difference(fmt.Sprintf(format, args...))) }

// isCaught reports whether the comparison finds a difference in one of the worlds when
// the anchor is changed.
func isCaught(edit func(*Anchor), main string) bool {
	type pair struct{ w, next world }
	draw := rapid.Custom(func(t *rapid.T) pair {
		w := drawWorld(t)
		return pair{w, drawChange(t, w)}
	})
	for seed := range 1500 {
		if differs(draw.Example(seed).w, draw.Example(seed).next, uint64(seed), edit, main) {
			return true
		}
	}
	return false
}

func differs(w, next world, seed uint64, edit func(*Anchor), main string) (differs bool) {
	defer func() {
		if p := recover(); p != nil {
			if _, differs = p.(difference); !differs {
				panic(p)
			}
		}
	}()
	newComparison(catcher{}, w, seed, main, edit).round(next)
	return false
}

// without returns an edit that removes the rules for which drop returns true.
func without(drop func(*pfconf.Rule) bool) func(*Anchor) {
	return func(a *Anchor) {
		a.Lines = slices.DeleteFunc(a.Lines, func(l Line) bool {
			r, ok := l.Statement.(*pfconf.Rule)
			return ok && drop(r)
		})
	}
}

// twice maps a rule to the rule that deliberately blocks the same packets: only without
// both does a forbidden packet pass.
var twice = map[string]string{
	"mesh-spoofed":      "mesh-no-routing",
	"mesh-no-routing":   "mesh-untranslated",
	"mesh-lan-loopback": "mesh-untranslated",
	"mesh-not-uplink":   "mesh-untranslated",
}

// TestEachRuleIsNeeded removes one rule at a time from the anchor and checks that the
// differential test finds a difference: each rule has an effect, and the test would
// notice its loss.
func TestEachRuleIsNeeded(t *testing.T) {
	for _, label := range mustAnchor(t, mustRuleset(t, testMesh(3, everything), testHost())).Labels() {
		t.Run(label, func(t *testing.T) {
			both := twice[label]
			if !isCaught(without(func(r *pfconf.Rule) bool { return r.Label == label || both != "" && r.Label == both }), appleMain) {
				t.Errorf("the comparison doesn't notice that rule %s is missing", label)
			}
		})
	}
}

// each returns an edit that changes every rule.
func each(change func(*pfconf.Rule)) func(*Anchor) {
	return func(a *Anchor) {
		for _, r := range a.rules() {
			change(r)
		}
	}
}

// TestEachDetailIsNeeded changes what all rules have in common, one detail at a time: the
// differential test finds each change.
func TestEachDetailIsNeeded(t *testing.T) {
	for about, tt := range map[string]struct {
		edit func(*Anchor)
		main string
	}{
		"states float":             {each(func(r *pfconf.Rule) { r.StateOptions.Policy = pfconf.Floating }), appleMain},
		"no state":                 {each(func(r *pfconf.Rule) { r.State, r.StateOptions = pfconf.NoState, pfconf.StateOptions{} }), appleMain},
		"flows begin with SYN":     {each(func(r *pfconf.Rule) { r.Flags = nil }), appleMain},
		"blocks aren't final":      {each(func(r *pfconf.Rule) { r.Quick = r.Quick && r.Action != pfconf.Block }), appleMain},
		"no translation":           {without(func(r *pfconf.Rule) bool { return r.Action == pfconf.Nat }), appleMain},
		"others translate to us":   {without(func(r *pfconf.Rule) bool { return r.Action == pfconf.NoNat }), "nat-anchor \"com.apple/*\"\nnat on utun7 inet from any to any -> (utun7)\nanchor \"com.apple/*\"\n"},
		"others redirect for us":   {without(func(r *pfconf.Rule) bool { return r.Action == pfconf.NoRdr }), "nat-anchor \"com.apple/*\"\nrdr-anchor \"com.apple/*\"\nrdr on utun7 inet from any to any -> 8.8.8.8\nanchor \"com.apple/*\"\n"},
		"others pass what we pass": {each(func(r *pfconf.Rule) { r.Quick = r.Quick && r.Action != pfconf.Pass }), appleMain + "pass all\n"},
	} {
		t.Run(about, func(t *testing.T) {
			if !isCaught(tt.edit, tt.main) {
				t.Errorf("the comparison doesn't notice the change")
			}
		})
	}
}
