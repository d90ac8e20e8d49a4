package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/meshhelper/meshhelper/launchd"
)

// A Check is the result of one check of the installed service.
type Check struct {
	Name string
	OK   bool
	// Message says what was found, Hint what to do about it. Hint is empty if OK.
	Message, Hint string
}

// fine returns c as passed, with a message.
func (c Check) fine(format string, args ...any) Check {
	c.OK, c.Message = true, fmt.Sprintf(format, args...)
	return c
}

// wrong returns c as a problem, with what was found and what to do about it.
func (c Check) wrong(message, hint string) Check {
	c.Message, c.Hint = message, hint
	return c
}

// unknown returns c as passed for a check that couldn't be made: that a command isn't
// understood says nothing about the service.
func (c Check) unknown(err error) Check { return c.fine("not known: %v", err) }

// checkLimit bounds each check, most of which run one command. launchctl and systemctl
// answer in less than a second unless the service manager hangs.
const checkLimit = 10 * time.Second

// again is the hint for a problem that another install fixes.
const again = "sudo meshhelper install fixes it; the mesh stays"

// Checks checks the installed service without asking the helper: on a Mac the property
// list, the program, its state in launchd and in Login Items, and the Application
// Firewall; on Linux the unit, the program, and its state in systemd. It changes nothing.
// If nothing is installed it returns one check that says so. Each check takes at most
// 10 s.
func Checks(ctx context.Context, o *Options) []Check {
	if o.Systemd {
		return o.systemdChecks(ctx)
	}
	if _, err := os.Lstat(o.disk(o.List())); errors.Is(err, fs.ErrNotExist) {
		return []Check{Check{Name: "service"}.wrong("not installed: there is no "+o.List(), "sudo meshhelper install")}
	}
	return runChecks(ctx, o.checkWrittenList, o.checkInstalled, o.checkService, o.checkEnabled, o.checkLoginItem, o.checkFirewall)
}

// runChecks makes the checks one after another, each within checkLimit.
func runChecks(ctx context.Context, checks ...func(context.Context) Check) (out []Check) {
	for _, check := range checks {
		limit, cancel := context.WithTimeout(ctx, checkLimit)
		out = append(out, check(limit))
		cancel()
	}
	return out
}

// checkWrittenList checks the property list by launchd's rules and by what Install writes.
func (o *Options) checkWrittenList(context.Context) Check {
	c := Check{Name: "property list"}
	f, err := launchd.Lstat(o.disk(o.List()))
	if err != nil {
		return c.wrong(err.Error(), again)
	}
	f.Path = o.List()
	if v := launchd.CheckFile(o.adopt(f), o.Label); len(v) > 0 {
		return c.wrong(v[0].Text, again)
	}
	j, err := readJob(o.disk(o.List()))
	if err != nil {
		return c.wrong(err.Error(), again)
	}
	if v := j.Check(); len(v) > 0 {
		return c.wrong(v[0].Text, again)
	}
	switch {
	case j.Label != o.Label:
		return c.wrong(fmt.Sprintf("%s has the label %q", o.List(), j.Label), again)
	case j.ProgramArguments[0] != o.Program() || j.Program != "" && j.Program != o.Program():
		return c.wrong(fmt.Sprintf("%s runs %q, not %q", o.List(), j.ProgramArguments[0], o.Program()), again)
	case j.ExitTimeOut == nil || *j.ExitTimeOut < ExitTimeOut:
		return c.wrong(fmt.Sprintf("%s lets launchd kill the helper before it has restored the host (ExitTimeOut under %d)", o.List(), ExitTimeOut), again)
	}
	return c.fine("%s", o.List())
}

// readJob reads a property list of at most launchd.MaxPlist bytes.
func readJob(path string) (*launchd.Job, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, launchd.MaxPlist+1))
	if err != nil {
		return nil, err
	}
	return launchd.Parse(data)
}

// checkInstalled checks that only root can replace the installed program.
func (o *Options) checkInstalled(ctx context.Context) Check {
	c := Check{Name: "program"}
	if err := o.checkProgram(ctx); err != nil {
		return c.wrong(err.Error(), "chown root and chmod go-w that path, then: sudo meshhelper install")
	}
	return c.fine("%s, which only root can change", o.Program())
}

// checkService asks launchd for the state of the service.
func (o *Options) checkService(ctx context.Context) Check {
	c := Check{Name: "service"}
	s, err := o.launchctl().Print(ctx, o.Label)
	switch {
	case err != nil:
		return c.unknown(err)
	case s.Running():
		return c.fine("%s runs, process %d", o.Label, s.PID)
	case s.BadSignature():
		return c.wrong(fmt.Sprintf("macOS kills the program when it starts, because of its code signature: %v", s),
			(&launchd.Error{Code: launchd.CodeSigning}).Hint())
	case !s.Loaded:
		return c.wrong("launchd hasn't loaded it", "sudo meshhelper install, once the checks below pass")
	}
	return c.wrong("it doesn't run: "+s.String(), "see the log below; launchd tries again by itself")
}

// checkEnabled looks for the mark of `launchctl disable`, which a reinstallation doesn't
// remove.
func (o *Options) checkEnabled(ctx context.Context) Check {
	c := Check{Name: "launchd"}
	disabled, err := o.launchctl().Disabled(ctx, o.Label)
	switch {
	case err != nil:
		return c.unknown(err)
	case disabled:
		return c.wrong("the service is disabled, so launchd doesn't load it", fmt.Sprintf("sudo launchctl enable system/%s, then: sudo meshhelper install", o.Label))
	}
	return c.fine("the service isn't disabled")
}

// switchOn is the hint for a service that is switched off in Login Items.
const switchOn = "switch meshhelper on in System Settings > General > Login Items & Extensions"

// checkLoginItem checks that the service isn't switched off in Login Items & Extensions.
func (o *Options) checkLoginItem(ctx context.Context) Check {
	c := Check{Name: "login item"}
	if o.needRoot() != nil {
		// sfltool would open a window that asks for a password.
		return c.fine("not checked, because that needs root: sudo meshhelper doctor")
	}
	item, err := o.launchctl().LoginItem(ctx, o.Label)
	switch {
	case err != nil:
		return c.unknown(err)
	case item.Blocked():
		return c.wrong(fmt.Sprintf("Login Items & Extensions holds it back (%s)", item.Disposition), switchOn)
	case !item.Found:
		return c.fine("Login Items & Extensions doesn't list it")
	}
	return c.fine("%s", item.Disposition)
}

// startsAtBoot checks, after the start, that macOS will start the service at the next
// boot: macOS decides that when it first sees a service.
func (o *Options) startsAtBoot(ctx context.Context) error {
	item, err := o.launchctl().LoginItem(ctx, o.Label)
	if err == nil && item.Blocked() {
		err = fmt.Errorf("it runs now, but Login Items & Extensions holds it back from the next boot on (%s); %s", item.Disposition, switchOn)
	}
	return err
}

// Limits of the part of a log that LastLines shows: enough for the error that ended the
// helper, on one screen.
const (
	logLines  = 5        // lines of each file
	logBytes  = 16 << 10 // bytes that are read from the end of each file
	lineRunes = 300      // characters of each line
)

// LastLines returns the last lines of the helper's log and of its standard error, which
// a crash writes to, as a check that is always OK.
func LastLines(o *Options) Check {
	c := Check{Name: "log"}
	var parts []string
	for _, name := range []string{"helper.log", "stderr.log"} {
		lines, err := lastLines(o.disk(o.LogDir + "/" + name))
		switch {
		case errors.Is(err, fs.ErrPermission):
			parts = append(parts, o.LogDir+"/"+name+" is readable by root only: sudo meshhelper doctor")
		case err == nil && len(lines) > 0:
			parts = append(parts, o.LogDir+"/"+name+" ends with")
			for _, l := range lines {
				parts = append(parts, "  "+l)
			}
		}
	}
	if parts == nil {
		return c.fine("%s has no log", o.LogDir)
	}
	return c.fine("%s", strings.Join(parts, "\n"))
}

// lastLines returns the last lines of a file, which may be large or hold anything.
func lastLines(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil, err
	}
	from := max(info.Size()-logBytes, 0)
	data, err := io.ReadAll(io.NewSectionReader(f, from, logBytes))
	if err != nil {
		return nil, err
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	if from > 0 && len(all) > 1 {
		all = all[1:] // the first line's beginning is missing
	}
	var out []string
	for _, line := range all[max(len(all)-logLines, 0):] {
		if line = printable(line); line != "" {
			out = append(out, line)
		}
	}
	return out, nil
}

// printable cuts a line to lineRunes, and replaces what could move a terminal's cursor.
func printable(line string) string {
	runes := []rune(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, line))
	if len(runes) > lineRunes {
		runes = append(runes[:lineRunes], '…')
	}
	return strings.TrimSpace(string(runes))
}
