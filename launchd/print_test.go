package launchd_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/launchd"
)

// Shapes of `launchctl print` as people have published them, from 10.15 to 26.
func TestParsePrint(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     launchd.Status
		running  bool
	}{
		{"running", "system/x = {\n\tactive count = 1\n\tpath = /Library/LaunchDaemons/x.plist\n\ttype = LaunchDaemon\n\tstate = running\n\n" +
			"\tprogram = /opt/x\n\targuments = {\n\t\t/opt/x\n\t\tpid = 1\n\t}\n\truns = 1\n\tpid = 302\n\tlast exit code = (never exited)\n}\n",
			launchd.Status{Loaded: true, State: "running", PID: 302, Path: "/Library/LaunchDaemons/x.plist", Program: "/opt/x"}, true},
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
          Disposition: [disabled, allowed, visible, not notified] (0x2)
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

 Records for UID 501
 #1:
                 UUID: 5A133E95-92FB-42BA-859C-2A0675FC20AF
          Disposition: [enabled, allowed, notified] (0xb)
           Identifier: 16.org.example.off
`
	for label, want := range map[string]launchd.LoginItem{
		"org.example.on":   {Found: true, Enabled: true, Allowed: true},
		"org.example.off":  {Found: true, Enabled: true, Allowed: false},
		"org.example.none": {},
	} {
		if got := launchd.ParseLoginItem([]byte(dump), label); got != want {
			t.Errorf("%s: %+v, want %+v", label, got, want)
		}
	}
}

func FuzzParsePrint(f *testing.F) {
	f.Add([]byte("system/x = {\n\tstate = running\n\tpid = 302\n\tlast exit code = 0\n}\n"))
	f.Add([]byte(" #1:\n UUID: x\n Disposition: [enabled, allowed] (0x3)\n Identifier: 16.x\n"))
	f.Add([]byte("\t\"x\" => disabled\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		if s := launchd.ParsePrint(in); !s.Loaded || s.PID < 0 {
			t.Errorf("%+v", s)
		}
		launchd.ParseDisabled(in, "x")
		if i := launchd.ParseLoginItem(in, "x"); i.Blocked() && !i.Found {
			t.Errorf("%+v", i)
		}
	})
}
