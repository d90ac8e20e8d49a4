// Package vectors reads the conformance vectors: what Apple's pf did with rulesets,
// packets and states. pfconf/pfsim/testdata/README.md has their form. It is for the
// tests of pfconf and pfsim alone.
package vectors

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

// A Scenario is one line of the vectors.
type Scenario struct {
	Name       string      `json:"name"`
	Kind       string      `json:"kind"`
	About      string      `json:"about"`
	Interfaces []Interface `json:"interfaces"`

	// Text, Anchor and Want are those of a parse scenario.
	Text   *string         `json:"text"`
	Anchor string          `json:"anchor"`
	Want   json.RawMessage `json:"want"`

	// Main, Anchors and Events are those of a packet scenario.
	Main    *string           `json:"main"`
	Anchors []Anchor          `json:"anchors"`
	Events  []json.RawMessage `json:"events"`
}

// An Interface is a network interface of a scenario's host.
type Interface struct {
	Name      string         `json:"name"`
	Addresses []netip.Prefix `json:"addresses"`
}

// An Anchor is an anchor that is loaded when a scenario begins.
type Anchor struct {
	Name  string `json:"name"`
	Rules string `json:"rules"`
}

// A ParseWant is what a parse scenario wants.
type ParseWant struct {
	RC        int `json:"rc"` // pfctl's exit status
	Canonical *struct {
		Nat    []string            `json:"nat"`
		Rules  []string            `json:"rules"`
		Tables map[string][]string `json:"tables"`
	} `json:"canonical"`
}

// Files returns the files of vectors: those in dir, and those in the directory that
// PFCONF_VECTORS names. That there are none is a failure.
func Files(t *testing.T, dir string) []string {
	t.Helper()
	dirs := []string{dir}
	if more := os.Getenv("PFCONF_VECTORS"); more != "" {
		dirs = append(dirs, more)
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

// Each calls do with each scenario of a file, compressed or not.
func Each(t *testing.T, file string, do func(*Scenario)) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var from io.Reader = f
	if filepath.Ext(file) == ".gz" {
		if from, err = gzip.NewReader(f); err != nil {
			t.Fatalf("open %s: %v", file, err)
		}
	}
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var s Scenario
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		do(&s)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
}
