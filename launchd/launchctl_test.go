package launchd_test

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/launchd"
)

const plistPath = "/Library/LaunchDaemons/" + label + ".plist"

// a mac is a fake launchd with one property list on its disk.
type mac struct {
	*launchd.Fake
	ctl   *launchd.Launchctl
	file  launchd.File
	job   *launchd.Job
	lives []string // what Start and Stop were called for
}

func newMac(t *testing.T) *mac {
	t.Helper()
	m := &mac{file: launchd.File{Path: plistPath, Mode: 0o644}, job: daemon()}
	m.Fake = &launchd.Fake{
		Files: func(p string) (launchd.File, []byte, error) {
			if p != plistPath {
				return launchd.File{}, nil, fs.ErrNotExist
			}
			data, err := m.job.Render()
			return m.file, data, err
		},
		Start: func(j *launchd.Job, pid int) { m.lives = append(m.lives, "start "+j.Label) },
		Stop:  func(label string) { m.lives = append(m.lives, "stop "+label) },
	}
	m.ctl = launchd.New(launchd.Options{Runner: m.Fake})
	return m
}

func TestLoadFirstTime(t *testing.T) {
	m := newMac(t)
	s, err := m.ctl.Load(t.Context(), label, plistPath)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Running() || s.Path != plistPath || s.Program != m.job.ProgramArguments[0] || s.LastExit != nil {
		t.Errorf("status %+v", s)
	}
	want := []string{
		"/bin/launchctl bootout system/" + label,
		"/bin/launchctl enable system/" + label,
		"/usr/bin/sfltool dumpbtm",
		"/bin/launchctl bootstrap system " + plistPath,
		"/bin/launchctl print system/" + label,
	}
	if diff := cmp.Diff(want, m.Calls()); diff != "" {
		t.Errorf("commands (-want +got):\n%s", diff)
	}
}

// An upgrade while the old instance takes four seconds to end, and launchd
// another four to notice.
func TestLoadUpgradeWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		m.Draining, m.Settling = 4*time.Second, 4*time.Second
		if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		s, err := m.ctl.Load(t.Context(), label, plistPath)
		if err != nil || !s.Running() {
			t.Fatalf("upgrade: %+v, %v", s, err)
		}
		if d := time.Since(begin); d < 8*time.Second || d > 9*time.Second {
			t.Errorf("took %v, want a little more than 8 s", d)
		}
		if want := []string{"start " + label, "stop " + label, "start " + label}; !slices.Equal(m.lives, want) {
			t.Errorf("instances %q, want %q", m.lives, want)
		}
	})
}

func TestLoadDisabledBefore(t *testing.T) {
	m := newMac(t)
	m.Disable(label)
	if d, err := m.ctl.Disabled(t.Context(), label); err != nil || !d {
		t.Fatalf("disabled: %v, %v", d, err)
	}
	if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
		t.Fatal(err)
	}
	if d, err := m.ctl.Disabled(t.Context(), label); err != nil || d {
		t.Errorf("still disabled: %v, %v", d, err)
	}
}

func TestLoadSwitchedOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		m.Blocked = []string{label}
		_, err := m.ctl.Load(t.Context(), label, plistPath)
		var e *launchd.Error
		if !errors.Is(err, launchd.SwitchedOff) || !errors.As(err, &e) {
			t.Fatalf("got %v", err)
		}
		if !strings.Contains(e.Hint(), "Login Items & Extensions") {
			t.Errorf("hint %q doesn't say where the switch is", e.Hint())
		}
	})
}

func TestBootstrapRefused(t *testing.T) {
	for name, spoil := range map[string]func(*mac){
		"group may write": func(m *mac) { m.file.Mode = 0o664 },
		"user's file":     func(m *mac) { m.file.UID = 501 },
		"wrong name":      func(m *mac) { m.job.Label = "org.example.other" },
		"disabled":        func(m *mac) { m.Disable(label) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMac(t)
				spoil(m)
				begin := time.Now()
				err := m.ctl.Bootstrap(t.Context(), label, plistPath)
				var e *launchd.Error
				if !errors.As(err, &e) || e.Code != launchd.InputOutput || e.Hint() == "" {
					t.Fatalf("got %v", err)
				}
				if d := time.Since(begin); d < 15*time.Second || d > 16*time.Second {
					t.Errorf("gave up after %v, want 15 s", d)
				}
			})
		})
	}
}

func TestBootstrapLoadedAlready(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
			t.Fatal(err)
		}
		// launchd answers 5, and the service is there all the same.
		if err := m.ctl.Bootstrap(t.Context(), label, plistPath); err != nil {
			t.Error(err)
		}
	})
}

func TestBootoutNeverLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		m.Draining = time.Hour
		if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
			t.Fatal(err)
		}
		err := m.ctl.Bootout(t.Context(), label)
		if !errors.Is(err, launchd.InProgress) || !strings.Contains(err.Error(), "SIGTERMed") {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := m.ctl.Bootout(ctx, label); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
	})
}

func TestAbsentService(t *testing.T) {
	m := newMac(t)
	if err := m.ctl.Bootout(t.Context(), label); err != nil {
		t.Errorf("bootout of what isn't loaded: %v", err)
	}
	if s, err := m.ctl.Print(t.Context(), label); err != nil || s.Loaded {
		t.Errorf("print: %+v, %v", s, err)
	}
	if err := m.ctl.Kickstart(t.Context(), label, true); !errors.Is(err, launchd.NoSuchService) {
		t.Errorf("kickstart: %v", err)
	}
}

func TestKickstartKills(t *testing.T) {
	m := newMac(t)
	before, err := m.ctl.Load(t.Context(), label, plistPath)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.ctl.Kickstart(t.Context(), label, false); err != nil {
		t.Fatal(err)
	}
	same, err := m.ctl.Print(t.Context(), label)
	if err != nil || same.PID != before.PID {
		t.Errorf("kickstart of a running service: pid %d, was %d, %v", same.PID, before.PID, err)
	}
	if err := m.ctl.Kickstart(t.Context(), label, true); err != nil {
		t.Fatal(err)
	}
	after, err := m.ctl.Print(t.Context(), label)
	if err != nil || after.PID == before.PID || !after.Running() {
		t.Errorf("kickstart -k: %+v, was pid %d, %v", after, before.PID, err)
	}
}

func TestBootLoadsWhatIsEnabled(t *testing.T) {
	m := newMac(t)
	if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
		t.Fatal(err)
	}
	m.Shutdown()
	if refused := m.Boot([]string{plistPath}); refused != nil {
		t.Fatal(refused)
	}
	if s, err := m.ctl.Print(t.Context(), label); err != nil || !s.Running() {
		t.Errorf("after boot: %+v, %v", s, err)
	}
	m.Disable(label)
	m.Shutdown()
	if refused := m.Boot([]string{plistPath}); len(refused) != 1 {
		t.Errorf("a disabled service was loaded at boot")
	}
	if want := []string{"start", "stop", "start", "stop"}; !slices.EqualFunc(m.lives, want, func(got, want string) bool { return got == want+" "+label }) {
		t.Errorf("instances %q", m.lives)
	}
}

func TestLabelsAreChecked(t *testing.T) {
	m := newMac(t)
	for _, bad := range []string{"", "a/b", "-k", "a b", "x\n"} {
		if _, err := m.ctl.Load(t.Context(), bad, plistPath); err == nil {
			t.Errorf("label %q was taken", bad)
		}
	}
	if err := m.ctl.Bootstrap(t.Context(), label, "relative.plist"); err == nil {
		t.Error("a relative path was taken")
	}
	if calls := m.Calls(); calls != nil {
		t.Errorf("commands were run: %q", calls)
	}
}

// brokenRunner can't run anything.
type brokenRunner struct{}

func (brokenRunner) Run(context.Context, []byte, string, ...string) ([]byte, []byte, int, error) {
	return nil, nil, -1, errors.New("no such program")
}

func TestRunnerFails(t *testing.T) {
	ctl := launchd.New(launchd.Options{Runner: brokenRunner{}})
	if _, err := ctl.Load(t.Context(), label, plistPath); err == nil {
		t.Error("load succeeded")
	}
	if _, err := ctl.Print(t.Context(), label); err == nil {
		t.Error("print succeeded")
	}
	if _, err := ctl.LoginItem(t.Context(), label); err == nil {
		t.Error("login items were read")
	}
}
