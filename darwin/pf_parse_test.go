package darwin_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/darwin"
)

// Output of pfctl on macOS 26.5.2 (25F84, arm64), from the captures of omacvm's
// netd; lo0's skip mark from the capture of an incident with Internet Sharing.
const (
	enableStderr   = "No ALTQ support in kernel\nALTQ related functions disabled\npf enabled\nToken : 11012949885072952621\n"
	infoDisabled   = "Status: Disabled                              Debug: Urgent\n\nState Table                          Total             Rate\n  current entries                        0               \n"
	infoEnabled    = "Status: Enabled for 0 days 00:00:00           Debug: Urgent\n\nState Table                          Total             Rate\n"
	referencesNone = "No pf starter references held\n"
	referencesTwo  = "TOKENS:\n" +
		"PID      Process Name                 TOKEN                    TIMESTAMP\n" +
		"4077     pfctl                        9084387343160548126      0 days 00:00:00\n" +
		"618      some helper                  15053025338191571182     12 days 01:00:03\n"
	interfaces = "No ALTQ support in kernel\nALTQ related functions disabled\nALL\nanpi0\nap1\nbridge100\nen0\nlo0 (skip)\nstf0\nutun0\nvmenet0\n"
)

func TestParseCaptures(t *testing.T) {
	if token, err := darwin.ParseToken([]byte(enableStderr)); err != nil || token != 11012949885072952621 {
		t.Errorf("token %d, %v", token, err)
	}
	if i, err := darwin.ParseInfo(infoEnabled); err != nil || !i.Enabled {
		t.Errorf("enabled: %+v, %v", i, err)
	}
	if i, err := darwin.ParseInfo(infoDisabled); err != nil || i.Enabled {
		t.Errorf("disabled: %+v, %v", i, err)
	}
	refs, err := darwin.ParseReferences(referencesTwo)
	want := []darwin.Reference{
		{PID: 4077, Name: "pfctl", Token: 9084387343160548126},
		{PID: 618, Name: "some helper", Token: 15053025338191571182},
	}
	if diff := cmp.Diff(want, refs); err != nil || diff != "" {
		t.Errorf("references: %v (-want +got):\n%s", err, diff)
	}
	if refs, err := darwin.ParseReferences(referencesNone); err != nil || refs != nil {
		t.Errorf("no references: %+v, %v", refs, err)
	}
	if got := darwin.ParseSkipped(interfaces); !slices.Equal(got, []string{"lo0"}) {
		t.Errorf("skipped %q", got)
	}
}

func TestParseRefusesDamage(t *testing.T) {
	for _, s := range []string{
		"", "pf enabled\n", "Token : \n", "Token : 18446744073709551616\n", "Token : 999 ; rm -rf /\n", "Token : -1\n",
	} {
		if token, err := darwin.ParseToken([]byte(s)); err == nil {
			t.Errorf("token %d of %q", token, s)
		}
	}
	for _, s := range []string{
		"", "hello\n", "TOKENS:\n", "TOKENS:\nPID Name TOKEN\nx pfctl 1 0 days 00:00:00\n",
		"TOKENS:\nPID Name TOKEN\n1 pfctl\n", "TOKENS:\nPID Name TOKEN\n1 pfctl -5 0 days 00:00:00\n",
		"TOKENS:\nPID Name TOKEN\n1 pfctl 7 0 weeks 00:00:00\n",
	} {
		if refs, err := darwin.ParseReferences(s); err == nil {
			t.Errorf("references %+v of %q", refs, s)
		}
	}
	for _, s := range []string{"", "Status:\n", "Status: Maybe\n", "status: Enabled\n"} {
		if i, err := darwin.ParseInfo(s); err == nil {
			t.Errorf("info %+v of %q", i, s)
		}
	}
}

func FuzzParsePfctl(f *testing.F) {
	for _, s := range []string{enableStderr, infoDisabled, infoEnabled, referencesNone, referencesTwo, interfaces} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if refs, err := darwin.ParseReferences(s); err != nil && refs != nil {
			t.Errorf("references %+v with error %v", refs, err)
		}
		darwin.ParseToken([]byte(s))
		darwin.ParseInfo(s)
		for _, name := range darwin.ParseSkipped(s) {
			if len(name) > len(s) {
				t.Errorf("name %q isn't in the text", name)
			}
		}
	})
}
