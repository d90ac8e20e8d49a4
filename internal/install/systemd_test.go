//go:build linux

package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A fakeSystemd is the service manager of a host below root, as far as systemctl exposes
// it. It refuses the same requests as systemctl, with the same messages (systemd 252).
type fakeSystemd struct {
	root   string
	loaded map[string]string // the text of each unit, as last read
	active map[string]bool
	starts []string // the program's contents at each start
	fails  bool     // the helper exits when started
}

func (f *fakeSystemd) Run(_ context.Context, _ []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if path != "/usr/bin/systemctl" || len(args) < 2 || args[0] != "--no-ask-password" {
		return nil, nil, -1, fmt.Errorf("%s %q: this host has no such command", path, args)
	}
	refuse := func(status int, format string, args ...any) ([]byte, []byte, int, error) {
		return nil, fmt.Appendf(nil, format+"\n", args...), status, nil
	}
	verb, unit := args[1], args[len(args)-1]
	file := filepath.Join(f.root, unitDir, unit)
	text, err := os.ReadFile(file)
	to, _ := os.Readlink(file)
	masked := to == "/dev/null"
	switch verb {
	case "daemon-reload":
		f.loaded = map[string]string{}
		entries, _ := os.ReadDir(filepath.Join(f.root, unitDir))
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".service") {
				b, _ := os.ReadFile(filepath.Join(f.root, unitDir, e.Name()))
				f.loaded[e.Name()] = string(b)
			}
		}
	case "enable":
		if masked {
			return refuse(1, "Failed to enable unit: Unit file %s is masked.", file)
		}
		if err != nil {
			return refuse(1, "Failed to enable unit: Unit file %s does not exist.", unit)
		}
		link := filepath.Join(f.root, wantsDir, unit)
		os.MkdirAll(filepath.Dir(link), 0o755)
		if err := os.Symlink(file, link); err != nil && !errors.Is(err, os.ErrExist) {
			return refuse(1, "%v", err)
		}
	case "start":
		switch is, ok := f.loaded[unit]; {
		case masked:
			return refuse(1, "Failed to start %s: Unit %s is masked.", unit, unit)
		case !ok:
			return refuse(5, "Failed to start %s: Unit %s not found.", unit, unit)
		case is != string(text):
			return refuse(1, "Warning: The unit file, source configuration file or drop-ins of %s changed on disk. Run 'systemctl daemon-reload' to reload units.", unit)
		}
		program := regexp.MustCompile(`(?m)^ExecStart="([^"]*)"`).FindStringSubmatch(f.loaded[unit])
		b, err := os.ReadFile(filepath.Join(f.root, program[1]))
		if err != nil || f.fails {
			return refuse(1, "Job for %s failed because the control process exited with error code.", unit)
		}
		f.starts = append(f.starts, string(b))
		f.active[unit] = true
	case "stop":
		if _, ok := f.loaded[unit]; !ok && !f.active[unit] {
			return refuse(5, "Failed to stop %s: Unit %s not loaded.", unit, unit)
		}
		f.active[unit] = false
	case "show":
		load, active := "not-found", "inactive"
		if _, ok := f.loaded[unit]; ok || f.active[unit] {
			load = "loaded"
		}
		if f.active[unit] {
			active = "active"
		}
		return fmt.Appendf(nil, "LoadState=%s\nActiveState=%s\n", load, active), nil, 0, nil
	default:
		return refuse(1, "Unknown command verb %s.", verb)
	}
	return nil, nil, 0, nil
}

// A linuxRig is a Linux host below a directory.
type linuxRig struct {
	t        *testing.T
	root     string
	systemd  *fakeSystemd
	o        *Options
	kept     int
	restored int
	steps    []string
}

func newLinuxRig(t *testing.T) *linuxRig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("install accepts only files owned by root, which only root can create")
	}
	g := &linuxRig{t: t, root: t.TempDir()}
	g.systemd = &fakeSystemd{root: g.root, loaded: map[string]string{}, active: map[string]bool{}}
	for _, dir := range []string{runDir, unitDir, "usr/local", "var/lib", "run", "usr/bin"} {
		g.must(os.MkdirAll(filepath.Join(g.root, dir), 0o755))
	}
	source := filepath.Join(t.TempDir(), "meshhelper")
	g.must(os.WriteFile(source, []byte("one"), 0o700))
	g.o = &Options{
		Systemd: true, Label: "meshhelper", Source: source, Arguments: []string{"--label", "meshhelper"},
		StateDir: "/var/lib/meshhelper", Socket: "/run/meshhelper.sock", Runner: g.systemd, Root: g.root,
		Ready: func(context.Context) error {
			if !g.systemd.active["meshhelper.service"] {
				return errors.New("no answer")
			}
			return nil
		},
		Keep: func() error {
			if g.systemd.active["meshhelper.service"] {
				return errors.New("a helper holds the folder")
			}
			g.kept++
			return nil
		},
		Restore: func(context.Context) error { g.restored++; return nil },
	}
	return g
}

func (g *linuxRig) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *linuxRig) report(s Step, err error) { g.steps = append(g.steps, s.Text) }

func (g *linuxRig) install() error { return Install(g.t.Context(), g.o, g.report) }

// files lists the files on the disk, without directories.
func (g *linuxRig) files() (list []string) {
	g.must(filepath.WalkDir(g.root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			info, infoErr := d.Info()
			g.must(infoErr)
			list = append(list, info.Mode().String()+" "+strings.TrimPrefix(path, g.root))
		}
		return err
	}))
	return list
}

var linuxFiles = []string{
	"Lrwxrwxrwx /etc/systemd/system/multi-user.target.wants/meshhelper.service",
	"-rw-r--r-- /etc/systemd/system/meshhelper.service",
	"-rwxr-xr-x /usr/local/libexec/meshhelper",
}

func sorted(list []string) []string {
	slices.SortFunc(list, func(a, b string) int { return strings.Compare(strings.Fields(a)[1], strings.Fields(b)[1]) })
	return list
}

// TestInstallOnLinux installs and upgrades: the files and modes are right, and the mesh
// is kept.
func TestInstallOnLinux(t *testing.T) {
	g := newLinuxRig(t)
	g.must(g.install())
	if diff := cmp.Diff(sorted(slices.Clone(linuxFiles)), sorted(g.files())); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if info, err := os.Stat(filepath.Join(g.root, g.o.StateDir)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("state directory %v, %v: other users must not be able to read the key", info, err)
	}
	state := filepath.Join(g.root, g.o.StateDir, "state.json")
	g.must(os.WriteFile(state, []byte("the mesh"), 0o600))
	// The upgrade also replaces a changed unit.
	g.must(os.WriteFile(g.o.Source, []byte("two"), 0o700))
	g.o.Arguments = append(g.o.Arguments, "--debug")
	g.must(g.install())
	if want := []string{"one", "two"}; !slices.Equal(g.systemd.starts, want) || g.kept != 2 {
		t.Errorf("systemd started %q, want %q; settings were saved %d times", g.systemd.starts, want, g.kept)
	}
	if b, err := os.ReadFile(state); err != nil || string(b) != "the mesh" {
		t.Errorf("the state is %q, %v", b, err)
	}
}

// TestInstallOnLinuxKilled interrupts an install, an upgrade and an uninstall after each
// of their steps: a second run completes each.
func TestInstallOnLinuxKilled(t *testing.T) {
	steps := len(InstallSteps(newLinuxRig(t).o))
	for upgrade := range 2 {
		for i := range steps {
			t.Run(fmt.Sprintf("install %d after step %d", upgrade, i), func(t *testing.T) {
				g := newLinuxRig(t)
				if upgrade == 1 {
					g.must(g.install())
				}
				g.must(os.WriteFile(g.o.Source, []byte("new"), 0o700))
				g.must(until(t.Context(), InstallSteps(g.o)[:i], g.report))
				g.must(g.install())
				if diff := cmp.Diff(sorted(slices.Clone(linuxFiles)), sorted(g.files())); diff != "" {
					t.Errorf("files (-want +got):\n%s", diff)
				}
				if last := g.systemd.starts[len(g.systemd.starts)-1]; last != "new" || !g.systemd.active["meshhelper.service"] {
					t.Errorf("%q runs, active %v", last, g.systemd.active)
				}
			})
			t.Run(fmt.Sprintf("uninstall after step %d of an install", i), func(t *testing.T) {
				g := newLinuxRig(t)
				g.must(until(t.Context(), InstallSteps(g.o)[:i], g.report))
				g.mustUninstall()
			})
		}
	}
	g := newLinuxRig(t)
	g.o.Purge = true
	for i := range UninstallSteps(g.o) {
		t.Run(fmt.Sprintf("uninstall after step %d", i), func(t *testing.T) {
			g := newLinuxRig(t)
			g.must(g.install())
			g.o.Purge = true
			g.must(through(t.Context(), UninstallSteps(g.o)[:i], g.report))
			g.mustUninstall()
		})
	}
}

// mustUninstall uninstalls with Purge and expects nothing to remain.
func (g *linuxRig) mustUninstall() {
	g.t.Helper()
	g.o.Purge = true
	left, err := Uninstall(g.t.Context(), g.o, g.report)
	if err != nil || left != nil || g.files() != nil || g.systemd.active["meshhelper.service"] || g.systemd.loaded["meshhelper.service"] != "" {
		g.t.Errorf("left %q, %v; files %q", left, err, g.files())
	}
}

// TestInstallOnLinuxRefuses installs on hosts that aren't safe or don't work: the error
// says why.
func TestInstallOnLinuxRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(g *linuxRig)
		want  string
	}{
		"no systemd": {func(g *linuxRig) { g.must(os.Remove(filepath.Join(g.root, runDir))) }, "systemd isn't this host's service manager"},
		"masked": {func(g *linuxRig) {
			g.must(os.Symlink("/dev/null", filepath.Join(g.root, unitDir, "meshhelper.service")))
		}, "is masked; to let it start: systemctl unmask meshhelper.service"},
		"another's unit": {func(g *linuxRig) {
			g.must(os.Symlink("/opt/x.service", filepath.Join(g.root, unitDir, "meshhelper.service")))
		}, "is a link to /opt/x.service"},
		"a parent that others can write": {func(g *linuxRig) { g.must(os.Chmod(filepath.Join(g.root, "usr/local"), 0o777)) }, "usr/local"},
		"a folder that others can write": {func(g *linuxRig) {
			g.must(os.MkdirAll(filepath.Join(g.root, libexecDir), 0o755))
			g.must(os.Chmod(filepath.Join(g.root, libexecDir), 0o775))
		}, "no other user can write"},
		"another user's folder": {func(g *linuxRig) {
			g.must(os.MkdirAll(filepath.Join(g.root, libexecDir), 0o755))
			g.must(os.Chown(filepath.Join(g.root, libexecDir), 1000, 1000))
		}, "1000"},
		"a helper that ends": {func(g *linuxRig) { g.systemd.fails = true }, "see why: journalctl -u meshhelper.service"},
		"a bad label":        {func(g *linuxRig) { g.o.Label = "../x" }, "want a letter or digit first"},
		"no program":         {func(g *linuxRig) { g.must(os.Remove(g.o.Source)) }, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newLinuxRig(t)
			tt.spoil(g)
			if err := g.install(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Install returned %v, want %q", err, tt.want)
			}
		})
	}
}

// TestFailedUpgradeStartsAgain has an upgrade fail after the service was stopped: the
// service is started again if it ran before, even if the command was interrupted, and the
// start is reported.
func TestFailedUpgradeStartsAgain(t *testing.T) {
	for name, ran := range map[string]bool{"it ran": true, "it was stopped": false} {
		t.Run(name, func(t *testing.T) {
			g := newLinuxRig(t)
			g.must(g.install())
			g.systemd.active["meshhelper.service"] = ran
			ctx, interrupt := context.WithCancel(t.Context())
			full := errors.New("no space left on device")
			g.o.Keep = func() error { interrupt(); return full }
			g.steps = nil
			if err := Install(ctx, g.o, g.report); !errors.Is(err, full) {
				t.Errorf("Install returned %v", err)
			}
			said := slices.Contains(g.steps, "start the service meshhelper again, because it ran before")
			if g.systemd.active["meshhelper.service"] != ran || said != ran {
				t.Errorf("service active %v, start reported %v", g.systemd.active, said)
			}
		})
	}
}

// TestUninstallBesideAnotherHelper uninstalls labels that aren't installed while another
// helper is: nothing is removed.
func TestUninstallBesideAnotherHelper(t *testing.T) {
	g := newLinuxRig(t)
	g.must(g.install())
	before := g.files()
	g.o.Held = func() error { return errors.New("held") }
	for _, label := range []string{"typo", "../libexec/meshhelper"} {
		g.o.Label, g.o.Purge = label, true
		g.must(os.WriteFile(filepath.Join(g.root, g.o.StateDir, "key"), nil, 0o600))
		if _, err := Uninstall(t.Context(), g.o, g.report); err == nil {
			t.Errorf("label %q: no error", label)
		}
		g.must(os.Remove(filepath.Join(g.root, g.o.StateDir, "key")))
		if diff := cmp.Diff(before, g.files()); diff != "" || g.restored != 0 {
			t.Errorf("label %q: restored %d times, files (-before +after):\n%s", label, g.restored, diff)
		}
	}
}

// TestUninstallOnLinuxWithoutSystemd uninstalls where systemd no longer runs: the host is
// restored and the files are removed.
func TestUninstallOnLinuxWithoutSystemd(t *testing.T) {
	g := newLinuxRig(t)
	g.must(g.install())
	g.must(os.Remove(filepath.Join(g.root, runDir)))
	g.systemd.active, g.systemd.loaded = map[string]bool{}, nil
	g.mustUninstall()
	if g.restored != 1 {
		t.Errorf("the host was restored %d times, want once", g.restored)
	}
}

// TestUnit has systemd verify the unit and rate the service's exposure.
func TestUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skipf("systemd-analyze isn't available: %v", err)
	}
	o := &Options{Systemd: true, Label: "meshhelper", StateDir: "/var/lib/meshhelper", Arguments: []string{"--label", `a "b" %n $HOME \x`}}
	dir := t.TempDir()
	file := filepath.Join(dir, o.Unit())
	text := strings.Replace(o.unitText(), o.Program(), "/bin/true", 1) // which exists
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(analyze, "verify", "--man=no", file).CombinedOutput()
	if err != nil || strings.Contains(string(out), o.Unit()) {
		t.Errorf("verify: %v\n%s\n%s", err, out, text)
	}
	out, err = exec.Command(analyze, "security", "--offline=true", "--no-pager", file).CombinedOutput()
	if err != nil {
		t.Fatalf("security: %v\n%s", err, out)
	}
	level := regexp.MustCompile(`Overall exposure level for .*: ([0-9.]+)`).FindStringSubmatch(string(out))
	if level == nil {
		t.Fatalf("systemd-analyze security prints no level:\n%s", out)
	}
	t.Logf("exposure level %s", level[1])
	if n, err := strconv.ParseFloat(level[1], 64); err != nil || n > 3.5 {
		t.Errorf("exposure level %s, want at most 3.5 (%v)\n%s", level[1], err, out)
	}
}

// TestQuoteUnit checks the quoting of words in a unit's command line.
func TestQuoteUnit(t *testing.T) {
	for word, want := range map[string]string{
		"/a b": `"/a b"`, `%n $HOME`: `"%%n $$HOME"`, `\"`: `"\\\""`, "a\nb": `"a\nb"`,
	} {
		if got := quoteUnit(word); got != want {
			t.Errorf("%q: %s, want %s", word, got, want)
		}
	}
}

// TestChecksOnLinux breaks one part of the installed service at a time: the matching
// check fails.
func TestChecksOnLinux(t *testing.T) {
	unit := func(g *linuxRig) string { return filepath.Join(g.root, unitDir, "meshhelper.service") }
	for name, tt := range map[string]struct {
		spoil      func(g *linuxRig)
		wrong      string // the checks that find something
		want, hint string
	}{
		"nothing": {func(*linuxRig) {}, "", "", ""},
		"no unit": {func(g *linuxRig) { g.must(os.Remove(unit(g))) }, "service", "there is no /etc/systemd/system/meshhelper.service", "sudo meshhelper install"},
		"no unit, nor systemd": {func(g *linuxRig) { g.must(errors.Join(os.Remove(unit(g)), os.Remove(filepath.Join(g.root, runDir)))) },
			"service", "systemd isn't this host's service manager", "meshhelper run"},
		"no systemd": {func(g *linuxRig) { g.must(os.Remove(filepath.Join(g.root, runDir))) }, "service", "nothing starts the unit", "meshhelper run"},
		"an edited unit": {func(g *linuxRig) {
			g.must(os.WriteFile(unit(g), []byte(strings.Replace(g.o.unitText(), "Restart=always", "Restart=no", 1)), 0o644))
		}, "unit", "isn't the unit that this version installs", "sudo meshhelper install"},
		"another version's unit": {func(g *linuxRig) { g.o.Arguments = append(g.o.Arguments, "--new") }, "unit", "another version wrote it", "sudo meshhelper install"},
		"masked": {func(g *linuxRig) { g.must(errors.Join(os.Remove(unit(g)), os.Symlink("/dev/null", unit(g)))) },
			"unit", "is masked", "systemctl unmask meshhelper.service"},
		"another's unit": {func(g *linuxRig) { g.must(errors.Join(os.Remove(unit(g)), os.Symlink("/opt/x.service", unit(g)))) },
			"unit", "is a link to /opt/x.service", "remove the link"},
		"not enabled": {func(g *linuxRig) { g.must(os.Remove(filepath.Join(g.root, wantsDir, "meshhelper.service"))) },
			"start with the host", "isn't enabled", "systemctl enable meshhelper.service"},
		"stopped": {func(g *linuxRig) { g.systemd.active["meshhelper.service"] = false }, "service", "is stopped", "systemctl start meshhelper.service"},
		"not loaded": {func(g *linuxRig) { g.systemd.active, g.systemd.loaded = map[string]bool{}, map[string]string{} },
			"service", "hasn't loaded", "systemctl daemon-reload"},
		"a program that others can write": {func(g *linuxRig) { g.must(os.Chmod(filepath.Join(g.root, g.o.Program()), 0o777)) }, "program", "others may write to it", "chmod go-w"},
		"no program":                      {func(g *linuxRig) { g.must(os.Remove(filepath.Join(g.root, g.o.Program()))) }, "program", "no such file", "sudo meshhelper install"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newLinuxRig(t)
			g.must(g.install())
			tt.spoil(g)
			var wrong, messages, hints []string
			for _, c := range Checks(t.Context(), g.o) {
				if !c.OK {
					wrong, messages, hints = append(wrong, c.Name), append(messages, c.Message), append(hints, c.Hint)
				}
				if c.Message == "" || c.OK != (c.Hint == "") {
					t.Errorf("%+v", c)
				}
			}
			if strings.Join(wrong, ", ") != tt.wrong || !strings.Contains(strings.Join(messages, "; "), tt.want) || !strings.Contains(strings.Join(hints, "; "), tt.hint) {
				t.Errorf("%q: %q -> %q; want %q: %q -> %q", wrong, messages, hints, tt.wrong, tt.want, tt.hint)
			}
		})
	}
}
