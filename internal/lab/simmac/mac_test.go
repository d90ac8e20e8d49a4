package simmac

// What a program leaves behind, what a boot forgets, and what pf refuses.

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/launchd"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

const anchor = "com.apple/org.meshhelper"

// newMac returns a Mac with Wi-Fi to the internet and a wired LAN.
func newMac(t testing.TB) *Mac {
	t.Helper()
	m := New(Options{Seed: 1, Root: t.TempDir()})
	must(t, m.AddEthernet("en0", []string{"203.0.113.1/24", "2001:db8:1::1/64"}, "203.0.113.254", "2001:db8:1::fe"))
	must(t, m.AddEthernet("en5", []string{"192.168.77.1/24"}, "192.168.77.254"))
	return m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newTunnel makes a tunnel with the mesh addresses on it.
func newTunnel(t testing.TB, m *Mac) (tun.Device, string) {
	t.Helper()
	d, err := m.CreateTUN("utun", 1420)
	must(t, err)
	t.Cleanup(func() { d.Close() })
	name, err := d.Name()
	must(t, err)
	c := darwin.NewIfconfig(m)
	for _, a := range []string{"100.64.0.1", "fd6d:6573:6800::1"} {
		must(t, c.AddAddress(context.Background(), name, netip.MustParseAddr(a)))
	}
	return d, name
}

func TestLeavesNothingBehind(t *testing.T) {
	m := newMac(t)
	ctx := t.Context()
	found := m.Dump()
	pf, sysctl := darwin.NewPF(m), darwin.NewSysctl(m, m)

	d, name := newTunnel(t, m)
	n, err := darwin.Observe(m)
	must(t, err)
	must(t, darwin.NewRouter(m).Set(n.Interface(name).Index, []netip.Prefix{netip.MustParsePrefix("100.64.0.2/32")}))
	token, err := pf.Enable(ctx)
	must(t, err)
	must(t, pf.Load(ctx, anchor, "table <p> { 100.64.0.2 }\nnat on en0 inet from <p> to any -> (en0)\npass in on utun0 from <p> to any\n"))
	must(t, sysctl.SetForwarding(ctx, darwin.IPv4, true))
	changed := m.Dump()
	for _, want := range []string{"100.64.0.2/32", "pf enabled true, 1 tokens", "[" + anchor + "]", "nat on en0 inet from <p>", "net.inet.ip.forwarding 1"} {
		if !strings.Contains(changed, want) {
			t.Errorf("the dump doesn't show %q:\n%s", want, changed)
		}
	}

	must(t, sysctl.SetForwarding(ctx, darwin.IPv4, false))
	must(t, pf.Flush(ctx, anchor))
	must(t, pf.Release(ctx, token))
	must(t, d.Close())
	if diff := cmp.Diff(found, m.Dump()); diff != "" {
		t.Errorf("not as found (-found +left):\n%s", diff)
	}
	if names, err := pf.Anchors(ctx, "com.apple"); err != nil || !slices.Contains(names, anchor) {
		t.Errorf("the kernel forgot the empty anchor: %q, %v", names, err)
	}
	if bad := m.PF.Misuse(); bad != nil {
		t.Errorf("misuse: %q", bad)
	}
}

func TestBootForgets(t *testing.T) {
	m := newMac(t)
	ctx := t.Context()
	found := m.Dump()
	pf, sysctl := darwin.NewPF(m), darwin.NewSysctl(m, m)
	session, err := sysctl.BootSession()
	must(t, err)
	token, err := pf.Enable(ctx)
	must(t, err)
	must(t, pf.Load(ctx, anchor, "block all\n"))
	must(t, sysctl.SetForwarding(ctx, darwin.IPv6, true))
	d, _ := newTunnel(t, m)
	run := filepath.Join(m.options.Root, "var/run")
	must(t, os.MkdirAll(run, 0o755))
	must(t, os.WriteFile(filepath.Join(run, "meshhelper.sock"), nil, 0o600))

	if refused := m.Boot(); refused != nil {
		t.Error(refused)
	}
	if diff := cmp.Diff(found, m.Dump()); diff != "" {
		t.Errorf("after boot (-before +after):\n%s", diff)
	}
	if after, err := sysctl.BootSession(); err != nil || after == session {
		t.Errorf("boot session %q as before, %v", after, err)
	}
	if err := pf.Release(ctx, token); !errors.Is(err, darwin.ErrNotEnabled) {
		t.Errorf("a token of before: %v", err)
	}
	if _, err := d.Read([][]byte{make([]byte, 2000)}, make([]int, 1), 4); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a tunnel of before: %v", err)
	}
	if left, _ := os.ReadDir(run); len(left) != 0 {
		t.Errorf("left in /var/run: %v", left)
	}
}

func TestNeighboursOfPF(t *testing.T) {
	m := newMac(t)
	ctx := t.Context()
	pf := darwin.NewPF(m)
	token, err := pf.Enable(ctx)
	must(t, err)
	must(t, pf.Load(ctx, anchor, "pass in on utun0 all label \"ours\"\n"))
	ours, err := pf.Rules(ctx, anchor)
	must(t, err)
	hooked := func() bool {
		rules, err := pf.Rules(ctx, "")
		must(t, err)
		return strings.Contains(rules, `anchor "com.apple/*" all`)
	}
	stays := func(when string) {
		t.Helper()
		if rules, err := pf.Rules(ctx, anchor); err != nil || rules != ours {
			t.Errorf("%s: our rules are %q, %v", when, rules, err)
		}
	}

	must(t, m.InternetSharing("en0"))
	stays("Internet Sharing on")
	if !hooked() || m.Kernel.Variable("net.inet.ip.forwarding") != "1" {
		t.Error("Internet Sharing: no hook or no forwarding")
	}
	must(t, m.StopInternetSharing())
	stays("Internet Sharing off")
	if m.Kernel.Variable("net.inet.ip.forwarding") != "0" || !m.PF.Enabled() {
		t.Error("after Internet Sharing forwarding is on or pf off")
	}

	must(t, m.LoadMain("set skip on utun0\nblock drop quick all\n"))
	stays("a VPN's main ruleset")
	if hooked() {
		t.Error("the hook survived another main ruleset")
	}
	if skipped, err := pf.Skipped(ctx); err != nil || len(skipped) != 0 {
		t.Errorf("a skip of an interface that doesn't exist yet: %q, %v", skipped, err)
	}
	newTunnel(t, m)
	must(t, m.LoadMain("set skip on utun0\n"))
	if skipped, err := pf.Skipped(ctx); err != nil || !slices.Equal(skipped, []string{"utun0"}) {
		t.Errorf("skipped %q, %v", skipped, err)
	}

	m.FlushMain()
	stays("pfctl -F all")
	if hooked() {
		t.Error("the hook survived pfctl -F all")
	}
	m.PF.Disable()
	if refs, err := pf.References(ctx); err != nil || len(refs) != 0 {
		t.Errorf("after pfctl -d: %+v, %v", refs, err)
	}
	if err := pf.Release(ctx, token); !errors.Is(err, darwin.ErrNotEnabled) {
		t.Errorf("release after pfctl -d: %v", err)
	}
	m.FlushAnchor(anchor)
	if rules, err := pf.Rules(ctx, anchor); err != nil || rules != "" {
		t.Errorf("after pfctl -a -F all: %q, %v", rules, err)
	}
}

func TestPFRefuses(t *testing.T) {
	m := newMac(t)
	ctx := t.Context()
	pf := darwin.NewPF(m)
	must(t, pf.Load(ctx, anchor, "pass all label \"first\"\n"))
	for name, text := range map[string]string{
		"syntax":          "pass all\nnonsense here\n",
		"order":           "pass all\nnat on en0 from 10.0.0.0/8 to any -> (en0)\n",
		"a host's name":   "pass from phone.example to any\n",
		"an open brace":   "pass from { 10.0.0.1 to any\n",
		"a missing table": "table <averyveryverylongtablenamethatistoolong> { }\n",
	} {
		if err := pf.Load(ctx, anchor, text); err == nil {
			t.Errorf("%s: loaded", name)
		}
	}
	m.Busy(1)
	if err := pf.Load(ctx, anchor, "pass all\n"); !errors.Is(err, darwin.ErrBusy) {
		t.Errorf("busy: %v", err)
	}
	if rules, err := pf.Rules(ctx, anchor); err != nil || !strings.Contains(rules, `label "first"`) {
		t.Errorf("refused loads changed the rules: %q, %v", rules, err)
	}
}

func TestHangingProgram(t *testing.T) {
	m := newMac(t)
	m.Hang("/sbin/pfctl", true)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := darwin.NewPF(m).Info(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	m.Hang("/sbin/pfctl", false)
	if _, err := darwin.NewPF(m).Info(t.Context()); err != nil {
		t.Error(err)
	}
	if _, _, _, err := m.Run(t.Context(), nil, "/usr/bin/true"); err == nil {
		t.Error("ran a program that isn't simulated")
	}
}

func TestLaunchdReadsTheDisk(t *testing.T) {
	m := newMac(t)
	const file = "/Library/LaunchDaemons/org.example.d.plist"
	real := filepath.Join(m.options.Root, file)
	must(t, os.MkdirAll(filepath.Dir(real), 0o755))
	var lives []string
	m.Launchd.Start = func(j *launchd.Job, pid int) { lives = append(lives, "start "+j.Label) }
	m.Launchd.Stop = func(label string) { lives = append(lives, "stop "+label) }
	j := &launchd.Job{Label: "org.example.d", ProgramArguments: []string{"/opt/d"}, RunAtLoad: true}
	text, err := j.Render()
	must(t, err)
	must(t, os.WriteFile(real, text, 0o644))
	ctl := launchd.New(launchd.Options{Runner: m, Retry: time.Millisecond})
	if _, err := ctl.Load(t.Context(), j.Label, file); err != nil {
		t.Fatal(err)
	}
	if refused := m.Boot(); refused != nil {
		t.Error(refused)
	}
	must(t, os.Chmod(real, 0o666))
	if refused := m.Boot(); len(refused) != 1 {
		t.Error("a property list that every user may write was loaded")
	}
	if want := []string{"start org.example.d", "stop org.example.d", "start org.example.d", "stop org.example.d"}; !slices.Equal(lives, want) {
		t.Errorf("instances %q", lives)
	}
}

// TestSleepIsSeen sleeps for an hour: the wall clock runs on, the monotonic one doesn't.
func TestSleepIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := New(Options{})
		wall, awake := m.Now(), time.Now()
		time.Sleep(time.Minute)
		m.Sleep(time.Hour)
		time.Sleep(time.Minute)
		if ran, stood := m.Now().Sub(wall), time.Since(awake); ran-stood != time.Hour || stood != 2*time.Minute {
			t.Errorf("the wall clock ran for %v, the monotonic one for %v", ran, stood)
		}
	})
}

func TestStatesEndWithTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMac(t)
		pf := darwin.NewPF(m)
		_, err := pf.Enable(t.Context())
		must(t, err)
		must(t, pf.Load(t.Context(), anchor, "pass out on en0 proto udp all keep state\n"))
		p := pfsim.Packet{Src: netip.MustParseAddr("203.0.113.1"), Dst: netip.MustParseAddr("198.51.100.9"), Proto: pfconf.ProtoUDP, SrcPort: 5000, DstPort: 53}
		if o := m.Send(p); o.Fate != Sent || o.Link != "en0" {
			t.Fatalf("%+v", o)
		}
		states := func() (n int) {
			m.Judge(func(pf *pfsim.PF) { n = pf.StateCount() })
			return n
		}
		if states() != 1 {
			t.Errorf("%d states, want 1", states())
		}
		time.Sleep(61 * time.Second) // udp.first
		if states() != 0 {
			t.Errorf("%d states after a minute, want none", states())
		}
	})
}
