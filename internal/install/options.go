package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/launchd"
)

// Options say what is installed, and how this host is reached.
type Options struct {
	// Systemd says that systemd is to run the helper; else launchd is.
	Systemd bool
	// Label names the service and its files.
	Label string // required
	// Source is the executable to copy, by an absolute path.
	Source string // required for Install
	// Arguments of the helper after `run`.
	Arguments []string // optional
	// StateDir has the key, the wanted state and the journal; LogDir what the
	// helper logs, where systemd's journal doesn't; Socket is where it answers.
	StateDir, LogDir, Socket string // required
	// Keep writes what the helper is told to be, while it doesn't run.
	Keep func() error // optional
	// Runner runs launchctl and the Application Firewall's program, or systemctl.
	Runner launchd.Runner // required
	// Ready returns when the helper answers, or why it doesn't.
	Ready func(ctx context.Context) error // required for Install
	// Restore puts the host back as a helper that died left it: packet filter,
	// forwarding, routes. It finds what to do in StateDir.
	Restore func(ctx context.Context) error // required for Uninstall
	// Held returns an error while a helper has StateDir, the service or another.
	Held func() error // optional; for Uninstall
	// Purge also removes StateDir and LogDir.
	Purge bool // optional
	// Root is a folder that stands for /. What belongs to this process's user there
	// counts as root's.
	Root string // optional

	// stopped says that the service ran until an install stopped it.
	stopped bool
}

// Where the parts are. /Library/PrivilegedHelperTools is Apple's place for
// programs that launchd runs as root; Homebrew's prefix and /usr/local belong to an
// admin and so to whatever he runs.
const (
	programDir = "/Library/PrivilegedHelperTools"
	listDir    = "/Library/LaunchDaemons"
	linkPath   = "/usr/local/bin/meshhelper"
)

// ExitTimeOut is how long launchd waits between SIGTERM and SIGKILL, in seconds:
// what the helper takes to leave the host as it was found, and a rest for a command
// that has to be killed first and for the socket's clients.
const ExitTimeOut = int(host.LeaveLimit/time.Second) + 5

// Program returns where the executable is installed.
func (o *Options) Program() string {
	if o.Systemd {
		return libexecDir + "/" + o.Label
	}
	return programDir + "/" + o.Label
}

// List returns where the property list is installed.
func (o *Options) List() string { return listDir + "/" + o.Label + ".plist" }

// Link returns the command line that puts the command into every user's path. It
// isn't needed: the source runs as well.
func (o *Options) Link() string {
	return fmt.Sprintf("sudo ln -sf %s %s", o.Program(), linkPath)
}

// disk returns where a path is on this disk.
func (o *Options) disk(path string) string {
	if o.Root == "" {
		return path
	}
	return filepath.Join(o.Root, path)
}

// job is what launchd is told.
func (o *Options) job() *launchd.Job {
	return &launchd.Job{
		Label:            o.Label,
		ProgramArguments: append([]string{o.Program(), "run"}, o.Arguments...),
		RunAtLoad:        true,
		KeepAlive:        &launchd.KeepAlive{Always: true},
		// The default differs by release.
		ExitTimeOut: new(ExitTimeOut),
		// Unset, launchd throttles CPU and I/O of what forwards all peers' packets.
		ProcessType: launchd.Interactive,
		Umask:       new(launchd.Umask(0o077)),
		// The helper logs by itself; what lands here is a crash.
		StandardErrorPath: o.LogDir + "/stderr.log",
	}
}

// isRoot gives an error where root is needed and this isn't.
func (o *Options) isRoot() error {
	if o.Root == "" && os.Geteuid() != 0 {
		return fmt.Errorf("needs root: %w", os.ErrPermission)
	}
	return nil
}

// adopt makes the files of this user root's where Root says so.
func (o *Options) adopt(f launchd.File) launchd.File {
	if o.Root != "" && f.UID == uint32(os.Geteuid()) {
		f.UID = 0
	}
	return f
}

// Operator returns the user who may change the mesh besides root: the one who ran
// sudo, by SUDO_UID; "" if there is none. getenv is os.Getenv.
func Operator(getenv func(string) string) (string, error) {
	text := getenv("SUDO_UID")
	uid, err := strconv.ParseUint(text, 10, 32)
	if text == "" || err == nil && uid == 0 {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read SUDO_UID %q: not a user's number", text)
	}
	u, err := user.LookupId(strconv.FormatUint(uid, 10))
	var unknown user.UnknownUserIdError
	if errors.As(err, &unknown) {
		return "", fmt.Errorf("read SUDO_UID: there is no user %d", uid)
	}
	if err != nil {
		return "", fmt.Errorf("look up the user who ran sudo: %w", err)
	}
	return u.Username, nil
}
