package launchd

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// A Status is a service's state in launchd, from `launchctl print system/LABEL`.
type Status struct {
	// Loaded says that launchd has the service; if it is false, all else is zero.
	Loaded bool
	// State is launchd's word: running, not running, waiting, spawn scheduled,
	// SIGTERMed; "" if launchctl printed none.
	State string
	// PID is the process ID, 0 if the service has no process.
	PID int
	// LastExit is the exit status of the previous process; nil if there was none or
	// launchctl didn't print it. If the previous process was killed, LastSignal, such as
	// "Killed: 9", or LastReason, such as "OS_REASON_CODESIGNING", is set instead.
	LastExit               *int
	LastSignal, LastReason string
	// Runs is the number of starts since the service was loaded, ExitTimeOut the time
	// from SIGTERM to SIGKILL in seconds; 0 if launchctl didn't print them.
	Runs, ExitTimeOut int
	// Path is the property list that was loaded, Program the executable that it names.
	Path, Program string
}

// Running reports whether the service has a process and isn't being ended.
func (s Status) Running() bool { return s.Loaded && s.PID > 0 && !s.Leaving() }

// Leaving reports whether launchd is stopping the service, as after a bootout.
func (s Status) Leaving() bool { return strings.HasPrefix(s.State, "SIG") }

// BadSignature reports whether the service has no process because the kernel killed the
// last one for its code signature.
func (s Status) BadSignature() bool {
	return !s.Running() && strings.HasPrefix(s.LastReason, reasonCodeSigning)
}

// String describes the status in a few words.
func (s Status) String() string {
	if !s.Loaded {
		return "not loaded"
	}
	text := fmt.Sprintf("state %q", s.State)
	if s.PID > 0 {
		text += fmt.Sprintf(", process %d", s.PID)
	}
	if s.Runs > 1 {
		text += fmt.Sprintf(", started %d times", s.Runs)
	}
	switch {
	case s.LastReason != "":
		text += ", last ended by " + s.LastReason
	case s.LastSignal != "":
		text += ", last ended by signal " + s.LastSignal
	case s.LastExit != nil:
		text += fmt.Sprintf(", last exit status %d", *s.LastExit)
	}
	return text
}

// ParsePrint reads the output of a `launchctl print` that succeeded. launchctl(1) says that
// the output isn't API, so each field may be missing. Only the outermost block is read:
// endpoints and coalitions have a state of their own, and the environment any name.
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
	case "runs":
		s.Runs = count(value)
	case "exit timeout":
		s.ExitTimeOut = count(value)
	case "last exit reason":
		s.LastReason = text(value)
	case "last terminating signal":
		s.LastSignal = text(value)
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

// count reads a non-negative number; it returns 0 for anything else.
func count(s string) int {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n < 0 {
		return 0
	}
	return int(n)
}

// text bounds a value that messages quote.
func text(s string) string { return strings.ToValidUTF8(s[:min(len(s), 100)], "") }

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

// A LoginItem is the record of a daemon in macOS's background task management.
type LoginItem struct {
	// Found is false if there is no record (yet).
	Found bool
	// Enabled is launchd's own setting. Disallowed says that the user's switch in System
	// Settings, a profile, or macOS itself keeps the daemon from starting.
	Enabled, Disallowed bool
	// Disposition is the whole disposition, such as "enabled, allowed, notified".
	Disposition string
}

// Blocked reports whether macOS won't start the daemon at boot. It may still be running
// until then.
func (i LoginItem) Blocked() bool { return i.Found && i.Disallowed }

// ParseLoginItem reads `sfltool dumpbtm`, a list of records for each user and, as
// user -2, for all users:
//
//	Records for UID -2 : FFFFEEEE-DDDD-CCCC-BBBB-AAAAFFFFFFFE
//
//	#1:
//	               Type: legacy daemon (0x10010)
//	        Disposition: [enabled, disallowed, notified] (0x9)
//	         Identifier: 16.org.example.daemon
//	                URL: file:///Library/LaunchDaemons/org.example.daemon.plist
//
// A daemon's record is found by its identifier, with or without the prefix 16 of a daemon
// with a property list of its own, or by the property list's path. Only the records of all
// users and of root count, and those before any heading; the daemon is blocked if any of
// these blocks it.
func ParseLoginItem(out []byte, label string) LoginItem {
	var found LoginItem
	var record btmRecord
	system := true
	flush := func() {
		if system && record.item.Found && record.names(label) {
			record.item.Disallowed = record.item.Disallowed || found.Disallowed
			found = record.item
		}
		record = btmRecord{}
	}
	for line := range bytes.Lines(out) {
		line := strings.TrimSpace(string(line))
		if user, ok := strings.CutPrefix(line, "Records for UID "); ok {
			flush()
			user, _, _ = strings.Cut(user, " ")
			n, err := strconv.ParseInt(strings.TrimSuffix(user, ":"), 10, 64)
			system = err != nil || n <= 0
			continue
		}
		key, value, ok := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch {
		case !ok:
		case value == "" && strings.HasPrefix(key, "#"), key == "UUID": // a record begins
			flush()
		default:
			record.set(key, value)
		}
	}
	flush()
	return found
}

// A btmRecord is one record of background task management.
type btmRecord struct {
	item                  LoginItem
	kind, identifier, url string
}

func (r *btmRecord) set(key, value string) {
	switch key {
	case "Type":
		r.kind = value
	case "Disposition":
		r.item = parseDisposition(value)
	case "Identifier":
		r.identifier = value
	case "URL":
		r.url = value
	}
}

// names reports whether the record is that of the daemon with the label. An app or
// an agent may have the same identifier.
func (r *btmRecord) names(label string) bool {
	if r.kind != "" && !strings.Contains(r.kind, "daemon") {
		return false
	}
	// The URL is a plain path since macOS 27, a file URL before; a URL escapes none of
	// the characters of a label.
	return r.identifier == label || r.identifier == "16."+label ||
		strings.TrimPrefix(r.url, "file://") == "/Library/LaunchDaemons/"+label+".plist"
}

// parseDisposition reads "[enabled, allowed, notified] (0xb)".
func parseDisposition(s string) LoginItem {
	s, _, _ = strings.Cut(strings.TrimPrefix(s, "["), "]")
	i := LoginItem{Found: true, Disposition: text(s)}
	for word := range strings.SplitSeq(s, ",") {
		switch strings.TrimSpace(word) {
		case "enabled":
			i.Enabled = true
		case "disallowed":
			i.Disallowed = true
		}
	}
	return i
}
