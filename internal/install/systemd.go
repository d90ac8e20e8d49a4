package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/owned"
)

// The installed paths on Linux: programs that an administrator installs are below
// /usr/local (hier(7)), an administrator's units in /etc/systemd/system (systemd.unit(5)).
const (
	libexecDir = "/usr/local/libexec"
	unitDir    = "/etc/systemd/system"
	// wantsDir holds the links by which systemd starts units at boot; `systemctl enable`
	// makes them for a unit's WantedBy=multi-user.target.
	wantsDir = unitDir + "/multi-user.target.wants"
	// runDir exists while systemd is the service manager (sd_booted(3)).
	runDir = "/run/systemd/system"
)

// WatchdogTime is how long an installed helper may go without a sign of life from its
// loop before systemd kills it. It exceeds reconcile.RoundLimit, which bounds the steps of
// one round together, by the wait between two rounds and a margin for a slow host.
const WatchdogTime = 4 * time.Minute

// Unit returns the name of the service's unit.
func (o *Options) Unit() string { return o.Label + ".service" }

// UnitPath returns where the unit is installed.
func (o *Options) UnitPath() string { return unitDir + "/" + o.Unit() }

// wantsPath returns the link by which systemd starts the unit at boot.
func (o *Options) wantsPath() string { return wantsDir + "/" + o.Unit() }

// unitText returns the unit file. A comment in it explains each protection of
// systemd.exec(5) that is left out.
func (o *Options) unitText() string {
	words := append([]string{o.Program(), "run"}, o.Arguments...)
	for i, w := range words {
		words[i] = quoteUnit(w)
	}
	return fmt.Sprintf(`# Written by "meshhelper install", which replaces it: put changes in a drop-in
# (systemctl edit %[1]s).
[Unit]
Description=meshhelper, a router for WireGuard peers
Documentation=https://github.com/meshhelper/meshhelper
# Stopped before the network goes, so that the host is left as it was found.
After=network.target nss-user-lookup.target
# It is started again for ever: while it doesn't run, no peer is served.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart=%[2]s
Restart=always
RestartSec=2s
WatchdogSec=%[3]d
TimeoutStartSec=90
# What it takes to leave the host as it was found, and a rest.
TimeoutStopSec=%[4]d
UMask=0077
StateDirectory=%[5]s
StateDirectoryMode=0700

NoNewPrivileges=yes
# NET_ADMIN for interface, routes, nftables and the sysctls of the network; NET_RAW for
# packets by a chosen interface; NET_BIND_SERVICE for a port below 1024.
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE
ProtectSystem=strict
# The socket and the lock are in /run.
ReadWritePaths=/run
ProtectHome=yes
PrivateTmp=yes
# Not PrivateDevices, which has no /dev/net/tun.
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
# Not PrivateNetwork nor IPAddressDeny: the host's network is what it serves. Not
# PrivateUsers: capabilities must count in the host's network namespace. Not
# ProtectKernelTunables, which makes /proc/sys read-only: it switches forwarding.
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
# Not ProcSubset=pid, which hides /proc/sys and /proc/net.
ProtectProc=invisible
# The threads that talk to the kernel stay in the network namespace by setns.
RestrictNamespaces=net
RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@resources @keyring @setuid @chown @aio
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
`, o.Label, strings.Join(words, " "), int(WatchdogTime/time.Second), int(host.LeaveLimit/time.Second)+5, filepath.Base(o.StateDir))
}

// quoteUnit returns a word of ExecStart in quotes, with the characters that systemd would
// expand doubled or escaped (systemd.service(5), "Command lines").
func quoteUnit(word string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`, `$`, `$$`, "\n", `\n`).Replace(word) + `"`
}

// systemdInstallSteps returns the steps of [Install] on Linux. The program and the unit are
// replaced while the old helper still runs, so that the mesh is down for as short as
// possible.
func (o *Options) systemdInstallSteps() []Step {
	return []Step{
		{"check that this runs as root and that systemd is running", false, o.checkUnit},
		{fmt.Sprintf("make the folders %s and %s", libexecDir, o.StateDir), false, o.makeUnitDirs},
		{fmt.Sprintf("copy %s to %s", o.Source, o.Program()), false, o.copyProgram},
		{fmt.Sprintf("check that only root can change %s", o.Program()), false, o.checkOwnedProgram},
		{fmt.Sprintf("write %s", o.UnitPath()), false, o.writeUnit},
		{"have systemd reload its units", false, func(ctx context.Context) error { return o.systemctl(ctx, "daemon-reload") }},
		{fmt.Sprintf("stop the service %s, if it runs", o.Label), false, o.stopUnit},
		{"keep the settings in " + o.StateDir, false, o.keep},
		{fmt.Sprintf("enable the service %s, so that it starts at boot", o.Label), false, func(ctx context.Context) error { return o.systemctl(ctx, "enable", o.Unit()) }},
		{fmt.Sprintf("start the service %s", o.Label), false, o.start},
		{"wait until the helper answers", false, o.Ready},
	}
}

// ErrNoSystemd is wrapped by Install's error if systemd isn't the service manager.
var ErrNoSystemd = errors.New("systemd isn't this host's service manager")

// checkUnit checks, before anything is changed, that systemd runs, that the unit's path is
// free or the unit is ours, that no other user can replace the folders, and last that this
// process is root.
func (o *Options) checkUnit(context.Context) error {
	if !o.HasSystemd() {
		return fmt.Errorf("%w (there is no %s)", ErrNoSystemd, runDir)
	}
	if err := host.CheckLabel(o.Label); err != nil {
		return err
	}
	if !filepath.IsAbs(o.Source) {
		return fmt.Errorf("source %q: not an absolute path", o.Source)
	}
	// A masked unit is a link to /dev/null (systemctl(1), mask), made on purpose by the
	// administrator. Any other link leads to a unit that isn't ours.
	if to, err := os.Readlink(o.disk(o.UnitPath())); err == nil {
		if to == "/dev/null" {
			return fmt.Errorf("%s is masked; to let it start: systemctl unmask %s", o.Unit(), o.Unit())
		}
		return fmt.Errorf("%s is a link to %s; remove it, or choose another --label", o.UnitPath(), to)
	}
	for _, dir := range []string{libexecDir, unitDir, o.StateDir} {
		if err := o.checkAbove(dir); err != nil {
			return err
		}
	}
	return o.needRoot()
}

// HasSystemd reports whether systemd is this host's service manager.
func (o *Options) HasSystemd() bool {
	info, err := os.Stat(o.disk(runDir))
	return err == nil && info.IsDir()
}

// makeUnitDirs is makeDirs on Linux. Only root can read the state, with the private key.
func (o *Options) makeUnitDirs(context.Context) error {
	return errors.Join(o.makeDir(libexecDir, 0o755), o.makeDir(unitDir, 0o755), o.makeDir(o.StateDir, 0o700))
}

// checkAbove fails if another user could replace dir, or a folder above it.
func (o *Options) checkAbove(dir string) error {
	err := owned.CheckAbove(o.disk(dir))
	var above *owned.AboveError
	if errors.As(err, &above) && above.Hint != "" {
		return fmt.Errorf("%w; %s", err, above.Hint)
	}
	return err
}

// checkOwnedProgram checks that only root can replace the executable, its folder and the
// folders above. If /usr/local is a link, as on hosts whose /usr is read-only, it follows
// the link.
func (o *Options) checkOwnedProgram(context.Context) error {
	if err := o.checkAbove(libexecDir); err != nil {
		return fmt.Errorf("it would run as root: %w", err)
	}
	f, err := owned.Open(o.disk(o.Program()))
	if err != nil {
		return fmt.Errorf("it would run as root: %w", err)
	}
	return f.Close()
}

// writeUnit writes the unit, which every user may read, as systemd's own units.
func (o *Options) writeUnit(context.Context) error {
	return replace(o.disk(o.UnitPath()), strings.NewReader(o.unitText()), 0o644)
}

// systemctlPaths are the paths that distributions install systemctl at.
var systemctlPaths = []string{"/usr/bin/systemctl", "/bin/systemctl"}

// systemctl runs `systemctl`. Its error quotes what systemctl printed on stderr.
func (o *Options) systemctl(ctx context.Context, args ...string) error {
	_, err := o.askSystemctl(ctx, args...)
	return err
}

// askSystemctl runs systemctl and returns its stdout. An exit status other than 0 is an
// error with a hint, which quotes stderr. --no-ask-password keeps systemctl from waiting at
// a terminal for the password of an encrypted disk.
func (o *Options) askSystemctl(ctx context.Context, args ...string) (string, error) {
	path := systemctlPaths[0]
	for _, p := range systemctlPaths {
		if _, err := os.Stat(o.disk(p)); err == nil {
			path = p
			break
		}
	}
	stdout, stderr, status, err := o.Runner.Run(ctx, nil, path, append([]string{"--no-ask-password"}, args...)...)
	command := "systemctl " + strings.Join(args, " ")
	if err != nil {
		return "", fmt.Errorf("%s: %w", command, err)
	}
	if status == 0 {
		return string(stdout), nil
	}
	said := strings.Join(strings.Fields(string(stderr)), " ")
	if said == "" {
		said = fmt.Sprintf("exit status %d", status)
	}
	hint := ""
	switch verb := args[0]; {
	case strings.Contains(said, "masked"):
		hint = "; to let it start: systemctl unmask " + o.Unit()
	case verb == "start":
		hint = "; see why: journalctl -u " + o.Unit()
	}
	return "", fmt.Errorf("%s: %s%s", command, said, hint)
}

// unitState returns the unit's LoadState and ActiveState, as `systemctl show` prints them,
// also for a unit that doesn't exist (systemctl(1)).
func (o *Options) unitState(ctx context.Context) (load, active string, err error) {
	text, err := o.askSystemctl(ctx, "show", "--property=LoadState,ActiveState", o.Unit())
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "LoadState":
			load = value
		case "ActiveState":
			active = value
		}
	}
	if err == nil && active == "" {
		err = fmt.Errorf("systemctl show %s: no ActiveState in %.100q", o.Unit(), text)
	}
	return load, active, err
}

// systemdChecks is [Checks] on Linux.
func (o *Options) systemdChecks(ctx context.Context) []Check {
	if _, err := os.Lstat(o.disk(o.UnitPath())); errors.Is(err, fs.ErrNotExist) {
		c := Check{Name: "service"}
		if !o.HasSystemd() {
			return []Check{c.wrong("not installed, and "+ErrNoSystemd.Error(), "run the helper in the foreground, or from this host's service manager: meshhelper run")}
		}
		return []Check{c.wrong("not installed: there is no "+o.UnitPath(), "sudo meshhelper install")}
	}
	return runChecks(ctx, o.checkUnitFile, o.checkUnitProgram, o.checkUnitRuns, o.checkUnitEnabled)
}

// checkUnitFile compares the unit with the one that Install writes.
func (o *Options) checkUnitFile(context.Context) Check {
	c := Check{Name: "unit"}
	if to, err := os.Readlink(o.disk(o.UnitPath())); err == nil {
		if to == "/dev/null" {
			return c.wrong(o.Unit()+" is masked, so it doesn't start", fmt.Sprintf("sudo systemctl unmask %s, then: sudo meshhelper install", o.Unit()))
		}
		return c.wrong(fmt.Sprintf("%s is a link to %s, which isn't meshhelper's", o.UnitPath(), to), "remove the link, then: sudo meshhelper install")
	}
	text, err := os.ReadFile(o.disk(o.UnitPath()))
	switch {
	case err != nil:
		return c.unknown(err)
	case string(text) != o.unitText():
		return c.wrong(o.UnitPath()+" isn't the unit that this version installs: it was edited, or another version wrote it", again+"; changes belong in a drop-in: sudo systemctl edit "+o.Unit())
	}
	return c.fine("%s", o.UnitPath())
}

// checkUnitProgram checks that only root can replace the installed program. A user who may
// not look into its folder gets no verdict.
func (o *Options) checkUnitProgram(ctx context.Context) Check {
	c := Check{Name: "program"}
	if err := o.checkOwnedProgram(ctx); err != nil && !errors.Is(err, fs.ErrPermission) {
		return c.wrong(err.Error(), "chown root and chmod go-w that path, then: sudo meshhelper install")
	} else if err != nil {
		return c.unknown(err)
	}
	return c.fine("%s, which only root can change", o.Program())
}

// checkUnitRuns asks systemd for the state of the service.
func (o *Options) checkUnitRuns(ctx context.Context) Check {
	c := Check{Name: "service"}
	if !o.HasSystemd() {
		return c.wrong(ErrNoSystemd.Error()+", so nothing starts the unit", "run the helper from this host's service manager: meshhelper run")
	}
	switch load, active, err := o.unitState(ctx); {
	case err != nil:
		return c.unknown(err)
	case active == "active":
		return c.fine("%s runs", o.Unit())
	case load != "loaded":
		return c.wrong(fmt.Sprintf("systemd hasn't loaded %s (%s)", o.Unit(), load), "sudo systemctl daemon-reload, then: sudo systemctl start "+o.Unit())
	case active == "inactive":
		return c.wrong(o.Unit()+" is stopped", "sudo systemctl start "+o.Unit())
	default:
		return c.wrong(fmt.Sprintf("%s doesn't run: systemd says %s", o.Unit(), active), "see why: journalctl -u "+o.Unit())
	}
}

// checkUnitEnabled looks for the link by which systemd starts the unit at boot.
func (o *Options) checkUnitEnabled(context.Context) Check {
	c := Check{Name: "start with the host"}
	switch _, err := os.Lstat(o.disk(o.wantsPath())); {
	case errors.Is(err, fs.ErrNotExist):
		return c.wrong(o.Unit()+" isn't enabled, so it doesn't start with the host", "sudo systemctl enable "+o.Unit())
	case err != nil:
		return c.unknown(err)
	}
	return c.fine("%s is enabled", o.Unit())
}

// stopUnit stops the service and waits until it has ended.
func (o *Options) stopUnit(ctx context.Context) error {
	_, active, err := o.unitState(ctx)
	switch {
	case err != nil:
		return err
	case active == "inactive":
		return errNothing
	}
	o.stopped = active != "failed"
	// A unit in the state failed may still be waiting for its next start.
	if err := o.systemctl(ctx, "stop", o.Unit()); err != nil {
		return err
	}
	_, active, err = o.unitState(ctx)
	if err == nil && active != "inactive" && active != "failed" {
		err = fmt.Errorf("%s is still %s", o.Unit(), active)
	}
	return err
}

// systemdUninstallSteps returns the steps of [Uninstall] on Linux.
func (o *Options) systemdUninstallSteps() []Step {
	u := &uninstaller{Options: o}
	steps := []Step{
		{fmt.Sprintf("stop the service %s", o.Label), false, u.stopSystemd},
		{"check that no other helper runs", false, u.alone},
		{"put the host back as it was found", false, u.restore},
		{"remove " + o.wantsPath(), false, o.remover(o.wantsPath())},
		{"remove " + o.UnitPath(), false, u.removeUnit},
		{"have systemd reload its units", false, u.reload},
		{"remove " + o.Program(), false, o.remover(o.Program())},
		{"remove " + o.Socket, false, u.removeSocket},
		{"remove the link " + linkPath, false, u.removeLink},
	}
	if o.Purge {
		steps = append(steps, Step{"remove " + o.StateDir + " with the key and all peers", false, u.purger(o.StateDir)})
	}
	return steps
}

// stopSystemd stops the service. If systemd isn't running, the service isn't either.
func (u *uninstaller) stopSystemd(ctx context.Context) error {
	if !u.HasSystemd() {
		u.stopped = true
		return errNothing
	}
	err := u.stopUnit(ctx)
	u.stopped = err == nil || errors.Is(err, errNothing)
	return err
}

// removeUnit removes the unit, unless it is a link, which Install never makes.
func (u *uninstaller) removeUnit(ctx context.Context) error {
	if _, err := os.Readlink(u.disk(u.UnitPath())); err == nil {
		return errNothing
	}
	return u.remover(u.UnitPath())(ctx)
}

// reload makes systemd forget the removed unit.
func (u *uninstaller) reload(ctx context.Context) error {
	if !u.HasSystemd() {
		return errNothing
	}
	return u.systemctl(ctx, "daemon-reload")
}

// installedOnLinux returns the installed paths that still exist.
func (o *Options) installedOnLinux() (left []string) {
	for _, path := range []string{o.wantsPath(), o.UnitPath(), o.Program(), o.Socket, o.StateDir} {
		if _, err := os.Lstat(o.disk(path)); !errors.Is(err, fs.ErrNotExist) {
			left = append(left, path)
		}
	}
	return left
}
