package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/install"
	"github.com/meshhelper/meshhelper/internal/macos"
	"github.com/meshhelper/meshhelper/launchd"
)

// A serviceHost is a Mac as far as installing goes.
type serviceHost struct {
	// runner runs launchctl.
	runner launchd.Runner
	// executable returns this program's file.
	executable func() (string, error)
	// restore puts back what a helper that died has left, by its journal.
	restore func(ctx context.Context, stateDir string) error
	// root stands for /; "" is /.
	root string
}

// logDir has what an installed helper logs, and what it says when it crashes.
const logDir = "/var/log/meshhelper"

// startTime bounds how long an installed helper may take to answer.
const startTime = 30 * time.Second

// installOptions are the flags of install.
type installOptions struct {
	app                       *app
	label, operator, endpoint string
	listenPort                uint16
	dryRun                    bool
}

func newInstallCommand(a *app) *cobra.Command {
	if a.service == nil {
		return notHere("install", "Install the helper as a service")
	}
	o := &installOptions{app: a}
	c := &cobra.Command{
		Use: "install", Short: "Install the helper as a service, or upgrade it",
		Long: `Copy the helper to a place that only root can change, have launchd start it now
and with every boot, and wait until it answers. Repeating it upgrades the helper
in place; the mesh stays as it is.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	f := c.Flags()
	f.StringVar(&o.label, "label", macos.DefaultLabel, "`NAME` of the service and of its anchor in the packet filter")
	f.StringVar(&o.operator, "operator", "", "`USER` who may change the mesh besides root (who runs sudo)")
	f.Uint16Var(&o.listenPort, "listen-port", defaultListenPort, "UDP `PORT` of WireGuard")
	f.StringVar(&o.endpoint, "endpoint", "", "`HOST[:PORT]` where peers reach this host")
	f.BoolVar(&o.dryRun, "dry-run", false, "print the steps and do nothing")
	return c
}

func (o *installOptions) run(ctx context.Context) error {
	what, err := o.options()
	if err != nil {
		return err
	}
	if o.dryRun {
		return o.app.printSteps(install.InstallSteps(what))
	}
	if err := install.Install(ctx, what, o.app.reportStep); err != nil {
		return serviceError("install", err)
	}
	s, err := o.app.client().Status(ctx)
	if err != nil {
		return err
	}
	return o.app.print(map[string]any{"label": o.label, "program": what.Program(), "operator": o.operator, "status": s}, func() {
		o.app.say("The helper %s runs on %s, port %d, and starts with this Mac.", o.label, s.Interface, s.ListenPort)
		if o.operator != "" {
			o.app.say("%s may change the mesh.", o.operator)
		}
		o.app.say("Next: meshhelper peer add phone --qr")
		o.app.talk("to have the command in everybody's path: %s", what.Link())
	})
}

// options turns the flags into what is installed.
func (o *installOptions) options() (*install.Options, error) {
	if o.operator == "" {
		name, err := install.Operator(o.app.getenv)
		if err != nil {
			return nil, err
		}
		o.operator = name
	}
	source, err := o.app.service.executable()
	if err != nil {
		return nil, fmt.Errorf("find this program's file: %w", err)
	}
	if _, err := macos.AnchorPath(o.label); err != nil {
		return nil, usagef("--label: %v", err)
	}
	what := o.app.installed(o.label)
	what.Source = source
	what.Arguments = []string{
		"--platform", "darwin", "--listen-port", strconv.Itoa(int(o.listenPort)),
		"--label", o.label, "--log-file", what.LogDir + "/helper.log",
	}
	if o.operator != "" {
		what.Arguments = append(what.Arguments, "--operator", o.operator)
	}
	if o.endpoint != "" {
		what.Arguments = append(what.Arguments, "--endpoint", o.endpoint)
	}
	what.Ready = func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, startTime)
		defer cancel()
		_, err := o.app.client().WaitReady(ctx)
		return err
	}
	return what, nil
}

// installed describes the service as both commands know it.
func (a *app) installed(label string) *install.Options {
	return &install.Options{
		Label: label, StateDir: a.defaultStateDir("darwin"), LogDir: logDir, Socket: "/var/run/meshhelper.sock",
		Runner: a.service.runner, Root: a.service.root,
		Restore: func(ctx context.Context) error { return a.service.restore(ctx, a.defaultStateDir("darwin")) },
	}
}

func newUninstallCommand(a *app) *cobra.Command {
	if a.service == nil {
		return notHere("uninstall", "Remove the service and put the host back as it was")
	}
	label, purge := "", false
	c := &cobra.Command{
		Use: "uninstall", Short: "Remove the service and put the host back as it was",
		Long: `Stop the helper, put the packet filter, forwarding and routes back as they were
found, and remove what was installed. It works when the helper is dead, too.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			what := a.installed(label)
			what.Purge = purge
			left, err := install.Uninstall(c.Context(), what, a.reportStep)
			if printErr := a.printLeft(left, purge); printErr != nil {
				return printErr
			}
			return serviceError("uninstall", err)
		},
	}
	c.Flags().StringVar(&label, "label", macos.DefaultLabel, "`NAME` of the service")
	c.Flags().BoolVar(&purge, "purge", false, "remove the keys, all peers and the logs, too")
	return c
}

func (a *app) printLeft(left []string, purge bool) error {
	return a.print(map[string]any{"left": left}, func() {
		if len(left) == 0 {
			a.say("Nothing of the helper is left.")
			return
		}
		a.say("Left: %s", strings.Join(left, ", "))
		if !purge {
			a.talk("to remove the keys, all peers and the logs, too: sudo meshhelper uninstall --purge")
		}
	})
}

// printSteps prints what would be done.
func (a *app) printSteps(steps []install.Step) error {
	var texts []string
	for _, s := range steps {
		texts = append(texts, s.Text)
	}
	return a.print(map[string]any{"steps": texts}, func() {
		for _, t := range texts {
			a.say("%s", t)
		}
	})
}

// reportStep tells of a step that was done.
func (a *app) reportStep(s install.Step, err error) {
	switch {
	case err == nil:
		a.talk("%s: done", s.Text)
	case s.Optional:
		a.talk("%s: skipped: %v", s.Text, err)
	}
}

// serviceError says what to do about a failure.
func serviceError(command string, err error) error {
	var e *launchd.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrPermission):
		return api.Errorf(api.CodeForbidden, "%v", err).WithHint("try: sudo meshhelper %s", command)
	case errors.As(err, &e):
		return fmt.Errorf("%w; %s", err, e.Hint())
	}
	return err
}
