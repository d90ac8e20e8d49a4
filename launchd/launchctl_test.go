package launchd_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/launchd"
	"github.com/meshhelper/meshhelper/launchd/launchdtest"
)

const plistPath = "/Library/LaunchDaemons/" + label + ".plist"

// A mac is a fake launchd with one property list on its disk.
type mac struct {
	*launchdtest.Launchd
	ctl  *launchd.Launchctl
	file launchd.File
	job  *launchd.Job

	mu  sync.Mutex
	saw []string // calls of Start and Stop
}

func (m *mac) note(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saw = append(m.saw, what+" "+label)
}

func (m *mac) lives() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.saw)
}

func newMac(t *testing.T) *mac {
	t.Helper()
	m := &mac{file: launchd.File{Path: plistPath, Mode: 0o644}, job: daemon()}
	m.Launchd = &launchdtest.Launchd{
		Files: func(p string) (launchd.File, []byte, error) {
			if p != plistPath {
				return launchd.File{}, nil, fs.ErrNotExist
			}
			data, err := m.job.Render()
			return m.file, data, err
		},
		Start: func(*launchd.Job, int) { m.note("start") },
		Stop:  func(string) { m.note("stop") },
	}
	m.ctl = launchd.New(launchd.Options{Runner: m.Launchd})
	return m
}

// TestLoadFirstTime loads a service that was never loaded, and checks the commands for
// it.
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
		"/usr/bin/sfltool dumpbtm",
		"/bin/launchctl bootout system/" + label,
		"/bin/launchctl enable system/" + label,
		"/bin/launchctl bootstrap system " + plistPath,
		"/bin/launchctl print system/" + label,
	}
	if diff := cmp.Diff(want, m.Calls()); diff != "" {
		t.Errorf("commands (-want +got):\n%s", diff)
	}
}

// TestLoadUpgradeWaits upgrades a service whose old instance takes four seconds to exit,
// and that launchd takes another four to remove: Load waits for both.
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
		if want := []string{"start " + label, "stop " + label, "start " + label}; !slices.Equal(m.lives(), want) {
			t.Errorf("instances %q, want %q", m.lives(), want)
		}
	})
}

// TestLoadDisabledBefore loads a disabled service, which enables it.
func TestLoadDisabledBefore(t *testing.T) {
	m := newMac(t)
	m.Disable(label)
	if d, err := m.ctl.Disabled(t.Context(), label); err != nil || !d {
		t.Fatalf("the service isn't disabled: %v, %v", d, err)
	}
	if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
		t.Fatal(err)
	}
	if d, err := m.ctl.Disabled(t.Context(), label); err != nil || d {
		t.Errorf("still disabled: %v, %v", d, err)
	}
}

// TestLoadSwitchedOff loads a service that the user has switched off: the error's hint
// names the setting.
func TestLoadSwitchedOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		m.Blocked = []string{label}
		_, err := m.ctl.Load(t.Context(), label, plistPath)
		var e *launchd.Error
		if !errors.Is(err, launchd.SwitchedOff) || !errors.As(err, &e) {
			t.Fatalf("Load returned %v", err)
		}
		if !strings.Contains(e.Hint(), "Login Items & Extensions") {
			t.Errorf("hint %q doesn't name the switch's location", e.Hint())
		}
	})
}

// TestLoadSwitchedOffWhileItRuns upgrades a running service that the user has switched
// off: it keeps running.
func TestLoadSwitchedOffWhileItRuns(t *testing.T) {
	m := newMac(t)
	if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
		t.Fatal(err)
	}
	m.Blocked = []string{label}
	if _, err := m.ctl.Load(t.Context(), label, plistPath); !errors.Is(err, launchd.SwitchedOff) {
		t.Errorf("Load returned %v", err)
	}
	if s, err := m.ctl.Print(t.Context(), label); err != nil || !s.Running() {
		t.Errorf("the service doesn't run any more: %v, %v", s, err)
	}
}

// TestBootstrapRefused bootstraps a property list that launchd refuses: it answers with
// error 5, as it does for some seconds after an unload, so Bootstrap retries for 15 s.
func TestBootstrapRefused(t *testing.T) {
	for name, spoil := range map[string]func(*mac){
		"group may write": func(m *mac) { m.file.Mode = 0o664 },
		"user's file":     func(m *mac) { m.file.UID = 501 },
		"wrong name":      func(m *mac) { m.job.Label = "org.example.other" },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMac(t)
				spoil(m)
				begin := time.Now()
				err := m.ctl.Bootstrap(t.Context(), label, plistPath)
				var e *launchd.Error
				if !errors.As(err, &e) || e.Code != launchd.InputOutput || e.Hint() == "" {
					t.Fatalf("Bootstrap returned %v", err)
				}
				if d := time.Since(begin); d < 15*time.Second || d > 16*time.Second {
					t.Errorf("gave up after %v, want 15 s", d)
				}
			})
		})
	}
}

// TestBootstrapDisabled bootstraps a disabled service: the hint names the command that
// enables it.
func TestBootstrapDisabled(t *testing.T) {
	m := newMac(t)
	m.Disable(label)
	err := m.ctl.Bootstrap(t.Context(), label, plistPath)
	var e *launchd.Error
	if !errors.Is(err, launchd.Disabled) || !errors.As(err, &e) || !strings.Contains(e.Hint(), "launchctl enable") {
		t.Errorf("Bootstrap returned %v", err)
	}
}

// TestErrorsOfMacs parses error messages of launchctl on real Macs.
func TestErrorsOfMacs(t *testing.T) {
	for _, tt := range []struct {
		file, line string
		status     int
		want       launchd.Code
		says       string
	}{
		{"launchctl-bootstrap-errors.txt", "Bootstrap failed: 5", 5, launchd.InputOutput, "Input/output error"},
		{"launchctl-bootstrap-errors.txt", "Boot-out failed: 3", 3, launchd.NoSuchProcess, "No such process"},
		{"launchctl-bootstrap-errors.txt", "Bootstrap failed: 119", 119, launchd.Disabled, "Service is disabled"},
		{"launchctl-bootstrap-errors.txt", "Bootstrap failed: 119", 1, launchd.Disabled, "Service is disabled"},
		{"launchctl-print-missing.txt", "", 113, launchd.NoSuchService, "Could not find service"},
		{"launchctl-print-missing.txt", "", 64, launchd.NoSuchService, "Could not find service"},
	} {
		stderr := macFile(t, tt.file)
		if tt.line != "" {
			_, after, _ := strings.Cut(string(stderr), tt.line)
			line, _, _ := strings.Cut(after, "\n")
			// Newer releases print another line before the error.
			stderr = []byte("Bad request.\n" + tt.line + line + "\n")
		}
		ctl := launchd.New(launchd.Options{Runner: failing{stderr, tt.status}})
		err := ctl.Kickstart(t.Context(), label, false)
		var e *launchd.Error
		if !errors.As(err, &e) || e.Code != tt.want || !strings.Contains(e.Message, tt.says) {
			t.Errorf("%s %s: %v, want code %d and %q", tt.file, tt.line, err, tt.want, tt.says)
		}
	}
	if s, err := launchd.New(launchd.Options{Runner: failing{macFile(t, "launchctl-print-missing.txt"), 64}}).Print(t.Context(), label); err != nil || s.Loaded {
		t.Errorf("print of a missing service: %+v, %v", s, err)
	}
}

// failing is a runner whose commands print stderr and exit with status.
type failing struct {
	stderr []byte
	status int
}

func (f failing) Run(context.Context, []byte, string, ...string) ([]byte, []byte, int, error) {
	return nil, f.stderr, f.status, nil
}

// TestLoadWaitsForTheSecondSpawn has the kernel refuse the first process after an
// upgrade. launchd starts the next one ten seconds later, and Load waits for it.
func TestLoadWaitsForTheSecondSpawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		m.job.KeepAlive = &launchd.KeepAlive{Always: true}
		m.RefuseSignature(label, 1)
		if s, err := m.ctl.Load(t.Context(), label, plistPath); err != nil || !s.Running() {
			t.Errorf("after one refusal: %v, %v", s, err)
		}
		m.RefuseSignature(label, 2)
		if s, err := m.ctl.Load(t.Context(), label, plistPath); err != nil || !s.Running() {
			t.Errorf("after two refusals: %v, %v", s, err)
		}
	})
}

// TestLoadBadSignature has the kernel refuse every process of the program: the error
// names the signature.
func TestLoadBadSignature(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		m.job.KeepAlive = &launchd.KeepAlive{Always: true}
		m.RefuseSignature(label, -1)
		_, err := m.ctl.Load(t.Context(), label, plistPath)
		var e *launchd.Error
		if !errors.Is(err, launchd.CodeSigning) || !errors.As(err, &e) || !strings.Contains(e.Hint(), "codesign") || !strings.Contains(e.Message, "OS_REASON_CODESIGNING") {
			t.Errorf("Load returned %v", err)
		}
		if m.lives() != nil {
			t.Errorf("instances %q", m.lives())
		}
		m.Shutdown()
	})
}

// TestProgramOverwrittenInPlace overwrites a program in place, which gets it killed, and
// replaces it, after which it runs.
func TestProgramOverwrittenInPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "program")
		write := func(path, text string) {
			if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		write(file, "one")
		m := newMac(t)
		m.Program = func(string) (fs.FileInfo, string, error) {
			info, err := os.Stat(file)
			if err != nil {
				return nil, "", err
			}
			b, err := os.ReadFile(file)
			return info, string(b), err
		}
		load := func() error {
			_, err := m.ctl.Load(t.Context(), label, plistPath)
			return err
		}
		if err := load(); err != nil {
			t.Fatal(err)
		}
		write(file, "two")
		if err := load(); !errors.Is(err, launchd.CodeSigning) {
			t.Errorf("overwritten in place: %v", err)
		}
		write(file+".new", "two")
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
		if err := load(); err != nil {
			t.Errorf("replaced: %v", err)
		}
	})
}

// TestExitTimeOut has launchd kill a process that doesn't exit in its exit timeout.
func TestExitTimeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		m.job.ExitTimeOut = new(20)
		hang := make(chan struct{})
		m.Stop = func(string) { <-hang }
		m.Kill = func(string) { m.note("kill"); hang <- struct{}{} }
		if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := m.ctl.Bootout(t.Context(), label); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d < 20*time.Second || d > 21*time.Second {
			t.Errorf("gone after %v, want 20 s", d)
		}

		if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
			t.Fatal(err)
		}
		begin = time.Now()
		if err := m.ctl.Kickstart(t.Context(), label, true); err != nil {
			t.Fatal(err)
		}
		s, err := m.ctl.Print(t.Context(), label)
		if d := time.Since(begin); err != nil || d != 20*time.Second || s.LastSignal != "Killed: 9" || !s.Running() || s.ExitTimeOut != 20 || s.Runs != 2 {
			t.Errorf("kickstart -k: after %v: %+v, %v", d, s, err)
		}
		want := []string{"start", "kill", "start", "kill", "start"}
		if !slices.EqualFunc(m.lives(), want, func(got, want string) bool { return got == want+" "+label }) {
			t.Errorf("instances %q", m.lives())
		}
		go func() { hang <- struct{}{} }() // the process exits on its own
		m.Shutdown()
	})
}

// TestBootoutThatIsSlow has launchctl wait for the process for longer than the runner's
// timeout: the bootout still takes effect, so it isn't an error.
func TestBootoutThatIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
			t.Fatal(err)
		}
		ctl := launchd.New(launchd.Options{Runner: slowBootout{m.Launchd}})
		if err := ctl.Bootout(t.Context(), label); err != nil {
			t.Error(err)
		}
	})
}

type slowBootout struct{ launchd.Runner }

func (s slowBootout) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	stdout, stderr, status, err := s.Runner.Run(ctx, stdin, path, args...)
	if args[0] == "bootout" {
		return nil, nil, -1, fmt.Errorf("run %s: %w", path, context.DeadlineExceeded)
	}
	return stdout, stderr, status, err
}

// TestBootstrapLoadedAlready bootstraps a loaded service: that isn't an error.
func TestBootstrapLoadedAlready(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
			t.Fatal(err)
		}
		// launchd answers with error 5 although the service is loaded.
		if err := m.ctl.Bootstrap(t.Context(), label, plistPath); err != nil {
			t.Error(err)
		}
	})
}

// TestBootoutNeverLeaves has the old process outlive every wait: Bootout returns an
// error, and respects its context.
func TestBootoutNeverLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		m.Draining = time.Hour
		if _, err := m.ctl.Load(t.Context(), label, plistPath); err != nil {
			t.Fatal(err)
		}
		err := m.ctl.Bootout(t.Context(), label)
		if !errors.Is(err, launchd.InProgress) || !strings.Contains(err.Error(), "SIGTERMed") {
			t.Errorf("Bootout returned %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := m.ctl.Bootout(ctx, label); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
	})
}

// TestAbsentService boots out, prints and kickstarts a service that isn't loaded.
func TestAbsentService(t *testing.T) {
	m := newMac(t)
	if err := m.ctl.Bootout(t.Context(), label); err != nil {
		t.Errorf("bootout of an absent service: %v", err)
	}
	if s, err := m.ctl.Print(t.Context(), label); err != nil || s.Loaded {
		t.Errorf("print: %+v, %v", s, err)
	}
	if err := m.ctl.Kickstart(t.Context(), label, true); !errors.Is(err, launchd.NoSuchService) {
		t.Errorf("kickstart: %v", err)
	}
}

// TestKickstartKills checks that kickstart leaves a running service alone, and replaces
// its process with -k.
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

// TestBootLoadsWhatIsEnabled reboots with the service enabled and then disabled.
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
	if want := []string{"start", "stop", "start", "stop"}; !slices.EqualFunc(m.lives(), want, func(got, want string) bool { return got == want+" "+label }) {
		t.Errorf("instances %q", m.lives())
	}
}

// TestLabelsAreChecked checks that no invalid label or path reaches a command.
func TestLabelsAreChecked(t *testing.T) {
	m := newMac(t)
	for _, bad := range []string{"", "a/b", "-k", "a b", "x\n"} {
		if _, err := m.ctl.Load(t.Context(), bad, plistPath); err == nil {
			t.Errorf("label %q was accepted", bad)
		}
	}
	if err := m.ctl.Bootstrap(t.Context(), label, "relative.plist"); err == nil {
		t.Error("a relative path was accepted")
	}
	if calls := m.Calls(); calls != nil {
		t.Errorf("commands were run: %q", calls)
	}
}

// brokenRunner is a runner that can't run any program.
type brokenRunner struct{}

func (brokenRunner) Run(context.Context, []byte, string, ...string) ([]byte, []byte, int, error) {
	return nil, nil, -1, errors.New("no such program")
}

// TestRunnerFails checks that each call returns an error if no program can be run.
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
