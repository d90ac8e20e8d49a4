package install

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/launchd"
)

// A rig is a simulated Mac with a disk, and a helper that answers while launchd runs it.
type rig struct {
	t        *testing.T
	mac      *simmac.Mac
	root     string
	o        *Options
	lives    []string // launchd's starts and stops of the helper
	alive    bool
	restored int
	restore  error
	keep     error    // returned when the settings are saved
	steps    []string // reported steps, failures with their error
}

const label = "org.meshhelper"

func newRig(t *testing.T) *rig {
	t.Helper()
	g := &rig{t: t, root: t.TempDir()}
	g.mac = simmac.New(simmac.Options{Root: g.root})
	g.mac.Launchd.Start = func(j *launchd.Job, _ int) {
		program, err := os.ReadFile(filepath.Join(g.root, j.ProgramArguments[0]))
		if err != nil {
			t.Errorf("launchd started a missing program: %v", err)
		}
		g.lives, g.alive = append(g.lives, "start "+string(program)), true
	}
	g.mac.Launchd.Stop = func(string) { g.lives, g.alive = append(g.lives, "stop"), false }
	source := filepath.Join(t.TempDir(), "meshhelper")
	g.must(os.WriteFile(source, []byte("one"), 0o700))
	g.must(os.MkdirAll(filepath.Join(g.root, "Library"), 0o755))
	g.must(os.MkdirAll(filepath.Join(g.root, "var/run"), 0o755))
	g.o = &Options{
		Label: label, Source: source, Arguments: []string{"--operator", "ann"},
		StateDir: "/Library/Application Support/meshhelper", LogDir: "/var/log/meshhelper", Socket: "/var/run/meshhelper.sock",
		Runner: g.mac, Root: g.root,
		Ready: func(context.Context) error {
			if !g.alive {
				return errors.New("no answer")
			}
			return nil
		},
		Keep: func() error {
			if g.alive {
				return errors.New("a helper holds the folder")
			}
			return g.keep
		},
		Restore: func(context.Context) error { g.restored++; return g.restore },
	}
	return g
}

func (g *rig) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *rig) report(s Step, err error) {
	text := s.Text
	if err != nil {
		text += ": " + err.Error()
	}
	g.steps = append(g.steps, text)
}

func (g *rig) install() error { return Install(g.t.Context(), g.o, g.report) }

// files lists the files on the disk with their modes.
func (g *rig) files() (list []string) {
	filepath.WalkDir(g.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if info, err := d.Info(); err == nil && !d.IsDir() {
			list = append(list, info.Mode().String()+" "+strings.TrimPrefix(path, g.root))
		}
		return nil
	})
	return list
}

// TestInstall installs the helper: the files, modes, firewall rule and arguments are
// right, and a repeated install takes the steps that the dry run prints.
func TestInstall(t *testing.T) {
	g := newRig(t)
	g.must(g.install())
	want := []string{
		"-rw-r--r-- /Library/LaunchDaemons/org.meshhelper.plist",
		"-rwxr-xr-x /Library/PrivilegedHelperTools/org.meshhelper",
	}
	if diff := cmp.Diff(want, g.files()); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	info, err := os.Stat(filepath.Join(g.root, g.o.StateDir))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("state directory %v, %v: other users must not be able to read the key", info, err)
	}
	if !g.mac.Allowed(g.o.Program()) {
		t.Error("the program isn't registered with the Application Firewall")
	}
	data, err := os.ReadFile(filepath.Join(g.root, g.o.List()))
	g.must(err)
	j, err := launchd.Parse(data)
	g.must(err)
	if want := []string{g.o.Program(), "run", "--operator", "ann"}; !slices.Equal(j.ProgramArguments, want) {
		t.Errorf("launchd runs %q, want %q", j.ProgramArguments, want)
	}
	g.steps = nil
	g.must(g.install()) // an upgrade, with the same steps
	var texts []string
	for _, s := range InstallSteps(g.o) {
		texts = append(texts, s.Text)
	}
	if diff := cmp.Diff(texts, g.steps); diff != "" {
		t.Errorf("a dry run shows different steps (-dry +done):\n%s", diff)
	}
}

// TestUpgradeInPlace upgrades a running helper that takes time to exit: the new program
// is a new file, since the kernel kills a program that is overwritten, and the mesh is
// kept.
func TestUpgradeInPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t)
		g.mac.Launchd.Draining, g.mac.Launchd.Settling = 3*time.Second, 4*time.Second
		g.must(g.install())
		state := filepath.Join(g.root, g.o.StateDir, "state.json")
		g.must(os.WriteFile(state, []byte("the mesh"), 0o600))
		program := filepath.Join(g.root, g.o.Program())
		running, err := os.Open(program) // as the old helper's process has it open
		g.must(err)
		defer running.Close()
		g.must(os.WriteFile(g.o.Source, []byte("two"), 0o700))
		g.must(g.install())
		if want := []string{"start one", "stop", "start two"}; !slices.Equal(g.lives, want) {
			t.Errorf("starts and stops %q, want %q", g.lives, want)
		}
		if old, err := running.Stat(); err != nil || old.Size() != 3 {
			t.Errorf("the running program's file was written to: %v, %v", old, err)
		}
		if now, err := os.Stat(program); err != nil || os.SameFile(now, must1(t)(running.Stat())) {
			t.Errorf("the program was replaced in place, %v", err)
		}
		if b, err := os.ReadFile(state); err != nil || string(b) != "the mesh" {
			t.Errorf("the state is %q, %v", b, err)
		}
	})
}

// must1 returns a value, or fails the test on an error.
func must1(t *testing.T) func(fs.FileInfo, error) fs.FileInfo {
	return func(i fs.FileInfo, err error) fs.FileInfo {
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
}

// TestInstallRefuses installs on hosts that aren't safe or don't work: the error says
// why, and no temporary file remains.
func TestInstallRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(g *rig)
		want  string
	}{
		"a folder that others can write": {func(g *rig) {
			dir := filepath.Join(g.root, programDir)
			g.must(os.MkdirAll(dir, 0o755))
			g.must(os.Chmod(dir, 0o775))
		}, "no other user can write"},
		"a parent that others can write": {func(g *rig) { g.must(os.Chmod(filepath.Join(g.root, "Library"), 0o777)) }, "it would run as root"},
		"a link to the state": {func(g *rig) {
			g.must(os.MkdirAll(filepath.Join(g.root, filepath.Dir(g.o.StateDir)), 0o755))
			g.must(os.Symlink(g.t.TempDir(), filepath.Join(g.root, g.o.StateDir)))
		}, "must be a folder"},
		"no program":       {func(g *rig) { g.must(os.Remove(g.o.Source)) }, "no such file"},
		"a folder":         {func(g *rig) { g.o.Source = g.t.TempDir() }, "not a regular file"},
		"a relative path":  {func(g *rig) { g.o.Source = "meshhelper" }, "not an absolute path"},
		"a bad label":      {func(g *rig) { g.o.Label = "../x" }, "Label"},
		"a silent helper":  {func(g *rig) { g.mac.Launchd.Start = nil }, "no answer"},
		"a hanging daemon": {func(g *rig) { g.mac.Hang("/bin/launchctl", true) }, "context deadline exceeded"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			tt.spoil(g)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			err := Install(ctx, g.o, g.report)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Install returned %v, want %q", err, tt.want)
			}
			for _, f := range g.files() {
				if strings.Contains(f, "/.") {
					t.Errorf("left behind: %s", f)
				}
			}
		})
	}
}

// TestFailedUpgradeGoesOn has an upgrade fail before and after the service is stopped:
// the old version runs afterwards.
func TestFailedUpgradeGoesOn(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(g *rig)
		lives []string
	}{
		"switched off":          {func(g *rig) { g.mac.Launchd.Blocked = []string{label} }, []string{"start one"}},
		"settings aren't saved": {func(g *rig) { g.keep = errors.New("no space left on device") }, []string{"start one", "stop", "start one"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newRig(t)
				g.must(g.install())
				tt.spoil(g)
				if err := g.install(); err == nil || !slices.Equal(g.lives, tt.lives) || !g.alive {
					t.Errorf("%v; starts and stops %q, want %q", err, g.lives, tt.lives)
				}
			})
		})
	}
}

// TestInstallSwitchedOff installs a service that the user has switched off: the error
// says where to switch it on.
func TestInstallSwitchedOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t)
		g.mac.Launchd.Blocked = []string{label}
		var e *launchd.Error
		if err := g.install(); !errors.Is(err, launchd.SwitchedOff) || !errors.As(err, &e) || !strings.Contains(e.Hint(), "Login Items") {
			t.Errorf("Install returned %v", err)
		}
	})
}

// TestFirewallIsOptional installs where a profile manages the Application Firewall: the
// failed step is reported, and the install succeeds.
func TestFirewallIsOptional(t *testing.T) {
	g := newRig(t)
	g.o.Runner = noFirewall{g.mac}
	g.must(g.install())
	if !slices.ContainsFunc(g.steps, func(s string) bool { return strings.Contains(s, "managed by a profile") }) {
		t.Errorf("the failure isn't reported: %q", g.steps)
	}
}

// noFirewall is a Mac whose firewall is managed by a profile.
type noFirewall struct{ *simmac.Mac }

func (n noFirewall) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if path == firewall {
		return []byte("Firewall settings are managed by a profile\n"), nil, 1, nil
	}
	return n.Mac.Run(ctx, stdin, path, args...)
}

// TestUninstall uninstalls, which keeps the state and the logs, repeats it, and purges.
func TestUninstall(t *testing.T) {
	g := newRig(t)
	g.must(g.install())
	g.must(os.WriteFile(filepath.Join(g.root, g.o.Socket), nil, 0o600))
	g.must(os.WriteFile(filepath.Join(g.root, g.o.StateDir, "key"), nil, 0o600))
	link := filepath.Join(g.root, linkPath)
	g.must(os.MkdirAll(filepath.Dir(link), 0o755))
	g.must(os.Symlink(g.o.Program(), link))

	left, err := Uninstall(t.Context(), g.o, g.report)
	if err != nil || !slices.Equal(left, []string{g.o.LogDir, g.o.StateDir}) {
		t.Errorf("left %q, %v", left, err)
	}
	if g.alive || g.restored != 1 || g.mac.Allowed(g.o.Program()) {
		t.Errorf("alive %v, restored %d times, allowed %v", g.alive, g.restored, g.mac.Allowed(g.o.Program()))
	}
	if got := g.files(); !slices.Equal(got, []string{"-rw------- " + g.o.StateDir + "/key"}) {
		t.Errorf("the remaining files are %q", got)
	}
	if left, err := Uninstall(t.Context(), g.o, g.report); err != nil || len(left) != 2 {
		t.Errorf("second uninstall: left %q, %v", left, err)
	}
	g.o.Purge = true
	if left, err := Uninstall(t.Context(), g.o, g.report); err != nil || left != nil {
		t.Errorf("purge: left %q, %v", left, err)
	}
}

// TestUninstallHalfRemoved purges an installation of which a part is missing: nothing
// remains.
func TestUninstallHalfRemoved(t *testing.T) {
	for name, remove := range map[string]func(g *rig) string{
		"no property list": func(g *rig) string { return g.o.List() },
		"no program":       func(g *rig) string { return g.o.Program() },
		"no state":         func(g *rig) string { return g.o.StateDir },
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.must(g.install())
			g.mac.Launchd.Shutdown() // the helper is dead
			g.must(os.RemoveAll(filepath.Join(g.root, remove(g))))
			g.o.Purge = true
			if left, err := Uninstall(t.Context(), g.o, g.report); err != nil || left != nil {
				t.Errorf("left %q, %v", left, err)
			}
			if got := g.files(); got != nil {
				t.Errorf("the remaining files are %q", got)
			}
		})
	}
}

// TestUninstallKeepsTheJournalWhileItIsNeeded has the restoring of the host fail: the
// state directory with the journal stays, even with Purge, until a second uninstall
// succeeds.
func TestUninstallKeepsTheJournalWhileItIsNeeded(t *testing.T) {
	g := newRig(t)
	g.must(g.install())
	g.o.Purge, g.restore = true, errors.New("pfctl failed")
	left, err := Uninstall(t.Context(), g.o, g.report)
	if err == nil || !strings.Contains(err.Error(), "pfctl failed") || !slices.Contains(left, g.o.StateDir) {
		t.Errorf("left %q, %v", left, err)
	}
	if slices.Contains(left, g.o.Program()) {
		t.Error("the rest wasn't removed")
	}
	g.restore = nil
	if left, err := Uninstall(t.Context(), g.o, g.report); err != nil || left != nil {
		t.Errorf("second uninstall: left %q, %v", left, err)
	}
}

// TestUninstallLeavesOthersLink uninstalls beside a link that leads to another program:
// the link stays.
func TestUninstallLeavesOthersLink(t *testing.T) {
	g := newRig(t)
	link := filepath.Join(g.root, linkPath)
	g.must(os.MkdirAll(filepath.Dir(link), 0o755))
	g.must(os.Symlink("/opt/homebrew/bin/meshhelper", link))
	if _, err := Uninstall(t.Context(), g.o, g.report); err != nil {
		t.Error(err)
	}
	if _, err := os.Readlink(link); err != nil {
		t.Errorf("another user's link is gone: %v", err)
	}
}

// TestOperator checks which values of SUDO_UID are errors.
func TestOperator(t *testing.T) {
	env := func(v string) func(string) string { return func(string) string { return v } }
	for v, ok := range map[string]bool{"": true, "0": true, "x": false, "-1": false, "4294967296": false, "4000000000": false} {
		name, err := Operator(env(v))
		if (err == nil) != ok || name != "" {
			t.Errorf("SUDO_UID=%q: %q, %v", v, name, err)
		}
	}
}
