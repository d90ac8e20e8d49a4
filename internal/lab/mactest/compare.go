package mactest

// The comparison of a Mac's configuration before the helper was installed and after it was
// removed.

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Differences has the differences between two snapshots of a Mac, one a line.
type Differences struct {
	// Changed has those that a helper may have caused and not undone. Moved has those that
	// macOS or other programs cause by themselves, often many times an hour.
	Changed, Moved []string
}

// A Comparison compares snapshots.
type Comparison struct {
	// Own are names of the helper: its label, its interface, its addresses. A line with one
	// of them never counts as Moved.
	Own []string
	// Volatile are the names of kernel variables that are known to change by themselves.
	Volatile map[string]bool
}

// Volatile returns the kernel variables that differ between two snapshots. Taken one after
// the other, without a change of the helper's in between, they differ in the variables
// that change by themselves.
func Volatile(a, b Snapshot) map[string]bool {
	out := map[string]bool{}
	for _, d := range (&Comparison{}).all(a, b) {
		if d.form == Sysctls {
			out[sysctlName(d.line)] = true
		}
	}
	return out
}

// Diff compares two snapshots. A difference begins with the name of the output and "-" for
// a line that only before has, "+" for one that only after has.
func (c *Comparison) Diff(before, after Snapshot) Differences {
	var out Differences
	for _, d := range c.all(before, after) {
		text := fmt.Sprintf("%s: %s %s", d.output, d.sign, d.line)
		if c.moved(d) {
			out.Moved = append(out.Moved, text)
		} else {
			out.Changed = append(out.Changed, text)
		}
	}
	return out
}

// difference is a line of an output that only one of two snapshots has.
type difference struct {
	output string
	form   Form
	sign   string // "-": only before, "+": only after
	line   string
}

// all returns all differences, also those that don't matter.
func (c *Comparison) all(before, after Snapshot) []difference {
	forms := map[string]Form{}
	lines := [2]map[string][]string{{}, {}}
	var names []string
	for i, s := range []Snapshot{before, after} {
		for _, o := range s {
			if _, ok := forms[o.Name]; !ok {
				names = append(names, o.Name)
			}
			forms[o.Name], lines[i][o.Name] = o.Form, o.normalised()
		}
	}
	var out []difference
	for _, name := range names {
		was, is := lines[0][name], lines[1][name]
		if forms[name] == Ruleset && !slices.Equal(was, is) && slices.Equal(slices.Sorted(slices.Values(was)), slices.Sorted(slices.Values(is))) {
			out = append(out, difference{name, Ruleset, "+", "the same lines in another order"})
		}
		for _, side := range []struct {
			sign       string
			these, not []string
		}{{"-", was, is}, {"+", is, was}} {
			for _, line := range without(side.these, side.not) {
				out = append(out, difference{name, forms[name], side.sign, line})
			}
		}
	}
	return out
}

// without returns the lines that aren't in less. A line that is there n times removes n.
func without(lines, less []string) []string {
	n := map[string]int{}
	for _, line := range less {
		n[line]++
	}
	var out []string
	for _, line := range lines {
		if n[line]--; n[line] < 0 {
			out = append(out, line)
		}
	}
	return out
}

// normalised returns the lines to compare of an output: those of Normalise, or its exit
// status, or why the command couldn't be run.
func (o Output) normalised() []string {
	switch {
	case o.Err != nil:
		return []string{"not run: " + o.Err.Error()}
	case o.Form == ExitStatus:
		return []string{"exit status " + strconv.Itoa(o.Status)}
	}
	return Normalise(o.Form, string(o.Stdout))
}

// Normalise returns the lines of an output without the parts that change by themselves:
// counters, ages, the expiry of routes, neighbours and link-local addresses.
func Normalise(f Form, text string) []string {
	switch f {
	case Ignored, ExitStatus:
		return nil
	case FilterAll:
		return normaliseAll(text)
	case Routes:
		return normaliseRoutes(text)
	case Interfaces:
		return normaliseInterfaces(text)
	}
	var out []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch f {
		case References:
			line = normaliseReference(line)
		case Numbered:
			line = strings.TrimSpace(menuNumber.ReplaceAllString(line, ""))
		}
		if line != "" {
			out = append(out, line)
		}
	}
	return out
}

// menuNumber is the number of a line of form Numbered.
var menuNumber = regexp.MustCompile(`^[0-9]+ *:`)

// normaliseReference returns the program and its token of a row such as
//
//	4063     pfctl      15053025338191571182     0 days 00:00:00
//
// The process with that PID has mostly ended, and the rest is the token's age.
func normaliseReference(line string) string {
	f := strings.Fields(line)
	if len(f) < 3 {
		return line
	}
	if _, err := strconv.Atoi(f[0]); err != nil {
		return line
	}
	for i, word := range f[1:] {
		if _, err := strconv.ParseUint(word, 10, 64); err == nil {
			return strings.Join(f[1:i+2], " ")
		}
	}
	return line
}

// sectionTitle is the first line of a section of pfctl -sa.
var sectionTitle = regexp.MustCompile(`^[A-Z][A-Z ]*:$`)

// movingSections are the sections of pfctl -sa that traffic changes.
var movingSections = []string{"STATES", "SOURCE TRACKING NODES", "LABEL COUNTERS", "INTERFACES", "TOKENS"}

// normaliseAll returns the lines of pfctl -sa, each behind the title of its section. Of
// the section INFO it keeps only whether pf is enabled.
func normaliseAll(text string) []string {
	var out []string
	section := ""
	for line := range strings.Lines(text) {
		line = strings.Join(strings.Fields(line), " ")
		switch {
		case sectionTitle.MatchString(line):
			section = strings.TrimSuffix(line, ":")
		case line == "", slices.Contains(movingSections, section):
		case section == "":
			out = append(out, line)
		case section == "INFO":
			if status, _, _ := strings.Cut(line, " for "); strings.HasPrefix(line, "Status: ") {
				status, _, _ = strings.Cut(status, " Debug")
				out = append(out, section+": "+status)
			}
		default:
			out = append(out, section+": "+line)
		}
	}
	return out
}

// normaliseRoutes returns the routes of netstat -rn. The columns differ between releases,
// so it finds them by the header. It leaves out routes to link-local networks and those
// that the kernel clones from others for single hosts (flag W).
func normaliseRoutes(text string) []string {
	var out []string
	netif, expire := -1, false
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0, len(f) == 1, f[0] == "Routing":
			continue
		case f[0] == "Destination":
			netif = slices.Index(f, "Netif")
			expire = slices.Contains(f, "Expire")
			continue
		}
		if strings.HasPrefix(f[0], "fe80:") {
			continue
		}
		if netif < 3 || len(f) <= netif {
			out = append(out, strings.Join(f, " ")) // of an unknown format: compare it whole
			continue
		}
		if strings.Contains(f[2], "W") {
			continue
		}
		end := len(f)
		if expire {
			end = netif + 1
		}
		// Older releases have counters, Refs and Use, between flags and interface.
		out = append(out, strings.Join(append(f[:3:3], f[netif:end]...), " "))
	}
	return out
}

// interfaceHead is the beginning of an interface's first line.
var interfaceHead = regexp.MustCompile(`^([^\s:]+): `)

// normaliseInterfaces returns the lines of ifconfig -a, each behind the name of its
// interface, without link-local addresses.
func normaliseInterfaces(text string) []string {
	var out []string
	name := ""
	for line := range strings.Lines(text) {
		if m := interfaceHead.FindStringSubmatch(line); m != nil {
			name = m[1]
			line = line[len(m[0]):]
		}
		line = strings.Join(strings.Fields(line), " ")
		if line == "" || strings.HasPrefix(line, "inet6 fe80:") {
			continue
		}
		out = append(out, name+": "+line)
	}
	return out
}

// systemInterfaces matches interfaces that macOS and other programs create, configure and
// remove at any time.
var systemInterfaces = regexp.MustCompile(`(^|\s)(awdl|llw|utun|ipsec|anpi|ap|bridge|vmenet|gif|stf|feth|XHC|p2p)[0-9]+(\s|:|$)`)

// routerSettings matches the kernel variables that a router changes, and related ones. The
// others under net are counters, or belong to parts that a helper doesn't touch.
var routerSettings = regexp.MustCompile(`^net\.(inet\.ip|inet6\.ip6|inet\.icmp|inet6\.icmp6|pf|link\.bridge)\.`)

// moved reports whether macOS or other programs may have caused a difference, see
// Differences.
func (c *Comparison) moved(d difference) bool {
	for _, word := range c.Own {
		if word != "" && strings.Contains(d.line, word) {
			return false
		}
	}
	switch d.form {
	case Sysctls:
		name := sysctlName(d.line)
		return c.Volatile[name] || !routerSettings.MatchString(name)
	case Routes:
		return systemInterfaces.MatchString(d.line)
	case Interfaces:
		return systemInterfaces.MatchString(d.line) || strings.Contains(d.line, " temporary") || strings.Contains(d.line, " deprecated")
	case References:
		return !strings.HasPrefix(d.line, "pfctl ")
	case Lines:
		// Folders and lists that other programs change too.
		return true
	}
	return false
}

// sysctlName returns the name of a kernel variable in a line of sysctl.
func sysctlName(line string) string {
	name, _, _ := strings.Cut(line, ":")
	return name
}
