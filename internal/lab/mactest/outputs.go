package mactest

// The commands whose output is saved, and how each is compared.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
)

// A Form is the format of an output, which decides how two outputs are compared.
type Form int

// The forms.
const (
	Lines      Form = iota // lines in any order
	Ruleset                // pf's rules or tables of one anchor, in their order
	FilterAll              // pfctl -sa
	References             // pfctl -s References
	Routes                 // netstat -rn
	Sysctls                // sysctl net
	Interfaces             // ifconfig
	Numbered               // lines that begin with a number and a colon, which isn't compared
	ExitStatus             // only the exit status is compared
	Ignored                // saved, not compared
)

// A Command is a command whose output is saved.
type Command struct {
	// Name is the name of the output's file, without its extension.
	Name string // required
	Form Form
	// Path is the absolute path of the program.
	Path string // required
	Args []string
}

// Outputs returns the commands that show a Mac's configuration, as far as a helper whose
// service has this label could change it.
func Outputs(label string) []Command {
	pfctl := func(name string, form Form, args ...string) Command {
		return Command{name, form, "/sbin/pfctl", args}
	}
	return []Command{
		{"sw_vers", Ignored, "/usr/bin/sw_vers", nil},
		{"uname", Ignored, "/usr/bin/uname", []string{"-a"}},
		pfctl("pfctl-sa", FilterAll, "-sa"),
		pfctl("pfctl-references", References, "-s", "References"),
		pfctl("pfctl-interfaces", Ignored, "-v", "-s", "Interfaces"),
		pfctl("pfctl-anchors", Ignored, "-v", "-s", "Anchors"),
		{"netstat-rn", Routes, "/usr/sbin/netstat", []string{"-rn"}},
		{"sysctl-net", Sysctls, "/usr/sbin/sysctl", []string{"net"}},
		{"ifconfig", Interfaces, "/sbin/ifconfig", []string{"-a"}},
		{"launchctl-print", ExitStatus, "/bin/launchctl", []string{"print", "system/" + label}},
		{"launchctl-disabled", Lines, "/bin/launchctl", []string{"print-disabled", "system"}},
		{"firewall-apps", Numbered, "/usr/libexec/ApplicationFirewall/socketfilterfw", []string{"--listapps"}},
		{"firewall-state", Lines, "/usr/libexec/ApplicationFirewall/socketfilterfw", []string{"--getglobalstate"}},
		{"daemons", Lines, "/bin/ls", []string{"-1A", "/Library/LaunchDaemons"}},
		{"helpers", Lines, "/bin/ls", []string{"-1A", "/Library/PrivilegedHelperTools"}},
		{"support", Lines, "/bin/ls", []string{"-1A", "/Library/Application Support"}},
		{"logs", Lines, "/bin/ls", []string{"-1A", "/var/log"}},
		{"run", Lines, "/bin/ls", []string{"-1A", "/var/run"}},
		{"btm", Ignored, "/usr/bin/sfltool", []string{"dumpbtm"}},
		{"dns", Ignored, "/usr/sbin/scutil", []string{"--dns"}},
	}
}

// An Output is the output of one command.
type Output struct {
	Command
	Stdout, Stderr []byte
	Status         int // exit status
	// Err says why the command couldn't be run; nil: it was.
	Err error
}

// A Snapshot has the outputs of all commands at one time.
type Snapshot []Output

// maxAnchors and maxAnchorDepth limit the anchors that are read, so that other software's
// rulesets can't make a snapshot take for ever.
const maxAnchors, maxAnchorDepth = 128, 8

// Take runs the commands, and three more for each anchor of the packet filter: its rules,
// translation rules and tables.
func Take(ctx context.Context, r darwin.Runner, commands []Command) Snapshot {
	var s Snapshot
	for _, c := range commands {
		s = append(s, take(ctx, r, c))
	}
	return append(s, takeAnchors(ctx, r)...)
}

// take runs one command.
func take(ctx context.Context, r darwin.Runner, c Command) Output {
	o := Output{Command: c}
	o.Stdout, o.Stderr, o.Status, o.Err = r.Run(ctx, nil, c.Path, c.Args...)
	return o
}

// takeAnchors saves the contents of all anchors. Their names aren't compared and would
// prove nothing: the kernel keeps an anchor that was loaded once, empty, until the next
// boot.
func takeAnchors(ctx context.Context, r darwin.Runner) Snapshot {
	var s Snapshot
	next := anchorsBelow(ctx, r, "")
	for len(next) > 0 && len(s) < 3*maxAnchors {
		path := next[0]
		next = next[1:]
		for _, what := range []string{"rules", "nat", "Tables"} {
			name := "anchor-" + strings.ReplaceAll(path, "/", "+") + "-" + strings.ToLower(what)
			s = append(s, take(ctx, r, Command{name, Ruleset, "/sbin/pfctl", []string{"-a", path, "-s", what}}))
		}
		if strings.Count(path, "/") < maxAnchorDepth {
			next = append(next, anchorsBelow(ctx, r, path)...)
		}
	}
	return s
}

// anchorsBelow returns the full paths of the anchors directly below one.
func anchorsBelow(ctx context.Context, r darwin.Runner, path string) []string {
	args := []string{"-s", "Anchors"}
	if path != "" {
		args = append([]string{"-a", path}, args...)
	}
	stdout, _, _, _ := r.Run(ctx, nil, "/sbin/pfctl", args...)
	var names []string
	for line := range bytes.Lines(stdout) {
		if name := strings.TrimSpace(string(line)); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// Save writes each output to a file of its own, readable by all users. The first line
// names the command, its exit status and the release of macOS; the rest is the output
// as printed. Standard error goes to a second file.
func (s Snapshot) Save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("save outputs: %w", err)
	}
	system := ""
	for _, o := range s {
		if o.Name == "sw_vers" {
			system = " on " + strings.Join(strings.Fields(string(o.Stdout)), " ")
		}
	}
	var errs []error
	for _, o := range s {
		source := fmt.Sprintf("# source: %s, exit status %d%s\n", strings.Join(append([]string{o.Path}, o.Args...), " "), o.Status, system)
		errs = append(errs, os.WriteFile(filepath.Join(dir, o.Name+".txt"), append([]byte(source), o.Stdout...), 0o644))
		if o.Err != nil {
			o.Stderr = append(o.Stderr, o.Err.Error()...)
		}
		if len(o.Stderr) > 0 {
			errs = append(errs, os.WriteFile(filepath.Join(dir, o.Name+".stderr.txt"), append([]byte(source), o.Stderr...), 0o644))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("save outputs: %w", err)
	}
	return nil
}
