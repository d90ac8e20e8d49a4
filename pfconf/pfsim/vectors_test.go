package pfsim

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/internal/vectors"
)

// vectorTotals has the totals of the vectors' run, which are printed after all other
// output, so that a script finds them on the last line.
var vectorTotals struct {
	ran                                bool
	scenarios, judgements, differences int
}

func TestMain(m *testing.M) {
	code := m.Run()
	if t := vectorTotals; t.ran {
		fmt.Printf("pf vectors: %d scenarios, %d judgements, %d differences\n", t.scenarios, t.judgements, t.differences)
	}
	os.Exit(code)
}

// hostInterfaces returns the interfaces of a scenario's host.
func hostInterfaces(s *vectors.Scenario) []pfconf.Interface {
	var ifs []pfconf.Interface
	for _, i := range s.Interfaces {
		ifs = append(ifs, pfconf.Interface{Name: i.Name, Addresses: i.Addresses})
	}
	return ifs
}

// A judge compares a scenario's expected values with those of the package, and counts.
type judge struct {
	t                       *testing.T
	scenario                string
	judgements, differences int
}

// check compares one value. got and want are compared as JSON.
func (j *judge) check(what string, got, want any) {
	j.t.Helper()
	j.judgements++
	g, w := mustJSON(j.t, got), mustJSON(j.t, want)
	if g == w {
		return
	}
	j.differences++
	j.t.Errorf("%s: %s:\n got %s\nwant %s", j.scenario, what, g, w)
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestVectors compares the package with what Apple's own pf did.
func TestVectors(t *testing.T) {
	vectorTotals.ran = true
	for _, f := range vectors.Files(t, "testdata") {
		t.Run(filepath.Base(f), func(t *testing.T) { runVectors(t, f) })
	}
	if vectorTotals.scenarios == 0 {
		t.Fatal("the vectors are empty")
	}
}

func runVectors(t *testing.T, file string) {
	vectors.Each(t, file, func(s *vectors.Scenario) {
		j := &judge{t: t, scenario: s.Name}
		if s.Text != nil {
			judgeParse(j, s)
		} else {
			judgePackets(j, s)
		}
		vectorTotals.scenarios++
		vectorTotals.judgements += j.judgements
		vectorTotals.differences += j.differences
	})
}

// judgeParse runs a scenario of kind parse. A ruleset that is accepted must also print as
// text with the same meaning.
func judgeParse(j *judge, s *vectors.Scenario) {
	var want vectors.ParseWant
	if err := json.Unmarshal(s.Want, &want); err != nil {
		j.t.Fatal(err)
	}
	ifs := hostInterfaces(s)
	got, err := loadText(*s.Text, s.Anchor, ifs)
	rc := 0
	if err != nil {
		rc = 1
	}
	j.check(fmt.Sprintf("rc of %q (%v)", *s.Text, err), rc, want.RC)
	if want.Canonical == nil || err != nil {
		return
	}
	judgeCanonical(j, got, &want)
	judgeShown(j, s, got, ifs)
	rs, err := pfconf.Parse(*s.Text)
	if err != nil {
		j.t.Fatal(err)
	}
	again, err := loadText(rs.String(), s.Anchor, ifs)
	if err != nil {
		j.t.Errorf("%s: printed text %q: %v", s.Name, rs, err)
		return
	}
	if !reflect.DeepEqual(again.ShowRules(), got.ShowRules()) || !reflect.DeepEqual(again.ShowNat(), got.ShowNat()) {
		j.t.Errorf("%s: printed text %q loads something else", s.Name, rs)
	}
}

// judgeShown parses what pfctl shows and loads it again.
func judgeShown(j *judge, s *vectors.Scenario, got *pfconf.Loaded, ifs []pfconf.Interface) {
	rules := pfconf.ParseShown(strings.Join(got.ShowRules(), "\n"))
	nat := pfconf.ParseShown(strings.Join(got.ShowNat(), "\n"))
	for _, u := range append(rules.Unknown, nat.Unknown...) {
		j.t.Errorf("%s: read shown rule %q: %v", s.Name, u.Text, u.Err)
	}
	again, err := rules.Ruleset(nat).Expand(s.Anchor, ifs)
	if err != nil {
		j.t.Errorf("%s: load what is shown again: %v", s.Name, err)
		return
	}
	if !reflect.DeepEqual(again.ShowRules(), got.ShowRules()) || !reflect.DeepEqual(again.ShowNat(), got.ShowNat()) {
		j.t.Errorf("%s: shown rules load as something else:\n%q\n%q", s.Name, again.ShowRules(), got.ShowRules())
	}
}

func judgeCanonical(j *judge, got *pfconf.Loaded, want *vectors.ParseWant) {
	c := want.Canonical
	if c.Nat != nil {
		j.check("nat", got.ShowNat(), c.Nat)
	}
	if c.Rules != nil {
		j.check("rules", got.ShowRules(), c.Rules)
	}
	tables := map[string][]string{}
	for _, t := range got.Tables {
		tables[t.Name] = t.Entries()
	}
	for name := range c.Tables {
		entries, ok := tables[name]
		j.check("table "+name, entries, c.Tables[name])
		if !ok {
			j.t.Errorf("%s: no table %s", j.scenario, name)
		}
		delete(tables, name)
	}
	if len(tables) > 0 {
		j.t.Errorf("%s: tables beyond those wanted: %v", j.scenario, tables)
	}
}

func loadText(text, anchor string, ifs []pfconf.Interface) (*pfconf.Loaded, error) {
	rs, err := pfconf.Parse(text)
	if err != nil {
		return nil, err
	}
	return rs.Expand(anchor, ifs)
}
