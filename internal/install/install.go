package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/launchd"
)

// StepBoot is the text of the step whose failure means that the helper runs now but
// won't start at the next boot.
const StepBoot = "check that macOS will start it at the next boot"

// InstallSteps returns the steps of Install, in order. Running them again upgrades the
// program; StateDir keeps its content.
func InstallSteps(o *Options) []Step {
	if o.Systemd {
		return o.systemdInstallSteps()
	}
	return []Step{
		{"check that this runs as root and that launchd will accept the service", false, o.checkJob},
		{fmt.Sprintf("make the folders %s, %s and %s", programDir, o.LogDir, o.StateDir), false, o.makeDirs},
		{fmt.Sprintf("copy %s to %s", o.Source, o.Program()), false, o.copyProgram},
		{fmt.Sprintf("check that only root can change %s", o.Program()), false, o.checkProgram},
		{"allow its packets in the Application Firewall", true, o.allow},
		{fmt.Sprintf("stop the service %s, if it runs", o.Label), false, o.stopJob},
		// Before the old property list is replaced, which may hold the settings.
		{"keep the settings in " + o.StateDir, false, o.keep},
		{fmt.Sprintf("write %s", o.List()), false, o.writeList},
		{fmt.Sprintf("start the service %s", o.Label), false, o.start},
		{"wait until the helper answers", false, o.Ready},
		{StepBoot, true, o.startsAtBoot},
	}
}

// Refusal runs only the first step, which changes nothing, and returns the reason why
// Install would refuse. Only if nothing else is wrong is that the lack of root
// (os.ErrPermission).
func Refusal(ctx context.Context, o *Options) error { return InstallSteps(o)[0].do(ctx) }

// againLimit bounds the restart of a service that Install stopped and failed to upgrade. It
// has a limit of its own, because ctx may have ended.
const againLimit = 2 * time.Minute

// Install installs or upgrades the helper and returns when the helper answers. If it
// fails, or ctx ends, a service that ran before is started again.
func Install(ctx context.Context, o *Options, report Report) error {
	err := until(ctx, InstallSteps(o), report)
	if err == nil || !o.stopped {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), againLimit)
	defer cancel()
	again := Step{fmt.Sprintf("start the service %s again, because it ran before", o.Label), false, o.start}
	return errors.Join(err, run(ctx, again, report))
}

// checkJob checks the property list by launchd's rules before anything is changed, and last
// that this process is root, so that a dry run reports every other problem first.
func (o *Options) checkJob(context.Context) error {
	if v := o.job().Check(); len(v) > 0 {
		return v[0]
	}
	if !filepath.IsAbs(o.Source) {
		return fmt.Errorf("source %q: not an absolute path", o.Source)
	}
	return o.needRoot()
}

// makeDirs creates the folders that don't exist, and checks those that do: root would
// read what another user can write there. Only root may read the state, which includes
// the private key.
func (o *Options) makeDirs(context.Context) error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{programDir, 0o755}, {listDir, 0o755}, {o.LogDir, 0o755}, {o.StateDir, 0o700}} {
		if err := o.makeDir(d.path, d.mode); err != nil {
			return err
		}
	}
	return nil
}

// makeDir creates a folder with that mode, or checks that an existing one belongs to root
// and that no other user can write to it. It doesn't change an existing folder.
func (o *Options) makeDir(path string, mode os.FileMode) error {
	f, err := launchd.Lstat(o.disk(path))
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(o.disk(path), 0o755); err != nil {
			return err
		}
		// Separately, because MkdirAll applies the umask and gives all folders one mode.
		return os.Chmod(o.disk(path), mode)
	}
	if err != nil {
		return err
	}
	if !f.Mode.IsDir() || o.adopt(f).UID != 0 || f.Mode.Perm()&0o022 != 0 {
		return fmt.Errorf("%s must be a folder that belongs to root and that no other user can write to (it has mode %v and belongs to user %d); check its content, then run: chown -R 0 %q && chmod go-w %q", path, f.Mode, f.UID, path, path)
	}
	return nil
}

// copyProgram replaces the executable. It doesn't overwrite the file in place: xnu caches
// the code signature of a running program's file and kills the program when the content
// no longer matches ("Code Signature Invalid"). Only the content is copied, so that a
// browser's quarantine attribute isn't.
func (o *Options) copyProgram(context.Context) error {
	from, err := os.Open(o.Source)
	if err != nil {
		return err
	}
	defer from.Close()
	if info, err := from.Stat(); err != nil || !info.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("%s is not a regular file", o.Source), err)
	}
	return replace(o.disk(o.Program()), from, 0o755)
}

// replace replaces a file of the service, and removes the temporary files of an install
// that was killed.
func replace(path string, content io.Reader, mode fs.FileMode) error {
	owned.Tidy(filepath.Dir(path), filepath.Base(path))
	return owned.ReplaceFrom(path, content, mode)
}

// checkProgram checks that only root can replace the executable, by the mode and owner
// of it and of every folder above it.
func (o *Options) checkProgram(context.Context) error {
	chain, err := launchd.Chain(o.disk(o.Program()))
	if err != nil {
		return err
	}
	var own []launchd.File
	for _, f := range chain {
		if o.Root != "" && !strings.HasPrefix(f.Path, filepath.Clean(o.Root)+"/") {
			break // above Root
		}
		own = append(own, o.adopt(f))
	}
	if v := launchd.CheckProgram(own); len(v) > 0 {
		return fmt.Errorf("it would run as root: %w", v[0])
	}
	return nil
}

// writeList writes the property list and checks its owner and mode, by which launchd
// refuses to load a list (launchctl(1), load).
func (o *Options) writeList(context.Context) error {
	text, err := o.job().Render()
	if err != nil {
		return err
	}
	// Every user may read it, as all property lists there.
	if err := replace(o.disk(o.List()), bytes.NewReader(text), 0o644); err != nil {
		return fmt.Errorf("write property list: %w", err)
	}
	f, err := launchd.Lstat(o.disk(o.List()))
	if err != nil {
		return err
	}
	f.Path = o.List()
	if v := launchd.CheckFile(o.adopt(f), o.Label); len(v) > 0 {
		return v[0]
	}
	return nil
}

// keep writes the settings of this install. The helper is stopped, so that it can't write
// the same file.
func (o *Options) keep(context.Context) error {
	if o.Keep == nil {
		return errNothing
	}
	return o.Keep()
}

// stopJob unloads the service, unless launchd would refuse to start it again.
func (o *Options) stopJob(ctx context.Context) error {
	l := o.launchctl()
	if s, err := l.Print(ctx, o.Label); err == nil && !s.Loaded {
		return errNothing
	}
	if err := l.CheckSwitch(ctx, o.Label); err != nil {
		return err
	}
	o.stopped = true
	return l.Bootout(ctx, o.Label)
}

// start starts the service. From here on Install doesn't start it again after a failure:
// the service manager retries by itself.
func (o *Options) start(ctx context.Context) error {
	o.stopped = false
	if o.Systemd {
		return o.systemctl(ctx, "start", o.Unit())
	}
	_, err := o.launchctl().Load(ctx, o.Label, o.List())
	return err
}

// launchctl returns the launchctl command of this host.
func (o *Options) launchctl() *launchd.Launchctl {
	return launchd.New(launchd.Options{Runner: o.Runner})
}
