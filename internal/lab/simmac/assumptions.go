package simmac

// The facts about macOS that the product relies on, each with its source and a check
// that runs on the simulated Mac and on a real one.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/launchd"
	"github.com/meshhelper/meshhelper/pfconf"
)

// A Host is a Mac, simulated or real, on which assumptions are checked.
type Host struct {
	// Runner runs commands as root.
	Runner darwin.Runner // required
	// Kernel reads interfaces, routes and sysctls, and opens routing sockets.
	Kernel darwin.Kernel // required
	// CreateTUN creates a utun device.
	CreateTUN func(name string, mtu int) (tun.Device, error) // required
	// Root is the root of the file system: / on a real Mac.
	Root string // required
}

// Host returns the simulated Mac as a [Host].
func (m *Mac) Host() Host {
	return Host{Runner: m, Kernel: m, CreateTUN: m.CreateTUN, Root: m.options.Root}
}

// An Assumption is a behaviour of macOS that the product relies on and that the
// simulated Mac has.
type Assumption struct {
	// Name identifies it in reports: lower-case words joined by dashes.
	Name string
	// Source says where it was read, captured or reported.
	Source string
	// Check tests it, undoes its changes, and returns how the host differs.
	Check func(ctx context.Context, h Host) error
}

// The names of what the checks create. No helper uses them, so the checks run on a Mac
// on which the product is installed.
const (
	scratchAnchor = "com.apple/org.meshhelper.assumptions"
	scratchLabel  = "org.meshhelper.assumptions"
)

// scratchAddr is in TEST-NET-3 (RFC 5737), so no host has it.
var scratchAddr = netip.MustParsePrefix("203.0.113.213/32")

// scratchAddr6 is in this project's unique local prefix (RFC 4193).
var scratchAddr6 = netip.MustParsePrefix("fd6d:6573:6800:ffff::213/128")

// Assumptions returns all assumptions; docs/macos.md lists them. Those about pf need
// Apple's main ruleset. None needs a network.
func Assumptions() []Assumption {
	return []Assumption{
		{"pfctl-token-on-stderr", "captured on macOS 26.5.2 (omacvm netd); sshuttle methods/pf.py", checkToken},
		{"pfctl-noise-on-every-call", "pfctl.c; wazuh#39189", checkNoise},
		{"pfctl-missing-anchor-exits-0", "captured on macOS 26.5.2 (omacvm netd)", checkMissingAnchor},
		{"pfctl-failed-load-keeps-old-rules", "xnu bsd/net/pf_ioctl.c, DIOCXROLLBACK", checkFailedLoad},
		{"pfctl-ignores-set-in-anchor", "pfctl.c, loadopts", checkSetIgnored},
		{"pfctl-takes-unknown-interface", "xnu bsd/net/pf_if.c: no groups, names needn't exist", checkUnknownInterface},
		{"pfctl-prints-rules-in-full", "pfctl(8); apple/container#1666", checkPrintedInFull},
		{"pfctl-replaces-table-from-stdin", "pfctl_table.c", checkTable},
		{"pfctl-changes-tables-in-place", "OpenBSD pfctl_table.c, of which Apple's is a copy", checkTableChanges},
		{"pf-tables-lack-the-all-zero-host", "measured on the pf of xnu-11417.101.15; xnu bsd/net/radix.c", checkZeroHost},
		{"pfctl-kills-both-ways", "xnu bsd/net/pf_ioctl.c, DIOCKILLSTATES", checkKill},
		{"pf-main-ruleset-has-hooks", "/etc/pf.conf of macOS 10.15 to 26", checkHooks},
		{"sysctl-sets-forwarding", "xnu bsd/netinet/ip_input.c, bsd/netinet6/in6_proto.c", checkForwarding},
		{"tunnels-are-closed-without-forwarding", "xnu bsd/netinet/ip_input.c, ip_input_check_interface; bsd/netinet6/ip6_input.c", checkClosedTunnels},
		{"sysctl-boot-session-is-a-uuid", "xnu bsd/kern/kern_sysctl.c", checkBootSession},
		{"sysctl-lists-sockets", "xnu bsd/netinet/in_pcblist.c, get_pcblist_n; network_cmds netstat.tproj/inet.c", checkSockets},
		{"route-mark-stays", "xnu bsd/net/route.h, RTF_PROTO1; netbird systemops_darwin.go", checkRouteMark},
		{"ifconfig-address-shows", "network_cmds ifconfig.tproj; xnu bsd/netinet6/in6.c", checkAddress},
		{"ifconfig-tells-kinds-of-addresses", "network_cmds ifconfig.tproj/af_inet6.c, in6_status", checkAddressKinds},
		{"scutil-shows-resolvers", "configd scutil.tproj/tests.c, dnsinfo/dnsinfo_logging.h", checkResolvers},
		{"pfctl-shows-all-in-one-process", "OpenBSD pfctl.c; captured pfctl -sa of a Mac with Internet Sharing", checkShowAll},
		{"pfctl-lists-all-anchors", "OpenBSD pfctl.c, pfctl_show_anchors; captured pfctl -v -s Anchors", checkAllAnchors},
		{"utun-takes-addresses-with-it", "xnu bsd/net/if_utun.c", checkTunnelGoes},
		{"routing-socket-tells-of-addresses", "xnu bsd/net/rtsock.c, rt_newaddrmsg; netbird, tailscale", checkRoutingSocket},
		{"own-address-leaves-by-utun", "xnu bsd/netinet/in.c, in_ifinit; bsd/netinet/in_rmx.c:168; nebula#38, tailscale#443, netbird#2365", checkOwnAddress(scratchAddr)},
		{"own-ipv6-address-goes-by-lo0", "xnu bsd/netinet6/in6.c:3000, in6_ifaddloop; bsd/netinet6/nd6.c:2990; teleport#66851", checkOwnAddress(scratchAddr6)},
		{"utun-number-taken-is-an-error", "netbird#2196", checkTunnelTaken},
		{"launchctl-missing-service-codes", "osquery#5698; launchctl(1)", checkMissingService},
		{"launchd-refuses-writable-list", "launchd-842 launchctl.c; munkireport#1468", checkWritableList},
		{"launchd-loads-and-unloads", "nix-installer; launchctl(1)", checkService},
		{"socketfilterfw-exits-0-on-failure", "socket_vmnet PR#51; captures of macOS 26", checkFirewall},
	}
}

// checkToken acquires a token, finds it among the references, and releases it twice:
// the second time must fail in a way that the helper recognises.
func checkToken(ctx context.Context, h Host) error {
	stdout, _, status, err := h.Runner.Run(ctx, nil, "/sbin/pfctl", "-s", "References")
	if err != nil || status != 0 {
		return fmt.Errorf("show References: status %d, stdout %q, %w", status, stdout, err)
	}
	pf := darwin.NewPF(h.Runner)
	token, err := pf.Enable(ctx)
	if err != nil {
		return err
	}
	refs, err := pf.References(ctx)
	held := false
	for _, r := range refs {
		held = held || r.Token == uint64(token)
	}
	if err != nil || !held {
		return errors.Join(fmt.Errorf("token %d isn't among the references %+v", token, refs), err, pf.Release(ctx, token))
	}
	if info, err := pf.Info(ctx); err != nil || !info.Enabled {
		return errors.Join(errors.New("not enabled with a token"), err, pf.Release(ctx, token))
	}
	if err := pf.Release(ctx, token); err != nil {
		return err
	}
	if err := pf.Release(ctx, token); !errors.Is(err, darwin.ErrTokenInvalid) && !errors.Is(err, darwin.ErrNotEnabled) {
		return fmt.Errorf("releasing twice gives %v", err)
	}
	return nil
}

// checkNoise looks for the lines about ALTQ that pfctl prints on stderr without -q, and
// that mustn't be taken for an error.
func checkNoise(ctx context.Context, h Host) error {
	_, stderr, status, err := h.Runner.Run(ctx, nil, "/sbin/pfctl", "-s", "info")
	if err != nil || status != 0 || !strings.Contains(string(stderr), "ALTQ") {
		return fmt.Errorf("status %d, stderr %q, %v", status, stderr, err)
	}
	return nil
}

// checkMissingAnchor shows the rules of an anchor that doesn't exist: the message is on
// stderr only, with exit status 0.
func checkMissingAnchor(ctx context.Context, h Host) error {
	stdout, stderr, status, err := h.Runner.Run(ctx, nil, "/sbin/pfctl", "-a", scratchAnchor+".never", "-s", "rules")
	if err != nil || status != 0 || len(stdout) != 0 || !strings.Contains(string(stderr), "Invalid argument") {
		return fmt.Errorf("status %d, stdout %q, stderr %q, %v", status, stdout, stderr, err)
	}
	return nil
}

// withAnchor loads rules into the scratch anchor, calls f with its filter rules as pfctl
// shows them, and flushes it. The rules are for utun4095, which doesn't exist.
func withAnchor(ctx context.Context, h Host, rules string, f func(pf *darwin.PF, shown string) error) error {
	pf := darwin.NewPF(h.Runner)
	err := pf.Load(ctx, scratchAnchor, rules)
	if err == nil {
		var shown string
		if shown, err = pf.Rules(ctx, scratchAnchor); err == nil {
			err = f(pf, shown)
		}
	}
	return errors.Join(err, pf.Flush(ctx, scratchAnchor))
}

// checkFailedLoad loads a file with a syntax error: a load is one transaction.
func checkFailedLoad(ctx context.Context, h Host) error {
	return withAnchor(ctx, h, "pass on utun4095 all\n", func(pf *darwin.PF, before string) error {
		if err := pf.Load(ctx, scratchAnchor, "block all\nnonsense\n"); err == nil {
			return errors.New("nonsense was loaded")
		}
		after, err := pf.Rules(ctx, scratchAnchor)
		if err == nil && (after != before || before == "") {
			err = fmt.Errorf("the rules were %q and are %q", before, after)
		}
		return err
	})
}

// checkSetIgnored loads an anchor with set skip: outside the main ruleset it is accepted
// without an error and has no effect.
func checkSetIgnored(ctx context.Context, h Host) error {
	return withAnchor(ctx, h, "set skip on utun4095\npass on utun4095 all\n", func(pf *darwin.PF, shown string) error {
		skipped, err := pf.Skipped(ctx)
		if err == nil && shown == "" {
			err = errors.New("the rule after set skip isn't loaded")
		}
		for _, name := range skipped {
			if name == "utun4095" {
				err = errors.New("an anchor's set skip has an effect")
			}
		}
		return err
	})
}

// checkUnknownInterface loads a rule for an interface that doesn't exist, as the helper
// does for interfaces that come back.
func checkUnknownInterface(ctx context.Context, h Host) error {
	return withAnchor(ctx, h, "pass on utun4095 all\n", func(_ *darwin.PF, shown string) error {
		if !strings.Contains(shown, "on utun4095") {
			return fmt.Errorf("shown as %q", shown)
		}
		return nil
	})
}

// checkPrintedInFull loads a short rule, which pfctl shows with its defaults. So drift is
// found by comparing parsed rules, not text.
func checkPrintedInFull(ctx context.Context, h Host) error {
	return withAnchor(ctx, h, "pass in on utun4095\n", func(_ *darwin.PF, shown string) error {
		if !strings.Contains(shown, "pass in on utun4095 all flags S/SA keep state") {
			return fmt.Errorf("shown as %q", shown)
		}
		return nil
	})
}

// checkTable replaces a table's content by entries from standard input, since thousands
// of addresses don't fit into arguments.
func checkTable(ctx context.Context, h Host) error {
	const rules = "table <scratch> persist { 203.0.113.1 }\npass on utun4095 from <scratch>\n"
	return withAnchor(ctx, h, rules, func(pf *darwin.PF, _ string) error {
		one := []pfconf.Address{{Kind: pfconf.AddrPrefix, Prefix: scratchAddr}}
		if err := pf.ReplaceTable(ctx, scratchAnchor, "scratch", one); err != nil {
			return err
		}
		entries, err := pf.Table(ctx, scratchAnchor, "scratch")
		if err == nil && (len(entries) != 1 || entries[0].Prefix != scratchAddr) {
			err = fmt.Errorf("the table holds %+v", entries)
		}
		return err
	})
}

// checkTableChanges adds and deletes single entries, one of them negated, and deletes
// from a table that doesn't exist, which is an error.
func checkTableChanges(ctx context.Context, h Host) error {
	const table = "scratch"
	whole := pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: netip.MustParsePrefix("203.0.113.0/24")}
	not := pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: scratchAddr, Not: true}
	return withAnchor(ctx, h, "pass on utun4095\n", func(pf *darwin.PF, _ string) error {
		if err := pf.DeleteFromTable(ctx, scratchAnchor, table, []pfconf.Address{whole}); err == nil {
			return errors.New("deleting from a missing table is no error")
		}
		for _, do := range []struct {
			change func(context.Context, string, string, []pfconf.Address) error
			entry  pfconf.Address
			want   []string
		}{
			{pf.ReplaceTable, whole, []string{"203.0.113.0/24"}},
			{pf.AddToTable, not, []string{"!203.0.113.213", "203.0.113.0/24"}},
			{pf.DeleteFromTable, whole, []string{"!203.0.113.213"}},
		} {
			if err := do.change(ctx, scratchAnchor, table, []pfconf.Address{do.entry}); err != nil {
				return err
			}
			entries, err := pf.Table(ctx, scratchAnchor, table)
			if got := (&pfconf.Table{Addrs: entries}).Entries(); err != nil || !slices.Equal(got, do.want) {
				return fmt.Errorf("the table holds %q, want %q, %v", got, do.want, err)
			}
		}
		return nil
	})
}

// checkZeroHost adds the hosts 0.0.0.0 and ::, which a table drops without an error;
// ::/127 is stored.
func checkZeroHost(ctx context.Context, h Host) error {
	const rules = "table <scratch> persist { 0.0.0.0 :: ::/127 203.0.113.1 }\npass on utun4095 from <scratch>\n"
	return withAnchor(ctx, h, rules, func(pf *darwin.PF, _ string) error {
		for _, zero := range []string{"0.0.0.0", "::"} {
			_, stderr, status, err := h.Runner.Run(ctx, nil, "/sbin/pfctl", "-a", scratchAnchor, "-t", "scratch", "-T", "add", zero)
			if err != nil || status != 0 || !strings.Contains(string(stderr), "0/1 addresses added") {
				return fmt.Errorf("add %s: status %d, stderr %q, %v", zero, status, stderr, err)
			}
		}
		entries, err := pf.Table(ctx, scratchAnchor, "scratch")
		if got := (&pfconf.Table{Addrs: entries}).Entries(); err == nil && !slices.Equal(got, []string{"203.0.113.1", "::/127"}) {
			err = fmt.Errorf("the table holds %q", got)
		}
		return err
	})
}

// checkKill kills states by source and by destination; there are none, so the output
// says 0.
func checkKill(ctx context.Context, h Host) error {
	if err := darwin.NewPF(h.Runner).Kill(ctx, scratchAddr, netip.MustParsePrefix("2001:db8:213::213/128")); err != nil {
		return err
	}
	_, stderr, status, err := h.Runner.Run(ctx, nil, "/sbin/pfctl", "-k", "0.0.0.0/0", "-k", scratchAddr.Addr().String())
	if err != nil || status != 0 || !strings.Contains(string(stderr), "killed 0 states") {
		return fmt.Errorf("status %d, stderr %q, %v", status, stderr, err)
	}
	return nil
}

// checkHooks looks for the calls of com.apple's children in the main ruleset.
func checkHooks(ctx context.Context, h Host) error {
	pf := darwin.NewPF(h.Runner)
	rules, err := pf.Rules(ctx, "")
	if err != nil {
		return err
	}
	nat, err := pf.NAT(ctx, "")
	if err != nil {
		return err
	}
	for _, want := range []string{`anchor "com.apple/*" all`, `nat-anchor "com.apple/*" all`, `rdr-anchor "com.apple/*" all`} {
		if !strings.Contains("\n"+rules+nat, "\n"+want) {
			return fmt.Errorf("the main ruleset has no %s:\n%s%s", want, rules, nat)
		}
	}
	return nil
}

// checkForwarding changes the forwarding sysctls and restores them.
func checkForwarding(ctx context.Context, h Host) error {
	s := darwin.NewSysctl(h.Runner, h.Kernel)
	for _, f := range []darwin.Family{darwin.IPv4, darwin.IPv6} {
		found, err := s.Forwarding(f)
		if err == nil {
			err = errors.Join(s.SetForwarding(ctx, f, !found), s.SetForwarding(ctx, f, found))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkBootSession reads kern.bootsessionuuid, by which a journal of an earlier boot is
// recognised.
func checkBootSession(_ context.Context, h Host) error {
	id, err := darwin.NewSysctl(h.Runner, h.Kernel).BootSession()
	if err == nil && (len(id) != 36 || strings.Count(id, "-") != 4) {
		err = fmt.Errorf("the id is %q", id)
	}
	return err
}

// checkRouteMark adds a route with RTF_PROTO1 and removes it by that mark, as the helper
// does with routes that a killed helper left.
func checkRouteMark(_ context.Context, h Host) error {
	n, err := darwin.Observe(h.Kernel)
	if err != nil {
		return err
	}
	lo := n.Interface("lo0")
	if lo == nil {
		return errors.New("there is no lo0")
	}
	r := darwin.NewRouter(h.Kernel)
	if err := r.Set(lo.Index, []netip.Prefix{scratchAddr}); err != nil {
		return err
	}
	removed, err := r.Sweep([]netip.Prefix{scratchAddr})
	if err == nil && (len(removed) != 1 || removed[0] != scratchAddr) {
		err = fmt.Errorf("swept %v", removed)
	}
	return err
}

// checkAddress gives a utun an IPv4 and an IPv6 address and an MTU, and reads them back.
func checkAddress(ctx context.Context, h Host) error {
	d, name, err := newScratchTunnel(h)
	if err != nil {
		return err
	}
	defer d.Close()
	c := darwin.NewIfconfig(h.Runner)
	v6 := scratchAddr6
	for _, p := range []netip.Prefix{scratchAddr, v6} {
		if err := c.AddAddress(ctx, name, p.Addr()); err != nil {
			return err
		}
	}
	if err := c.SetMTU(ctx, name, 1400); err != nil {
		return err
	}
	n, err := darwin.Observe(h.Kernel)
	if err != nil {
		return err
	}
	i := n.Interface(name)
	found := 0
	for _, a := range i.Addresses {
		if a.Prefix == scratchAddr || a.Prefix == v6 {
			found++
		}
	}
	if found != 2 || i.MTU != 1400 || i.Flags&darwin.InterfacePointToPoint == 0 {
		return fmt.Errorf("the interface is %+v", i)
	}
	return errors.Join(c.RemoveAddress(ctx, name, scratchAddr.Addr()), c.RemoveAddress(ctx, name, v6.Addr()))
}

// checkAddressKinds compares the IPv6 addresses that ifconfig shows, with their flags,
// with those of the routing sysctl.
func checkAddressKinds(ctx context.Context, h Host) error {
	n, err := darwin.Observe(h.Kernel)
	if err != nil {
		return err
	}
	// Both agree on every interface.
	for _, i := range n.Interfaces {
		shown, err := darwin.NewIfconfig(h.Runner).Addresses6(ctx, i.Name)
		if err != nil {
			return err
		}
		var want, got []string
		for _, a := range i.Addresses {
			if a.Prefix.Addr().Is6() {
				want = append(want, a.Prefix.String())
			}
		}
		for _, a := range shown {
			got = append(got, a.Prefix.String())
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("ifconfig shows %q for %s, the kernel %q", got, i.Name, want)
		}
	}
	return nil
}

// checkResolvers parses the output of scutil --dns.
func checkResolvers(ctx context.Context, h Host) error {
	_, err := darwin.Resolvers(ctx, h.Runner)
	return err
}

// checkShowAll reads an anchor with one pfctl -v -s all, and finds the rules as pfctl -s
// rules and -s nat show them, with counters below each.
func checkShowAll(ctx context.Context, h Host) error {
	const rules = "nat on utun4095 inet from 203.0.113.0/24 to any -> 203.0.113.213\npass in on utun4095\n"
	return withAnchor(ctx, h, rules, func(pf *darwin.PF, shown string) error {
		nat, err := pf.NAT(ctx, scratchAnchor)
		if err != nil {
			return err
		}
		all, err := pf.All(ctx, scratchAnchor)
		if err != nil {
			return err
		}
		if all.Sections["STATES"] != "" {
			return fmt.Errorf("states of no interface are shown:\n%s", all.Sections["STATES"])
		}
		// The same rules, with counters between them.
		for text, counted := range map[string]string{shown: all.Rules, nat: all.NAT} {
			line, _, _ := strings.Cut(text, "\n")
			rules := pfconf.ParseShown(counted)
			if len(rules.Rules) != 1 || len(rules.Unknown) != 0 || line == "" || !strings.HasPrefix(counted, line+"\n") || !strings.Contains(counted, "[ Evaluations: ") {
				return fmt.Errorf("%q is shown as %q", text, counted)
			}
		}
		return nil
	})
}

// checkAllAnchors looks for an anchor below another one in the list of all anchors, and
// for its table in the output of one pfctl process.
func checkAllAnchors(ctx context.Context, h Host) error {
	return withAnchor(ctx, h, "table <scratch> persist { 203.0.113.213 }\npass in on utun4095 from <scratch>\n", func(pf *darwin.PF, _ string) error {
		anchors, err := pf.AllAnchors(ctx)
		if err != nil {
			return err
		}
		if !slices.Contains(anchors, scratchAnchor) {
			return fmt.Errorf("%s isn't among the anchors %q", scratchAnchor, anchors)
		}
		all, err := pf.AllOfAny(ctx, scratchAnchor)
		if err != nil {
			return err
		}
		tables := pfconf.ParseTables(all.Sections["TABLES"])
		if len(tables) != 1 || tables[0].Name != "scratch" {
			return fmt.Errorf("the tables are shown as %q", all.Sections["TABLES"])
		}
		return nil
	})
}

// newScratchTunnel creates a utun with any free number and returns its name.
func newScratchTunnel(h Host) (tun.Device, string, error) {
	d, err := h.CreateTUN("utun", 1420)
	if err != nil {
		return nil, "", err
	}
	name, err := d.Name()
	if err != nil {
		d.Close()
	}
	return d, name, err
}

// checkTunnelGoes closes a utun: its addresses and routes must disappear with it.
func checkTunnelGoes(ctx context.Context, h Host) error {
	d, name, err := newScratchTunnel(h)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := darwin.NewIfconfig(h.Runner).AddAddress(ctx, name, scratchAddr.Addr()); err != nil {
		return err
	}
	n, err := darwin.Observe(h.Kernel)
	if err != nil {
		return err
	}
	other := netip.MustParsePrefix("203.0.113.214/32")
	if err := darwin.NewRouter(h.Kernel).Set(n.Interface(name).Index, []netip.Prefix{other}); err != nil {
		return err
	}
	if err := d.Close(); err != nil {
		return err
	}
	if n, err = darwin.Observe(h.Kernel); err != nil {
		return err
	}
	if n.Interface(name) != nil {
		return fmt.Errorf("%s is still there", name)
	}
	for _, r := range n.Routes {
		if r.Dst == other || r.Dst == scratchAddr {
			return fmt.Errorf("the route to %s is still there", r.Dst)
		}
	}
	return nil
}

// checkRoutingSocket waits for a report after which a utun's new address can be read, and
// for one after which it is gone with its utun.
func checkRoutingSocket(ctx context.Context, h Host) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	reports, done := make(chan struct{}, 1), make(chan error)
	watcher := darwin.NewWatcher(darwin.WatcherOptions{Kernel: h.Kernel, Log: slog.New(slog.DiscardHandler)})
	go func() {
		done <- watcher.Run(ctx, func() {
			select {
			case reports <- struct{}{}:
			default:
			}
		})
	}()
	defer func() {
		cancel()
		<-done
	}()
	select {
	case <-reports: // the watcher listens
	case <-ctx.Done():
		return errors.New("the routing socket doesn't open")
	}
	d, name, err := newScratchTunnel(h)
	if err != nil {
		return err
	}
	defer d.Close()
	// Changes of other interfaces are reported too. A report must come after the
	// address was added or removed.
	reported := func(there bool, what string) error {
		for {
			select {
			case <-reports:
			case <-ctx.Done():
				return fmt.Errorf("%s isn't reported", what)
			}
			n, err := darwin.Observe(h.Kernel)
			if err != nil {
				return err
			}
			i := n.Interface(name)
			if has := i != nil && slices.ContainsFunc(i.Addresses, func(a darwin.Address) bool { return a.Prefix.Addr() == scratchAddr.Addr() }); has == there {
				return nil
			}
		}
	}
	if err := darwin.NewIfconfig(h.Runner).AddAddress(ctx, name, scratchAddr.Addr()); err != nil {
		return err
	}
	if err := reported(true, "an address"); err != nil {
		return err
	}
	if err := d.Close(); err != nil {
		return err
	}
	return reported(false, "an address that goes with its tunnel")
}

// checkOwnAddress looks up the route to a utun's own address: it leads into the utun for
// IPv4, and to lo0 for IPv6.
func checkOwnAddress(own netip.Prefix) func(context.Context, Host) error {
	return func(ctx context.Context, h Host) error {
		d, name, err := newScratchTunnel(h)
		if err != nil {
			return err
		}
		defer d.Close()
		if err := darwin.NewIfconfig(h.Runner).AddAddress(ctx, name, own.Addr()); err != nil {
			return err
		}
		n, err := darwin.Observe(h.Kernel)
		if err != nil {
			return err
		}
		want := name
		if own.Addr().Is6() {
			want = "lo0"
		}
		for _, r := range n.Routes {
			if r.Dst != own || r.Flags&darwin.RouteScoped != 0 {
				continue
			}
			if i := n.Interface(want); i == nil || r.Index != i.Index || r.Flags&darwin.RouteLocal == 0 {
				return fmt.Errorf("the route to %s is %+v, want by %s, marked as local", own, r, want)
			}
			for _, routed := range n.Routed() {
				if routed.Prefix == own {
					return fmt.Errorf("%s passes for a network of %s", own, routed.Interface)
				}
			}
			return nil
		}
		return fmt.Errorf("there is no route to %s", own)
	}
}

// checkTunnelTaken creates a utun with a number that is in use, which is an error.
func checkTunnelTaken(_ context.Context, h Host) error {
	d, name, err := newScratchTunnel(h)
	if err != nil {
		return err
	}
	defer d.Close()
	if again, err := h.CreateTUN(name, 1420); err == nil {
		again.Close()
		return fmt.Errorf("%s was made twice", name)
	}
	return nil
}

// checkMissingService checks launchctl's exit status for a service that isn't loaded.
func checkMissingService(ctx context.Context, h Host) error {
	for verb, want := range map[string]int{"print": int(launchd.NoSuchService), "bootout": int(launchd.NoSuchProcess)} {
		_, stderr, status, err := h.Runner.Run(ctx, nil, "/bin/launchctl", verb, "system/"+scratchLabel+".never")
		if err != nil || status != want {
			return fmt.Errorf("%s of a missing service: status %d, want %d, stderr %q, %v", verb, status, want, stderr, err)
		}
	}
	return nil
}

// withList writes the property list of a service that sleeps, calls f with its path as
// the Mac and as this process see it, and removes the service and the file.
func withList(ctx context.Context, h Host, f func(ctl *launchd.Launchctl, path, file string) error) error {
	path := "/Library/LaunchDaemons/" + scratchLabel + ".plist"
	file := filepath.Join(h.Root, path)
	j := &launchd.Job{Label: scratchLabel, ProgramArguments: []string{"/bin/sleep", "600"}, RunAtLoad: true, ExitTimeOut: new(5)}
	text, err := j.Render()
	if err != nil {
		return err
	}
	if err := owned.ReplaceFrom(file, bytes.NewReader(text), 0o644); err != nil { // launchd refuses a list that others can write
		return err
	}
	ctl := launchd.New(launchd.Options{Runner: h.Runner})
	err = f(ctl, path, file)
	return errors.Join(err, ctl.Bootout(ctx, scratchLabel), os.Remove(file))
}

// checkWritableList bootstraps a property list that anyone can write, which must fail.
func checkWritableList(ctx context.Context, h Host) error {
	return withList(ctx, h, func(_ *launchd.Launchctl, path, file string) error {
		if err := os.Chmod(file, 0o666); err != nil {
			return err
		}
		_, stderr, status, err := h.Runner.Run(ctx, nil, "/bin/launchctl", "bootstrap", "system", path)
		if err != nil || status == 0 {
			return fmt.Errorf("status %d, stderr %q, %v", status, stderr, err)
		}
		return nil
	})
}

// checkService loads a service, upgrades it, and boots it out.
func checkService(ctx context.Context, h Host) error {
	return withList(ctx, h, func(ctl *launchd.Launchctl, path, _ string) error {
		// The second time is an upgrade: bootout, then bootstrap.
		for range 2 {
			s, err := ctl.Load(ctx, scratchLabel, path)
			if err != nil {
				return err
			}
			if !s.Running() || s.Path != path {
				return fmt.Errorf("status %+v", s)
			}
		}
		if err := ctl.Bootout(ctx, scratchLabel); err != nil {
			return err
		}
		s, err := ctl.Print(ctx, scratchLabel)
		if err == nil && s.Loaded {
			err = fmt.Errorf("still loaded: %+v", s)
		}
		return err
	})
}

// checkClosedTunnels checks that the sysctls of check_interface have their defaults.
func checkClosedTunnels(_ context.Context, h Host) error {
	for _, f := range []darwin.Family{darwin.IPv4, darwin.IPv6} {
		if closes, err := darwin.NewSysctl(h.Runner, h.Kernel).ClosesTunnels(f); err != nil || !closes {
			return fmt.Errorf("%v: packets to a tunnel's address are taken from any interface (%v)", f, err)
		}
	}
	return nil
}

// checkSockets reads the ephemeral ports and the sockets, among which mDNSResponder's
// UDP port 5353 always is.
func checkSockets(_ context.Context, h Host) error {
	ranges, err := darwin.NewSysctl(h.Runner, h.Kernel).EphemeralPorts()
	if err != nil {
		return err
	}
	if r := ranges[0]; r.First < 1024 || r.Last <= r.First {
		return fmt.Errorf("sockets get ports %v", ranges)
	}
	sockets, err := darwin.ReadSockets(h.Kernel)
	if err != nil {
		return err
	}
	if !slices.Contains(sockets.UDP, 5353) {
		return fmt.Errorf("mDNSResponder's UDP port 5353 isn't among %d", len(sockets.UDP))
	}
	return nil
}

// checkFirewall unblocks a program that isn't registered: socketfilterfw exits with 0,
// and only its list shows the failure.
func checkFirewall(ctx context.Context, h Host) error {
	const missing = "/nonexistent/" + scratchLabel
	stdout, stderr, status, err := h.Runner.Run(ctx, nil, firewallPath, "--unblockapp", missing)
	if err != nil || status != 0 {
		return fmt.Errorf("--unblockapp of what isn't registered: status %d, stdout %q, stderr %q, %w", status, stdout, stderr, err)
	}
	stdout, _, status, err = h.Runner.Run(ctx, nil, firewallPath, "--listapps")
	if text := strings.ToLower(string(stdout)); err != nil || status != 0 || !strings.Contains(text, "total number of apps") || strings.Contains(text, missing) {
		return fmt.Errorf("--listapps: status %d, stdout %.200q, %v", status, stdout, err)
	}
	return nil
}
