package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/launchd"
)

// launchd must not kill the helper while it restores the host, so ExitTimeOut exceeds
// LeaveLimit by at least 3 s.
func TestExitTimeOutIsLongerThanLeaving(t *testing.T) {
	o := &Options{Label: label, LogDir: "/var/log/meshhelper"}
	if rest := *o.job().ExitTimeOut - int(host.LeaveLimit.Seconds()); rest < 3 {
		t.Errorf("ExitTimeOut leaves %d s beyond LeaveLimit, want at least 3", rest)
	}
}

// wrong returns the names of the checks that found a problem, and the problems' texts.
func wrong(checks []Check) (names []string, texts string) {
	for _, c := range checks {
		if !c.OK {
			names = append(names, c.Name)
			texts += c.Message + "; " + c.Hint + "\n"
		}
		if c.OK && c.Hint != "" || !c.OK && c.Hint == "" || c.Message == "" {
			names = append(names, fmt.Sprintf("%+v", c))
		}
	}
	return names, texts
}

// TestChecks breaks one part of an installed service at a time: the matching check fails
// and says why.
func TestChecks(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(g *rig)
		names []string
		want  string
	}{
		"all is well":        {func(*rig) {}, nil, ""},
		"the firewall is on": {func(g *rig) { g.mac.SetFirewall(simmac.Firewall{On: true, Newer: true}) }, nil, ""},
		"no property list":   {func(g *rig) { g.must(os.Remove(g.disk(g.o.List()))) }, []string{"service"}, "not installed"},
		"a list that others can write": {func(g *rig) { g.must(os.Chmod(g.disk(g.o.List()), 0o666)) },
			[]string{"property list"}, "writable by others"},
		"a broken list": {func(g *rig) { g.must(os.WriteFile(g.disk(g.o.List()), []byte("<plist>"), 0o644)) },
			[]string{"property list"}, "parse property list"},
		"another program": {func(g *rig) { g.rewrite(func(j *launchd.Job) { j.ProgramArguments[0] = "/usr/local/bin/meshhelper" }) },
			[]string{"property list"}, "runs \"/usr/local/bin/meshhelper\""},
		"a short time to end": {func(g *rig) { g.rewrite(func(j *launchd.Job) { j.ExitTimeOut = new(10) }) },
			[]string{"property list"}, "ExitTimeOut under 20"},
		"no time to end": {func(g *rig) { g.rewrite(func(j *launchd.Job) { j.ExitTimeOut = nil }) },
			[]string{"property list"}, "ExitTimeOut under 20"},
		"a program that others can write": {func(g *rig) { g.must(os.Chmod(g.disk(g.o.Program()), 0o777)) },
			[]string{"program"}, "writable by others"},
		"no program": {func(g *rig) { g.must(os.Remove(g.disk(g.o.Program()))) }, []string{"program"}, "no such file"},
		"unloaded":   {func(g *rig) { g.must(g.o.launchctl().Bootout(g.t.Context(), label)) }, []string{"service"}, "hasn't loaded it"},
		"disabled":   {func(g *rig) { g.mac.Launchd.Disable(label) }, []string{"launchd"}, "sudo launchctl enable system/org.meshhelper"},
		"held back":  {func(g *rig) { g.mac.Launchd.HeldBack = []string{label} }, []string{"login item"}, "enabled, disallowed, not notified"},
		"held back, by its bare name": {func(g *rig) {
			g.mac.Launchd.HeldBack, g.mac.Launchd.BareIdentifiers = []string{label}, true
		}, []string{"login item"}, "Login Items & Extensions"},
		"not in the firewall": {func(g *rig) {
			_, _, _, err := g.mac.Run(g.t.Context(), nil, firewall, "--remove", g.o.Program())
			g.must(err)
			g.mac.SetFirewall(simmac.Firewall{On: true, Newer: true})
		}, []string{"application firewall"}, "not registered"},
		"blocked by the firewall": {func(g *rig) {
			_, _, _, err := g.mac.Run(g.t.Context(), nil, firewall, "--blockapp", g.o.Program())
			g.must(err)
			g.mac.SetFirewall(simmac.Firewall{On: true})
		}, []string{"application firewall"}, "blocked"},
		"all blocked by the firewall": {func(g *rig) { g.mac.SetFirewall(simmac.Firewall{On: true, BlockAll: true}) },
			[]string{"application firewall"}, "Block all incoming connections"},
		"tools that can't be asked": {func(g *rig) { g.o.Runner = nothing{} }, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.must(g.install())
			tt.spoil(g)
			names, texts := wrong(Checks(t.Context(), g.o))
			if !slices.Equal(names, tt.names) || !strings.Contains(texts, tt.want) {
				t.Errorf("problems %q, want %q with %q:\n%s", names, tt.names, tt.want, texts)
			}
		})
	}
}

func (g *rig) disk(path string) string { return filepath.Join(g.root, path) }

// rewrite changes the installed property list.
func (g *rig) rewrite(change func(*launchd.Job)) {
	j := g.o.job()
	change(j)
	text, err := j.Render()
	g.must(err)
	g.must(owned.ReplaceFrom(g.disk(g.o.List()), bytes.NewReader(text), 0o644))
}

// nothing is a Mac on which no program can be run.
type nothing struct{ launchd.Runner }

func (nothing) Run(context.Context, []byte, string, ...string) ([]byte, []byte, int, error) {
	return nil, nil, -1, os.ErrNotExist
}

// TestCheckOfABadSignature has macOS refuse the program's signature: doctor names the
// reason and the command that repairs it.
func TestCheckOfABadSignature(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t)
		g.mac.Launchd.RefuseSignature(label, -1)
		err := g.install()
		if !errors.Is(err, launchd.CodeSigning) {
			t.Errorf("install: %v", err)
		}
		names, texts := wrong(Checks(t.Context(), g.o))
		if !slices.Equal(names, []string{"service"}) || !strings.Contains(texts, "OS_REASON_CODESIGNING") || !strings.Contains(texts, "codesign --force") {
			t.Errorf("problems %q:\n%s", names, texts)
		}
		g.mac.Launchd.Shutdown()
	})
}

// TestOverwrittenInPlace writes to the installed program's file: the kernel kills the
// program at its next start, doctor says to install it again, and that repairs it.
func TestOverwrittenInPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t)
		g.must(g.install())
		g.must(os.WriteFile(g.disk(g.o.Program()), []byte("two"), 0o755))
		if err := g.o.launchctl().Kickstart(t.Context(), label, true); err != nil {
			t.Fatal(err)
		}
		if names, texts := wrong(Checks(t.Context(), g.o)); !slices.Equal(names, []string{"service"}) || !strings.Contains(texts, "install it again") {
			t.Errorf("problems %q:\n%s", names, texts)
		}
		g.must(g.install())
		if names, _ := wrong(Checks(t.Context(), g.o)); names != nil {
			t.Errorf("problems %q", names)
		}
		g.mac.Launchd.Shutdown()
	})
}

// TestInstallAsksAgainAfterTheStart has macOS disable the service only once it has
// started (Login Items & Extensions): the last step reports it.
func TestInstallAsksAgainAfterTheStart(t *testing.T) {
	g := newRig(t)
	g.mac.Launchd.HeldBack = []string{label}
	g.must(g.install())
	last := g.steps[len(g.steps)-1]
	if !strings.HasPrefix(last, StepBoot+": it runs now, but Login Items & Extensions holds it back") || !g.alive {
		t.Errorf("the last step is %q", last)
	}
}

// TestLastLines checks the excerpt of the logs: the last lines of each, shortened and
// without control characters.
func TestLastLines(t *testing.T) {
	g := newRig(t)
	if c := LastLines(g.o); !c.OK || c.Message != "/var/log/meshhelper has no log" {
		t.Errorf("without a log: %+v", c)
	}
	g.must(os.MkdirAll(g.disk(g.o.LogDir), 0o755))
	var b strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	b.WriteString("\x1b[2Jred\tblue " + strings.Repeat("x", 1000) + "\n")
	g.must(os.WriteFile(g.disk(g.o.LogDir+"/helper.log"), []byte(b.String()), 0o600))
	g.must(os.WriteFile(g.disk(g.o.LogDir+"/stderr.log"), []byte("panic: no\n"), 0o600))
	got := strings.Split(LastLines(g.o).Message, "\n")
	if len(got) != 8 || got[0] != "/var/log/meshhelper/helper.log ends with" || got[1] != "  line 4996" || got[7] != "  panic: no" {
		t.Errorf("the last lines are %q", got)
	}
	if l := got[5]; strings.Contains(l, "\x1b") || len([]rune(l)) > lineRunes+3 || !strings.HasSuffix(l, "…") {
		t.Errorf("a long line with control characters is %q", l)
	}
}
