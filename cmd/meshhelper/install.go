package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/macos"
	"github.com/meshhelper/meshhelper/internal/install"
	"github.com/meshhelper/meshhelper/internal/wanted"
	"github.com/meshhelper/meshhelper/launchd"
)

// serviceHost is a host on which the helper can be installed: a Mac or a Linux host. Tests
// make one of a temporary folder and a fake runner.
type serviceHost struct {
	// systemd distinguishes Linux from macOS. A Linux host may still lack systemd
	// (install.ErrNoSystemd).
	systemd bool
	// runner runs launchctl or systemctl.
	runner launchd.Runner
	// executable returns the path of this program (os.Executable).
	executable func() (string, error)
	// restore undoes, by the journal in stateDir, what a helper that died left on the host.
	restore func(ctx context.Context, stateDir string) error
	// inUse returns an error if a helper runs on this host, by what all helpers share; nil
	// where they share nothing but the default socket.
	inUse func() error
	// root is prepended to every path of the host; "" outside tests.
	root string
	// settle replaces settleTime in tests; 0 means settleTime.
	settle time.Duration
}

// logDir is the folder of an installed helper's log on a Mac, and of its stderr, to which Go
// writes the goroutines of a crash. With systemd the journal has both.
const logDir = "/var/log/meshhelper"

// startTime bounds how long an installed helper may take to answer. It starts in about a
// second; a host that is booting or busy may need more.
const startTime = 30 * time.Second

// settleTime is how long install waits for a helper that answers but is closed. It covers
// several rounds of the helper, each of which repeats a step that failed.
const settleTime = 5 * time.Second

// installOptions are the flags of install.
type installOptions struct {
	app                       *app
	label, operator, endpoint string
	caller                    string // the user behind sudo, unless --operator is given
	listenPort                uint16
	dryRun                    bool
	given                     func(flag string) bool // whether a flag was given
	flags                     string                 // givenFlags
}

// defaultLabel returns the service's name if --label isn't given: a unit's name on Linux, a
// reverse domain name on macOS (launchd.plist(5), Label).
func (h *serviceHost) defaultLabel() string {
	if h.systemd {
		return "meshhelper"
	}
	return macos.DefaultLabel
}

// onLaunchd reports whether launchd is this host's service manager.
func (a *app) onLaunchd() bool { return a.service != nil && !a.service.systemd }

// newInstallCommand returns `install`.
func newInstallCommand(a *app) *cobra.Command {
	if a.service == nil {
		return newUnsupportedCommand("install", "Install the helper as a service")
	}
	o := &installOptions{app: a}
	c := &cobra.Command{
		Use: "install", Short: "Install the helper as a service, or upgrade it",
		Long: `Copy the helper to a folder that only root can change, have launchd or systemd
start it now and at every boot, wait until it answers, and print its state.
Repeating it upgrades the helper in place; the mesh stays as it is. --operator,
--listen-port and --endpoint are kept as settings, which "meshhelper settings"
shows and changes; a flag that isn't given leaves its setting as it was.`,
		RunE: func(c *cobra.Command, _ []string) error {
			o.given, o.flags = c.Flags().Changed, givenFlags(c.Flags())
			return o.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&o.label, "label", a.service.defaultLabel(), "`NAME` of the service, and on a Mac of its anchor in the packet filter")
	f.StringVar(&o.operator, "operator", "", "`USER` who may change the mesh besides root (the user of sudo)")
	f.Uint16Var(&o.listenPort, "listen-port", wanted.DefaultListenPort, "UDP `PORT` of WireGuard")
	f.StringVar(&o.endpoint, "endpoint", "", "`HOST[:PORT]` where peers reach this host")
	f.BoolVar(&o.dryRun, "dry-run", false, "print the steps and do nothing")
	return c
}

// run installs the helper and prints its state. A helper that is installed and answers but
// stays closed is an error (exit status 1): peers can't use it.
func (o *installOptions) run(ctx context.Context) error {
	what, err := o.options()
	if err != nil {
		return err
	}
	if o.dryRun {
		return o.printPlan(ctx, what)
	}
	boots := true // whether the optional step that enables the start at boot succeeded
	err = install.Install(ctx, what, func(s install.Step, err error) {
		boots = boots && (s.Text != install.StepBoot || err == nil)
		o.app.reportStep(s, err)
	})
	if err != nil {
		return o.app.serviceError("install"+o.flags, err)
	}
	s, err := o.waitEnforcing(ctx)
	if err != nil {
		return err
	}
	out := map[string]any{"label": o.label, "program": what.Program(), "operator": o.operator, "startsAtBoot": boots, "status": s}
	if err := o.app.print(out, func() { o.describe(s, what, boots) }); err != nil {
		return err
	}
	return closedError(s)
}

// printPlan prints the steps for --dry-run, and returns the error with which install would
// refuse them. Lack of root isn't one: a dry run is for a user who has yet to decide.
func (o *installOptions) printPlan(ctx context.Context, what *install.Options) error {
	if err := o.app.printSteps(install.InstallSteps(what)); err != nil {
		return err
	}
	err := install.Refusal(ctx, what)
	if errors.Is(err, os.ErrPermission) {
		o.app.talk("install itself needs root: %s", o.app.asRoot("install"+strings.ReplaceAll(o.flags, " --dry-run", "")))
		return nil
	}
	return o.app.serviceError("install"+o.flags, err)
}

// waitEnforcing returns the helper's status once it enforces the rules, or after settleTime
// whatever the state. A fault at the start, such as an uplink without an address yet, may
// pass within that time.
func (o *installOptions) waitEnforcing(ctx context.Context) (s api.Status, err error) {
	limit := o.app.service.settle
	if limit == 0 {
		limit = settleTime
	}
	for until := time.Now().Add(limit); ; {
		if s, err = o.app.client().Status(ctx); err != nil || s.State == api.Enforcing || time.Now().After(until) {
			return s, err
		}
		select {
		case <-ctx.Done():
			return s, ctx.Err()
		case <-time.After(limit / 50): // every 100 ms
		}
	}
}

// describe says what was installed, in which state it is, and what to do next.
func (o *installOptions) describe(s api.Status, what *install.Options, boots bool) {
	a := o.app
	starts := "starts with this Mac"
	if a.service.systemd {
		starts = "starts with this host"
	} else if !boots {
		starts = "doesn't start with this Mac: see above"
	}
	if s.State == api.Enforcing {
		a.say("The helper %s runs on %s, port %d, and %s.", o.label, s.Interface, s.ListenPort, starts)
	} else {
		a.say("The helper %s is installed and %s. It runs, but is %s.", o.label, starts, s.State)
	}
	if o.operator != "" {
		a.say("%s may change the mesh.", o.operator)
	}
	if o.caller != o.operator && o.caller != "" {
		a.talk("%s may not: the operator stays the same; to change it: %s", o.caller, a.asRoot("install --operator "+o.caller))
	}
	if s.State != api.Enforcing {
		return
	}
	for _, p := range s.Problems {
		a.talk("problem: %s: %s", p.Step, p.Message)
		if p.Hint != "" {
			a.talk("         %s", p.Hint)
		}
	}
	command := a.commandName()
	if command != "meshhelper" {
		command = what.Program() // the installed copy: the user may delete the file that was run
	}
	a.say("Next: %s peer add phone --own --allow routing --qr", command)
	a.talk("to put the command in every user's PATH: %s", what.Link())
}

// closedError returns nil for a helper that enforces, and else an error with the first
// problem and its hint.
func closedError(s api.Status) error {
	if s.State == api.Enforcing {
		return nil
	}
	err := fmt.Errorf("installed and running, but %s", s.State)
	if len(s.Problems) > 0 {
		p := s.Problems[0]
		err = fmt.Errorf("%w: %s: %s", err, p.Step, p.Message)
		if p.Hint != "" {
			return hintf(err, "%s", p.Hint)
		}
	}
	return hintf(err, "see: meshhelper doctor")
}

// options returns what to install, from the flags. The operator is that of --operator, else
// the user who ran sudo. Settings are checked here, before any step, but written only by a
// step of the installation (keep), when no helper runs.
func (o *installOptions) options() (*install.Options, error) {
	if o.given("operator") {
		if err := wanted.CheckOperator(o.operator); err != nil {
			return nil, err
		}
	}
	if o.operator == "" {
		name, err := install.Operator(o.app.getenv)
		if err != nil {
			return nil, err
		}
		o.caller, o.operator = name, name
	}
	source, err := o.app.service.executable()
	if err != nil {
		return nil, fmt.Errorf("find this program's file: %w", err)
	}
	changes := map[string]*string{}
	port := strconv.Itoa(int(o.listenPort))
	for key, value := range map[string]*string{
		wanted.SettingLabel: &o.label, wanted.SettingOperator: &o.operator, wanted.SettingListenPort: &port, wanted.SettingEndpoint: &o.endpoint,
	} {
		if key != wanted.SettingLabel && (*value == "" || !o.given(key) && key != wanted.SettingOperator) {
			continue
		}
		if _, err := wanted.CheckSetting(key, *value); err != nil {
			return nil, usagef("--%s: %v", key, err)
		}
		changes[key] = value
	}
	delete(changes, wanted.SettingLabel) // checked only: the service passes --label to the helper
	what := o.app.installed(o.label)
	what.Source, what.Ready = source, o.ready
	what.Keep = func() error { return o.keep(what, changes) }
	return what, nil
}

// keep writes the given flags to the settings in the state folder, over the arguments of an
// earlier installation. An operator that was set before stays unless --operator is given:
// the administrator who upgrades needn't be the one who owns the mesh. It sets o.operator to
// the one that counts.
func (o *installOptions) keep(what *install.Options, given map[string]*string) error {
	dir := filepath.Join(o.app.service.root, what.StateDir)
	kept, err := wanted.ReadSettings(dir)
	if err != nil {
		return err
	}
	changes := o.app.listArguments(what)
	before := changes[wanted.SettingOperator] != nil || kept[wanted.SettingOperator] != ""
	for key, value := range given {
		if key == wanted.SettingOperator && before && !o.given(key) {
			continue
		}
		changes[key] = value
	}
	if err := wanted.WriteSettings(dir, changes); err != nil {
		return err
	}
	if kept, err = wanted.ReadSettings(dir); err == nil {
		o.operator = kept[wanted.SettingOperator]
	}
	return err
}

// listArguments returns the settings that an installed property list passes to the helper as
// arguments, by their keys. Lists of earlier releases have them, where they override the
// settings; those written now don't, so the values move to the settings. A list that is
// missing or can't be parsed has none: launchd starts no helper by it.
func (a *app) listArguments(what *install.Options) map[string]*string {
	out := map[string]*string{}
	text, err := os.ReadFile(filepath.Join(a.service.root, what.List()))
	if err != nil || a.service.systemd {
		return out // nothing is installed
	}
	job, err := launchd.Parse(text)
	if err != nil {
		return out // launchd starts nothing by it
	}
	for i, word := range job.ProgramArguments[:max(0, len(job.ProgramArguments)-1)] {
		key, value := strings.TrimPrefix(word, "--"), job.ProgramArguments[i+1]
		if key == word || key != wanted.SettingOperator && key != wanted.SettingListenPort && key != wanted.SettingEndpoint {
			continue
		}
		if _, err := wanted.CheckSetting(key, value); err != nil {
			a.talk("%s isn't carried over: %v", key, err)
			continue
		}
		out[key] = &value
	}
	return out
}

// ready waits until the helper answers and its first round is over, for startTime at most.
func (o *installOptions) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	_, err := o.app.client().WaitReady(ctx)
	return err
}

// unitSocket is the socket of a helper that systemd runs.
const unitSocket = "/run/meshhelper.sock"

// installed describes the installed service of that name, for install, uninstall, doctor
// and the hints. It looks at nothing on the host.
func (a *app) installed(label string) *install.Options {
	what := &install.Options{Systemd: a.service.systemd, Label: label, Runner: a.service.runner, Root: a.service.root}
	if what.Systemd {
		what.StateDir, what.Socket = a.defaultStateDir("linux"), unitSocket
		what.Arguments = []string{"--platform", "linux", "--state-dir", what.StateDir, "--socket", unitSocket, "--label", label}
	} else {
		what.StateDir, what.LogDir, what.Socket = a.defaultStateDir("darwin"), logDir, "/var/run/meshhelper.sock"
		what.Arguments = []string{"--platform", "darwin", "--label", label, "--log-file", logDir + "/helper.log"}
	}
	what.Restore = func(ctx context.Context) error { return a.service.restore(ctx, what.StateDir) }
	what.Held = func() error { return a.helperRuns(what) }
	return what
}

// helperRuns returns an error if a helper runs on this host: one that uses the state folder
// of the service, one that answers on its socket or that of --socket, or another one that
// the host knows of. Even a helper with a state folder of its own has the host's packet
// filter and forwarding, which an uninstallation would change.
func (a *app) helperRuns(what *install.Options) error {
	if err := wanted.InUse(filepath.Join(a.service.root, what.StateDir)); err != nil {
		return err
	}
	for _, path := range []string{filepath.Join(a.service.root, what.Socket), a.socket} {
		if c, err := net.DialTimeout("unix", path, dialLimit); err == nil {
			c.Close()
			return fmt.Errorf("one answers on %q", path)
		}
	}
	if a.service.inUse == nil {
		return nil
	}
	return a.service.inUse()
}

// dialLimit bounds a connection to a socket, whose queue may be full.
const dialLimit = time.Second

// commandName returns what a user types to run this program: its name if the shell finds
// that in the PATH, else its path. Hints use it.
func (a *app) commandName() string {
	if a.lookPath == nil {
		return "meshhelper"
	}
	if _, err := a.lookPath("meshhelper"); err == nil {
		return "meshhelper"
	}
	path, err := os.Executable()
	if err != nil {
		return "meshhelper"
	}
	return path
}

// sudo returns what comes before a command that root has to run: nothing if the user is.
func (a *app) sudo() string {
	if a.root {
		return ""
	}
	return "sudo "
}

// asRoot returns the shell command that runs this program with arguments as root.
func (a *app) asRoot(arguments string) string {
	return a.sudo() + a.commandName() + " " + arguments
}

// plainWord matches a word that no shell interprets.
var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// shellWord returns text as one word of a shell command, in quotes if it needs them.
func shellWord(text string) string {
	if plainWord.MatchString(text) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// startHint says how to start the helper. That is the service if one is installed and the
// command uses its socket, else install or run, whichever fits the host.
func (a *app) startHint() string {
	if a.service == nil {
		return "start it with: " + a.runCommand(systemSocket())
	}
	label := a.service.defaultLabel()
	what := a.installed(label)
	run := a.runCommand(what.Socket)
	installed := func(path string) bool {
		_, err := os.Stat(filepath.Join(a.service.root, path))
		return err == nil
	}
	switch {
	case a.socket != what.Socket:
		return "start it with: " + run
	case a.service.systemd && installed(what.UnitPath()):
		return "start it with: " + a.sudo() + "systemctl start " + label
	case !a.service.systemd && installed(what.List()):
		return "start it with: " + a.sudo() + "launchctl bootstrap system " + what.List()
	case a.service.systemd && !what.HasSystemd():
		return "start it with: " + run
	}
	return fmt.Sprintf("%s, or in the foreground: %s", a.asRoot("install"), run)
}

// runCommand returns the command that starts a helper on the socket that this command uses.
// Without --socket root's helper takes the system's, which is where a user whose own helper
// is gone looks next. sudo drops the environment, and with it MESHHELPER_SOCKET.
func (a *app) runCommand(system string) string {
	if a.socket == system || a.socket == a.userSocket() {
		return a.asRoot("run")
	}
	return a.asRoot("run --socket " + shellWord(a.socket))
}

// newUninstallCommand returns `uninstall`. It doesn't ask the helper, which may be dead, but
// restores the host by its journal.
func newUninstallCommand(a *app) *cobra.Command {
	if a.service == nil {
		return newUnsupportedCommand("uninstall", "Remove the service and put the host back as it was")
	}
	label, purge := "", false
	c := &cobra.Command{
		Use: "uninstall", Short: "Remove the service and put the host back as it was",
		Long: `Stop the helper, put the packet filter, forwarding and routes back as they were
found, and remove what was installed. It also works if the helper is dead.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := host.CheckLabel(label); err != nil {
				return usagef("--label: %v", err)
			}
			what := a.installed(label)
			what.Purge = purge
			left, err := install.Uninstall(c.Context(), what, a.reportStep)
			if err == nil || len(left) > 0 {
				if printErr := a.printLeft(left, purge); printErr != nil {
					return printErr
				}
			}
			return a.serviceError("uninstall"+givenFlags(c.Flags()), err)
		},
	}
	c.Flags().StringVar(&label, "label", a.service.defaultLabel(), "`NAME` of the service")
	c.Flags().BoolVar(&purge, "purge", false, "also remove the keys, all peers and the logs")
	return c
}

// printLeft says which files of the helper remain, without --purge the keys and the state.
func (a *app) printLeft(left []string, purge bool) error {
	if left == nil {
		left = []string{} // an empty list in JSON, not null
	}
	return a.print(map[string]any{"left": left}, func() {
		if len(left) == 0 {
			a.say("Nothing of the helper is left.")
			return
		}
		a.say("Left: %s", strings.Join(left, ", "))
		if !purge {
			a.talk("to remove the keys, all peers and the logs as well: %s", a.asRoot("uninstall --purge"))
		}
	})
}

// printSteps prints the steps of an installation, in order, without doing them.
func (a *app) printSteps(steps []install.Step) error {
	var texts []string
	for _, s := range steps {
		texts = append(texts, s.Text)
	}
	return a.print(map[string]any{"steps": texts}, func() {
		for _, t := range texts {
			a.sayWrapped("", "  ", t)
		}
	})
}

// reportStep reports a step that was done, or an optional one that failed. The error of any
// other step ends the installation, and main reports it.
func (a *app) reportStep(s install.Step, err error) {
	switch {
	case err == nil:
		a.talk("%s: done", s.Text)
	case s.Optional:
		a.talk("%s: problem: %v", s.Text, err)
	}
}

// serviceError adds to an error of install or uninstall what to do about it. command is the
// subcommand with the flags that were given.
func (a *app) serviceError(command string, err error) error {
	var e *launchd.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, install.ErrNoSystemd):
		return hintf(err, "have this host's service manager run the helper, or run it in the foreground: %s", a.asRoot("run"))
	case errors.Is(err, os.ErrPermission):
		return api.Errorf(api.CodeForbidden, "%v", err).WithHint("try: %s", a.asRoot(command))
	case errors.As(err, &e):
		return hintf(err, "%s", e.Hint())
	case errors.Is(err, api.ErrUnreachable):
		// The service is installed but doesn't answer, so the usual hint, to install or
		// start it, doesn't help. The second line is that the time is over.
		what, _, _ := strings.Cut(err.Error(), "\n")
		return hintf(errors.New(what), "see why: %s", a.asRoot("doctor"))
	}
	return err
}
