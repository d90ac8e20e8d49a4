package launchd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Absolute paths: a daemon's PATH is minimal, and root runs nothing by a name
// that a program elsewhere in it could shadow.
const (
	launchctlPath = "/bin/launchctl"
	sfltoolPath   = "/usr/bin/sfltool"
)

// A Runner runs one command to its end and returns what it wrote and its exit
// status. An error means that it couldn't be run or didn't end by itself; an
// exit status other than 0 isn't one. Both outputs are read to their end, path
// is absolute, and the messages are English (LC_ALL=C).
type Runner interface {
	Run(ctx context.Context, stdin []byte, path string, args ...string) (stdout, stderr []byte, status int, err error)
}

// Options of New.
type Options struct {
	// Runner runs launchctl. Required.
	Runner Runner
	// Poll is the time between two looks at a service that is going or coming,
	// 200 ms by default. Optional.
	Poll time.Duration
	// Drain is how long Bootout waits for a service to go: its ExitTimeOut and some
	// seconds. 25 s by default. Optional.
	Drain time.Duration
	// Retry is how long Bootstrap is tried while launchd answers that it can't yet,
	// 15 s by default; 3 to 5 s were measured. Optional.
	Retry time.Duration
}

// Launchctl drives the system domain through launchctl(1). Its methods need
// root, take a label, and may be repeated: what already holds is success.
type Launchctl struct{ o Options }

// New returns a Launchctl.
func New(o Options) *Launchctl {
	if o.Poll <= 0 {
		o.Poll = 200 * time.Millisecond
	}
	if o.Drain <= 0 {
		o.Drain = 25 * time.Second
	}
	if o.Retry <= 0 {
		o.Retry = 15 * time.Second
	}
	return &Launchctl{o}
}

// Load puts the property list into force, also in the place of an older one with
// the same label, and returns when the service runs. That is the upgrade as
// well: `launchctl kickstart` would go on with the list that is loaded, and with
// what launchd noted of the old program's signature, so that the new program is
// killed at its start (mache#641).
func (l *Launchctl) Load(ctx context.Context, label, file string) (Status, error) {
	// First, so that an instance that runs isn't taken away for one that can't.
	if err := l.CheckSwitch(ctx, label); err != nil {
		return Status{}, err
	}
	if err := l.Bootout(ctx, label); err != nil {
		return Status{}, err
	}
	// A service that was disabled once stays so through reinstallation, and
	// bootstrap then answers 119, or 5 in older releases.
	if err := l.Enable(ctx, label); err != nil {
		return Status{}, err
	}
	s, err := Status{}, l.Bootstrap(ctx, label, file)
	if err == nil {
		s, err = l.awaitRunning(ctx, label)
	}
	if err != nil {
		// Whatever launchd answered, the user's own switch explains it best.
		if off := l.CheckSwitch(ctx, label); off != nil {
			err = off
		}
	}
	return s, err
}

// CheckSwitch gives an error if the user, or a profile, has switched the service
// off. Where that can't be told (before macOS 13), it isn't.
func (l *Launchctl) CheckSwitch(ctx context.Context, label string) error {
	if _, err := serviceTarget("load", label); err != nil {
		return err
	}
	if item, err := l.LoginItem(ctx, label); err == nil && item.Blocked() {
		return &Error{Verb: "load", Target: "system/" + label, Code: SwitchedOff}
	}
	return nil
}

// Enable takes away the disabled mark, which outlives reboots.
func (l *Launchctl) Enable(ctx context.Context, label string) error {
	target, err := serviceTarget("enable", label)
	if err != nil {
		return err
	}
	_, err = l.run(ctx, "enable", target, target)
	return err
}

// Bootstrap loads the property list. launchd answers 5 for some seconds after
// the previous instance has gone, so that answer is tried again for
// Options.Retry; then it means something else, and the error says what to check.
func (l *Launchctl) Bootstrap(ctx context.Context, label, file string) error {
	target, err := serviceTarget("bootstrap", label)
	if err != nil {
		return err
	}
	if bad := absolute("property list", file); bad != "" {
		return errors.New("bootstrap " + target + ": " + bad)
	}
	retry := []Code{InputOutput, InProgress}
	err = l.poll(ctx, l.o.Retry, func() (bool, error) {
		_, err := l.run(ctx, "bootstrap", target, "system", file)
		var e *Error
		if errors.As(err, &e) && slices.Contains(retry, e.Code) {
			return false, err
		}
		return true, err
	})
	if err == nil || ctx.Err() != nil {
		return err
	}
	// 5 and 37 are also the answers for what is loaded already, and 5 was seen for
	// a load that went through: what print says decides.
	if s, printErr := l.Print(ctx, label); printErr == nil && s.Loaded && !s.Leaving() {
		return nil
	}
	return err
}

// Bootout unloads the service and waits until it has gone. One that isn't loaded
// is success.
func (l *Launchctl) Bootout(ctx context.Context, label string) error {
	target, err := serviceTarget("bootout", label)
	if err != nil {
		return err
	}
	// `bootout --wait` isn't available on macOS 15, so print is asked until it
	// fails, also where launchctl waits itself and longer than its runner does.
	_, err = l.run(ctx, "bootout", target, target)
	switch {
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
	case errors.Is(err, NoSuchProcess), errors.Is(err, NoSuchService):
		return nil
	case err != nil && !errors.Is(err, InProgress) && !errors.Is(err, Already):
		return err
	}
	return l.poll(ctx, l.o.Drain, func() (bool, error) {
		s, err := l.Print(ctx, label)
		if err == nil && s.Loaded {
			return false, &Error{Verb: "bootout", Target: target, Code: InProgress, Message: "still loaded, state " + s.State}
		}
		return true, err
	})
}

// Kickstart starts the service now; with kill, a running instance is ended
// first. It runs what is loaded: a changed property list needs Load, and so does a
// changed program.
func (l *Launchctl) Kickstart(ctx context.Context, label string, kill bool) error {
	target, err := serviceTarget("kickstart", label)
	if err != nil {
		return err
	}
	args := []string{target}
	if kill {
		args = []string{"-k", target}
	}
	_, err = l.run(ctx, "kickstart", target, args...)
	return err
}

// Print returns what launchd says of the service. One that isn't loaded is no
// error: Status.Loaded is false.
func (l *Launchctl) Print(ctx context.Context, label string) (Status, error) {
	target, err := serviceTarget("print", label)
	if err != nil {
		return Status{}, err
	}
	out, err := l.run(ctx, "print", target, target)
	if errors.Is(err, NoSuchService) || errors.Is(err, NoSuchProcess) {
		return Status{}, nil
	}
	if err != nil {
		return Status{}, err
	}
	return ParsePrint(out), nil
}

// Disabled reports whether the service carries the disabled mark.
func (l *Launchctl) Disabled(ctx context.Context, label string) (bool, error) {
	out, err := l.run(ctx, "print-disabled", "system", "system")
	if err != nil {
		return false, err
	}
	return ParseDisabled(out, label), nil
}

// LoginItem returns how the service stands in Login Items & Extensions, where
// the user can switch it off (macOS 13 and later). It changes with the start of a
// service: macOS may let a new one run and hold it back from the next boot on.
func (l *Launchctl) LoginItem(ctx context.Context, label string) (LoginItem, error) {
	stdout, stderr, status, err := l.o.Runner.Run(ctx, nil, sfltoolPath, "dumpbtm")
	if err != nil {
		return LoginItem{}, fmt.Errorf("read login items: %w", err)
	}
	if status != 0 {
		return LoginItem{}, fmt.Errorf("read login items: sfltool: %s", message(stderr))
	}
	return ParseLoginItem(stdout, label), nil
}

// awaitRunning waits until the service has a process. launchd spawns it after
// bootstrap has returned.
func (l *Launchctl) awaitRunning(ctx context.Context, label string) (Status, error) {
	s, err := l.awaitProcess(ctx, label)
	if err == nil || !s.BadSignature() {
		return s, err
	}
	// The first spawn of a program that isn't signed by a developer may be refused
	// by what launchd noted of the one before it, and the next one isn't; it comes
	// after ThrottleInterval.
	if s, err = l.awaitProcess(ctx, label); err != nil && s.BadSignature() {
		return s, &Error{Verb: "start", Target: "system/" + label, Code: CodeSigning, Message: s.String()}
	}
	return s, err
}

func (l *Launchctl) awaitProcess(ctx context.Context, label string) (s Status, err error) {
	err = l.poll(ctx, l.o.Retry, func() (bool, error) {
		var err error
		if s, err = l.Print(ctx, label); err != nil {
			return true, err
		}
		if !s.Running() {
			return false, fmt.Errorf("start %q: %v", label, s)
		}
		return true, nil
	})
	return s, err
}

// poll calls try until it is done, at most for the given time, and returns its
// last error.
func (l *Launchctl) poll(ctx context.Context, limit time.Duration, try func() (done bool, err error)) error {
	deadline := time.Now().Add(limit)
	for {
		done, err := try()
		if done || err == nil || !time.Now().Before(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-time.After(l.o.Poll):
		}
	}
}

// run runs one launchctl verb and translates its failure.
func (l *Launchctl) run(ctx context.Context, verb, target string, args ...string) ([]byte, error) {
	stdout, stderr, status, err := l.o.Runner.Run(ctx, nil, launchctlPath, append([]string{verb}, args...)...)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", verb, target, err)
	}
	if status == 0 {
		return stdout, nil
	}
	return nil, newError(verb, target, status, stderr)
}

func serviceTarget(verb, label string) (string, error) {
	if !validLabel(label) {
		return "", fmt.Errorf("%s service: label %q is not valid", verb, label)
	}
	return "system/" + label, nil
}
