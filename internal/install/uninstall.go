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

// UninstallSteps returns what Uninstall does, in order. Each finds for itself
// whether there is anything to do.
func UninstallSteps(o *Options) []Step {
	if o.Systemd {
		return o.systemdUninstallSteps()
	}
	u := &uninstaller{Options: o}
	steps := []Step{
		{fmt.Sprintf("stop the service %s", o.Label), false, u.stop},
		{"check that no other helper has " + o.StateDir, false, u.alone},
		{"put the host back as it was found", false, u.restore},
		{"take it out of the Application Firewall", true, o.disallow},
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

// Uninstall stops the helper, puts the host back, removes what Install made, and
// returns what of it is left. It can be repeated.
func Uninstall(ctx context.Context, o *Options, report Report) (left []string, err error) {
	if err := errors.Join(host.CheckLabel(o.Label), o.isRoot()); err != nil {
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

// An uninstaller remembers whether the journal is still needed.
type uninstaller struct {
	*Options
	stopped, restored bool
}

// stop ends the helper, which puts the host back itself if it is alive.
func (u *uninstaller) stop(ctx context.Context) error {
	err := u.launchctl().Bootout(ctx, u.Label)
	u.stopped = err == nil
	return err
}

// errAnother ends an uninstall: what it would remove or put back is another helper's.
var errAnother = errors.New("a helper that isn't this service runs")

// alone refuses to go on beside a helper that the label isn't that of.
func (u *uninstaller) alone(context.Context) error {
	if !u.stopped || u.Held == nil {
		return errNothing // what comes says that the service still runs
	}
	if err := u.Held(); err != nil {
		return fmt.Errorf("%w: %w; where it is a service, give its name with --label, else end it, and repeat this", errAnother, err)
	}
	return errNothing
}

// restore does what a dead helper didn't. Not beside a living one.
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

func (o *Options) remover(path string) func(context.Context) error {
	return func(context.Context) error {
		err := os.Remove(o.disk(path))
		if errors.Is(err, fs.ErrNotExist) {
			return errNothing
		}
		return err
	}
}

// removeSocket removes what a helper that was killed left. One that still runs keeps it: the
// service, or a helper that was started by hand.
func (u *uninstaller) removeSocket(ctx context.Context) error {
	if !u.stopped {
		return errors.New("the helper still runs")
	}
	if c, err := net.Dial("unix", u.disk(u.Socket)); err == nil {
		c.Close()
		return errors.New("a helper that isn't the service answers there: end it, and repeat this")
	}
	return u.remover(u.Socket)(ctx)
}

// removeLink removes the link in every user's path if it is ours.
func (u *uninstaller) removeLink(ctx context.Context) error {
	if to, err := os.Readlink(u.disk(linkPath)); err != nil || to != u.Program() {
		return errNothing
	}
	return u.remover(linkPath)(ctx)
}

// purger removes a folder of ours, unless the journal in it is still needed.
func (u *uninstaller) purger(path string) func(context.Context) error {
	return func(context.Context) error {
		if !u.restored {
			return errors.New("kept: the host couldn't be put back, and what to put back is noted there")
		}
		if _, err := os.Lstat(u.disk(path)); errors.Is(err, fs.ErrNotExist) {
			return errNothing
		}
		return os.RemoveAll(u.disk(path))
	}
}
