//go:build darwin && mactest

package mactest

// The script on a real Mac, with settings from the environment.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host/macos"
)

// Environment variables that configure the test.
const (
	artifactsEnv = "MESHHELPER_ARTIFACTS" // the folder for outputs; a new one without
	pageEnv      = "MESHHELPER_PAGE"      // a page on the internet, by http or https
	resolverEnv  = "MESHHELPER_RESOLVER"  // a resolver on the internet, with its port
	downloadEnv  = "MESHHELPER_DOWNLOAD"  // a file of at least 50 MB, by http or https
)

// Public hosts on the internet, for use without configuration.
const (
	defaultPage     = "https://1.1.1.1/"
	defaultResolver = "1.1.1.1:53"
	defaultDownload = "https://speed.cloudflare.com/__down?bytes=90000000"
)

// traces are files that an installed helper has on the disk. If one exists, the test would
// stop that helper or delete its keys, so it doesn't start.
var traces = []string{
	"/Library/LaunchDaemons/org.meshhelper*.plist", "/Library/PrivilegedHelperTools/org.meshhelper*",
	"/Library/Application Support/meshhelper", "/var/log/meshhelper", "/var/run/meshhelper.sock",
}

// commandTime limits a meshhelper command. install waits until the helper runs, and
// uninstall until it has ended.
const commandTime = 2 * time.Minute

// A mac is the Mac that the test runs on.
type mac struct {
	runner darwin.Runner
	dir    string   // of the artifacts
	binary string   // the program as built
	own    []string // words that mark what is the helper's
}

// TestThisMac is the test on a real Mac. It installs a helper under a label of its own, runs
// the script, and removes everything again; it changes nothing else.
func TestThisMac(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root: sudo make test-mac")
	}
	for _, trace := range traces {
		if found, _ := filepath.Glob(trace); len(found) > 0 {
			t.Fatalf("a helper is or was installed here (%s); this test would delete its keys.\n"+
				"Remove it first: sudo meshhelper uninstall --purge\n"+
				"If an aborted run of this test left it: sudo /Library/PrivilegedHelperTools/%s uninstall --label %[2]s --purge", found[0], scratchLabel)
		}
	}
	m := &mac{runner: darwin.Exec{}, dir: os.Getenv(artifactsEnv), own: []string{"meshhelper"}}
	if m.dir == "" {
		dir, err := os.MkdirTemp("", "meshhelper-artifacts-")
		if err != nil {
			t.Fatal(err)
		}
		m.dir = dir
	}
	if err := errors.Join(os.MkdirAll(m.dir, 0o755), os.Chmod(m.dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	t.Logf("outputs are kept in %s; they name this Mac's addresses and programs", m.dir)

	first := m.take(t, "before")
	volatile := Volatile(first, m.take(t, "before-again"))
	t.Run("child-anchor-is-evaluated", m.children)
	t.Run("enforced-rules-are-shown", func(t *testing.T) {
		enforceTable(t, macos.Options{StateDir: t.TempDir(), Label: scratchLabel + ".table",
			Runner: m.runner, Kernel: darwin.System{}}, func(name, text string) { m.keep(t, name, text) })
	})
	t.Run("helper", m.helper)
	t.Run("left-as-found", func(t *testing.T) { m.asFound(t, first, volatile) })
}

// take saves the Mac's current configuration.
func (m *mac) take(t *testing.T, moment string) Snapshot {
	t.Helper()
	s := Take(context.WithoutCancel(t.Context()), m.runner, Outputs(scratchLabel))
	if err := s.Save(filepath.Join(m.dir, moment)); err != nil {
		t.Error(err)
	}
	return s
}

// keep saves a text.
func (m *mac) keep(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(m.dir, name), []byte(text), 0o644); err != nil {
		t.Error(err)
	}
}

// run saves the output of a command.
func (m *mac) run(t *testing.T, name, path string, args ...string) {
	t.Helper()
	o := take(context.WithoutCancel(t.Context()), m.runner, Command{Name: name, Path: path, Args: args})
	if err := (Snapshot{o}).Save(m.dir); err != nil {
		t.Error(err)
	}
}

// asFound compares the Mac with its configuration before the test.
func (m *mac) asFound(t *testing.T, before Snapshot, volatile map[string]bool) {
	d := (&Comparison{Own: m.own, Volatile: volatile}).Diff(before, m.take(t, "after"))
	m.keep(t, "differences.txt", strings.Join(append(d.Changed, d.Moved...), "\n")+"\n")
	for _, line := range d.Moved {
		t.Logf("moved by itself: %s", line)
	}
	for _, line := range d.Changed {
		// launchd remembers for ever that a service was switched on, and has no
		// command to forget it.
		if strings.HasPrefix(line, "launchctl-disabled: + ") && strings.Contains(line, "enabled") {
			t.Logf("stays, harmless: %s", line)
			continue
		}
		t.Errorf("not as it was found: %s", line)
	}
}

// children finds out with real packets whether pf evaluates a child of com.apple.
func (m *mac) children(t *testing.T) {
	const anchor = "com.apple/" + scratchLabel + ".probe"
	ctx := context.WithoutCancel(t.Context())
	pf := darwin.NewPF(m.runner)
	token, err := pf.Enable(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(pf.Flush(ctx, anchor), pf.Release(ctx, token)); err != nil {
			t.Error(err)
		}
	})
	p := m.probe(t)
	kind := ""
	p.Load = func(ctx context.Context, rules string) error {
		if rules != "" {
			return pf.Load(ctx, anchor, rules)
		}
		// With the counters of the rules that were loaded.
		m.run(t, "probe-"+kind+"-rules", "/sbin/pfctl", "-a", anchor, "-v", "-s", "rules")
		m.run(t, "probe-"+kind+"-nat", "/sbin/pfctl", "-a", anchor, "-v", "-s", "nat")
		return pf.Flush(ctx, anchor)
	}
	for _, c := range []struct {
		name string
		try  func(context.Context) (bool, error)
	}{
		{"filter", p.Filter}, {"nat", p.NAT}, {"rdr", p.RDR},
		{"rdr-on-lo0", func(ctx context.Context) (bool, error) { return redirectsOnLoopback(ctx, p.Load) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			kind = c.name
			if skipped, err := pf.Skipped(ctx); c.name == "rdr-on-lo0" && err == nil && strings.Contains(strings.Join(skipped, " "), "lo0") {
				t.Skip("lo0 is (skip): vmnet or Internet Sharing ran")
			}
			evaluated, err := c.try(ctx)
			switch {
			case err != nil:
				t.Errorf("can't find out whether it is evaluated: %v", err)
			case !evaluated:
				t.Errorf("no rule of this kind in a child of com.apple is evaluated on this Mac")
			}
		})
	}
}

// probe makes a utun device with an address and a route.
func (m *mac) probe(t *testing.T) *Probe {
	t.Helper()
	dev, err := tun.CreateTUN("utun", 1420)
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewProbe(dev)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	p.Own, p.Far = scratchOwn, scratchFar
	p.Do = func(f func() error) error { return f() }
	if err := darwin.NewIfconfig(m.runner).AddAddress(t.Context(), p.name, p.Own); err != nil {
		t.Fatal(err)
	}
	n, err := darwin.Observe(darwin.System{})
	if err != nil {
		t.Fatal(err)
	}
	i := n.Interface(p.name)
	if i == nil {
		t.Fatalf("%s doesn't exist", p.name)
	}
	if err := darwin.NewRouter(darwin.System{}).Set(i.Index, []netip.Prefix{netip.PrefixFrom(p.Far, 32)}); err != nil {
		t.Fatal(err)
	}
	return p
}

// redirectsOnLoopback reports whether pf evaluates a redirection between two ports of
// 127.0.0.1.
func redirectsOnLoopback(ctx context.Context, load func(context.Context, string) error) (bool, error) {
	var ends [3]*net.UDPConn // the sender, the port that is asked, the one it is redirected to
	for i := range ends {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return false, err
		}
		defer c.Close()
		ends[i] = c
	}
	rule := fmt.Sprintf("rdr on lo0 inet proto udp from any to 127.0.0.1 port %d -> 127.0.0.1 port %d\n", portOf(ends[1]), portOf(ends[2]))
	if err := load(ctx, rule); err != nil {
		return false, err
	}
	if _, err := ends[0].WriteTo([]byte("mactest"), ends[1].LocalAddr()); err != nil {
		return false, errors.Join(err, load(ctx, ""))
	}
	got, asked := received(ends[2], time.Second), received(ends[1], probePause)
	if err := load(ctx, ""); err != nil {
		return false, err
	}
	if !got && !asked {
		return false, errors.New("the datagram arrived nowhere")
	}
	return got, nil
}

// helper installs a helper, runs the script, and uninstalls it.
func (m *mac) helper(t *testing.T) {
	m.build(t)
	port := freePort(t)
	installed := true
	uninstall := func() (string, error) {
		stdout, stderr, code, err := m.command(context.WithoutCancel(t.Context()), "uninstall", "--label", scratchLabel, "--purge")
		if err == nil && code != 0 {
			err = fmt.Errorf("exit status %d", code)
		}
		m.keep(t, "uninstall.txt", stdout+stderr)
		return stdout + stderr, err
	}
	t.Cleanup(func() {
		if !installed {
			return
		}
		if out, err := uninstall(); err != nil {
			t.Errorf("uninstall: %v\n%s", err, out)
		}
	})
	t.Run("install", func(t *testing.T) {
		stdout, stderr, code, err := m.command(t.Context(), "install", "--label", scratchLabel,
			"--listen-port", strconv.Itoa(int(port)), "--endpoint", fmt.Sprintf("localhost:%d", port))
		m.keep(t, "install.txt", stdout+stderr)
		if err != nil || code != 0 {
			t.Errorf("exit status %d, %v\n%s%s", code, err, stderr, stdout)
		}
		m.run(t, "launchctl-print-installed", "/bin/launchctl", "print", "system/"+scratchLabel)
	})
	t.Run("script", func(t *testing.T) { m.script(t) })
	t.Run("doctor", func(t *testing.T) {
		stdout, stderr, code, err := m.command(t.Context(), "doctor")
		m.keep(t, "doctor.txt", stdout+stderr)
		t.Logf("exit status %d, %v\n%s%s", code, err, stderr, stdout)
	})
	for _, name := range []string{"helper.log", "stderr.log"} {
		if b, err := os.ReadFile(filepath.Join("/var/log/meshhelper", name)); err == nil {
			m.keep(t, name, string(b))
		}
	}
	t.Run("uninstall", func(t *testing.T) {
		out, err := uninstall()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		installed = false
		for _, trace := range traces {
			if found, _ := filepath.Glob(trace); len(found) > 0 {
				t.Errorf("left: %q", found)
			}
		}
	})
}

// build builds the program from this module.
func (m *mac) build(t *testing.T) {
	t.Helper()
	m.binary = filepath.Join(t.TempDir(), "meshhelper")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", m.binary, "github.com/meshhelper/meshhelper/cmd/meshhelper")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
}

// freePort returns a UDP port to which no socket is bound.
func freePort(t *testing.T) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return portOf(c)
}

// command runs a meshhelper command.
func (m *mac) command(ctx context.Context, args ...string) (stdout, stderr string, status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	var out, talk bytes.Buffer
	cmd := exec.CommandContext(ctx, m.binary, args...)
	cmd.Stdout, cmd.Stderr = &out, &talk
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		err = nil
	}
	return out.String(), talk.String(), cmd.ProcessState.ExitCode(), err
}

// script runs the script with the installed helper.
func (m *mac) script(t *testing.T) {
	n, err := darwin.Observe(darwin.System{})
	if err != nil {
		t.Fatal(err)
	}
	_, router := n.Uplink(darwin.IPv4)
	s := &script{world: world{
		command:   m.command,
		do:        func(f func() error) error { return f() },
		page:      page(t, pageEnv, defaultPage),
		resolver:  resolver(t),
		download:  page(t, downloadEnv, defaultDownload),
		neighbour: router,
		keep:      func(name, text string) { m.keep(t, name, text) },
		look:      func(moment string) { m.take(t, moment) },
		ping:      m.ping,
	}}
	at := s.status(t)
	m.own = append(m.own, at.Interface)
	for _, a := range at.Addresses {
		m.own = append(m.own, a.String())
		of := "-inet"
		if a.Is6() {
			of = "-inet6"
		}
		m.run(t, "route-to-own-address"+of, "/sbin/route", "-n", "get", of, a.String())
	}
	s.run(t)
}

// ping sends one echo request from this Mac.
func (m *mac) ping(ctx context.Context, a netip.Addr) error {
	path, args := "/sbin/ping", []string{"-n", "-c", "1", "-t", "5", a.String()}
	if a.Is6() {
		path, args = "/sbin/ping6", []string{"-n", "-c", "1", a.String()}
	}
	stdout, stderr, code, err := m.runner.Run(ctx, nil, path, args...)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit status %d: %s%s", code, stdout, stderr)
	}
	return err
}

// page returns a page's address from the environment, or the default.
func page(t *testing.T, env, fallback string) *url.URL {
	t.Helper()
	text := os.Getenv(env)
	if text == "" {
		text = fallback
	}
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https" {
		t.Fatalf("%s: %q isn't the URL of a page: %v", env, text, err)
	}
	return u
}

// resolver returns a resolver's address from the environment, or the default.
func resolver(t *testing.T) netip.AddrPort {
	t.Helper()
	text := os.Getenv(resolverEnv)
	if text == "" {
		text = defaultResolver
	}
	a, err := netip.ParseAddrPort(text)
	if err != nil {
		t.Fatalf("%s: %v", resolverEnv, err)
	}
	return a
}
