package darwin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"strings"
	"sync"
	"time"
)

// A Runner runs one command, waits for its end, and returns its output and exit status.
// err means that the command couldn't be run or was killed; an exit status other than 0
// isn't an error. path is absolute. The Runner must read both outputs to their end, and
// must set LC_ALL=C, since the messages are parsed.
type Runner interface {
	Run(ctx context.Context, stdin []byte, path string, args ...string) (stdout, stderr []byte, status int, err error)
}

// DefaultTimeout is the time after which a command that hangs is killed. pfctl takes
// milliseconds, or a second or two for ten thousand rules. It is short, so that a caller
// with a deadline of its own can still run further commands.
const DefaultTimeout = 5 * time.Second

// MaxOutput is how much of each output an Exec keeps, in bytes: about a hundred thousand
// rules. It reads and drops the rest, and Run returns an error, since half a ruleset is
// worse than none.
const MaxOutput = 32 << 20

// An Exec runs commands on this host. The zero value is ready to use.
type Exec struct {
	// Timeout for one command; DefaultTimeout if 0. Optional.
	Timeout time.Duration
}

// Run implements Runner. The command gets a fixed environment, so the caller's doesn't
// influence it.
func (e Exec) Run(ctx context.Context, stdin []byte, file string, args ...string) ([]byte, []byte, int, error) {
	if !path.IsAbs(file) {
		return nil, nil, -1, fmt.Errorf("run %q: not an absolute path", file)
	}
	timeout := e.Timeout
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	cmd := exec.CommandContext(ctx, file, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/bin:/bin:/usr/sbin:/sbin"}
	cmd.Dir = "/"
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	// Both pipes are drained to the end: pfctl writes to stderr on every call and
	// dies by SIGPIPE when the reader leaves (wazuh#39189).
	var stdout, stderr limited
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// Run doesn't wait for a grandchild that keeps the pipes open.
	cmd.WaitDelay = time.Second

	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return nil, nil, -1, fmt.Errorf("run %s: %w", file, context.Cause(ctx))
	case errors.As(err, &exit) && exit.Exited():
		err = nil
	case err != nil:
		return nil, nil, -1, fmt.Errorf("run %s: %w", file, err)
	}
	if stdout.over || stderr.over {
		return nil, nil, -1, fmt.Errorf("run %s: more than %d bytes of output", file, MaxOutput)
	}
	return stdout.kept, stderr.kept, cmd.ProcessState.ExitCode(), err
}

// limited is an io.Writer that accepts everything and keeps the first MaxOutput bytes.
type limited struct {
	kept []byte
	over bool
}

func (l *limited) Write(p []byte) (int, error) {
	keep := min(len(p), MaxOutput-len(l.kept))
	l.over = l.over || keep < len(p)
	l.kept = append(l.kept, p[:keep]...)
	return len(p), nil
}

// A CommandError is the error of a command that failed.
type CommandError struct {
	Command string // as typed, without its standard input
	Status  int
	Message string // the first line on stderr that isn't noise, or ""
}

func (e *CommandError) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("%s: exit status %d", e.Command, e.Status)
	}
	return fmt.Sprintf("%s: %s", e.Command, e.Message)
}

// failure makes a CommandError of what a command printed.
func failure(stderr []byte, status int, file string, args []string) *CommandError {
	return &CommandError{
		Command: strings.Join(append([]string{path.Base(file)}, args...), " "),
		Status:  status,
		Message: firstLine(stderr),
	}
}

// firstLine returns the first line that isn't noise, cut to 200 bytes.
func firstLine(b []byte) string {
	for line := range bytes.Lines(b) {
		line = bytes.TrimSpace(line)
		if len(line) > 0 && !isNoise(string(line)) {
			return strings.ToValidUTF8(string(line[:min(len(line), 200)]), "")
		}
	}
	return ""
}

// serial is a Runner that runs one command at a time.
type serial struct {
	mu sync.Mutex
	r  Runner
}

func (s *serial) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.r.Run(ctx, stdin, path, args...)
}
