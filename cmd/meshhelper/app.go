package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
)

// version is the release, which the linker sets (-X main.version). A build without it
// reports the commit or the module's version: see versionText.
var version string

// The exit statuses. Scripts rely on them: docs/cli.md lists them.
const (
	exitDone         = 0
	exitFailed       = 1 // the helper or the system refused, or a step failed
	exitUsage        = 2 // an argument is wrong by itself, for every user and mesh
	exitUnreachable  = 3 // no helper answers on the socket
	exitNotPermitted = 4 // the user may not do this, or may not open the socket
)

// newHost makes the host that a helper runs on.
type newHost func(hostOptions) (host.Host, error)

// hostOptions are the options of a newHost.
type hostOptions struct {
	stateDir string       // folder of the host's journal
	label    string       // name of the service, which names the anchor on a Mac; "" is the default
	log      *slog.Logger // required
}

// app holds what all commands share: the process's input and output, and the global
// options. Tests replace its fields instead of the process's own.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	random         io.Reader // source of private keys
	terminal       bool      // whether stdout is a terminal
	root           bool      // whether the user is root, who needs no sudo
	columns, rows  int       // size of stdout's terminal; 0 where stdout is no terminal
	talkColumns    int       // width of stderr's terminal; 0 where stderr is no terminal

	// size and talkSize measure the terminals of stdout and stderr, in characters; nil
	// means that neither is a terminal. A window may change size while a command runs, so
	// status --watch measures again.
	size, talkSize func() (columns, rows int)

	hosts   map[string]newHost // by the name that --platform takes
	service *serviceHost       // nil on a platform without a known service manager

	// resolve looks a name up; nil uses this computer's resolver.
	resolve func(context.Context, string) ([]netip.Addr, error)

	// lookPath finds a program in the PATH; nil finds every program under its own name.
	lookPath func(name string) (string, error)

	// flush waits, for a bounded time, until stderr has taken what was written to it.
	flush func()

	socket string // --socket: path of the helper's socket
	json   bool   // --json

	// started is set once the arguments were parsed and the command runs. An error before
	// that is wrong usage.
	started bool
}

// errWriter is a command's standard output. It keeps the first error of a write, so that
// a command whose output is lost, for example on a full disk, doesn't exit with status 0.
// A standard output that the caller closed goes unnoticed, because the Go runtime opens
// /dev/null in its place: see discardsOutput.
type errWriter struct {
	to  io.Writer
	err error // of the first write that failed
}

func (w *errWriter) Write(b []byte) (int, error) {
	n, err := w.to.Write(b)
	if w.err == nil {
		w.err = err
	}
	return n, err
}

// outputError returns the first error of writing to stdout. Where stdout is a regular file
// it also flushes the file, because some file systems report a full or failing disk only
// then (fsync(2): ENOSPC, EIO).
func (a *app) outputError() error {
	out, ok := a.stdout.(*errWriter)
	if !ok {
		return nil
	}
	f, ok := out.to.(*os.File)
	if out.err != nil || !ok {
		return out.err
	}
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
		out.err = f.Sync()
	}
	return out.err
}

// discardsOutput reports whether what is written to stdout is lost: stdout is the null
// device, or the caller closed it.
func (a *app) discardsOutput() bool {
	out, ok := a.stdout.(*errWriter)
	if !ok {
		return false
	}
	f, ok := out.to.(*os.File)
	return ok && isNullDevice(f)
}

// main runs the command with args and returns its exit status. An error goes to stderr, as
// text or, with --json, as JSON.
func (a *app) main(args []string) int {
	ctx, stop := endingBy(context.Background(), endSignals...)
	defer stop()
	defer func() { a.flush() }()
	if a.flush == nil {
		a.flush = func() {}
	}
	out := &errWriter{to: a.stdout}
	a.stdout = out
	if a.size == nil {
		a.size = func() (int, int) { return 0, 0 }
	}
	a.columns, a.rows = a.size()
	if a.talkSize != nil {
		a.talkColumns, _ = a.talkSize()
	}
	root := newRoot(a)
	root.SetArgs(args)
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil && out.err == nil {
		return exitDone
	}
	if out.err != nil {
		a.started = true // cobra runs no command for --help, but that isn't wrong usage
		lost := fmt.Errorf("the answer couldn't be written: %w", out.err)
		var undone *undoneError
		switch {
		case errors.As(err, &undone): // already names the write
		case err == nil || errors.Is(err, out.err):
			err = lost
		default:
			err = errors.Join(err, lost)
		}
	}
	if !a.started {
		err = &usageError{err}
	}
	// An error in the arguments may come before --json was parsed.
	if a.json || slices.Contains(args, "--json") {
		a.sayErrorJSON(cmd, err)
		return exitStatus(err)
	}
	a.talk("meshhelper: %v", err)
	if exitStatus(err) == exitUsage {
		if !a.started && !cmd.HasSubCommands() {
			a.talk("usage: %s", cmd.UseLine())
		}
		a.talk("see: %s --help", cmd.CommandPath())
	} else if hint := a.reachHint(err); hint != "" {
		a.talk("%s", hint)
	}
	return exitStatus(err)
}

// Error codes that only the command reports with --json. Those of the helper are in
// internal/api.
const (
	codeUsage        = "usage"         // exit status 2
	codeUnreachable  = "unreachable"   // exit status 3
	codeNotPermitted = "not_permitted" // exit status 4, by the system: the helper's own code is forbidden
	codeUntrusted    = "untrusted"     // another user could have made the socket
	codeFailed       = "failed"        // any other error
)

// sayErrorJSON writes an error to stderr as one line of JSON, in the form of the helper's
// error answers: {"error": {"code": ..., "message": ..., "hint": ...}}.
func (a *app) sayErrorJSON(cmd *cobra.Command, err error) {
	out := errorAnswer{api.Error{Code: codeFailed, Message: err.Error(), Hint: a.reachHint(err)}}
	var refused *api.Error
	var hinted *hintedError
	if errors.As(err, &hinted) {
		out.setHint(hinted.hint)
	}
	switch {
	case errors.As(err, &refused):
		out.Code = refused.Code
		out.setHint(refused.Hint)
	case exitStatus(err) == exitUsage:
		out.Code, out.Hint = codeUsage, "see: "+cmd.CommandPath()+" --help"
	case errors.Is(err, api.ErrUnreachable):
		out.Code = codeUnreachable
	case errors.Is(err, api.ErrUntrusted):
		out.Code = codeUntrusted
	case exitStatus(err) == exitNotPermitted:
		out.Code = codeNotPermitted
	}
	enc := json.NewEncoder(a.stderr)
	enc.SetEscapeHTML(false)
	// If stderr takes nothing, the exit status still reports the error.
	_ = enc.Encode(map[string]api.Error{"error": out.Error})
}

// errorAnswer is an error that sayErrorJSON writes.
type errorAnswer struct{ api.Error }

// setHint moves hint out of the message, at whose end the error's text has it, into a field
// of its own. A message that goes on after the hint, as with errors.Join, keeps it.
func (e *errorAnswer) setHint(hint string) {
	if message, ends := strings.CutSuffix(e.Message, "; "+hint); ends && hint != "" {
		e.Message, e.Hint = message, hint
	}
}

// hintedError is an error with what to do about it.
type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string { return e.err.Error() + "; " + e.hint }
func (e *hintedError) Unwrap() error { return e.err }

// hintf adds a hint to err, which isn't nil.
func hintf(err error, format string, args ...any) error {
	return &hintedError{err, fmt.Sprintf(format, args...)}
}

// usageError is an argument that is wrong by itself, without regard to the helper's state
// or the user's rights. The exit status is 2.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usagef returns a usageError with a formatted message.
func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// exitStatus returns the exit status for an error, which isn't nil. The helper's errors
// about the request alone count as wrong usage, so that a script sees the same status
// whether the command or the helper found the mistake.
func exitStatus(err error) int {
	var usage *usageError
	var refused *api.Error
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, api.ErrUnreachable):
		return exitUnreachable
	case errors.Is(err, api.ErrNotPermitted), errors.Is(err, fs.ErrPermission):
		return exitNotPermitted
	case errors.As(err, &refused) && refused.Code == api.CodeForbidden:
		return exitNotPermitted
	case errors.As(err, &refused) && refused.WrongByItself():
		return exitUsage
	}
	return exitFailed
}

// reachHint returns the hint for a socket that the command couldn't use, and "" for any
// other error.
func (a *app) reachHint(err error) string {
	switch {
	case errors.Is(err, api.ErrUnreachable):
		return a.startHint()
	case errors.Is(err, api.ErrNotPermitted):
		return "try sudo"
	case errors.Is(err, api.ErrUntrusted):
		return "a helper's socket belongs to root or to you, in a folder that no other user may write to"
	}
	return ""
}

// newRoot builds the command tree. cobra's own errors, help and usage output are replaced,
// so that all commands speak alike: see usage.go, near.go and wrap.go.
func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "meshhelper",
		Short: "Route for your own and your friends' devices, with permissions for each",
		Long: `meshhelper turns this computer into a WireGuard router for your own devices and
your friends' devices. What each of them may do is a toggle: connect to this
host, reach the internet through it, or reach its networks.`,
		Version: versionLine(),
		// RunE refuses an unknown command in the project's words rather than cobra's.
		Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			return unknownCommand(c, args[0])
		},
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			a.started = true
			if a.socket == "" {
				return usagef("--socket is empty; leave it out for the default, or give a path")
			}
			return nil
		},
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.socket, "socket", a.defaultSocket(), "`PATH` of the helper's socket (MESHHELPER_SOCKET)")
	flags.BoolVar(&a.json, "json", false, "print JSON")
	root.AddCommand(
		newRunCommand(a, nil), newStatusCommand(a), newPeerCommand(a),
		newExplainCommand(a), newRulesCommand(a), newDoctorCommand(a), newEventsCommand(a), newSettingsCommand(a),
		newInstallCommand(a), newUninstallCommand(a), newVersionCommand(a),
	)
	root.SetHelpFunc(a.wrapHelpOf(root.HelpFunc()))
	root.SetHelpCommand(newHelpCommand())
	root.SetVersionTemplate("{{.Version}}\n")
	root.SetFlagErrorFunc(suggestFlag)
	addCompletion(a, root)
	applyConventions(root)
	addSuggestions(root)
	return root
}

// group makes a command that does nothing itself but has subcommands.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, RunE: needsCommand}
	c.AddCommand(commands...)
	return c
}

// needsCommand is the RunE of a group. cobra calls it without a subcommand, or with an
// unknown one; both are wrong usage.
func needsCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		var names []string
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() {
				names = append(names, sub.Name())
			}
		}
		return usagef("%q needs a command, one of: %s", c.Name(), strings.Join(names, ", "))
	}
	return unknownCommand(c, args[0])
}

// client returns a client of the helper. It connects with the first request.
func (a *app) client() *api.Client { return api.NewClient(a.socket) }

// print writes v as JSON with --json, and calls text without. JSON is one line, for
// programs that read line by line, except on a terminal, where it is indented.
func (a *app) print(v any, text func()) error {
	if !a.json {
		text()
		return nil
	}
	enc := json.NewEncoder(a.stdout)
	enc.SetEscapeHTML(false)
	if a.terminal {
		enc.SetIndent("", "  ")
	}
	return enc.Encode(v)
}

// defaultSocket returns the path on which a command looks for the helper:
// $MESHHELPER_SOCKET, else the system's socket if it exists, else this user's own. The
// user's own counts only if no other user can have made it (api.CheckSocket), and root
// never uses it: a socket that another user serves could forge the answers.
func (a *app) defaultSocket() string {
	if path := a.getenv("MESHHELPER_SOCKET"); path != "" {
		return path
	}
	system := systemSocket()
	if _, err := os.Lstat(system); err == nil || os.Geteuid() == 0 {
		return system
	}
	if own := a.userSocket(); own != "" && api.CheckSocket(own) == nil {
		return own
	}
	return system
}

// systemSocket returns the socket of the helper that the system's service manager runs.
// macOS has no /run; its /var/run is root's and emptied at boot.
func systemSocket() string {
	if runtime.GOOS == "darwin" {
		return "/var/run/meshhelper.sock"
	}
	return "/run/meshhelper.sock"
}

// userSocket returns the socket of a helper that a user other than root runs: in
// $XDG_RUNTIME_DIR, which only its user may write to, else in the state folder. It never
// lies in /tmp, where another user could make it first. It is "" if the environment gives
// no absolute path.
func (a *app) userSocket() string {
	dir := a.getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = a.defaultStateDir("userspace")
	}
	if !filepath.IsAbs(dir) {
		return ""
	}
	return filepath.Join(dir, "meshhelper.sock")
}

// defaultStateDir returns the folder in which the helper of a platform keeps its keys and
// state. For userspace it follows the XDG Base Directory Specification ($XDG_STATE_HOME,
// else ~/.local/state).
func (a *app) defaultStateDir(platform string) string {
	switch platform {
	case "userspace":
		if dir := a.getenv("XDG_STATE_HOME"); dir != "" {
			return filepath.Join(dir, "meshhelper")
		}
		return filepath.Join(a.getenv("HOME"), ".local", "state", "meshhelper")
	case "darwin":
		return "/Library/Application Support/meshhelper"
	}
	return "/var/lib/meshhelper"
}

// versionText returns the release, else "devel-" and the first 12 digits of the commit,
// else the module's version, as `go install` with a version leaves it.
func versionText() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return strings.Trim(info.Main.Version, "()")
}

// versionLine returns the version with the Go release and the platform, for a reader who
// files a bug report.
func versionLine() string {
	return fmt.Sprintf("meshhelper %s (%s, %s/%s)", versionText(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// newVersionCommand returns `version`.
func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version",
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version string `json:"version"`
				Go      string `json:"go"`
				OS      string `json:"os"`
				Arch    string `json:"arch"`
			}{versionText(), runtime.Version(), runtime.GOOS, runtime.GOARCH}
			return a.print(v, func() { a.say("%s", versionLine()) })
		},
	}
}
