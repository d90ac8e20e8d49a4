package launchd_test

import (
	"bytes"
	"os"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/launchd"
)

// TestParsePrint parses forms of `launchctl print` output that were published, from macOS
// 10.15 to 26.
func TestParsePrint(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     launchd.Status
		running  bool
	}{
		{"running", "system/x = {\n\tactive count = 1\n\tpath = /Library/LaunchDaemons/x.plist\n\ttype = LaunchDaemon\n\tstate = running\n\n" +
			"\tprogram = /opt/x\n\targuments = {\n\t\t/opt/x\n\t\tpid = 1\n\t}\n\truns = 1\n\tpid = 302\n\tlast exit code = (never exited)\n}\n",
			launchd.Status{Loaded: true, State: "running", PID: 302, Runs: 1, Path: "/Library/LaunchDaemons/x.plist", Program: "/opt/x"}, true},
		{"ended", "system/x = {\n\tstate = not running\n\tlast exit code = 78: EX_CONFIG\n}\n",
			launchd.Status{Loaded: true, State: "not running", LastExit: new(78)}, false},
		{"being unloaded", "system/x = {\n\tstate = SIGTERMed\n\tpid = 4711\n}\n",
			launchd.Status{Loaded: true, State: "SIGTERMed", PID: 4711}, false},
		{"nested states", "system/x = {\n\tendpoints = {\n\t\t\"y\" = {\n\t\t\tstate = active\n\t\t\tpid = 1\n\t\t}\n\t}\n\tstate = waiting\n\tresource coalition = {\n\t\tstate = active\n\t}\n}\n",
			launchd.Status{Loaded: true, State: "waiting"}, false},
		{"nonsense", "hello\n}\n}\n{\npid = 3\n", launchd.Status{Loaded: true}, false},
		{"absurd numbers", "x = {\n\tpid = 99999999999999999999\n\tlast exit code = -\n\tpid = -4\n}\n", launchd.Status{Loaded: true}, false},
		{"nothing", "", launchd.Status{Loaded: true}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := launchd.ParsePrint([]byte(tt.in))
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if got.Running() != tt.running {
				t.Errorf("running %v, want %v", got.Running(), tt.running)
			}
		})
	}
}

func TestParseDisabled(t *testing.T) {
	out := []byte("\tdisabled services = {\n\t\t\"a\" => disabled\n\t\t\"b\" => enabled\n\t\t\"c\" => true\n\t\t\"d\" => false\n\t}\n")
	for label, want := range map[string]bool{"a": true, "b": false, "c": true, "d": false, "e": false} {
		if got := launchd.ParseDisabled(out, label); got != want {
			t.Errorf("%s disabled: %v, want %v", label, got, want)
		}
	}
}

func TestParseLoginItem(t *testing.T) {
	const dump = ` #21:
                 UUID: 5DE2BC10-F63F-41F1-A4DB-4AF1506ED6E8
                 Type: developer (0x20)
          Disposition: [disabled, disallowed, visible, not notified] (0x2)
           Identifier: Example Ltd
  Embedded Item Identifiers:
    #1: 16.org.example.off

 #22:
                 UUID: BE38FF3E-994C-457B-8A21-D647E2A177A3
                 Type: legacy daemon (0x10010)
          Disposition: [enabled, disallowed, visible, notified] (0x9)
           Identifier: 16.org.example.off
                  URL: file:///Library/LaunchDaemons/org.example.off.plist

 #23:
                 UUID: 5A133E95-92FB-42BA-859C-2A0675FC20AF
                 Type: legacy daemon (0x10010)
          Disposition: [enabled, allowed, notified] (0xb)
           Identifier: 16.org.example.on

 #24:
                 Type: legacy daemon (0x10010)
          Disposition: [enabled, disallowed, not notified] (0x1)
           Identifier: org.example.bare
 #25:
                 Type: legacy daemon (0x10010)
          Disposition: [enabled, disallowed, not notified] (0x1)
           Identifier: 16.something
                  URL: /Library/LaunchDaemons/org.example.url.plist
 #26:
                 Type: app (0x2)
          Disposition: [disabled, disallowed, notified] (0x8)
           Identifier: org.example.on
 #27:
          Disposition: [enabled, approved] (0x20)
           Identifier: org.example.new

 Records for UID 0 : FFFFEEEE-DDDD-CCCC-BBBB-AAAA00000000
 #1:
                 Type: legacy daemon (0x10010)
          Disposition: [enabled, allowed, notified] (0xb)
           Identifier: 16.org.example.off

 Records for UID 501 : FFFFEEEE-DDDD-CCCC-BBBB-AAAA00000501
 #1:
                 UUID: 5A133E95-92FB-42BA-859C-2A0675FC20AF
                 Type: legacy daemon (0x10010)
          Disposition: [enabled, disallowed, notified] (0x9)
           Identifier: 16.org.example.on
`
	for label, want := range map[string]launchd.LoginItem{
		"org.example.on":   {Found: true, Enabled: true, Disposition: "enabled, allowed, notified"},
		"org.example.off":  {Found: true, Enabled: true, Disallowed: true, Disposition: "enabled, allowed, notified"},
		"org.example.bare": {Found: true, Enabled: true, Disallowed: true, Disposition: "enabled, disallowed, not notified"},
		"org.example.url":  {Found: true, Enabled: true, Disallowed: true, Disposition: "enabled, disallowed, not notified"},
		"org.example.new":  {Found: true, Enabled: true, Disposition: "enabled, approved"},
		"org.example.none": {},
	} {
		if got := launchd.ParseLoginItem([]byte(dump), label); got != want {
			t.Errorf("%s: %+v, want %+v", label, got, want)
		}
	}
}

// macFile returns a Mac's output without the first line, which names its source.
func macFile(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/mac/" + name)
	if err != nil {
		t.Fatal(err)
	}
	_, b, _ = bytes.Cut(b, []byte("\n"))
	return b
}

// TestParseOutputsOfMacs parses complete outputs of Macs.
func TestParseOutputsOfMacs(t *testing.T) {
	for name, want := range map[string]launchd.Status{
		"launchctl-print-codesigning-13.txt": {Loaded: true, State: "spawn scheduled", LastReason: "OS_REASON_CODESIGNING", Runs: 15, ExitTimeOut: 5,
			Path: "/Library/LaunchDaemons/com.tailscale.tailscaled.plist", Program: "/usr/local/bin/tailscaled"},
		"launchctl-print-agent.txt": {Loaded: true, State: "not running", LastExit: new(0), Runs: 1, ExitTimeOut: 5,
			Path: "/Users/USER/Library/LaunchAgents/local.resticprofile.self.check.agent.plist", Program: "/Users/USER/resticprofile"},
	} {
		got := launchd.ParsePrint(macFile(t, name))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if signed := name != "launchctl-print-codesigning-13.txt"; got.BadSignature() == signed {
			t.Errorf("%s: bad signature %v", name, !signed)
		}
	}
	dump := macFile(t, "sfltool-dumpbtm-26-noprefix.txt")
	for label, want := range map[string]launchd.LoginItem{
		"com.docker.vmnetd": {Found: true, Enabled: true, Disposition: "enabled, allowed, notified"},
		"Docker":            {}, // a developer entry, not a daemon
		"us.zoom.updater":   {}, // another user's agent
	} {
		if got := launchd.ParseLoginItem(dump, label); got != want {
			t.Errorf("%s: %+v, want %+v", label, got, want)
		}
	}
}

func TestStatusSays(t *testing.T) {
	for want, s := range map[string]launchd.Status{
		"not loaded":                               {},
		`state "running", process 302`:             {Loaded: true, State: "running", PID: 302, Runs: 1},
		`state "not running", last exit status 78`: {Loaded: true, State: "not running", LastExit: new(78)},
		`state "spawn scheduled", started 15 times, last ended by OS_REASON_CODESIGNING`: {Loaded: true, State: "spawn scheduled", Runs: 15, LastReason: "OS_REASON_CODESIGNING"},
		`state "not running", started 2 times, last ended by signal Killed: 9`:           {Loaded: true, State: "not running", Runs: 2, LastSignal: "Killed: 9"},
	} {
		if got := s.String(); got != want {
			t.Errorf("%+v: %s, want %s", s, got, want)
		}
	}
}

func FuzzParsePrint(f *testing.F) {
	f.Add([]byte("system/x = {\n\tstate = running\n\tpid = 302\n\tlast exit code = 0\n}\n"))
	f.Add([]byte(" #1:\n UUID: x\n Disposition: [enabled, allowed] (0x3)\n Identifier: 16.x\n"))
	f.Add([]byte("\t\"x\" => disabled\n"))
	f.Add([]byte(" Records for UID -2 :\n #1:\n Type: legacy daemon\n Disposition: [disallowed]\n URL: file:///Library/LaunchDaemons/x.plist\n"))
	for _, name := range []string{"launchctl-print-codesigning-13.txt", "launchctl-print-agent.txt", "sfltool-dumpbtm-26-noprefix.txt"} {
		f.Add(macFile(f, name))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if s := launchd.ParsePrint(in); !s.Loaded || s.PID < 0 || s.Runs < 0 || !utf8.ValidString(s.LastReason+s.LastSignal) {
			t.Errorf("%+v", s)
		}
		launchd.ParseDisabled(in, "x")
		if i := launchd.ParseLoginItem(in, "x"); i.Blocked() && !i.Found {
			t.Errorf("%+v", i)
		}
	})
}
