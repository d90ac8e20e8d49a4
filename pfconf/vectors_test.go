package pfconf

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// vectorTotals is what the vectors' run says at the end, after all other
// output, so that a script finds it in the last line.
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

// A scenario is one line of the conformance vectors.
type scenario struct {
	Name       string            `json:"name"`
	Kind       string            `json:"kind"`
	About      string            `json:"about"`
	Interfaces []vectorInterface `json:"interfaces"`

	// Text, Anchor and Want are those of a parse scenario.
	Text   *string         `json:"text"`
	Anchor string          `json:"anchor"`
	Want   json.RawMessage `json:"want"`

	// Main, Anchors and Events are those of a packet scenario.
	Main    *string           `json:"main"`
	Anchors []vectorAnchor    `json:"anchors"`
	Events  []json.RawMessage `json:"events"`
}

type vectorInterface struct {
	Name      string   `json:"name"`
	Addresses []string `json:"addresses"`
}

type vectorAnchor struct {
	Name  string `json:"name"`
	Rules string `json:"rules"`
}

// hostInterfaces returns the scenario's interfaces in the package's form.
func (s *scenario) hostInterfaces(t *testing.T) []Interface {
	t.Helper()
	var ifs []Interface
	for _, vi := range s.Interfaces {
		in := Interface{Name: vi.Name}
		for _, a := range vi.Addresses {
			p, err := netip.ParsePrefix(a)
			if err != nil {
				t.Fatalf("%s: interface %s: %v", s.Name, vi.Name, err)
			}
			in.Addresses = append(in.Addresses, p)
		}
		ifs = append(ifs, in)
	}
	return ifs
}

// A judge compares what a scenario wants with what the package says and counts.
type judge struct {
	t                       *testing.T
	scenario                string
	judgements, differences int
}

// check judges one value; got and want are compared as JSON.
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

// TestVectors holds the package against what Apple's own pf did.
func TestVectors(t *testing.T) {
	vectorTotals.ran = true
	for _, f := range vectorFiles(t) {
		t.Run(filepath.Base(f), func(t *testing.T) { runVectors(t, f) })
	}
	if vectorTotals.scenarios == 0 {
		t.Fatal("the vectors are empty")
	}
}

// vectorFiles returns the files of vectors: those of the repository, and those
// in the directory that PFCONF_VECTORS names. That there are none is a failure.
func vectorFiles(t *testing.T) []string {
	t.Helper()
	dirs := []string{"testdata"}
	if dir := os.Getenv("PFCONF_VECTORS"); dir != "" {
		dirs = append(dirs, dir)
	}
	var all []string
	for _, dir := range dirs {
		found := 0
		for _, pattern := range []string{"*.jsonl", "*.jsonl.gz"} {
			files, err := filepath.Glob(filepath.Join(dir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, files...)
			found += len(files)
		}
		if found == 0 {
			t.Fatalf("no vectors in %s", dir)
		}
	}
	return all
}

// openVectors opens a file of vectors, compressed or not.
func openVectors(t *testing.T, file string) io.Reader {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if filepath.Ext(file) != ".gz" {
		return f
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatalf("open %s: %v", file, err)
	}
	return z
}

// eachScenario calls do with each line of a file.
func eachScenario(t *testing.T, file string, do func(*scenario)) {
	t.Helper()
	lines := bufio.NewScanner(openVectors(t, file))
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var s scenario
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			t.Fatal(err)
		}
		do(&s)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
}

func runVectors(t *testing.T, file string) {
	eachScenario(t, file, func(s *scenario) {
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

// A parseWant is what a parse scenario wants.
type parseWant struct {
	RC        int `json:"rc"`
	Canonical *struct {
		Nat    []string            `json:"nat"`
		Rules  []string            `json:"rules"`
		Tables map[string][]string `json:"tables"`
	} `json:"canonical"`
}

// judgeParse runs a scenario of the kind parse. What is accepted must also print
// as text that means the same.
func judgeParse(j *judge, s *scenario) {
	var want parseWant
	if err := json.Unmarshal(s.Want, &want); err != nil {
		j.t.Fatal(err)
	}
	ifs := s.hostInterfaces(j.t)
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
	rs, err := Parse(*s.Text)
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

// judgeShown reads what pfctl shows and loads it again.
func judgeShown(j *judge, s *scenario, got *Loaded, ifs []Interface) {
	rules := ParseShown(strings.Join(got.ShowRules(), "\n"))
	nat := ParseShown(strings.Join(got.ShowNat(), "\n"))
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

func judgeCanonical(j *judge, got *Loaded, want *parseWant) {
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

func loadText(text, anchor string, ifs []Interface) (*Loaded, error) {
	rs, err := Parse(text)
	if err != nil {
		return nil, err
	}
	return rs.Expand(anchor, ifs)
}

func mustUnmarshal(t *testing.T, raw []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(raw, v); err != nil {
		t.Fatal(err)
	}
}
