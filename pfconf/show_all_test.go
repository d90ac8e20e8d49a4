package pfconf

import (
	"slices"
	"strings"
	"testing"
)

// sampleAll is the output of pfctl -a ANCHOR -v -s all.
const sampleAll = `No ALTQ support in kernel
ALTQ related functions disabled
TRANSLATION RULES:
nat on en0 inet from 100.64.0.0/10 to any -> (en0) round-robin extfilter ei
  [ Evaluations: 5         Packets: 4         Bytes: 300         States: 1     ]
  [ Inserted: uid 0 pid 4000 ]

FILTER RULES:
block drop in quick on utun7 all label "FILTER RULES:"
  [ Evaluations: 20        Packets: 0         Bytes: 0           States: 0     ]
  [ Inserted: uid 0 pid 4000 ]
pass in all flags S/SA keep state
  [ Evaluations: 7         Packets: 6         Bytes: 500         States: 2     ]
  [ Inserted: uid 0 pid 4000 ]

STATES:
ALL tcp 192.0.2.7:49152 -> 203.0.113.5:443       ESTABLISHED:ESTABLISHED

INFO:
Status: Enabled for 0 days 00:01:02           Debug: Urgent

State Table                          Total             Rate
  current entries                        3
  searches                             100            1.6/s
Counters
  match                                 42            0.7/s

TIMEOUTS:
tcp.first                   120s

LIMITS:
states        hard limit    10000

TABLES:
INFO:
peers
`

func TestParseAll(t *testing.T) {
	all, err := ParseAll(sampleAll)
	if err != nil {
		t.Fatal(err)
	}
	rules, nat := ParseShown(all.Rules), ParseShown(all.NAT)
	if len(rules.Rules) != 2 || len(nat.Rules) != 1 || len(rules.Unknown)+len(nat.Unknown) != 0 {
		t.Fatalf("read %+v and %+v", rules, nat)
	}
	if rules.Rules[0].Evaluations != 20 || rules.Rules[1].States != 2 || nat.Rules[0].Bytes != 300 {
		t.Errorf("counters %+v, %+v", rules.Rules, nat.Rules)
	}
	if !all.Info.Enabled || all.Info.States != 3 || all.Info.Counters["Counters"]["match"] != 42 {
		t.Errorf("info %+v", all.Info)
	}
	// A table may have the name of a section.
	if got := ParseTables(all.Sections["TABLES"]); len(got) != 2 || got[0].Name != "INFO:" {
		t.Errorf("tables %+v", got)
	}
	if states, err := ParseStates(all.Sections["STATES"]); err != nil || len(states) != 1 {
		t.Errorf("states %+v, %v", states, err)
	}
	if err := EqualShown([]string{"nat on en0 inet from 100.64.0.0/10 to any -> (en0)"}, all.NAT); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "FILTER RULES:\npass all\n", "INFO:\nStatus: Perhaps\n"} {
		if all, err := ParseAll(bad); err == nil || all == nil {
			t.Errorf("%q: %v", bad, err)
		}
	}
	// Without rules of a kind, their section is missing.
	if all, err = ParseAll("INFO:\nStatus: Disabled                              Debug: Urgent\n"); err != nil || all.Rules != "" || all.Info.Enabled {
		t.Errorf("%+v, %v", all, err)
	}
}

// TestMacAll parses the beginning of a Mac's output. The rest wasn't captured, so the
// status is missing.
func TestMacAll(t *testing.T) {
	all, err := ParseAll(macOutput(t, "pfctl-sa-main-rules-sharing.txt"))
	if err == nil {
		t.Error("no error for the missing status")
	}
	if err := EqualShown([]string{
		`nat-anchor "com.apple/*"`, `nat-anchor "com.apple.internet-sharing"`,
		`rdr-anchor "com.apple/*"`, `rdr-anchor "com.apple.internet-sharing"`,
	}, all.NAT); err != nil {
		t.Error(err)
	}
	if err := EqualShown([]string{
		`scrub-anchor "com.apple/*"`, `scrub-anchor "com.apple.internet-sharing"`,
		`anchor "com.apple/*"`, `anchor "com.apple.internet-sharing"`,
	}, all.Rules); err != nil {
		t.Error(err)
	}
	if err := EqualShown([]string{`dummynet-anchor "com.apple/*"`}, all.Sections["DUMMYNET RULES"]); err != nil {
		t.Error(err)
	}
}

// FuzzParseAll checks that parsing doesn't panic and that each line ends up in its
// section.
func FuzzParseAll(f *testing.F) {
	f.Add(sampleAll)
	f.Add("INFO:\nINFO:\n\nFILTER RULES:\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		all, err := ParseAll(text)
		if all == nil || err == nil && all.Info == nil {
			t.Fatalf("%+v, %v", all, err)
		}
		lines := strings.Split(text, "\n")
		for title, section := range all.Sections {
			if !allTitles[title+":"] {
				t.Fatalf("section %q", title)
			}
			at := slices.IndexFunc(lines, func(l string) bool { return strings.TrimRight(l, " \r") == title+":" })
			got := strings.Split(section, "\n")
			if section == "" {
				continue
			}
			if at < 0 || !slices.Equal(lines[at+1:at+len(got)], got[:len(got)-1]) {
				t.Fatalf("section %q has %q", title, section)
			}
		}
	})
}
