// Package launchdtest simulates launchd for tests on any system. [Launchd] answers
// launchctl and `sfltool dumpbtm` with the output and exit status that a Mac's gives, and
// refuses what a Mac's refuses.
package launchdtest

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/launchd"
)

// A Launchd simulates launchd behind a launchd.Runner for launchctl and `sfltool dumpbtm`.
// It ends processes by SIGTERM and, ExitTimeOut later, by SIGKILL; refuses bootstrap with
// exit status 5 for a while after an unload; keeps the effect of `launchctl disable` across
// a Boot; and checks a property list's owner, mode and content. It uses package time, so
// run it in a testing/synctest bubble.
type Launchd struct {
	// Files returns a property list's content, and its owner and mode by lstat(2). Required.
	Files func(path string) (launchd.File, []byte, error)
	// Program returns an executable's owner and mode, and a digest of its content. If a file was
	// overwritten in place after a service ran from it, the signature that the kernel cached
	// no longer matches, and the next process is killed; a file that was renamed into its
	// place runs. Optional.
	Program func(path string) (info fs.FileInfo, digest string, err error)
	// Start is called when a job's process starts, and must not block until it ends. Stop is
	// called when the process gets SIGTERM, and returns when the process has ended. Kill is
	// called if Stop hasn't returned after the job's ExitTimeOut: the process gets SIGKILL and
	// has ended whether Stop returns or not. All are called without a lock. Optional.
	Start func(j *launchd.Job, pid int)
	Stop  func(label string)
	Kill  func(label string)
	// Draining is how long a service stays loaded, in state SIGTERMed, after its process
	// has ended by bootout; Settling is how long bootstrap is refused after that. Optional.
	Draining, Settling time.Duration
	// Blocked are labels that the user switched off in Login Items. They load, but launchd
	// starts no process. Optional.
	Blocked []string
	// HeldBack are labels that macOS disallows after they are loaded: their process runs
	// until the next boot and isn't started again. Optional.
	HeldBack []string
	// BareIdentifiers has dumpbtm omit the "16." before identifiers, as macOS 26
	// does. Optional.
	BareIdentifiers bool

	mu       sync.Mutex
	services map[string]*service // by label
	disabled map[string]bool     // launchctl disable and enable, by label
	programs map[string]program  // by path
	unsigned map[string]int      // number of processes that the kernel will kill, by label
	pid      int                 // processes so far, from which PIDs are made
	calls    []string
}

// A service is a service that is loaded, or was until bootout.
type service struct {
	job  *launchd.Job
	path string // of the property list
	pid  int    // 0: no process
	runs int    // processes so far
	last string // how the last process ended, a line of launchctl print
	// ended is closed when the process that is being ended has ended; nil: none is.
	ended   chan struct{}
	leaving bool      // by bootout
	gone    time.Time // when it is no longer loaded; zero: not known yet
	quiet   time.Time // until when bootstrap is refused
}

// A program identifies the executable that a service ran last.
type program struct {
	info   fs.FileInfo
	digest string
}

// Calls returns the commands since the last Calls, each as one string.
func (f *Launchd) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.calls
	f.calls = nil
	return c
}

// Shutdown stops every service, as a Mac does that shuts down, and returns when their
// processes have ended.
func (f *Launchd) Shutdown() {
	f.mu.Lock()
	services := f.services
	f.services = nil
	var ended []<-chan struct{}
	for _, label := range slices.Sorted(maps.Keys(services)) {
		if s := services[label]; s.gone.IsZero() {
			ended = append(ended, f.end(s))
		}
	}
	f.mu.Unlock()
	for _, e := range ended {
		<-e
	}
}

// Boot starts the Mac after a Shutdown: it loads the property lists in the order given,
// unless their service is disabled or launchd refuses them, and returns an error for each
// of those.
func (f *Launchd) Boot(files []string) []error {
	var refused []error
	f.mu.Lock()
	f.Blocked = append(f.Blocked, f.HeldBack...)
	f.mu.Unlock()
	for _, p := range files {
		if r := f.bootstrap(p); r.status != 0 {
			refused = append(refused, fmt.Errorf("boot %s: %s", p, r.stderr))
		}
	}
	return refused
}

// RefuseSignature makes the kernel kill the next n processes of a service because of their
// code signature, or all if n is negative.
func (f *Launchd) RefuseSignature(label string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.unsigned == nil {
		f.unsigned = map[string]int{}
	}
	f.unsigned[label] = n
}

// Disable marks a service as `launchctl disable` does.
func (f *Launchd) Disable(label string) { f.mark(label, true) }

// Run implements launchd.Runner.
func (f *Launchd) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, -1, err
	}
	f.mu.Lock()
	f.calls = append(f.calls, strings.Join(append([]string{path}, args...), " "))
	f.mu.Unlock()
	var r reply
	switch path {
	case "/bin/launchctl":
		r = f.launchctl(ctx, args)
	case "/usr/bin/sfltool":
		r = f.sfltool(args)
	default:
		return nil, nil, -1, &exec.Error{Name: path, Err: exec.ErrNotFound}
	}
	return []byte(r.stdout), []byte(r.stderr), r.status, nil
}

// A reply has the output and exit status of a command.
type reply struct {
	stdout, stderr string
	status         int
}

// launchctl executes the subcommands that package launchd uses, in the forms that it uses.
func (f *Launchd) launchctl(ctx context.Context, args []string) reply {
	verb, rest := "", args
	if len(args) > 0 {
		verb, rest = args[0], args[1:]
	}
	label := strings.TrimPrefix(strings.Join(rest, " "), "system/")
	switch {
	case verb == "bootstrap" && len(rest) == 2 && rest[0] == "system":
		return f.bootstrap(rest[1])
	case verb == "print-disabled" && slices.Equal(rest, []string{"system"}):
		return f.printDisabled()
	case verb == "kickstart" && len(rest) == 2 && rest[0] == "-k":
		return f.kickstart(ctx, strings.TrimPrefix(rest[1], "system/"), true)
	case len(rest) != 1 || !strings.HasPrefix(rest[0], "system/"):
	case verb == "enable", verb == "disable":
		f.mark(label, verb == "disable")
		return reply{}
	case verb == "bootout":
		return f.bootout(ctx, label)
	case verb == "print":
		return f.print(label)
	case verb == "kickstart":
		return f.kickstart(ctx, label, false)
	}
	return reply{stderr: "Unrecognized subcommand or arguments\n", status: int(launchd.Usage)}
}

// mark records launchctl disable or enable. It doesn't affect a loaded service.
func (f *Launchd) mark(label string, disabled bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.disabled == nil {
		f.disabled = map[string]bool{}
	}
	f.disabled[label] = disabled
}

// loaded returns the service if it is loaded, also while bootout is unloading it; nil
// otherwise. The lock is held.
func (f *Launchd) loaded(label string) *service {
	s := f.services[label]
	if s == nil || s.leaving && !s.gone.IsZero() && !time.Now().Before(s.gone) {
		return nil
	}
	return s
}

// ioError is the message with which launchd refuses a property list, whatever is wrong
// with it.
const ioError = "Bootstrap failed: 5: Input/output error\nTry re-running the command as root for richer errors.\n"

// defaultExitTimeOut is the ExitTimeOut in seconds of a property list that has none, as
// launchctl print shows it on a Mac: "exit timeout = 5".
const defaultExitTimeOut = 5

// bootoutWait is how long bootout waits for the process to end before it answers that the
// operation is in progress.
const bootoutWait = time.Second

// bootstrap loads a property list and starts its process, if it is to run at load.
func (f *Launchd) bootstrap(p string) reply {
	refused := reply{stderr: ioError, status: int(launchd.InputOutput)}
	file, data, err := f.Files(p)
	if err != nil {
		return refused
	}
	j, err := launchd.Parse(data)
	if err != nil || len(j.Check()) > 0 || len(launchd.CheckFile(file, j.Label)) > 0 {
		return refused
	}
	f.mu.Lock()
	old := f.services[j.Label]
	switch {
	case f.disabled[j.Label]:
		f.mu.Unlock()
		return reply{stderr: "Bootstrap failed: 119: Service is disabled\nTry re-running the command as root for richer errors.\n", status: int(launchd.Disabled)}
	case f.loaded(j.Label) != nil, old != nil && time.Now().Before(old.quiet):
		f.mu.Unlock()
		return refused
	}
	if f.services == nil {
		f.services = map[string]*service{}
	}
	s := &service{job: j, path: p, last: "last exit code = (never exited)"}
	f.services[j.Label] = s
	pid := 0
	if !slices.Contains(f.Blocked, j.Label) && (j.RunAtLoad || j.KeepAlive != nil) {
		pid = f.spawn(s)
	}
	f.mu.Unlock()
	f.started(j, pid)
	return reply{}
}

// spawn starts the service's process and returns its PID, or 0 if the kernel kills it at
// once. Then launchd starts another after ThrottleInterval, if the job has KeepAlive. The
// lock is held; the caller has to call started without it.
func (f *Launchd) spawn(s *service) int {
	s.runs++
	if f.killed(s) {
		s.pid, s.last = 0, killedForSignature
		if s.job.KeepAlive != nil {
			time.AfterFunc(seconds(s.job.ThrottleInterval, 10), func() { f.respawn(s) })
		}
		return 0
	}
	f.pid++
	s.pid = 4000 + f.pid
	return s.pid
}

// killed reports whether the kernel kills the service's process because of its code
// signature: it caches the signature of a file, so a file that was overwritten in place no
// longer has the right one. The lock is held.
func (f *Launchd) killed(s *service) bool {
	if n := f.unsigned[s.job.Label]; n != 0 {
		f.unsigned[s.job.Label] = n - 1
		return true
	}
	if f.Program == nil {
		return false
	}
	path := s.job.ProgramArguments[0]
	info, digest, err := f.Program(path)
	if err != nil {
		return false
	}
	before, ran := f.programs[path]
	if ran && os.SameFile(before.info, info) && before.digest != digest {
		return true
	}
	if f.programs == nil {
		f.programs = map[string]program{}
	}
	f.programs[path] = program{info, digest}
	return false
}

// respawn starts another process after one that was killed at once.
func (f *Launchd) respawn(s *service) {
	f.mu.Lock()
	pid := 0
	if f.services[s.job.Label] == s && !s.leaving && s.pid == 0 {
		pid = f.spawn(s)
	}
	f.mu.Unlock()
	f.started(s.job, pid)
}

// seconds returns a property list's number of seconds, or the standard one if it has none.
func seconds(n *int, standard int) time.Duration {
	if n != nil {
		standard = *n
	}
	return time.Duration(standard) * time.Second
}

// started calls Start for a process that spawn started. The lock isn't held.
func (f *Launchd) started(j *launchd.Job, pid int) {
	if f.Start != nil && pid != 0 {
		f.Start(j, pid)
	}
}

// end sends SIGTERM to the service's process, and SIGKILL if it still runs after
// ExitTimeOut. It returns at once; the channel is closed when the process has ended. The
// lock is held.
func (f *Launchd) end(s *service) <-chan struct{} {
	if s.ended != nil {
		return s.ended
	}
	ended := make(chan struct{})
	s.ended = ended
	if s.pid == 0 {
		f.noteExit(s)
		return ended
	}
	exited, stop, kill := make(chan struct{}), f.Stop, f.Kill
	go func() {
		if stop != nil {
			stop(s.job.Label)
		}
		close(exited)
	}()
	go func() {
		last := "last exit code = 0"
		limit := time.NewTimer(seconds(s.job.ExitTimeOut, defaultExitTimeOut))
		defer limit.Stop()
		select {
		case <-exited:
		case <-limit.C:
			last = "last terminating signal = Killed: 9"
			if kill != nil {
				kill(s.job.Label)
			}
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		s.last = last
		f.noteExit(s)
	}()
	return ended
}

// noteExit records that the service has no process any more. The lock is held.
func (f *Launchd) noteExit(s *service) {
	s.pid = 0
	s.gone = time.Now().Add(f.Draining)
	s.quiet = s.gone.Add(f.Settling)
	close(s.ended)
}

// bootout unloads a service. If the process needs long to end, or one is being ended
// already, it answers that the operation is in progress.
func (f *Launchd) bootout(ctx context.Context, label string) reply {
	f.mu.Lock()
	s := f.loaded(label)
	if s == nil {
		f.mu.Unlock()
		return reply{stderr: badRequest + "Boot-out failed: 3: No such process\n", status: int(launchd.NoSuchProcess)}
	}
	again := s.leaving
	s.leaving = true
	ended := f.end(s)
	f.mu.Unlock()
	done := !again && within(ctx, ended, bootoutWait) && f.Draining == 0
	if !done {
		return reply{stderr: "Boot-out failed: 36: Operation now in progress\n", status: int(launchd.InProgress)}
	}
	return reply{}
}

// within reports whether a process ended within a time.
func within(ctx context.Context, ended <-chan struct{}, limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-ended:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}

// killedForSignature is the line of launchctl print for a process that the kernel killed
// because of its code signature (<sys/reason.h>).
const killedForSignature = "last exit reason = OS_REASON_CODESIGNING"

// badRequest precedes the line with the reason (nix#9978).
const badRequest = "Bad request.\n"

// noService is the reply about a service that isn't loaded.
func noService(label string) reply {
	return reply{stderr: badRequest + fmt.Sprintf("Could not find service %q in domain for system\n", label), status: int(launchd.NoSuchService)}
}

// kickstart starts the service's process. If one runs, it does nothing, or with kill ends
// that first.
func (f *Launchd) kickstart(ctx context.Context, label string, kill bool) reply {
	f.mu.Lock()
	s := f.loaded(label)
	if s == nil {
		f.mu.Unlock()
		return noService(label)
	}
	if s.leaving {
		f.mu.Unlock()
		return reply{stderr: "Operation now in progress\n", status: int(launchd.InProgress)}
	}
	if s.pid != 0 {
		if !kill {
			f.mu.Unlock()
			return reply{}
		}
		ended := f.end(s)
		f.mu.Unlock()
		select {
		case <-ended:
		case <-ctx.Done():
			return reply{status: int(launchd.InProgress)}
		}
		f.mu.Lock()
	}
	s.ended, s.gone, s.quiet = nil, time.Time{}, time.Time{}
	pid := f.spawn(s)
	f.mu.Unlock()
	f.started(s.job, pid)
	return reply{}
}

// print returns the output of `launchctl print` for a daemon, abridged. It keeps the nested
// blocks that repeat keys of the outer one, which a parser must not confuse.
func (f *Launchd) print(label string) reply {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.loaded(label)
	if s == nil {
		return noService(label)
	}
	state := "running"
	switch {
	case s.ended != nil:
		state = "SIGTERMed"
	case s.pid == 0 && s.last == killedForSignature:
		state = "spawn scheduled"
	case s.pid == 0:
		state = "not running"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "system/%s = {\n\tactive count = 1\n\tpath = %s\n\ttype = LaunchDaemon\n\tstate = %s\n\n", label, s.path, state)
	fmt.Fprintf(&b, "\tprogram = %s\n\tenvironment = {\n\t\tpid => 1\n\t\tstate = active\n\t}\n\n", s.job.ProgramArguments[0])
	fmt.Fprintf(&b, "\texit timeout = %d\n\truns = %d\n", seconds(s.job.ExitTimeOut, defaultExitTimeOut)/time.Second, s.runs)
	if s.pid != 0 {
		fmt.Fprintf(&b, "\tpid = %d\n", s.pid)
	}
	fmt.Fprintf(&b, "\t%s\n}\n", s.last)
	return reply{stdout: b.String()}
}

// printDisabled returns the output of `launchctl print-disabled system`.
func (f *Launchd) printDisabled() reply {
	f.mu.Lock()
	defer f.mu.Unlock()
	var lines []string
	for label, disabled := range f.disabled {
		word := "enabled"
		if disabled {
			word = "disabled"
		}
		lines = append(lines, fmt.Sprintf("\t\t%q => %s\n", label, word))
	}
	slices.Sort(lines)
	return reply{stdout: "\tdisabled services = {\n" + strings.Join(lines, "") + "\t}\n"}
}

// sfltool returns the output of `sfltool dumpbtm` for the loaded and the blocked services.
func (f *Launchd) sfltool(args []string) reply {
	if !slices.Equal(args, []string{"dumpbtm"}) {
		return reply{stderr: "Usage: sfltool dumpbtm\n", status: 1}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	labels := slices.Clone(f.Blocked)
	for label := range f.services {
		if !slices.Contains(labels, label) {
			labels = append(labels, label)
		}
	}
	slices.Sort(labels)
	var b bytes.Buffer
	line := strings.Repeat("=", 24)
	fmt.Fprintf(&b, "%s\n Records for UID -2 : FFFFEEEE-DDDD-CCCC-BBBB-AAAAFFFFFFFE\n%[1]s\n\n Items:\n\n", line)
	for i, label := range labels {
		disposition, identifier := "[enabled, allowed, notified] (0xb)", "16."+label
		switch {
		case slices.Contains(f.Blocked, label):
			disposition = "[enabled, disallowed, notified] (0x9)"
		case slices.Contains(f.HeldBack, label):
			disposition = "[enabled, disallowed, not notified] (0x1)"
		}
		if f.BareIdentifiers {
			identifier = label
		}
		fmt.Fprintf(&b, " #%d:\n                 UUID: 5A133E95-92FB-42BA-859C-2A0675FC20AF\n                 Type: legacy daemon (0x10010)\n", i+1)
		fmt.Fprintf(&b, "          Disposition: %s\n           Identifier: %s\n                  URL: file:///Library/LaunchDaemons/%s.plist\n\n", disposition, identifier, label)
	}
	return reply{stdout: b.String()}
}
