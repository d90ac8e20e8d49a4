package pfconf

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// macOutput returns output of a real Mac's pfctl without the first line, which names its
// source.
func macOutput(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "mac", name))
	if err != nil {
		t.Fatal(err)
	}
	source, text, ok := strings.Cut(string(b), "\n")
	if !ok || !strings.HasPrefix(source, "# source: ") {
		t.Fatalf("%s doesn't begin with its source", name)
	}
	return text
}

// macOutputs returns the names of the outputs with a prefix.
func macOutputs(t *testing.T, prefixes ...string) []string {
	t.Helper()
	var all []string
	for _, p := range prefixes {
		files, err := filepath.Glob(filepath.Join("testdata", "mac", p+"*"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no outputs %s: %v", p, err)
		}
		for _, f := range files {
			all = append(all, filepath.Base(f))
		}
	}
	return all
}

// TestMacRules parses the rules in real Macs' output, and checks that they print
// unchanged.
func TestMacRules(t *testing.T) {
	for _, name := range macOutputs(t, "pfctl-rules-", "pfctl-s-rules-", "pfctl-nat-", "pfctl-s-nat-", "pfctl-mullvad-") {
		text := strings.TrimSpace(macOutput(t, name))
		s := ParseShown(text)
		if _, err := s.Ruleset(nil).Expand("", nil); err != nil {
			t.Errorf("%s: load again: %v", name, err)
		}
		for _, u := range s.Unknown {
			t.Errorf("%s: line %d %q: %v", name, u.Line, u.Text, u.Err)
		}
		var got []string
		for _, r := range s.Rules {
			if r.Action == Scrub || r.Action == ScrubAnchor {
				r.Normalize.Fragment = FragmentReassemble
			}
			got = append(got, shown(r.Rule, r.Anchor))
		}
		// pfctl shows an interface without a router in two forms.
		text = strings.Replace(text, "(utun4 any)", "utun4", 1)
		if again := strings.Join(got, "\n"); again != text {
			t.Errorf("%s: shown again:\n%s\nwant\n%s", name, again, text)
		}
	}
}

// TestMacAnchorIsMissing parses the output for a path with a star, which pfctl takes as
// an anchor's name: it begins with a rule and ends with an error.
func TestMacAnchorIsMissing(t *testing.T) {
	s := ParseShown(macOutput(t, "pfctl-missing-wildcard.txt"))
	if len(s.Rules) != 1 || s.Rules[0].Anchor != "*" || len(s.Unknown) != 1 {
		t.Errorf("got %+v", s)
	}
}

func TestMacInfo(t *testing.T) {
	info, err := ParseInfo(macOutput(t, "pfctl-info-enabled-26.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if !info.Enabled || info.For != 0 || info.Debug != "Urgent" || info.States != 0 || len(info.Counters["Counters"]) != 17 {
		t.Errorf("got %+v", info)
	}
	if info, err = ParseInfo(macOutput(t, "pfctl-s-info-8days.txt")); err != nil {
		t.Fatal(err)
	}
	want := &Info{Enabled: true, For: 8*24*time.Hour + 3*time.Hour + 22*time.Minute + 4*time.Second, Debug: "Urgent",
		States: 40, Counters: map[string]map[string]uint64{
			"State Table": {"current entries": 40, "searches": 21967266, "inserts": 128013, "removals": 127973},
			"Counters":    {"match": 988220, "bad-offset": 0, "ip-option": 9618, "state-mismatch": 753, "dummynet": 0},
		}}
	if !reflect.DeepEqual(info, want) {
		t.Errorf("got %+v", info)
	}
}

func TestMacInterfaces(t *testing.T) {
	want := []ShownInterface{{Name: "ALL"}, {Name: "anpi0"}, {Name: "ap1"}, {Name: "bridge100"}, {Name: "en0"},
		{Name: "lo0", Skip: true}, {Name: "stf0"}, {Name: "utun0"}, {Name: "vmenet0"}}
	if got := ParseInterfaces(macOutput(t, "pfctl-interfaces-lo0-skip.txt")); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}

func TestMacReferences(t *testing.T) {
	for name, want := range map[string][]Reference{
		"pfctl-references-none-26.txt": nil,
		"pfctl-references-alf-10.txt":  {{618, "socketfilterfw", 9813589183660731843, 3*time.Minute + 31*time.Second}},
		"pfctl-references-pfd-26.txt": {{42671, "pfd", 11605101605051758694,
			56*24*time.Hour + 8*time.Hour + 17*time.Minute + 11*time.Second}},
	} {
		got, err := ParseReferences(macOutput(t, name))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
}

func TestMacToken(t *testing.T) {
	for name, want := range map[string]uint64{
		"pfctl-enable-stderr-26.txt":       11012949885072952621,
		"pfctl-enable-stderr-again-26.txt": 15447822800193098702,
	} {
		if got, err := ParseToken(macOutput(t, name)); err != nil || got != want {
			t.Errorf("%s: got %d, %v", name, got, err)
		}
	}
	for _, name := range []string{"pfctl-release-stderr-26.txt", "pfctl-flush-all-stderr-26.txt"} {
		if got, err := ParseToken(macOutput(t, name)); err == nil {
			t.Errorf("%s: got %d", name, got)
		}
	}
}

func TestMacAnchors(t *testing.T) {
	want := []string{"com.apple", "com.apple/200.AirDrop", "com.apple/200.AirDrop/Bonjour", "com.apple/250.ApplicationFirewall"}
	if got := ParseAnchors(macOutput(t, "pfctl-v-s-anchors-10.txt")); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q", got)
	}
}

func TestMacStates(t *testing.T) {
	all, err := ParseStates(macOutput(t, "pfctl-s-states.txt"))
	if err != nil || len(all) != 10 {
		t.Fatalf("got %d states, %v", len(all), err)
	}
	end := netip.MustParseAddrPort
	if s := all[1]; s.Proto != "tcp" || s.Direction != Out || s.Inner != end("192.168.1.17:58651") ||
		s.Outer != end("54.192.151.129:443") || s.Source != "ESTABLISHED" || s.Destination != "FIN_WAIT_2" {
		t.Errorf("got %+v", s)
	}
	if s := all[4]; s.Proto != "udp" || s.Direction != In || s.Inner != end("[ff02::fb]:5353") ||
		s.Outer != end("[fe80::106f:1056:148d:9939]:5353") {
		t.Errorf("got %+v", s)
	}
	if s := all[6]; s.Proto != "igmp" || s.Inner != end("224.0.0.2:0") || s.Source != "NO_TRAFFIC" {
		t.Errorf("got %+v", s)
	}
}
