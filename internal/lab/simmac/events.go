package simmac

// Events of a whole Mac: boot, sleep, Internet Sharing, rules that other software loads.

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
)

// Boot restarts the Mac. Services end, and those with a property list start again.
// Tokens, states, rules, tunnels and the content of /var/run are lost; forwarding is
// disabled and the boot session is new. It returns the errors of services that launchd
// refused to load.
func (m *Mac) Boot() []error {
	m.Launchd.Shutdown()
	m.mu.Lock()
	tunnels := m.tunnels
	m.tunnels = map[string]*tunnel{}
	m.mu.Unlock()
	for _, t := range tunnels {
		t.Close()
	}
	m.Kernel.Boot()
	m.engine.boot()
	m.PF.Boot()
	if m.options.Root == "" {
		return nil
	}
	run, _ := filepath.Glob(filepath.Join(m.options.Root, "var/run/*"))
	for _, f := range run {
		os.RemoveAll(f)
	}
	lists, _ := filepath.Glob(filepath.Join(m.options.Root, "Library/LaunchDaemons/*.plist"))
	for i, l := range lists {
		lists[i] = strings.TrimPrefix(l, filepath.Clean(m.options.Root))
	}
	return m.Launchd.Boot(lists)
}

// Sleep makes the Mac sleep for d and wake. Only the wall clock advances, and some
// processes' routing sockets are shut down (pid_shutdown_sockets in xnu
// bsd/kern/kern_proc.c).
func (m *Mac) Sleep(d time.Duration) {
	m.mu.Lock()
	m.slept += d
	m.mu.Unlock()
	m.Kernel.BreakSockets(syscall.ENOTCONN)
}

// LoadMain replaces the main ruleset, as other software or a system update does with
// pfctl -f. Anchors that were loaded separately survive; inserted anchor calls and skip
// flags don't.
func (m *Mac) LoadMain(rules string) error { return m.engine.Load("", rules) }

// LoadAnchor loads an anchor, as other software does.
func (m *Mac) LoadAnchor(anchor, rules string) error { return m.engine.Load(anchor, rules) }

// FlushMain is another program's pfctl -F all: it removes the main ruleset with its
// anchor calls, and all states. Child anchors stay.
func (m *Mac) FlushMain() { m.engine.Flush("") }

// FlushAnchor is another program's pfctl -a anchor -F all.
func (m *Mac) FlushAnchor(anchor string) { m.engine.Flush(anchor) }

// sharingMain is the main ruleset while Internet Sharing runs: its calls come after
// those of com.apple (captured on macOS 15, sshuttle#975), and lo0 is skipped (captured:
// pfctl -v -s Interfaces).
const sharingMain = `set skip on lo0
scrub-anchor "com.apple/*"
scrub-anchor "com.apple.internet-sharing"
nat-anchor "com.apple/*"
nat-anchor "com.apple.internet-sharing"
rdr-anchor "com.apple/*"
rdr-anchor "com.apple.internet-sharing"
dummynet-anchor "com.apple/*"
anchor "com.apple/*"
anchor "com.apple.internet-sharing"
`

// The bridge of Internet Sharing and of virtual machines (vmnet).
const (
	sharingBridge = "bridge100"
	sharingLAN    = "192.168.2.1/24"
)

// sharingRules are loaded into the anchor of Internet Sharing.
const sharingRules = `scrub in on bridge100 all
nat on %s inet from 192.168.2.0/24 to any -> (%[1]s)
pass on bridge100 all
`

// InternetSharing turns Internet Sharing on, towards uplink.
func (m *Mac) InternetSharing(uplink string) error {
	if err := m.AddEthernet(sharingBridge, []string{sharingLAN}); err != nil {
		return err
	}
	m.Kernel.SetVariable("net.inet.ip.forwarding", "1")
	token := m.PF.Hold("pfd")
	m.mu.Lock()
	m.sharing = append(m.sharing, token)
	m.mu.Unlock()
	if err := m.LoadAnchor("com.apple.internet-sharing", fmt.Sprintf(sharingRules, uplink)); err != nil {
		return err
	}
	return m.LoadMain(sharingMain)
}

// StopInternetSharing turns it off, and IPv4 forwarding with it. Whether macOS does so
// isn't known, but a program must survive it. lo0 stays skipped.
func (m *Mac) StopInternetSharing() error {
	m.Kernel.RemoveInterface(sharingBridge)
	m.engine.Flush("com.apple.internet-sharing")
	m.Kernel.SetVariable("net.inet.ip.forwarding", "0")
	m.mu.Lock()
	tokens := m.sharing
	m.sharing = nil
	m.mu.Unlock()
	for _, t := range tokens {
		if err := darwin.NewPF(m.PF).Release(context.Background(), t); err != nil {
			return err
		}
	}
	return m.SkipLoopback()
}

// Dump prints everything that a program may change on the Mac and must restore:
// interfaces, addresses, routes, forwarding, whether pf is enabled, and all rules, tables
// and tokens. It leaves out empty anchors, which the kernel keeps until it boots.
func (m *Mac) Dump() string {
	var b strings.Builder
	n := m.engine.observe()
	names := map[int]string{}
	for _, i := range n.Interfaces {
		names[i.Index] = i.Name
		fmt.Fprintf(&b, "interface %s flags %#x mtu %d", i.Name, uint32(i.Flags), i.MTU)
		for _, a := range i.Addresses {
			fmt.Fprintf(&b, " %s", a.Prefix)
		}
		b.WriteString("\n")
	}
	var routes []string
	for _, r := range n.Routes {
		routes = append(routes, fmt.Sprintf("route %s %v by %s flags %#x\n", r.Dst, r.Gateway, names[r.Index], uint32(r.Flags)))
	}
	slices.Sort(routes)
	b.WriteString(strings.Join(routes, ""))
	for _, v := range []string{"net.inet.ip.forwarding", "net.inet6.ip6.forwarding"} {
		fmt.Fprintf(&b, "%s %s\n", v, m.Kernel.Variable(v))
	}
	fmt.Fprintf(&b, "pf enabled %v, %d tokens\n", m.PF.Enabled(), len(m.PF.Tokens()))
	b.WriteString(m.engine.dump())
	return b.String()
}
