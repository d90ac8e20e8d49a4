//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/macos"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/launchd"
)

// a macRig is a simulated Mac whose launchd runs the command's real `run`, and on
// which people type commands. Everything is in this process: the commands, the
// socket, the helper, the platform, pf.
type macRig struct {
	t      *testing.T
	mac    *simmac.Mac
	root   string
	socket string

	helper *simmac.Process // of the helper that runs, nil: none
	stop   func()          // ends it and waits
	said   said            // by it on stderr
	refuse atomic.Bool     // pfctl loads nothing for it

	stdout, stderr bytes.Buffer // of the last command
	columns        int          // of the terminal
	caller         string       // number of the user who runs sudo, "": none
	stateDir       string       // of a helper that is started, "": the default
}

func newMacRig(t *testing.T) *macRig {
	t.Helper()
	// Short, for the socket's path.
	root, err := os.MkdirTemp("", "mac")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	for _, dir := range []string{"Library", "var/run", "var/log"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	g := &macRig{t: t, root: root, mac: simmac.New(simmac.Options{Root: root}), socket: filepath.Join(root, "var/run/meshhelper.sock")}
	for name, a := range map[string][]string{"en0": {"203.0.113.1/24", "203.0.113.254"}, "en5": {"192.168.77.1/24", "192.168.77.254"}} {
		if err := g.mac.AddEthernet(name, a[:1], a[1]); err != nil && name == "en0" {
			t.Fatal(err)
		}
	}
	g.mac.Launchd.Start = func(j *launchd.Job, _ int) { g.start(j) }
	g.mac.Launchd.Stop = func(string) { g.end() }
	t.Cleanup(g.end)
	return g
}

// app returns the command as process p of the Mac would have it.
func (g *macRig) app(p *simmac.Process) *app {
	platform := func(o hostOptions) (host.Host, error) {
		made, err := macos.New(macos.Options{StateDir: o.stateDir, Label: o.label, Runner: refusing{p, &g.refuse}, Kernel: p, CreateTUN: p.CreateTUN, Log: o.log})
		if err != nil {
			return host.Host{}, err
		}
		return made.Host(), nil
	}
	return &app{
		stdin: strings.NewReader(""), stdout: &g.stdout, stderr: &g.stderr, random: rand.Reader, size: func() (int, int) { return g.columns, 0 }, talkSize: func() (int, int) { return g.columns, 0 },
		getenv: func(name string) string {
			return map[string]string{"MESHHELPER_SOCKET": g.socket, "SUDO_UID": g.caller}[name]
		},
		hosts: map[string]newHost{"darwin": platform},
		service: &serviceHost{
			runner: p, root: g.root, executable: os.Executable, settle: time.Second,
			restore: func(ctx context.Context, stateDir string) error {
				made, err := platform(hostOptions{stateDir: filepath.Join(g.root, stateDir), log: slog.New(slog.DiscardHandler)})
				if err != nil {
					return err
				}
				_, err = made.Link.Close(ctx)
				return err
			},
		},
	}
}

// refusing is a process for which pfctl may load nothing.
type refusing struct {
	*simmac.Process
	refuse *atomic.Bool
}

func (r refusing) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if r.refuse.Load() && path == "/sbin/pfctl" && slices.Contains(args, "-f") {
		return nil, []byte("pfctl: /dev/pf: Operation not permitted\n"), 1, nil
	}
	return r.Process.Run(ctx, stdin, path, args...)
}

// start runs the job, as launchd does.
func (g *macRig) start(j *launchd.Job) {
	g.helper = g.mac.Process()
	a := g.app(g.helper)
	g.said.Reset()
	a.stdout, a.stderr = &g.said, &g.said
	root := newRoot(a)
	stateDir := g.stateDir
	if stateDir == "" {
		stateDir = filepath.Join(g.root, a.defaultStateDir("darwin"))
	}
	root.SetArgs(append(j.ProgramArguments[1:], "--state-dir", stateDir, "--log-file", filepath.Join(g.root, logDir, "helper.log")))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- root.ExecuteContext(ctx) }()
	g.stop = func() {
		cancel()
		if err := <-done; err != nil && !g.helper.Killed() {
			g.t.Errorf("the helper ended with %v\n%s", err, g.said.String())
		}
	}
}

// end sends SIGTERM to the helper, if there is one, and waits.
func (g *macRig) end() {
	if g.stop != nil {
		g.stop()
		g.stop = nil
	}
}

// run types a command and returns its exit status.
func (g *macRig) run(args ...string) int {
	g.stdout.Reset()
	g.stderr.Reset()
	return g.app(g.mac.Process()).main(args)
}

// must types a command that must succeed.
func (g *macRig) must(args ...string) string {
	g.t.Helper()
	if status := g.run(args...); status != 0 {
		g.t.Fatalf("meshhelper %s: exit status %d\n%s", strings.Join(args, " "), status, g.stderr.String())
	}
	return g.stdout.String()
}

// files lists what is on the disk.
func (g *macRig) files() (list []string) {
	filepath.WalkDir(g.root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			list = append(list, strings.TrimPrefix(path, g.root))
		}
		return err
	})
	return list
}

// log returns what the helper has logged.
func (g *macRig) log() string {
	g.t.Helper()
	b, err := os.ReadFile(filepath.Join(g.root, logDir, "helper.log"))
	if err != nil {
		g.t.Error(err)
	}
	return string(b)
}

// said is a buffer that one process writes while another reads.
type said struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (s *said) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.Reset()
}

// status asks the helper.
func (g *macRig) status() api.Status {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s, err := api.NewClient(g.socket).WaitReady(ctx)
	if err != nil {
		g.t.Fatal(err)
	}
	return s
}

// reaches sends a first segment from the first peer to dst, and says whether the
// Mac's kernel lets it go on.
func (g *macRig) reaches(dst string) bool {
	g.t.Helper()
	s := g.status()
	src := s.Peers[0].Addresses[0]
	o := g.mac.Inject(s.Interface, netlab.TCPPacket(netip.AddrPortFrom(src, 40000), netip.AddrPortFrom(netip.MustParseAddr(dst), 443), netlab.SYN, 1, 0, nil))
	return o.Fate != simmac.Dropped
}

func TestInstallOnTheSimulatedMac(t *testing.T) {
	g := newMacRig(t)
	found := g.mac.Dump()

	if out := g.must("install", "--dry-run", "--listen-port", "0"); !strings.Contains(out, "write /Library/LaunchDaemons/org.meshhelper.plist\n") {
		t.Errorf("a dry run prints\n%s", out)
	}
	if files := g.files(); files != nil || g.helper != nil {
		t.Fatalf("a dry run made %q", files)
	}

	out := g.must("install", "--listen-port", "0")
	if !strings.Contains(out, "The helper org.meshhelper runs on utun0") || !strings.Contains(out, "Next: meshhelper peer add phone --own --allow routing --qr\n") {
		t.Errorf("install prints\n%s", out)
	}
	if !g.mac.Allowed("/Library/PrivilegedHelperTools/org.meshhelper") {
		t.Error("the Application Firewall doesn't know the helper")
	}

	g.must("peer", "add", "phone")
	if g.reaches("198.51.100.9") {
		t.Error("a peer without routing reaches the internet")
	}
	g.must("peer", "allow", "phone", "routing")
	if !g.reaches("198.51.100.9") || g.reaches("192.168.77.9") {
		t.Error("a peer with routing doesn't reach the internet, or reaches the LAN")
	}
	if dump := g.mac.Dump(); !strings.Contains(dump, "[com.apple/org.meshhelper]") || !strings.Contains(dump, "1 tokens") {
		t.Errorf("the packet filter doesn't have our part:\n%s", dump)
	}

	if log := g.log(); !strings.Contains(log, "level=INFO") || strings.Contains(g.said.String(), "level=") {
		t.Errorf("the helper logs\n%s\nand says\n%s", log, g.said.String())
	}

	g.must("install", "--listen-port", "0") // an upgrade
	if s := g.status(); len(s.Peers) != 1 || !s.Peers[0].Permissions.Of(mesh.Routing).Allowed {
		t.Errorf("the mesh didn't survive the upgrade: %+v", s.Peers)
	}
	if !g.reaches("198.51.100.9") {
		t.Error("after the upgrade nothing is routed")
	}

	g.must("uninstall")
	if diff := cmp.Diff(found, g.mac.Dump()); diff != "" {
		t.Errorf("not as found (-found +left):\n%s", diff)
	}
	if out := g.must("uninstall", "--purge"); !strings.Contains(out, "Nothing of the helper is left.") {
		t.Errorf("uninstall --purge prints\n%s", out)
	}
	if files := g.files(); files != nil {
		t.Errorf("left on the disk: %q", files)
	}
	if bad := g.mac.PF.Misuse(); bad != nil {
		t.Errorf("misuse of pfctl: %q", bad)
	}
}

func TestUninstallAfterACrash(t *testing.T) {
	g := newMacRig(t)
	found := g.mac.Dump()
	g.must("install", "--listen-port", "0")
	g.must("peer", "add", "phone", "--allow", "routing")
	if g.mac.Kernel.Variable("net.inet.ip.forwarding") != "1" {
		t.Fatal("nothing to put back")
	}
	g.helper.Kill()
	g.end()
	if dump := g.mac.Dump(); !strings.Contains(dump, "[com.apple/org.meshhelper]") || !strings.Contains(dump, "net.inet.ip.forwarding 1") {
		t.Errorf("the crash left nothing:\n%s", dump)
	}
	g.must("uninstall", "--purge")
	if diff := cmp.Diff(found, g.mac.Dump()); diff != "" {
		t.Errorf("not as found (-found +left):\n%s", diff)
	}
	if files := g.files(); files != nil {
		t.Errorf("left on the disk: %q", files)
	}
}

// A label names the service, its files and the anchor, and all of it goes again.
func TestInstallWithLabel(t *testing.T) {
	g := newMacRig(t)
	found := g.mac.Dump()
	g.must("install", "--listen-port", "0", "--label", "org.example.mesh")
	g.must("peer", "add", "phone", "--allow", "routing")
	if dump := g.mac.Dump(); !strings.Contains(dump, "[com.apple/org.example.mesh]") || strings.Contains(dump, "org.meshhelper]") {
		t.Errorf("the anchor isn't named after the label:\n%s", dump)
	}
	g.must("uninstall", "--purge", "--label", "org.example.mesh")
	if diff := cmp.Diff(found, g.mac.Dump()); diff != "" {
		t.Errorf("not as found (-found +left):\n%s", diff)
	}
	for _, bad := range []string{"", "_pf", "a/b", strings.Repeat("x", 64)} {
		if status := g.run("install", "--listen-port", "0", "--label", bad); status != exitUsage || !strings.Contains(g.stderr.String(), "--label") {
			t.Errorf("label %q: exit status %d\n%s", bad, status, g.stderr.String())
		}
	}
}

func TestInstallHintsAtTheSwitch(t *testing.T) {
	g := newMacRig(t)
	g.mac.Launchd.Blocked = []string{"org.meshhelper"}
	if status := g.run("install", "--listen-port", "0"); status != exitFailed || !strings.Contains(g.stderr.String(), "Login Items & Extensions") {
		t.Errorf("exit status %d\n%s", status, g.stderr.String())
	}
}

// A helper that can't hold the policy is installed, and isn't said to run well.
func TestInstallSaysClosed(t *testing.T) {
	g := newMacRig(t)
	g.must("install", "--listen-port", "0")
	g.must("peer", "add", "phone", "--allow", "routing")
	g.mac.Launchd.Shutdown()
	g.refuse.Store(true)
	for _, json := range []bool{false, true} {
		args := []string{"install", "--listen-port", "0"}
		if json {
			args = append(args, "--json")
		}
		status := g.run(args...)
		errs, out := g.stderr.String(), g.stdout.String()
		prefix := "meshhelper: "
		if json {
			prefix = `"message":"`
		}
		if status != exitFailed || !strings.Contains(errs, prefix+"installed and running, but closed: ") ||
			!strings.Contains(errs, "Operation not permitted") || !strings.Contains(errs, "see: meshhelper doctor") {
			t.Errorf("exit status %d\n%s", status, errs)
		}
		if json != strings.Contains(out, `"state":"closed"`) || strings.Contains(out, "Next:") || strings.Contains(out, "runs on") {
			t.Errorf("install prints\n%s", out)
		}
	}
	// It is closed for a moment only.
	go func() {
		time.Sleep(300 * time.Millisecond)
		g.refuse.Store(false)
	}()
	if out := g.must("install", "--listen-port", "0", "--json"); !strings.Contains(out, `"state":"enforcing"`) || !strings.Contains(out, `"startsAtBoot":true`) {
		t.Errorf("install prints\n%s", out)
	}
}

// macOS lets the service run and holds it back from the next boot on.
func TestInstallSaysHeldBack(t *testing.T) {
	g := newMacRig(t)
	g.mac.Launchd.HeldBack = []string{"org.meshhelper"}
	out := g.must("install", "--listen-port", "0")
	if !strings.Contains(out, "doesn't start with this Mac: see above") || !strings.Contains(g.stderr.String(), "General > Login Items & Extensions") {
		t.Errorf("install prints\n%s%s", out, g.stderr.String())
	}
}

// doctor looks at the installed service, with and without a helper.
func TestDoctorOnTheSimulatedMac(t *testing.T) {
	g := newMacRig(t)
	doctor := func(want int, has ...string) {
		t.Helper()
		status := g.run("doctor")
		out := g.stdout.String()
		if status != want {
			t.Errorf("exit status %d, want %d\n%s%s", status, want, out, g.stderr.String())
		}
		for _, h := range has {
			if !strings.Contains(out, h) {
				t.Errorf("no %q in\n%s", h, out)
			}
		}
	}
	doctor(exitFailed, "problem  service: not installed", "problem  helper: none answers on ", "-> sudo meshhelper install")
	g.must("install", "--listen-port", "0")
	doctor(exitDone, "ok       property list: /Library/LaunchDaemons/org.meshhelper.plist\n", "ok       service: org.meshhelper runs, process 4001\n",
		"ok       login item: enabled, allowed, notified\n", "ok       helper: the state is enforcing\n")
	if out := g.stdout.String(); strings.Index(out, "property list") > strings.Index(out, "helper: ") || strings.Contains(out, "log ") {
		t.Errorf("doctor prints\n%s", out)
	}

	// The kernel kills it, again and again.
	g.mac.Launchd.RefuseSignature("org.meshhelper", -1)
	if _, _, _, err := g.mac.Run(t.Context(), nil, "/bin/launchctl", "kickstart", "-k", "system/org.meshhelper"); err != nil {
		t.Fatal(err)
	}
	doctor(exitFailed, "problem  service: macOS kills the program when it starts", "OS_REASON_CODESIGNING", "-> install it again",
		"problem  helper: none answers on ", "-> see the checks of the service above",
		"log      /var/log/meshhelper/helper.log ends with\n", "starting became enforcing")
	g.mac.Launchd.RefuseSignature("org.meshhelper", 0)

	var checks []api.Check
	if status := g.run("doctor", "--json"); status != exitFailed || json.Unmarshal(g.stdout.Bytes(), &checks) != nil || checks[2].Name != "service" || checks[2].OK {
		t.Errorf("exit status %d\n%s", status, g.stdout.String())
	}

	g.must("uninstall")
	g.columns = 40
	doctor(exitFailed, "problem  service: not installed: there\n         is no\n         /Library/LaunchDaemons/org.meshhelper.plist\n         -> sudo meshhelper install\n")
}

// TestUninstallBesideAnotherHelper has a helper in the foreground with a state folder of its
// own: uninstall may not say that nothing is left, nor touch what that helper has.
func TestUninstallBesideAnotherHelper(t *testing.T) {
	g := newMacRig(t)
	g.stateDir = filepath.Join(g.root, "other")
	g.start(&launchd.Job{ProgramArguments: []string{"meshhelper", "run", "--listen-port", "0", "--platform", "darwin"}})
	g.status()
	if status := g.run("uninstall"); status != exitFailed || strings.Contains(g.stdout.String(), "Nothing of the helper is left") ||
		!strings.Contains(g.stderr.String(), "a helper that isn't this service is running: one answers on ") {
		t.Errorf("exit status %d\n%s%s", status, g.stdout.String(), g.stderr.String())
	}
	g.status() // it runs on
	g.end()
	if out := g.must("uninstall", "--json"); out != "{\"left\":[]}\n" {
		t.Errorf("without it, uninstall prints %q", out)
	}
}

// A helper in the foreground is no problem for not being installed.
func TestDoctorInTheForeground(t *testing.T) {
	g := newMacRig(t)
	g.start(&launchd.Job{ProgramArguments: []string{"meshhelper", "run", "--listen-port", "0", "--platform", "darwin"}})
	g.status()
	if status := g.run("doctor"); status != exitDone || !strings.Contains(g.stdout.String(), "ok       service: not installed; the helper runs in the foreground\n") {
		t.Errorf("exit status %d\n%s%s", status, g.stdout.String(), g.stderr.String())
	}
}

func TestInstallElsewhere(t *testing.T) {
	g := newMacRig(t)
	for _, command := range []string{"install", "uninstall"} {
		a := g.app(g.mac.Process())
		a.service = nil
		g.stderr.Reset()
		if status := a.main([]string{command}); status != exitFailed || !strings.Contains(g.stderr.String(), "meshhelper run") {
			t.Errorf("%s: exit status %d\n%s", command, status, g.stderr.String())
		}
	}
}

// TestUninstallBesideAHelper has a helper in the foreground hold the state folder: uninstall
// fails, touches nothing of its, and doesn't say that nothing is left.
func TestUninstallBesideAHelper(t *testing.T) {
	g := newMacRig(t)
	g.start(&launchd.Job{ProgramArguments: []string{"meshhelper", "run", "--listen-port", "0", "--platform", "darwin"}})
	g.status()
	if status := g.run("uninstall"); status != exitFailed || !strings.Contains(g.stderr.String(), "a helper that isn't this service is running") ||
		strings.Contains(g.stdout.String(), "Nothing") {
		t.Errorf("exit status %d\n%s%s", status, g.stdout.String(), g.stderr.String())
	}
	g.must("status")
	if status := g.run("uninstall", "--label", "../org.meshhelper"); status != exitUsage || !strings.Contains(g.stderr.String(), "--label: label") {
		t.Errorf("a label that is a path: exit status %d\n%s", status, g.stderr.String())
	}
}

// TestUninstallWithAWrongLabel names a service that isn't installed, beside one that runs:
// its helper goes on, with all it has put into the packet filter.
func TestUninstallWithAWrongLabel(t *testing.T) {
	g := newMacRig(t)
	g.must("install", "--listen-port", "0")
	g.must("peer", "add", "phone", "--allow", "routing")
	before, files := g.mac.Dump(), g.files()
	if status := g.run("uninstall", "--purge", "--label", "org.meshelper"); status != exitFailed || !strings.Contains(g.stderr.String(), "give its name with --label") {
		t.Errorf("exit status %d\n%s", status, g.stderr.String())
	}
	if diff := cmp.Diff(before, g.mac.Dump()) + cmp.Diff(files, g.files()); diff != "" {
		t.Errorf("something was changed (-before +after):\n%s", diff)
	}
	if !g.reaches("198.51.100.9") {
		t.Error("nothing is routed any more")
	}
}

// TestInstallKeepsSettings installs on a Mac with settings, changes one, and upgrades: what
// was changed counts, as does the operator, also when another administrator upgrades.
func TestInstallKeepsSettings(t *testing.T) {
	g := newMacRig(t)
	setting := func(key, want string) {
		t.Helper()
		if out := strings.TrimSpace(g.must("settings", key)); out != want {
			t.Errorf("the setting %s is %q, want %q", key, out, want)
		}
	}
	g.must("install", "--listen-port", "0", "--endpoint", "old.example", "--operator", "nobody")
	setting("endpoint", "old.example")
	g.must("settings", "endpoint", "new.example")
	setting("endpoint", "new.example")
	g.caller = strconv.Itoa(daemonUser(t))
	out := g.must("install")
	if !strings.Contains(out, "nobody may change the mesh.") || !strings.Contains(g.stderr.String(), "daemon may not: the operator stays the same; to change it: sudo meshhelper install --operator daemon") {
		t.Errorf("an upgrade by another administrator says\n%s%s", out, g.stderr.String())
	}
	setting("endpoint", "new.example")
	setting("operator", "nobody")
	setting("listen-port", "0")
	if out := g.must("install", "--json"); !strings.Contains(out, `"operator":"nobody"`) {
		t.Errorf("install --json prints\n%s", out)
	}
	g.must("install", "--operator", "daemon")
	setting("operator", "daemon")
}

// daemonUser returns the number of the user "daemon", which every Unix has.
func daemonUser(t *testing.T) int {
	t.Helper()
	u, err := user.Lookup("daemon")
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		t.Fatal(err)
	}
	return uid
}

// TestUpgradeOfAListWithArguments upgrades an installation whose property list has what is
// kept as settings by now: what counted counts, and a setting changes it.
func TestUpgradeOfAListWithArguments(t *testing.T) {
	g := newMacRig(t)
	g.must("install", "--listen-port", "0")
	g.must("settings", "operator", "daemon") // the list overrides it
	g.mac.Launchd.Shutdown()
	list := filepath.Join(g.root, "Library/LaunchDaemons/org.meshhelper.plist")
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	job, err := launchd.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	job.ProgramArguments = append(job.ProgramArguments, "--listen-port", "0", "--operator", "nobody", "--endpoint", "old.example")
	if text, err = job.Render(); err != nil {
		t.Fatal(err)
	}
	if err := owned.ReplaceFrom(list, bytes.NewReader(text), 0o644); err != nil {
		t.Fatal(err)
	}
	g.must("install")
	for _, want := range []string{"operator +nobody", "endpoint +old.example", "listen-port +0"} {
		if out := g.must("settings"); !regexp.MustCompile("(?m)^" + want + " +(kept|setting|set)").MatchString(out) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	g.must("settings", "endpoint", "new.example")
	g.must("install")
	if out := g.must("settings", "endpoint"); out != "new.example\n" {
		t.Errorf("after another upgrade the endpoint is %q", out)
	}
}

// linuxApp returns the command on a Linux host below root, which needn't have systemd.
func linuxApp(root string, stdout, stderr *bytes.Buffer) *app {
	return &app{
		stdin: strings.NewReader(""), stdout: stdout, stderr: stderr, random: rand.Reader, getenv: func(string) string { return "" },
		service: &serviceHost{systemd: true, root: root, executable: func() (string, error) { return "/src/meshhelper", nil }},
	}
}

// TestDryRunSaysWhatIsRefused has no systemd, an operator that doesn't exist, and a folder
// that others may replace: a dry run fails as install would, and changes nothing.
func TestDryRunSaysWhatIsRefused(t *testing.T) {
	for _, c := range []struct {
		systemd bool
		args    string
		status  int
		says    string
	}{
		{true, "", exitDone, ""},
		{true, "--operator 4242", exitDone, ""},
		{false, "", exitFailed, "systemd isn't this host's service manager"},
		{true, "--operator nobody-of-that-name", exitFailed, `there is no user "nobody-of-that-name"; give a user of this host`},
		{true, "--endpoint https://x/", exitUsage, `endpoint "https://x/": it looks like a URL`},
		{true, "--label a/b", exitUsage, "--label"},
	} {
		root := t.TempDir()
		if c.systemd {
			if err := os.MkdirAll(filepath.Join(root, "run/systemd/system"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		var out, talk bytes.Buffer
		status := linuxApp(root, &out, &talk).main(append([]string{"install", "--dry-run"}, strings.Fields(c.args)...))
		if status != c.status || !strings.Contains(talk.String(), c.says) || c.says == "" && talk.Len() > 0 {
			t.Errorf("systemd %t, %q: exit status %d, %q", c.systemd, c.args, status, talk.String())
		}
		if status == exitDone && !strings.Contains(out.String(), "write /etc/systemd/system/meshhelper.service\n") {
			t.Errorf("it prints\n%s", out.String())
		}
		if _, err := os.Stat(filepath.Join(root, "etc")); err == nil {
			t.Error("it wrote something")
		}
	}
}

// TestStartHint names what starts a helper: the service where one is installed, by the
// program's path where the shell doesn't find it.
func TestStartHint(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		systemd bool
		has     string // on the disk
		socket  string // "": the service's
		lost    bool   // whether the program isn't in the PATH
		want    string
	}{
		{true, "etc/systemd/system/meshhelper.service", "", false, "start it with: sudo systemctl start meshhelper"},
		{true, "run/systemd/system/x", "", false, "sudo meshhelper install, or in the foreground: sudo meshhelper run"},
		{true, "run/systemd/system/x", "", true, "sudo " + self + " install, or in the foreground: sudo " + self + " run"},
		{true, "etc/x", "", false, "start it with: sudo meshhelper run"},
		{true, "etc/systemd/system/meshhelper.service", "/tmp/a b", false, "start it with: sudo meshhelper run --socket '/tmp/a b'"},
		{false, "Library/LaunchDaemons/org.meshhelper.plist", "", false, "start it with: sudo launchctl bootstrap system /Library/LaunchDaemons/org.meshhelper.plist"},
		{false, "Library/x", "", false, "sudo meshhelper install, or in the foreground: sudo meshhelper run"},
	} {
		a := linuxApp(t.TempDir(), nil, nil)
		a.service.systemd = c.systemd
		if a.socket = c.socket; a.socket == "" {
			a.socket = a.installed(a.service.defaultLabel()).Socket
		}
		if c.lost {
			a.lookPath = func(string) (string, error) { return "", os.ErrNotExist }
		}
		path := filepath.Join(a.service.root, c.has)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if got := a.reachHint(api.ErrUnreachable); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// TestInstallAtSixtyColumns types commands at a terminal of 60 columns: what is said is
// wrapped, and what is to be copied into a file isn't.
func TestInstallAtSixtyColumns(t *testing.T) {
	g := newMacRig(t)
	g.columns = 60
	const addresses = "AllowedIPs = "
	for _, line := range []string{
		"install --listen-port 0 --dry-run", "install --listen-port 0", "--help", "peer add --help", "explain --help", "help settings", "completion bash --help",
		"peer add phone --allow routing --for 2h", "peer add phone --allow routing --for 2h", "peer add laptop --own", "peer add phone --own",
		"peer allow laptop routing,lan --for 2h", "peer deny laptop routing", "peer allow laptop rooting", "peer show nobody-of-that-name-whom-anyone-knows",
		"explain phone 192.168.77.9:445", "explain phone 198.51.100.9:443", "settings", "settings mesh-prefix4 10.99.0.0/16", "settings endpoint https://x.example/",
		"status", "status --nonsense", "peer list", "doctor", "events", "stats", "peer dlete", "uninstall", "status",
	} {
		g.run(strings.Fields(line)...)
		for text := range strings.Lines(g.stdout.String() + g.stderr.String()) {
			text = strings.TrimSuffix(text, "\n")
			bare := strings.TrimSpace(text)
			copied := strings.HasPrefix(bare, "Address = ") || strings.HasPrefix(bare, addresses)
			long := len(strings.Fields(text)) == 1 // a path or a key
			if n := utf8.RuneCountInString(text); n > g.columns && !copied && !long {
				t.Errorf("%s: %d columns: %q", line, n, text)
			}
		}
		if strings.HasPrefix(line, "peer add laptop") && !strings.Contains(g.stdout.String(), "/32, fd6d:") {
			t.Errorf("a configuration is wrapped:\n%s", g.stdout.String())
		}
	}
}
