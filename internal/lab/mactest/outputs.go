package mactest

// The commands whose outputs are kept, and what of them is compared.

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

// A Form is how an output is to be read when two are compared.
type Form int

// The forms.
const (
	Lines      Form = iota // each line counts as it is
	Ruleset                // pf's rules or tables of one anchor, in their order
	FilterAll              // pfctl -sa
	References             // pfctl -s References
	Routes                 // netstat -rn
	Sysctls                // sysctl net
	Interfaces             // ifconfig
	Numbered               // lines with a number first, as of a menu
	ExitStatus             // only the exit status counts
	Ignored                // kept, not compared
)

// A Command is one whose output is kept.
type Command struct {
	// Name is the file's, without its ending.
	Name string // required
	Form Form
	// Path is absolute.
	Path string // required
	Args []string
}

// Outputs are the commands that tell how a Mac is set up, as far as a helper with
// this label could change it.
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

// An Output is what one command printed.
type Output struct {
	Command
	Stdout, Stderr []byte
	Status         int
	// Err says that the command couldn't be run.
	Err error
}

// A Snapshot is what all commands printed.
type Snapshot []Output

// maxAnchors and maxAnchorDepth bound how many anchors are read.
const maxAnchors, maxAnchorDepth = 128, 8

// Take runs the commands, and three more for each anchor of the packet filter.
func Take(ctx context.Context, r darwin.Runner, commands []Command) Snapshot {
	var s Snapshot
	for _, c := range commands {
		s = append(s, take(ctx, r, c))
	}
	return append(s, takeAnchors(ctx, r)...)
}

func take(ctx context.Context, r darwin.Runner, c Command) Output {
	o := Output{Command: c}
	o.Stdout, o.Stderr, o.Status, o.Err = r.Run(ctx, nil, c.Path, c.Args...)
	return o
}

// takeAnchors shows all that anchors hold. The names alone prove nothing, and
// aren't compared: the kernel keeps an anchor that was loaded once, empty, until
// it boots again.
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

// anchorsBelow names the anchors directly below one, in full.
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

// Save writes each output to a file of its own, made for reading by all: the first
// line says where it is from, the rest is as it was printed. What a command said on
// stderr is in a second file.
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
