package launchd

import (
	"fmt"
	"io/fs"
	"maps"
	"path"
	"reflect"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of what launchd and launchctl accept. The label becomes part of a path
// and of a service target; 1024 is PATH_MAX of <sys/syslimits.h>.
const (
	maxLabel = 128
	maxPath  = 1024
)

// A Violation is a rule that a job or a file breaks.
type Violation struct {
	Rule string // the rule's name, such as "label" or "owner"
	Text string // the problem, with the value quoted
}

func (v Violation) Error() string { return v.Text }

// jobRules is the table of rules for a job, from launchd.plist(5) and the experience of
// projects that shipped daemons. A rule returns the problem, or "".
var jobRules = []struct {
	name  string
	check func(*Job) string
}{
	// launchd.plist(5): "This required key uniquely identifies the job".
	{"label", func(j *Job) string {
		if !validLabel(j.Label) {
			return fmt.Sprintf("Label %q must be 1 to %d letters, digits, dots, dashes or underscores, and start with a letter or digit", j.Label, maxLabel)
		}
		return ""
	}},
	// launchd.plist(5), ProgramArguments: required in the absence of Program. Here
	// always: execvp(3) takes the vector, and argv[0] should name the program.
	{"arguments", func(j *Job) string {
		if len(j.ProgramArguments) == 0 {
			return "ProgramArguments must at least name the program"
		}
		return absolute("ProgramArguments[0]", j.ProgramArguments[0])
	}},
	{"program", func(j *Job) string { return absoluteOrEmpty("Program", j.Program) }},
	{"output", func(j *Job) string { return absoluteOrEmpty("StandardOutPath", j.StandardOutPath) }},
	{"errors", func(j *Job) string { return absoluteOrEmpty("StandardErrorPath", j.StandardErrorPath) }},
	{"directory", func(j *Job) string { return absoluteOrEmpty("WorkingDirectory", j.WorkingDirectory) }},
	// launchd.plist(5), ProcessType.
	{"process type", func(j *Job) string {
		if !slices.Contains([]string{"", Background, Standard, Adaptive, Interactive}, j.ProcessType) {
			return fmt.Sprintf("ProcessType %q is unknown", j.ProcessType)
		}
		return ""
	}},
	// launchd.plist(5), ExitTimeOut: 0 is infinity, and then a daemon that hangs at
	// SIGTERM holds up every shutdown and every upgrade.
	{"exit timeout", func(j *Job) string { return between("ExitTimeOut", j.ExitTimeOut, 1, 600) }},
	{"throttle", func(j *Job) string { return between("ThrottleInterval", j.ThrottleInterval, 0, 3600) }},
	{"umask", func(j *Job) string {
		if j.Umask != nil && *j.Umask > 0o777 {
			return fmt.Sprintf("Umask %#o is out of range", uint32(*j.Umask))
		}
		return ""
	}},
	// launchd.plist(5), KeepAlive: "NetworkState … is no longer implemented".
	{"keep alive", func(j *Job) string {
		if j.KeepAlive != nil && len(j.KeepAlive.Ignored) > 0 {
			return fmt.Sprintf("KeepAlive condition %q is not implemented", j.KeepAlive.Ignored[0])
		}
		return ""
	}},
	// launchd.plist(5), HardResourceLimits: in a system daemon NumberOfFiles also
	// sets kern.maxfiles or kern.maxfilesperproc, for the whole Mac.
	{"file limit", func(j *Job) string {
		_, soft := j.SoftResourceLimits["NumberOfFiles"]
		_, hard := j.HardResourceLimits["NumberOfFiles"]
		if soft || hard {
			return "NumberOfFiles changes the limit of the whole system; use setrlimit in the process"
		}
		return ""
	}},
	{"environment", func(j *Job) string {
		for k := range j.EnvironmentVariables {
			if k == "" || strings.ContainsRune(k, '=') {
				return fmt.Sprintf("environment variable %q has an invalid name", k)
			}
		}
		return ""
	}},
	// XML 1.0 can't represent most control characters, and an argument can't contain NUL.
	{"text", func(j *Job) string { return j.badText() }},
	{"unknown keys", func(j *Job) string {
		if len(j.Unknown) > 0 {
			return fmt.Sprintf("key %q is unknown and would be lost", j.Unknown[0])
		}
		return ""
	}},
}

// Check returns every rule that the job breaks, in a fixed order.
func (j *Job) Check() []Violation {
	var v []Violation
	for _, r := range jobRules {
		if text := r.check(j); text != "" {
			v = append(v, Violation{r.name, text})
		}
	}
	return v
}

func validLabel(s string) bool {
	if s == "" || len(s) > maxLabel || !alphanumeric(s[0]) {
		return false
	}
	for i := range len(s) {
		if !alphanumeric(s[i]) && !strings.ContainsRune("._-", rune(s[i])) {
			return false
		}
	}
	return true
}

func alphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

func absolute(key, p string) string {
	if !path.IsAbs(p) || path.Clean(p) != p || len(p) >= maxPath {
		return fmt.Sprintf("%s %q must be an absolute path without . and ..", key, p)
	}
	return ""
}

func absoluteOrEmpty(key, p string) string {
	if p == "" {
		return ""
	}
	return absolute(key, p)
}

func between(key string, n *int, low, high int) string {
	if n != nil && (*n < low || *n > high) {
		return fmt.Sprintf("%s %d must be from %d to %d seconds", key, *n, low, high)
	}
	return ""
}

// badText returns the problem of the first string that XML can't represent, or "".
func (j *Job) badText() string {
	for _, s := range j.texts() {
		if !utf8.ValidString(s) || strings.ContainsFunc(s, unwritable) {
			return fmt.Sprintf("%q has characters that a property list can't contain", s)
		}
	}
	return ""
}

func unwritable(r rune) bool {
	return unicode.IsControl(r) || r == 0xFFFE || r == 0xFFFF
}

// texts returns every string of the job, map keys included.
func (j *Job) texts() []string {
	t := []string{j.Label, j.Program, j.ProcessType, j.UserName, j.GroupName,
		j.WorkingDirectory, j.StandardOutPath, j.StandardErrorPath}
	t = append(t, j.ProgramArguments...)
	t = append(t, j.AssociatedBundleIdentifiers...)
	for k, v := range j.EnvironmentVariables {
		t = append(t, k, v)
	}
	t = slices.AppendSeq(t, maps.Keys(j.SoftResourceLimits))
	t = slices.AppendSeq(t, maps.Keys(j.HardResourceLimits))
	if k := j.KeepAlive; k != nil {
		t = slices.AppendSeq(t, maps.Keys(k.PathState))
		t = slices.AppendSeq(t, maps.Keys(k.OtherJobEnabled))
	}
	return t
}

// jobKeys returns the keys that Job has fields for.
func jobKeys() []string {
	var keys []string
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Job]()) {
		name, _, _ := strings.Cut(f.Tag.Get("plist"), ",")
		if name != "-" {
			keys = append(keys, name)
		}
	}
	return keys
}

// A File holds the facts about a file by which launchd decides whether to trust it. Mode
// includes the type bits.
type File struct {
	Path     string
	UID, GID uint32
	Mode     fs.FileMode
}

// fileRules are launchd's rules for the file of a property list. The last open-source
// release (launchd-842, path_check of launchctl.c) refused with "Dubious ownership on file
// (skipping)" or "Dubious permissions on file (skipping)"; current ones say "Path had bad
// ownership/permissions", and launchctl exits with 5.
var fileRules = []struct {
	name  string
	check func(File) string
}{
	{"place", func(f File) string {
		if path.Dir(f.Path) != "/Library/LaunchDaemons" {
			return fmt.Sprintf("%q is not in /Library/LaunchDaemons, so it won't be loaded at boot", f.Path)
		}
		return ""
	}},
	{"type", func(f File) string {
		if !f.Mode.IsRegular() {
			return fmt.Sprintf("%q is not a regular file", f.Path)
		}
		return ""
	}},
	{"owner", func(f File) string {
		if f.UID != 0 {
			return fmt.Sprintf("%q belongs to user %d, not to root", f.Path, f.UID)
		}
		return ""
	}},
	{"mode", func(f File) string {
		if f.Mode.Perm()&0o022 != 0 {
			return fmt.Sprintf("%q is writable by others than root (mode %#o)", f.Path, f.Mode.Perm())
		}
		return ""
	}},
}

// CheckFile returns every rule that the property list's file breaks by its directory, its
// name (the label with .plist), its type, its owner or its mode.
func CheckFile(f File, label string) []Violation {
	var v []Violation
	for _, r := range fileRules {
		if text := r.check(f); text != "" {
			v = append(v, Violation{r.name, text})
		}
	}
	if path.Base(f.Path) != label+".plist" {
		v = append(v, Violation{"name", fmt.Sprintf("%q must be named %q after its label", f.Path, label+".plist")})
	}
	return v
}

// CheckProgram returns the reasons why a program shouldn't run as root: a user other than
// root can change it or a directory above it, or one of them is a symbolic link. chain is
// the program and then each directory up to the root, as [Chain] returns them. A user that
// may write to one of them becomes root at the next start (CVE-2025-46351 is a daemon whose
// program could be replaced; Homebrew's prefix belongs to an admin user).
func CheckProgram(chain []File) []Violation {
	var v []Violation
	for i, f := range chain {
		switch {
		case i == 0 && !f.Mode.IsRegular():
			v = append(v, Violation{"type", fmt.Sprintf("%q is not a regular file", f.Path)})
		case i == 0 && f.Mode.Perm()&0o100 == 0:
			v = append(v, Violation{"type", fmt.Sprintf("%q is not executable", f.Path)})
		case i > 0 && !f.Mode.IsDir():
			v = append(v, Violation{"type", fmt.Sprintf("%q is not a directory", f.Path)})
		}
		if f.UID != 0 {
			v = append(v, Violation{"owner", fmt.Sprintf("%q belongs to user %d, not to root", f.Path, f.UID)})
		}
		// The sticky bit doesn't help: other users can still create entries. Nor is the
		// admin group better than all users: any program of an admin user has it.
		if f.Mode.Perm()&0o022 != 0 {
			v = append(v, Violation{"mode", fmt.Sprintf("%q is writable by others than root (mode %#o)", f.Path, f.Mode.Perm())})
		}
	}
	return v
}
