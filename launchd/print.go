package launchd

import (
	"bytes"
	"strconv"
	"strings"
)

// A Status is the little of `launchctl print system/LABEL` that is used.
type Status struct {
	Loaded bool
	// State is launchd's word: running, not running, waiting, spawn scheduled,
	// SIGTERMed. "" when it wasn't found.
	State string
	// PID is 0 when there is no process.
	PID int
	// LastExit is the exit status of the previous instance; nil when there was none
	// or it wasn't found.
	LastExit *int
	// Path is the property list that is loaded, Program what it runs.
	Path, Program string
}

// Running reports whether the service has a process and isn't being ended.
func (s Status) Running() bool { return s.Loaded && s.PID > 0 && !s.Leaving() }

// Leaving reports whether the service is being ended: bootout shows so.
func (s Status) Leaving() bool { return strings.HasPrefix(s.State, "SIG") }

// ParsePrint reads the output of a `launchctl print` that succeeded. The manual
// says not to rely on it, so each field may be missing. Only the outermost block
// counts: endpoints and coalitions have a state, and the environment can have any
// name.
func ParsePrint(out []byte) Status {
	s := Status{Loaded: true}
	depth := 0
	for line := range bytes.Lines(out) {
		line = bytes.TrimSpace(line)
		switch {
		case bytes.HasSuffix(line, []byte("{")):
			depth++
		case bytes.Equal(line, []byte("}")):
			depth--
		case depth == 1:
			if key, value, ok := bytes.Cut(line, []byte(" = ")); ok {
				s.set(string(key), string(value))
			}
		}
	}
	return s
}

func (s *Status) set(key, value string) {
	switch key {
	case "state":
		s.State = value
	case "pid":
		if n, err := strconv.ParseInt(value, 10, 32); err == nil && n > 0 {
			s.PID = int(n)
		}
	case "last exit code":
		// "0", "78: EX_CONFIG" or "(never exited)".
		number, _, _ := strings.Cut(value, ":")
		if n, err := strconv.ParseInt(number, 10, 32); err == nil {
			s.LastExit = new(int(n))
		}
	case "path":
		s.Path = value
	case "program":
		s.Program = value
	}
}

// ParseDisabled reads `launchctl print-disabled system`: a line `"LABEL" =>
// disabled`, or `=> true` before macOS 13. No line means not disabled.
func ParseDisabled(out []byte, label string) bool {
	want := `"` + label + `"`
	for line := range bytes.Lines(out) {
		name, value, ok := strings.Cut(strings.TrimSpace(string(line)), " => ")
		if ok && name == want {
			return value == "disabled" || value == "true"
		}
	}
	return false
}

// A LoginItem is how macOS's background task management has a daemon.
type LoginItem struct {
	// Found is false when it doesn't know the daemon (yet).
	Found bool
	// Enabled is launchd's side, Allowed the user's switch in System Settings or a
	// profile's.
	Enabled, Allowed bool
}

// Blocked reports whether the user or a profile has switched the daemon off.
func (i LoginItem) Blocked() bool { return i.Found && !i.Allowed }

// ParseLoginItem reads `sfltool dumpbtm`, whose records say
//
//	Disposition: [enabled, disallowed, visible, notified] (0x9)
//	 Identifier: 16.org.example.daemon
//
// where 16 stands for a daemon that came with a property list of its own. There
// is a section for each user; the daemon is blocked if any of them blocks it.
func ParseLoginItem(out []byte, label string) LoginItem {
	var found, item LoginItem
	for line := range bytes.Lines(out) {
		key, value, ok := strings.Cut(strings.TrimSpace(string(line)), ": ")
		switch {
		case !ok:
		case key == "UUID": // the first line of a record
			item = LoginItem{}
		case key == "Disposition":
			item = parseDisposition(value)
		case key == "Identifier" && item.Found && value == "16."+label:
			item.Allowed = item.Allowed && (found.Allowed || !found.Found)
			found = item
		}
	}
	return found
}

// parseDisposition reads "[enabled, allowed, notified] (0xb)".
func parseDisposition(s string) LoginItem {
	s, _, _ = strings.Cut(strings.TrimPrefix(s, "["), "]")
	i := LoginItem{Found: true}
	for word := range strings.SplitSeq(s, ",") {
		switch strings.TrimSpace(word) {
		case "enabled":
			i.Enabled = true
		case "allowed":
			i.Allowed = true
		}
	}
	return i
}
