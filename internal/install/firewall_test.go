package install

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/simmac"
)

// TestParseFirewall parses socketfilterfw's output: captured on Macs, and in the forms
// that other projects parse.
func TestParseFirewall(t *testing.T) {
	const program = "/Library/PrivilegedHelperTools/org.meshhelper"
	for out, want := range map[string]appRule{
		"ALF: total number of apps = 2 \n\n1 :  /Applications/Foo.app \n \t ( Allow incoming connections ) \n\n2 :  " + program + " \n \t ( Block incoming connections ) \n\n": appBlocked,
		"ALF: total number of apps = 1 \n\n1 :  " + program + " \n \t ( Allow incoming connections ) \n\n":                                                                     appAllowed,
		"Total number of apps = 1 \n1 : " + program + " \n             (Allow incoming connections) \n":                                                                        appAllowed,
		"Total number of apps = 1\n1 : " + program + " ( Block incoming connections )\n":                                                                                       appBlocked,
		"Total number of apps = 1\n1 : " + program + ".old\n             (Allow incoming connections) \n":                                                                      appAbsent,
		"Total number of apps = 0 \n":                                         appAbsent,
		"Total number of apps = 1\n1 : " + program + "\n( No rules apply )\n": appUnknown,
		"Total number of apps = 1\n1 : " + program + "\n":                     appUnknown,
		"":                        appUnknown,
		"usage: socketfilterfw\n": appUnknown,
	} {
		if got := parseApps(out, program); got != want {
			t.Errorf("%q: %s, want %s", out, got, want)
		}
	}
	for out, want := range map[string]appRule{
		"Incoming connection to the application is permitted\n":  appAllowed,
		"Incoming connection to the application is blocked\n":    appBlocked,
		"Incoming connection to " + program + " is permitted.\n": appAllowed,
		"The application is not part of the firewall\n":          appAbsent,
		"": appUnknown,
	} {
		if got := parseAppBlocked(out, program); got != want {
			t.Errorf("%q: %s, want %s", out, got, want)
		}
	}
	if got := parseAppBlocked("Incoming connection to /opt/blocked/x is permitted.\n", "/opt/blocked/x"); got != appAllowed {
		t.Errorf("a word of the path decides: %s", got)
	}
	for _, tt := range []struct {
		state, all          string
		known, on, blockAll bool
	}{
		{"Firewall is enabled. (State = 1)\nFirewall stealth mode is on\n", "Firewall has block all state set to disabled.\n", true, true, false},
		{"Firewall is enabled. (State = 2)\n", "", true, true, true},
		{"Firewall is enabled. (State = 1)\n", "Firewall has block all state set to enabled.\n", true, true, true},
		{"Firewall is enabled. (State = 1)\n", "Block all ENABLED!\n", true, true, true},
		{"Firewall is enabled. (State = 1)\n", "Block all DISABLED!\n", true, true, false},
		{"Firewall is disabled. (State = 0)\n", "Block all ENABLED!\n", true, false, false},
		{"", "", false, false, false},
		{"usage\n", "usage\n", false, false, false},
	} {
		on, all := parseFirewall(tt.state, tt.all)
		if (on != nil) != tt.known || on != nil && *on != tt.on || all != tt.blockAll {
			t.Errorf("state %q, block all %q: %v, %v", tt.state, tt.all, on, all)
		}
	}
	// The three lines that socket_vmnet's installer gets, each with exit status 0.
	b, err := os.ReadFile("testdata/mac/socketfilterfw-add.txt")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for i, want := range []appRule{appUnknown, appAbsent, appAllowed} {
		if got := parseAppBlocked(lines[i+1], "/usr/libexec/bootpd"); got != want {
			t.Errorf("%q: %s, want %s", lines[i+1], got, want)
		}
	}
}

func FuzzParseFirewall(f *testing.F) {
	f.Add("Total number of apps = 1\n1 : /x\n ( Allow incoming connections )\n", "/x")
	f.Add("Firewall is enabled. (State = 1)\n", "is enabled")
	f.Fuzz(func(t *testing.T, out, program string) {
		if program == "" {
			return
		}
		if parseApps(out, program) == appAllowed && !strings.Contains(out, program) {
			t.Errorf("%q allows %q", out, program)
		}
		parseAppBlocked(out, program)
		parseFirewall(out, program)
	})
}

// TestFirewallIsReadBack registers the program with firewalls that accept or refuse it.
// socketfilterfw exits 0 either way, so the step reads the rule back, and fails if the
// program isn't allowed.
func TestFirewallIsReadBack(t *testing.T) {
	for name, tt := range map[string]struct {
		firewall simmac.Firewall
		want     string // in the step's error; "" for no error
	}{
		"off":            {simmac.Firewall{}, ""},
		"on":             {simmac.Firewall{On: true}, ""},
		"on, newer":      {simmac.Firewall{On: true, Newer: true}, ""},
		"refuses":        {simmac.Firewall{On: true, Refuses: true}, `not registered (socketfilterfw says "The application is not part of the firewall")`},
		"refuses, newer": {simmac.Firewall{On: true, Refuses: true, Newer: true}, "not registered"},
		"managed, newer": {simmac.Firewall{On: true, Managed: true, Newer: true}, "managed Mac computers"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.mac.SetFirewall(tt.firewall)
			g.must(g.install())
			i := slices.IndexFunc(g.steps, func(s string) bool { return strings.HasPrefix(s, "allow its packets") })
			if failed := strings.Contains(g.steps[i], ": "); failed != (tt.want != "") || !strings.Contains(g.steps[i], tt.want) {
				t.Errorf("step %q, want %q", g.steps[i], tt.want)
			}
			if g.mac.Allowed(g.o.Program()) == (tt.want != "") {
				t.Errorf("the program is allowed: %v", tt.want != "")
			}
			// A program that was never registered needs no removal. If the removal fails,
			// uninstall reports it.
			registered := g.mac.Allowed(g.o.Program())
			g.mac.SetFirewall(simmac.Firewall{Refuses: true, Newer: tt.firewall.Newer})
			g.steps = nil
			if _, err := Uninstall(t.Context(), g.o, g.report); err != nil {
				t.Error(err)
			}
			told := slices.ContainsFunc(g.steps, func(s string) bool { return strings.Contains(s, "the program is still allowed") })
			if told != registered {
				t.Errorf("registered %v, steps %q", registered, g.steps)
			}
		})
	}
}
