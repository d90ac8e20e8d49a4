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

// Options say what is installed, and give access to the host.
type Options struct {
	// Systemd selects systemd as the service manager; the default is launchd.
	Systemd bool
	// Label names the service and its files.
	Label string // required
	// Source is the executable to copy, by an absolute path.
	Source string // required for Install
	// Arguments follow `run` on the helper's command line.
	Arguments []string // optional
	// StateDir holds the key, the wanted state and the journal, LogDir the log (under
	// systemd its journal does). Socket is the path of the helper's socket.
	StateDir, LogDir, Socket string // required
	// Keep writes the helper's settings to StateDir while the helper is stopped.
	Keep func() error // optional
	// Runner runs launchctl and the Application Firewall's program, or systemctl.
	Runner launchd.Runner // required
	// Ready returns nil once the helper answers, or the reason why it doesn't.
	Ready func(ctx context.Context) error // required for Install
	// Restore undoes what a helper that died left on the host: packet filter,
	// forwarding, routes. It reads the journal in StateDir.
	Restore func(ctx context.Context) error // required for Uninstall
	// Held returns an error while any helper, the service or another, runs on the host.
	Held func() error // optional; for Uninstall
	// Purge also removes StateDir and LogDir.
	Purge bool // optional
	// Root is a folder that takes the place of /, for tests. Files in it that belong to
	// this process's user count as root's.
	Root string // optional

	// stopped is true while the service is stopped by this install and ran before.
	stopped bool
}

// The installed paths on a Mac. /Library/PrivilegedHelperTools is Apple's folder for
// programs that launchd runs as root. Homebrew's prefix and /usr/local may belong to an
// admin user, and so any program of that user could replace what is in them.
const (
	programDir = "/Library/PrivilegedHelperTools"
	listDir    = "/Library/LaunchDaemons"
	linkPath   = "/usr/local/bin/meshhelper"
)

// ExitTimeOut is how long launchd waits between SIGTERM and SIGKILL, in seconds: the
// limit for restoring the host, and 5 s for a command that has to be killed first and
// for the socket's clients.
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

// Link returns the shell command that puts meshhelper into every user's PATH. It is
// optional: the executable that was copied runs as well.
func (o *Options) Link() string {
	return fmt.Sprintf("sudo ln -sf %s %s", o.Program(), linkPath)
}

// disk returns path below Root.
func (o *Options) disk(path string) string {
	if o.Root == "" {
		return path
	}
	return filepath.Join(o.Root, path)
}

// job returns the helper's property list.
func (o *Options) job() *launchd.Job {
	return &launchd.Job{
		Label:            o.Label,
		ProgramArguments: append([]string{o.Program(), "run"}, o.Arguments...),
		RunAtLoad:        true,
		KeepAlive:        &launchd.KeepAlive{Always: true},
		// The default differs by release.
		ExitTimeOut: new(ExitTimeOut),
		// By default launchd throttles CPU and I/O, and the helper forwards all peers'
		// packets.
		ProcessType: launchd.Interactive,
		Umask:       new(launchd.Umask(0o077)),
		// The helper writes its own log; only a crash is written here.
		StandardErrorPath: o.LogDir + "/stderr.log",
	}
}

// needRoot returns an error unless this process may change the host.
func (o *Options) needRoot() error {
	if o.Root == "" && os.Geteuid() != 0 {
		return fmt.Errorf("needs root: %w", os.ErrPermission)
	}
	return nil
}

// adopt returns f as root's if Root is set and f belongs to this process's user.
func (o *Options) adopt(f launchd.File) launchd.File {
	if o.Root != "" && f.UID == uint32(os.Geteuid()) {
		f.UID = 0
	}
	return f
}

// Operator returns the name of the user that may change the mesh besides root: the one
// that ran sudo, from SUDO_UID, or "" without sudo. getenv is os.Getenv.
func Operator(getenv func(string) string) (string, error) {
	text := getenv("SUDO_UID")
	uid, err := strconv.ParseUint(text, 10, 32)
	if text == "" || err == nil && uid == 0 {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read SUDO_UID %q: not a user ID", text)
	}
	u, err := user.LookupId(strconv.FormatUint(uid, 10))
	var unknown user.UnknownUserIdError
	if errors.As(err, &unknown) {
		return "", fmt.Errorf("read SUDO_UID: there is no user %d", uid)
	}
	if err != nil {
		return "", fmt.Errorf("look up the user that ran sudo: %w", err)
	}
	return u.Username, nil
}
