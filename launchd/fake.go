package launchd

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"
)

// A Fake is a launchd to test with: a Runner for launchctl and `sfltool dumpbtm`
// that refuses what launchd refuses, with its words and its exit status. It
// unloads slowly, answers bootstrap with 5 for a while afterwards, keeps the
// disabled marks over a Boot, and looks at a property list's owner, mode and
// rules. Time is package time's: put it into a synctest bubble.
type Fake struct {
	// Files returns a property list and what lstat says of it. Required.
	Files func(path string) (File, []byte, error)
	// Start is called when a job gets its process, Stop when its process gets
	// SIGTERM; not at the same time, never holding a lock. Optional.
	Start func(j *Job, pid int)
	Stop  func(label string)
	// Draining is how long a service stays SIGTERMed after bootout, Settling how
	// long bootstrap answers 5 after that. Optional.
	Draining, Settling time.Duration
	// Blocked are labels that the user switched off in Login Items. They load but
	// get no process. Optional.
	Blocked []string

	mu       sync.Mutex
	services map[string]*fakeService
	disabled map[string]bool
	pid      int
	calls    []string
}

// A fakeService is a loaded service, or one that has gone a moment ago.
type fakeService struct {
	job   *Job
	path  string
	pid   int
	gone  time.Time // when it stops being there; zero: not leaving
	quiet time.Time // until when bootstrap answers 5
}

// Calls returns the commands that were run, one a line, and forgets them.
func (f *Fake) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.calls
	f.calls = nil
	return c
}

// Shutdown ends every service, as a Mac that goes down does.
func (f *Fake) Shutdown() {
	f.mu.Lock()
	var labels []string
	for label, s := range f.services {
		if s.gone.IsZero() && s.pid != 0 {
			labels = append(labels, label)
		}
	}
	f.services = nil
	f.mu.Unlock()
	slices.Sort(labels)
	for _, label := range labels {
		f.stopped(label)
	}
}

// Boot starts the Mac after a Shutdown: the property lists load, in the order
// given, unless their service is disabled or launchd refuses them. It returns the
// refusals.
func (f *Fake) Boot(files []string) []error {
	var refused []error
	for _, p := range files {
		if r := f.bootstrap(p); r.status != 0 {
			refused = append(refused, fmt.Errorf("boot %s: %s", p, r.stderr))
		}
	}
	return refused
}

// Disable marks a service as `launchctl disable` does.
func (f *Fake) Disable(label string) { f.mark(label, true) }

// Run implements Runner.
func (f *Fake) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, -1, err
	}
	f.mu.Lock()
	f.calls = append(f.calls, strings.Join(append([]string{path}, args...), " "))
	f.mu.Unlock()
	var r fakeReply
	switch path {
	case launchctlPath:
		r = f.launchctl(args)
	case sfltoolPath:
		r = f.sfltool(args)
	default:
		return nil, nil, -1, &exec.Error{Name: path, Err: exec.ErrNotFound}
	}
	return []byte(r.stdout), []byte(r.stderr), r.status, nil
}

// A fakeReply is what a command printed and its exit status.
type fakeReply struct {
	stdout, stderr string
	status         int
}

func (f *Fake) launchctl(args []string) fakeReply {
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
		return f.kickstart(strings.TrimPrefix(rest[1], "system/"), true)
	case len(rest) != 1 || !strings.HasPrefix(rest[0], "system/"):
	case verb == "enable", verb == "disable":
		f.mark(label, verb == "disable")
		return fakeReply{}
	case verb == "bootout":
		return f.bootout(label)
	case verb == "print":
		return f.print(label)
	case verb == "kickstart":
		return f.kickstart(label, false)
	}
	return fakeReply{stderr: "Unrecognized subcommand or arguments\n", status: int(Usage)}
}

func (f *Fake) mark(label string, disabled bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.disabled == nil {
		f.disabled = map[string]bool{}
	}
	f.disabled[label] = disabled
}

// loaded returns the service if it is there, also while it is leaving. The lock
// is held.
func (f *Fake) loaded(label string) *fakeService {
	s := f.services[label]
	if s == nil || !s.gone.IsZero() && !time.Now().Before(s.gone) {
		return nil
	}
	return s
}

const ioError = "Bootstrap failed: 5: Input/output error\nTry re-running the command as root for richer errors.\n"

func (f *Fake) bootstrap(p string) fakeReply {
	refused := fakeReply{stderr: ioError, status: int(InputOutput)}
	file, data, err := f.Files(p)
	if err != nil {
		return refused
	}
	j, err := Parse(data)
	if err != nil || len(j.Check()) > 0 || len(CheckFile(file, j.Label)) > 0 {
		return refused
	}
	f.mu.Lock()
	old := f.services[j.Label]
	if f.disabled[j.Label] || f.loaded(j.Label) != nil || old != nil && time.Now().Before(old.quiet) {
		f.mu.Unlock()
		return refused
	}
	if f.services == nil {
		f.services = map[string]*fakeService{}
	}
	s := &fakeService{job: j, path: p}
	f.services[j.Label] = s
	pid := 0
	if !slices.Contains(f.Blocked, j.Label) && (j.RunAtLoad || j.KeepAlive != nil) {
		pid = f.spawn(s)
	}
	f.mu.Unlock()
	f.started(j, pid)
	return fakeReply{}
}

// spawn gives the service a process. The lock is held.
func (f *Fake) spawn(s *fakeService) int {
	f.pid++
	s.pid = 4000 + f.pid
	return s.pid
}

func (f *Fake) started(j *Job, pid int) {
	if f.Start != nil && pid != 0 {
		f.Start(j, pid)
	}
}

func (f *Fake) stopped(label string) {
	if f.Stop != nil {
		f.Stop(label)
	}
}

func (f *Fake) bootout(label string) fakeReply {
	f.mu.Lock()
	s := f.loaded(label)
	if s == nil {
		f.mu.Unlock()
		return fakeReply{stderr: "Boot-out failed: 3: No such process\n", status: int(NoSuchProcess)}
	}
	leaving := !s.gone.IsZero()
	if !leaving {
		s.gone = time.Now().Add(f.Draining)
		s.quiet = s.gone.Add(f.Settling)
	}
	f.mu.Unlock()
	if !leaving {
		f.stopped(label)
	}
	if leaving || f.Draining > 0 {
		return fakeReply{stderr: "Boot-out failed: 36: Operation now in progress\n", status: int(InProgress)}
	}
	return fakeReply{}
}

func noService(label string) fakeReply {
	return fakeReply{stderr: fmt.Sprintf("Could not find service %q in domain for system\n", label), status: int(NoSuchService)}
}

func (f *Fake) kickstart(label string, kill bool) fakeReply {
	f.mu.Lock()
	s := f.loaded(label)
	if s == nil {
		f.mu.Unlock()
		return noService(label)
	}
	if s.pid != 0 && !kill {
		f.mu.Unlock()
		return fakeReply{}
	}
	had := s.pid != 0
	pid := f.spawn(s)
	f.mu.Unlock()
	if had {
		f.stopped(label)
	}
	f.started(s.job, pid)
	return fakeReply{}
}

// print gives what the real one prints of a daemon, abridged. The nested blocks
// are there because they repeat the outer keys.
func (f *Fake) print(label string) fakeReply {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.loaded(label)
	if s == nil {
		return noService(label)
	}
	state := "running"
	switch {
	case !s.gone.IsZero():
		state = "SIGTERMed"
	case s.pid == 0:
		state = "not running"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "system/%s = {\n\tactive count = 1\n\tpath = %s\n\ttype = LaunchDaemon\n\tstate = %s\n\n", label, s.path, state)
	fmt.Fprintf(&b, "\tprogram = %s\n\tenvironment = {\n\t\tpid => 1\n\t\tstate = active\n\t}\n\n", s.job.ProgramArguments[0])
	if s.pid != 0 {
		fmt.Fprintf(&b, "\tpid = %d\n", s.pid)
	}
	b.WriteString("\tlast exit code = (never exited)\n}\n")
	return fakeReply{stdout: b.String()}
}

func (f *Fake) printDisabled() fakeReply {
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
	return fakeReply{stdout: "\tdisabled services = {\n" + strings.Join(lines, "") + "\t}\n"}
}

// sfltool lists the services and the blocked ones in the form of `sfltool
// dumpbtm`.
func (f *Fake) sfltool(args []string) fakeReply {
	if !slices.Equal(args, []string{"dumpbtm"}) {
		return fakeReply{stderr: "Usage: sfltool dumpbtm\n", status: 1}
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
	b.WriteString(" Items:\n\n")
	for i, label := range labels {
		disposition := "[enabled, allowed, notified] (0xb)"
		if slices.Contains(f.Blocked, label) {
			disposition = "[enabled, disallowed, notified] (0x9)"
		}
		fmt.Fprintf(&b, " #%d:\n                 UUID: 5A133E95-92FB-42BA-859C-2A0675FC20AF\n                 Type: legacy daemon (0x10010)\n", i+1)
		fmt.Fprintf(&b, "          Disposition: %s\n           Identifier: 16.%s\n\n", disposition, label)
	}
	return fakeReply{stdout: b.String()}
}
