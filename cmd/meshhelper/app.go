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

// version is set by the linker; without, the module's version is used.
var version string

// The exit statuses.
const (
	exitDone         = 0
	exitFailed       = 1 // refused or failed
	exitUsage        = 2 // wrong usage
	exitUnreachable  = 3 // no helper answers
	exitNotPermitted = 4
)

// newHost makes the host of a helper.
type newHost func(hostOptions) (host.Host, error)

// hostOptions are what a host is told.
type hostOptions struct {
	stateDir string // where its files are
	label    string // of the service, on a Mac; "" for the usual one
	log      *slog.Logger
}

// app is what all commands share: the way in and out of the process, and the
// global options.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	random         io.Reader
	terminal       bool // whether stdout is one
	columns, rows  int  // of the terminal that stdout is; 0: it is none
	talkColumns    int  // of the terminal that stderr is; 0: it is none
	size           func() (columns, rows int)
	talkSize       func() (columns, rows int)
	hosts          map[string]newHost // by the name that --platform takes
	service        *serviceHost       // nil where there is no launchd

	// resolve looks a name up; nil: as this computer does.
	resolve func(context.Context, string) ([]netip.Addr, error)

	// lookPath finds a program in the PATH; nil: all are there.
	lookPath func(name string) (string, error)

	// flush waits, bounded, for what stderr hasn't taken yet.
	flush func()

	socket  string
	json    bool
	started bool // whether a command began, and so wasn't used wrongly
}

// answer is a command's standard output. It keeps the first error, so that a command
// whose answer is lost, on a full disk for one, doesn't look done. (Of a descriptor that is
// closed Go makes /dev/null; there nothing is noticed.)
type answer struct {
	to  io.Writer
	err error
}

func (a *answer) Write(b []byte) (int, error) {
	n, err := a.to.Write(b)
	if a.err == nil {
		a.err = err
	}
	return n, err
}

// written returns why the answer isn't where it is to stay: the first error of a
// write, or of flushing a file, for only then a full or failing disk shows everywhere.
func (a *app) written() error {
	out, ok := a.stdout.(*answer)
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

// main runs the command with args and returns its exit status.
func (a *app) main(args []string) int {
	ctx, stop := endingBy(context.Background(), endSignals...)
	defer stop()
	defer func() { a.flush() }()
	if a.flush == nil {
		a.flush = func() {}
	}
	out := &answer{to: a.stdout}
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
		a.started = true // also where --help was asked for
		lost := fmt.Errorf("the answer couldn't be written: %w", out.err)
		var told *takenBack
		switch {
		case errors.As(err, &told): // says it
		case err == nil || errors.Is(err, out.err):
			err = lost
		default:
			err = errors.Join(err, lost)
		}
	}
	if !a.started {
		err = &usageError{err}
	}
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

// The codes of errors with --json that no helper answers with.
const (
	codeUsage        = "usage"
	codeUnreachable  = "unreachable"
	codeNotPermitted = "not_permitted"
	codeUntrusted    = "untrusted"
	codeFailed       = "failed"
)

// sayErrorJSON writes an error as a line of JSON on stderr, in the form in which the
// helper answers with one.
func (a *app) sayErrorJSON(cmd *cobra.Command, err error) {
	out := api.Error{Code: codeFailed, Message: err.Error(), Hint: a.reachHint(err)}
	var refused *api.Error
	switch {
	case errors.As(err, &refused):
		out.Code = refused.Code
		if err == error(refused) {
			out = *refused
		}
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
	// An error that can't be written leaves the exit status.
	_ = enc.Encode(map[string]api.Error{"error": out})
}

// usageError is the command used wrongly.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

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

func (a *app) reachHint(err error) string {
	switch {
	case errors.Is(err, api.ErrUnreachable):
		return a.startHint()
	case errors.Is(err, api.ErrNotPermitted):
		return "try sudo"
	case errors.Is(err, api.ErrUntrusted):
		return "a helper's socket is root's or yours, and in a folder that no other user may write to"
	}
	return ""
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "meshhelper",
		Short: "Route for your own and your friends' devices, with permissions for each",
		Long: `meshhelper turns this computer into a WireGuard router for your own devices and
your friends' devices. What each of them may do is a toggle: connect to this
host, reach the internet through it, or reach its networks.`,
		Version: versionLine(),
		Args:    cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			return unknownCommand(c, args[0])
		},
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRun: func(*cobra.Command, []string) {
			a.started = true
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
	root.SetFlagErrorFunc(nearFlag)
	addCompletion(a, root)
	speak(root)
	propose(root)
	return root
}

// group makes a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, RunE: needsCommand}
	c.AddCommand(commands...)
	return c
}

// needsCommand is run where a command that only holds others is called by itself, or with
// one that it doesn't have.
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

func (a *app) client() *api.Client { return api.NewClient(a.socket) }

// print writes v as JSON where that was asked for, and else calls text.
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

// defaultSocket is where a command looks for the helper: what the environment
// says, else the system's, else that of a helper of this user's, where no other
// user can have made it. Root looks for the system's only.
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

func systemSocket() string {
	if runtime.GOOS == "darwin" {
		return "/var/run/meshhelper.sock"
	}
	return "/run/meshhelper.sock"
}

// userSocket is where a helper that isn't root's has its socket: in a folder that
// only its user may write to, and never in one for temporary files. It is "" where
// the environment names none.
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

// defaultStateDir is where the helper of a platform keeps its files.
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

// versionText is what was built: the release, or the commit.
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

// versionLine says what this is, for a person.
func versionLine() string {
	return fmt.Sprintf("meshhelper %s (%s, %s/%s)", versionText(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

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
