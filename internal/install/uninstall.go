package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/meshhelper/meshhelper/internal/host"
)

// UninstallSteps returns the steps of Uninstall, in order. Each step finds out by itself
// whether it has anything to do.
func UninstallSteps(o *Options) []Step {
	if o.Systemd {
		return o.systemdUninstallSteps()
	}
	u := &uninstaller{Options: o}
	steps := []Step{
		{fmt.Sprintf("stop the service %s", o.Label), false, u.stop},
		{"check that no other helper runs", false, u.alone},
		{"put the host back as it was found", false, u.restore},
		{"remove it from the Application Firewall", true, o.disallow},
		{"remove " + o.List(), false, o.remover(o.List())},
		{"remove " + o.Program(), false, o.remover(o.Program())},
		{"remove " + o.Socket, false, u.removeSocket},
		{"remove the link " + linkPath, false, u.removeLink},
	}
	if o.Purge {
		steps = append(steps,
			Step{"remove " + o.LogDir, false, u.purger(o.LogDir)},
			Step{"remove " + o.StateDir + " with the key and all peers", false, u.purger(o.StateDir)})
	}
	return steps
}

// Uninstall stops the helper, restores the host, removes what Install created, and
// returns the paths that still exist. It can be repeated.
func Uninstall(ctx context.Context, o *Options, report Report) (left []string, err error) {
	if err := errors.Join(host.CheckLabel(o.Label), o.needRoot()); err != nil {
		return nil, fmt.Errorf("uninstall: %w", err)
	}
	err = through(ctx, UninstallSteps(o), report)
	if o.Systemd {
		return o.installedOnLinux(), err
	}
	for _, path := range []string{o.List(), o.Program(), o.Socket, o.LogDir, o.StateDir} {
		if _, statErr := os.Lstat(o.disk(path)); statErr == nil {
			left = append(left, path)
		}
	}
	return left, err
}

// An uninstaller remembers which steps succeeded, for those that depend on them.
type uninstaller struct {
	*Options
	stopped  bool // the service doesn't run
	restored bool // the host is as it was found, so the journal in StateDir is no longer needed
}

// stop unloads the service. A helper that is alive restores the host as it exits.
func (u *uninstaller) stop(ctx context.Context) error {
	err := u.launchctl().Bootout(ctx, u.Label)
	u.stopped = err == nil
	return err
}

// errAnother ends an uninstall: the files and the host's state belong to another helper.
var errAnother = errors.New("a helper that isn't this service is running")

// alone fails if a helper other than the service of this label runs: one in the foreground,
// or a service with another label.
func (u *uninstaller) alone(context.Context) error {
	if !u.stopped || u.Held == nil {
		return errNothing // restore reports that the service still runs
	}
	if err := u.Held(); err != nil {
		return fmt.Errorf("%w: %w; if it is a service, give its name with --label, else stop it, and repeat this", errAnother, err)
	}
	return errNothing
}

// restore undoes what a helper that died left on the host. It refuses while the helper
// runs: its rules protect the host, and it would load them again.
func (u *uninstaller) restore(ctx context.Context) error {
	if !u.stopped {
		return errors.New("the helper still runs")
	}
	if _, err := os.Stat(u.disk(u.StateDir)); errors.Is(err, fs.ErrNotExist) {
		u.restored = true
		return errNothing
	}
	err := u.Restore(ctx)
	u.restored = err == nil
	return err
}

// remover returns a step that removes a file. A missing file is nothing to do.
func (o *Options) remover(path string) func(context.Context) error {
	return func(context.Context) error {
		err := os.Remove(o.disk(path))
		if errors.Is(err, fs.ErrNotExist) {
			return errNothing
		}
		return err
	}
}

// removeSocket removes the socket that a killed helper left. It refuses while a helper
// runs: the service, or one that was started by hand.
func (u *uninstaller) removeSocket(ctx context.Context) error {
	if !u.stopped {
		return errors.New("the helper still runs")
	}
	if c, err := net.Dial("unix", u.disk(u.Socket)); err == nil {
		c.Close()
		return errors.New("a helper that isn't this service answers there: stop it, and repeat this")
	}
	return u.remover(u.Socket)(ctx)
}

// removeLink removes the link of [Options.Link] if it leads to the installed program.
func (u *uninstaller) removeLink(ctx context.Context) error {
	if to, err := os.Readlink(u.disk(linkPath)); err != nil || to != u.Program() {
		return errNothing
	}
	return u.remover(linkPath)(ctx)
}

// purger returns a step that removes a folder with all its content, unless the journal
// is still needed.
func (u *uninstaller) purger(path string) func(context.Context) error {
	return func(context.Context) error {
		if !u.restored {
			return errors.New("kept, because the host couldn't be restored and the journal there says how")
		}
		if _, err := os.Lstat(u.disk(path)); errors.Is(err, fs.ErrNotExist) {
			return errNothing
		}
		return os.RemoveAll(u.disk(path))
	}
}
