package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/logfile"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/systemd"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// runOptions are the flags of run. takeSettings fills in settings for those that aren't
// given.
type runOptions struct {
	app *app

	stateDir, platform, iface, endpoint, operator string
	label, logFile                                string
	prefix4, prefix6                              string
	listenPort                                    uint16
	addresses, dns                                []string
	debug                                         bool
	tick, wait                                    time.Duration

	given func(flag string) bool // whether a flag was given
	flags string                 // givenFlags, and the socket of the environment
	kept  []string               // keys of the settings in use, whose flags weren't given

	log *slog.Logger // set by openLog
}

// The range of --tick and --wait. A round takes some milliseconds, so shorter ticks would
// only keep the host busy. The client gives an answer on the socket a minute, so a longer
// wait would look like a helper that hangs.
const (
	minTick = 100 * time.Millisecond
	maxWait = 50 * time.Second
)

// newRunCommand returns `run`, which calls run with the flags, or runHelper if run is nil.
func newRunCommand(a *app, run func(context.Context, *runOptions) error) *cobra.Command {
	if run == nil {
		run = runHelper
	}
	o := &runOptions{app: a}
	c := &cobra.Command{
		Use: "run", Short: "Run the helper in the foreground",
		Long: `Run the helper in the foreground until SIGTERM, SIGINT, SIGHUP or SIGQUIT, and then
leave the host as it was found. It is ready when "meshhelper status" shows a state
other than starting.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.chooseUserSocket(c.Flag("socket").Changed); err != nil {
				return err
			}
			o.given, o.flags = c.Flags().Changed, givenFlags(c.Flags())
			if path := a.getenv("MESHHELPER_SOCKET"); path != "" && !c.Flags().Changed("socket") {
				o.flags += " --socket " + shellWord(path) // sudo doesn't pass the environment on
			}
			return run(c.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.stateDir, "state-dir", "", "`DIR` for the key and the wanted state")
	f.StringVar(&o.platform, "platform", "auto", "auto, darwin or linux")
	f.Uint16Var(&o.listenPort, "listen-port", wanted.DefaultListenPort, "UDP `PORT` of WireGuard, 0 for any")
	f.StringVar(&o.iface, "interface", "", "`NAME` of the mesh interface")
	f.StringVar(&o.prefix4, "mesh-prefix4", mesh.DefaultPrefixes().V4.String(), "IPv4 `PREFIX` of the mesh")
	f.StringVar(&o.prefix6, "mesh-prefix6", mesh.DefaultPrefixes().V6.String(), "IPv6 `PREFIX` of the mesh")
	f.StringSliceVar(&o.addresses, "address", nil, "this host's own mesh `ADDRESS`, one per family (derived from the key)")
	f.StringVar(&o.endpoint, "endpoint", "", "`HOST[:PORT]` where peers reach this host (the uplink's address)")
	f.StringSliceVar(&o.dns, "dns", nil, "`ADDRESS` of a resolver for the peers' configurations (9.9.9.9, 149.112.112.112)")
	f.StringVar(&o.operator, "operator", "", "`USER` who may change the mesh besides root")
	f.DurationVar(&o.tick, "tick", daemon.DefaultTick, "how often to check the host, besides after each change that it reports")
	f.DurationVar(&o.wait, "wait", daemon.DefaultWait, "how long a command waits for its change to be in force")
	f.StringVar(&o.label, "label", "", "`NAME` of the service, and of the anchor in the packet filter of a Mac")
	f.StringVar(&o.logFile, "log-file", "", "log to `FILE`, and rotate it when it is full (stderr)")
	f.BoolVar(&o.debug, "debug", false, "log more")
	return c
}

// givenFlags returns the flags that were given, as a shell takes them, each after a space, for
// a hint that repeats the command.
func givenFlags(f *pflag.FlagSet) string {
	var out strings.Builder
	f.Visit(func(one *pflag.Flag) {
		value := one.Value.String()
		if list, ok := one.Value.(pflag.SliceValue); ok {
			value = strings.Join(list.GetSlice(), ",")
		}
		if out.WriteString(" --" + one.Name); value != one.NoOptDefVal {
			out.WriteString(map[bool]string{true: "=", false: " "}[one.NoOptDefVal != ""] + shellWord(value))
		}
	})
	return out.String()
}

// chooseUserSocket sets the socket of a helper that isn't run by root, unless the user gave
// one, and creates its folder. Geteuid is -1 on Windows.
func (o *runOptions) chooseUserSocket(given bool) error {
	if given || o.app.getenv("MESHHELPER_SOCKET") != "" || os.Geteuid() <= 0 {
		return nil
	}
	own := o.app.userSocket()
	if own == "" {
		return usagef("there is no folder for the socket: set XDG_RUNTIME_DIR, or give --socket")
	}
	o.app.socket = own
	if err := os.MkdirAll(filepath.Dir(own), 0o700); err != nil {
		return fmt.Errorf("make a folder for the socket: %w", err)
	}
	return nil
}

// runHelper runs the helper until ctx ends or a signal comes, with signals and the log set
// up.
func runHelper(ctx context.Context, o *runOptions) error {
	ctx, stop := handleSignals(ctx)
	defer stop()
	closeLog, err := o.openLog()
	if err != nil {
		return err
	}
	defer closeLog()
	err = o.runLogged(ctx)
	if err != nil && o.logFile != "" {
		o.log.Error("the helper ends", "error", err) // main writes it to stderr, which a service's user may not read
	}
	return err
}

// runLogged is runHelper once the log is open. It makes the daemon, serves until ctx ends,
// and closes what was opened, also after an error.
func (o *runOptions) runLogged(ctx context.Context) error {
	name, make, err := o.chooseHost()
	if err != nil {
		return err
	}
	if o.stateDir == "" {
		o.stateDir = o.app.defaultStateDir(name)
	}
	start, err := o.takeSettings(o.stateDir)
	if err != nil {
		return o.withHint(err)
	}
	access, err := o.access()
	if err != nil {
		return err
	}
	d, err := o.daemon(name, make, start)
	if err != nil {
		return err
	}
	n, err := systemd.FromEnvironment(o.app.getenv, os.Getpid())
	if err == nil {
		err = o.checkWatchdog(n)
	}
	if err == nil {
		err = o.serve(ctx, d, access, n)
	}
	return errors.Join(err, d.Close(), n.Close())
}

// serve opens the socket and runs the daemon and the server until ctx ends or one of them
// fails. It notifies the service manager through n. The daemon's Run restores the host
// before it returns.
func (o *runOptions) serve(ctx context.Context, d *daemon.Daemon, access api.Access, n *systemd.Notifier) error {
	l, err := api.Listen(o.app.socket)
	if errors.Is(err, api.ErrHeld) {
		return api.Errorf(api.CodeInternal, "%v", err).WithHint("see `meshhelper status`; there is one helper per host")
	}
	if err != nil {
		return err
	}
	server := api.NewServer(api.ServerOptions{Listener: l, Service: d, Access: access, Logger: o.log})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Run(ctx) })
	g.Go(func() error { return o.withHint(d.Run(ctx)) })
	g.Go(func() error { return o.announce(ctx, d, n) })
	g.Go(func() error {
		o.sayReady(ctx, d)
		return nil
	})
	return g.Wait()
}

// sayReady says on stderr that the helper answers, once it has everything that another
// program could hold: the lock, the socket, the mesh interface and the UDP port. So a start
// that fails prints only its error.
func (o *runOptions) sayReady(ctx context.Context, d *daemon.Daemon) {
	had, stop := context.WithCancel(ctx)
	defer stop()
	d.EachRound(had, func(state string) {
		if state != api.Starting && had.Err() == nil {
			o.app.talk("meshhelper %s answers on %s", versionText(), o.app.socket)
			stop()
		}
	})
}

// withHint adds to an error of the host or the tunnel what to do about it.
func (o *runOptions) withHint(err error) error {
	var step *host.StepError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &step) && step.Hint != "":
		return hintf(err, "%s", step.Hint)
	case errors.Is(err, syscall.EADDRINUSE):
		return hintf(err, "another program has UDP port %d: choose another one with --listen-port", o.listenPort)
	case errors.Is(err, fs.ErrPermission) && !o.app.root:
		return hintf(err, "the helper needs root: %s", o.app.asRoot("run"+o.flags))
	case errors.Is(err, fs.ErrPermission):
		return hintf(err, "the helper needs root's privileges, all of which a container or a user namespace may not give")
	}
	return err
}

// chooseHost returns the name of the platform, which is never auto, and the function that
// makes its host. An unknown name is a usageError; a known one that this build lacks isn't,
// since it is right on another system.
func (o *runOptions) chooseHost() (string, newHost, error) {
	name := o.platform
	if name == "auto" {
		name = runtime.GOOS
	}
	if make, ok := o.app.hosts[name]; ok {
		return name, make, nil
	}
	known := name == "linux" || name == "darwin" || name == "userspace"
	if o.platform != "auto" && !known {
		return "", nil, usagef("platform %q is unknown: it is auto, darwin or linux", name)
	}
	return "", nil, api.Errorf(api.CodeUnsupported, "platform %q isn't available on %s", name, runtime.GOOS)
}

// daemon makes the daemon from the options. It opens the state folder but doesn't change the
// host yet. start holds the settings from takeSettings.
func (o *runOptions) daemon(name string, make newHost, start wanted.StartSettings) (*daemon.Daemon, error) {
	if err := api.CheckSocketPath(o.app.socket); err != nil {
		return nil, &usageError{err}
	}
	opts := daemon.Options{
		StateDir: o.stateDir, Logger: o.log, Version: versionText(),
		Interface: o.iface, ListenPort: o.listenPort, Languages: languages,
		Tick: o.tick, Wait: o.wait, Settings: start,
		// Peers get addresses in another mesh prefix only if that is a setting, which showed
		// the new addresses when it was set. A flag may be a mistake.
		Renumber: slices.ContainsFunc(o.kept, func(key string) bool {
			return key == wanted.SettingMeshPrefix4 || key == wanted.SettingMeshPrefix6
		}),
	}
	if err := o.parse(&opts); err != nil {
		return nil, err
	}
	var err error
	if opts.Host, err = make(hostOptions{stateDir: o.stateDir, label: o.label, log: o.log.With("part", name)}); err != nil {
		return nil, o.withHint(err)
	}
	d, err := daemon.New(opts)
	return d, o.withHint(err)
}

// interfaceName matches the names that both Linux and macOS take for an interface (IFNAMSIZ
// is 16 on both, with the NUL at the end), and "" for the platform's default.
var interfaceName = regexp.MustCompile(`^([A-Za-z0-9_@+-][A-Za-z0-9._@+-]{0,14})?$`)

// parse sets the options that need parsing: prefixes, addresses, DNS servers, durations and
// the endpoint, whose port defaults to the listen port.
func (o *runOptions) parse(opts *daemon.Options) (err error) {
	if opts.Prefixes.V4, err = netip.ParsePrefix(o.prefix4); err != nil {
		return o.badValuef(wanted.SettingMeshPrefix4, "%q is not a prefix", o.prefix4)
	}
	if opts.Prefixes.V6, err = netip.ParsePrefix(o.prefix6); err != nil {
		return o.badValuef(wanted.SettingMeshPrefix6, "%q is not a prefix", o.prefix6)
	}
	if err := opts.Prefixes.Validate(); err != nil {
		return &usageError{err}
	}
	for flag, given := range map[string]time.Duration{"tick": o.tick, "wait": o.wait} {
		if given < minTick || given > maxWait {
			return usagef("--%s %v: it is from %v to %v", flag, shortDuration(given), minTick, maxWait)
		}
	}
	if o.label != "" {
		if err := host.CheckLabel(o.label); err != nil {
			return o.badValuef(wanted.SettingLabel, "%v", err)
		}
	}
	if !interfaceName.MatchString(o.iface) {
		return usagef("--interface: %q is not an interface's name, which has 1 to 15 letters, digits and . _ - @ +", o.iface)
	}
	if opts.Addresses, err = parseAddresses("--address", o.addresses); err != nil {
		return err
	}
	for i, one := range opts.Addresses {
		for _, other := range opts.Addresses[:i] {
			if one.Is4() == other.Is4() {
				return usagef("--address: %v and %v are of one family; give one IPv4 and one IPv6 address at most", other, one)
			}
		}
	}
	if opts.DNS, err = parseAddresses("--dns", o.dns); err != nil {
		return err
	}
	if len(o.dns) > 0 && !slices.Contains(o.kept, wanted.SettingDNS) {
		checked, err := wanted.CheckSetting(wanted.SettingDNS, strings.Join(o.dns, ","))
		if err != nil {
			return o.badValuef(wanted.SettingDNS, "%s", strings.TrimPrefix(err.Error(), wanted.SettingDNS+" "))
		}
		if opts.DNS, err = parseAddresses("--dns", strings.Split(checked, ",")); err != nil {
			return err
		}
	}
	if o.endpoint == "" {
		return nil
	}
	fallback := o.listenPort
	if fallback == 0 {
		fallback = wanted.DefaultListenPort
	}
	if opts.Endpoint, err = mesh.ParseEndpoint(o.endpoint, fallback); err != nil {
		return o.badValuef(wanted.SettingEndpoint, "%q: %v", o.endpoint, errors.Unwrap(err)) // err itself repeats the endpoint
	}
	return nil
}

// parseAddresses parses the values of a flag that takes addresses.
func parseAddresses(flag string, texts []string) (out []netip.Addr, err error) {
	for _, t := range texts {
		a, err := netip.ParseAddr(t)
		if err != nil {
			return nil, usagef("%s: %q is not an address", flag, t)
		}
		out = append(out, a)
	}
	return out, nil
}

// access returns which users may use the socket (package api). Without --operator the user
// who runs the helper is the operator, unless that is root. The admin groups, which may
// read, are those whose members may use sudo by default: admin on macOS, sudo on Debian,
// wheel on Fedora, Arch and others.
func (o *runOptions) access() (api.Access, error) {
	a := api.Access{Operator: api.NoOperator, AdminGroups: []string{"sudo", "wheel"}}
	if runtime.GOOS == "darwin" {
		a.AdminGroups = []string{"admin"}
	}
	if o.operator == "" {
		if uid := os.Geteuid(); uid > 0 {
			a.Operator = uint32(uid)
		}
		return a, nil
	}
	id := o.operator // may be a user ID without an entry in the user database
	if u, err := user.Lookup(o.operator); err == nil {
		id = u.Uid
	}
	uid, err := strconv.ParseUint(id, 10, 32)
	if err != nil || uint32(uid) == api.NoOperator {
		if slices.Contains(o.kept, wanted.SettingOperator) {
			return a, o.badValuef(wanted.SettingOperator, "there is no user %q", o.operator)
		}
		// Another host may have the user, so the flag isn't wrong by itself.
		return a, api.Errorf(api.CodeBadSetting, "--operator: there is no user %q", o.operator).WithHint("give a user of this host")
	}
	a.Operator = uint32(uid)
	return a, nil
}

// oldLogs is how many full log files are kept beside the current one. With
// logfile.DefaultMaxSize they bound the disk space of the logs.
const oldLogs = 3

// flushLimit bounds how long the helper waits at its end until the log and stderr, each,
// have taken the last lines.
const flushLimit = time.Second

// openLog sets o.log, and returns a function that flushes and closes it. A log that can't
// be written doesn't keep the helper from starting, and one that blocks, such as a terminal
// that was stopped with Ctrl-S, doesn't stop it: every line goes to a queue, which writes
// it in the background. Its only error is a usageError for --log-file.
func (o *runOptions) openLog() (closeLog func(), err error) {
	level := slog.LevelInfo
	if o.debug {
		level = slog.LevelDebug
	}
	direct, stderr := o.app.stderr, logfile.NewQueue(o.app.stderr)
	o.app.stderr = stderr
	o.app.flush = func() { stderr.Flush(flushLimit) }
	closeLog = o.app.flush
	queue := stderr
	if o.logFile != "" {
		f, err := logfile.New(logfile.Options{
			Path: o.logFile, Keep: oldLogs,
			Failed: func(err error) { o.app.talk("meshhelper: %v", err) },
		})
		if err != nil {
			return nil, usagef("--log-file: %v", err)
		}
		queue = logfile.NewQueue(f)
		closeLog = func() {
			// After a timeout a write hangs, and Close would wait for it.
			if queue.Flush(flushLimit) {
				_ = f.Close() // every line is written, so an error loses none
			}
			o.app.flush()
		}
		// launchd writes stderr to a file (StandardErrorPath) and never truncates it.
		if h, ok := direct.(*os.File); ok {
			if err := logfile.Bound(h, logfile.DefaultMaxSize); err != nil {
				o.app.talk("meshhelper: bound stderr: %v", err)
			}
		}
	}
	o.log = slog.New(slog.NewTextHandler(queue, &slog.HandlerOptions{Level: level}))
	return closeLog, nil
}
