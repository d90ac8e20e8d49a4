package launchd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// The paths are absolute, so that no program elsewhere in PATH is run as root instead.
const (
	launchctlPath = "/bin/launchctl"
	sfltoolPath   = "/usr/bin/sfltool"
)

// A Runner runs one command, waits for its end, and returns its output and exit status.
// err means that the command couldn't be run or was killed; an exit status other than 0
// isn't an error. path is absolute. The Runner must read both outputs to their end, and
// must set LC_ALL=C, since the messages are parsed.
type Runner interface {
	Run(ctx context.Context, stdin []byte, path string, args ...string) (stdout, stderr []byte, status int, err error)
}

// Options are the dependencies and time limits of a [Launchctl].
type Options struct {
	// Runner runs launchctl. Required.
	Runner Runner
	// Poll is the interval at which a service that starts or stops is polled, 200 ms by
	// default. Optional.
	Poll time.Duration
	// Drain is how long Bootout waits until a service is unloaded. It should exceed the
	// job's ExitTimeOut by some seconds. 25 s by default. Optional.
	Drain time.Duration
	// Retry is how long Bootstrap is retried while launchd can't load the service yet,
	// and how long Load waits for a process; 15 s by default. launchd was measured to
	// need 3 to 5 s. Optional.
	Retry time.Duration
}

// A Launchctl controls services of the system domain through launchctl(1). Its methods
// need root, take a service's label, and are idempotent.
type Launchctl struct{ o Options }

// New returns a Launchctl with o and its defaults.
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

// Load loads the property list file, replacing one with the same label that is loaded,
// and returns once the service runs. An upgrade must call it, too: `launchctl kickstart`
// would use the property list that is loaded and what launchd recorded of the old
// program's signature, so that the new program is killed when it starts (mache#641).
func (l *Launchctl) Load(ctx context.Context, label, file string) (Status, error) {
	// Checked first, so that a running service isn't stopped for one that can't start.
	if err := l.CheckSwitch(ctx, label); err != nil {
		return Status{}, err
	}
	if err := l.Bootout(ctx, label); err != nil {
		return Status{}, err
	}
	// A disabled service stays disabled when it is reinstalled, and bootstrap then
	// answers 119, or 5 in older releases.
	if err := l.Enable(ctx, label); err != nil {
		return Status{}, err
	}
	s, err := Status{}, l.Bootstrap(ctx, label, file)
	if err == nil {
		s, err = l.awaitRunning(ctx, label)
	}
	if err != nil {
		// Whatever launchd answered, the user's switch explains it best.
		if off := l.CheckSwitch(ctx, label); off != nil {
			err = off
		}
	}
	return s, err
}

// CheckSwitch returns an error with the code SwitchedOff if the user, or a profile, has
// switched the service off. It returns nil if that isn't known, as before macOS 13.
func (l *Launchctl) CheckSwitch(ctx context.Context, label string) error {
	if _, err := serviceTarget("load", label); err != nil {
		return err
	}
	if item, err := l.LoginItem(ctx, label); err == nil && item.Blocked() {
		return &Error{Verb: "load", Target: "system/" + label, Code: SwitchedOff}
	}
	return nil
}

// Enable removes the mark of `launchctl disable`, which persists across reboots.
func (l *Launchctl) Enable(ctx context.Context, label string) error {
	target, err := serviceTarget("enable", label)
	if err != nil {
		return err
	}
	_, err = l.run(ctx, "enable", target, target)
	return err
}

// Bootstrap loads the property list file. launchd answers 5 for some seconds after a
// service of that label was unloaded, so Bootstrap retries for Options.Retry. After that
// 5 has another cause, and the error's hint says what to check.
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
	// 5 and 37 also mean that the service is already loaded, and 5 was seen after a load
	// that succeeded, so print decides.
	if s, printErr := l.Print(ctx, label); printErr == nil && s.Loaded && !s.Leaving() {
		return nil
	}
	return err
}

// Bootout unloads the service and waits until it is gone, at most Options.Drain. It
// succeeds if the service isn't loaded.
func (l *Launchctl) Bootout(ctx context.Context, label string) error {
	target, err := serviceTarget("bootout", label)
	if err != nil {
		return err
	}
	// `bootout --wait` isn't available on macOS 15, so print is polled until it fails,
	// also if launchctl itself waits and exceeds the Runner's time limit.
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

// Kickstart starts the service now; with kill, it ends a running process first. It uses
// what is loaded: after a change of the property list or the program call Load instead.
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

// Print returns the service's status. If the service isn't loaded, Status.Loaded is false
// and the error is nil.
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

// Disabled reports whether the service has the mark of `launchctl disable`.
func (l *Launchctl) Disabled(ctx context.Context, label string) (bool, error) {
	out, err := l.run(ctx, "print-disabled", "system", "system")
	if err != nil {
		return false, err
	}
	return ParseDisabled(out, label), nil
}

// LoginItem returns the service's record in Login Items & Extensions, where the user can
// switch it off (macOS 13 and later). Starting a service may change it: macOS may let a new
// one run and disallow it from the next boot on.
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

// awaitRunning waits until the service has a process, which launchd spawns only after
// bootstrap has returned.
func (l *Launchctl) awaitRunning(ctx context.Context, label string) (Status, error) {
	s, err := l.awaitProcess(ctx, label)
	if err == nil || !s.BadSignature() {
		return s, err
	}
	// The first process of a program without a developer's signature may be killed because
	// of what launchd recorded of the old program. The next one, after ThrottleInterval,
	// isn't.
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

// poll calls try until it is done or succeeds, at most for limit, and returns its last
// error.
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

// run runs one launchctl verb and turns an exit status other than 0 into an *Error.
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
		return "", fmt.Errorf("%s service: invalid label %q", verb, label)
	}
	return "system/" + label, nil
}
