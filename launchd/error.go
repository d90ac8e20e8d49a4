package launchd

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// A Code is what launchctl failed with: an errno below 100, launchd's own above.
// It is the exit status of the modern verbs. (The legacy `load` and `unload` exit
// 0 even when they fail, launchctl(1), so they aren't used.)
type Code int

// The codes with a meaning of their own. `launchctl error N` prints the text of
// any.
const (
	NoSuchProcess Code = 3   // bootout of what isn't loaded
	InputOutput   Code = 5   // bootstrap, for nearly every cause
	InProgress    Code = 36  // bootout goes on in the background
	Already       Code = 37  // bootstrap of what is loaded, or on its way
	Usage         Code = 64  // sysexits(3): an argument this release doesn't know
	NoSuchService Code = 113 // print and kickstart of what isn't loaded
	Disabled      Code = 119 // bootstrap of what `launchctl disable` has marked
	BadOwnership  Code = 122 // the property list's owner or mode; not confirmed
	// SwitchedOff isn't launchctl's, which answers 5 or nothing at all: the user, or
	// a profile, has switched the daemon off.
	SwitchedOff Code = -1
	// CodeSigning isn't launchctl's, either: the service is loaded, and the kernel
	// ends its program before the first instruction.
	CodeSigning Code = -2
)

// reasonCodeSigning is what launchd says of a process that the kernel ended for
// its code signature (<sys/reason.h>). A reason may have more words behind it, as
// in "OS_REASON_CODESIGNING | Launch Constraint Violation".
const reasonCodeSigning = "OS_REASON_CODESIGNING"

// codeTexts says what a code means and what to do.
var codeTexts = map[Code]struct{ means, hint string }{
	NoSuchProcess: {"the service is not loaded", "nothing to unload; load it with bootstrap"},
	InputOutput: {"launchd refused without a reason",
		"check that the property list belongs to root with mode 0644, that the program exists, " +
			"that the service isn't disabled (launchctl print-disabled system), and that it is " +
			"switched on in System Settings > General > Login Items & Extensions; " +
			"if it was unloaded a moment ago, try again in some seconds"},
	InProgress: {"the operation goes on in the background", "wait until `launchctl print` no longer finds the service"},
	Already:    {"the service is loaded already", "unload it first (launchctl bootout)"},
	Usage:      {"this macOS release doesn't know an argument", "report it with the output of sw_vers"},
	NoSuchService: {"the service is not loaded",
		"load it with bootstrap; if its property list is in place, look for it in System Settings > General > Login Items & Extensions"},
	SwitchedOff: {"the service is switched off in Login Items & Extensions",
		"switch it on in System Settings > General > Login Items & Extensions, then try again"},
	Disabled: {"the service is disabled", "enable it (sudo launchctl enable system/LABEL), then try again"},
	CodeSigning: {"macOS ends the program at its start: its code signature isn't valid",
		"install it again, which replaces the file; if that doesn't help, sign the program " +
			"that is installed from (codesign --force --sign - FILE) and install it once more"},
	BadOwnership: {"the property list has a bad owner or mode", "chown root:wheel and chmod 0644 it"},
}

// Error gives the meaning, so that a Code can stand as an error to compare with.
func (c Code) Error() string {
	if t, ok := codeTexts[c]; ok {
		return t.means
	}
	return "launchctl error " + strconv.Itoa(int(c))
}

// An Error is one failed launchctl verb. errors.Is compares it with a Code.
type Error struct {
	Verb    string // enable, bootstrap, bootout, kickstart, print, print-disabled; of this package load, start
	Target  string // system/LABEL, or system
	Code    Code
	Message string // the first line of launchctl's that says something, or ""
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s %s: %v", e.Verb, e.Target, e.Code)
	if e.Code > 0 {
		s += fmt.Sprintf(" (%d)", int(e.Code))
	}
	if e.Message != "" {
		s += fmt.Sprintf(": %q", e.Message)
	}
	return s
}

// Unwrap returns the code.
func (e *Error) Unwrap() error { return e.Code }

// Hint says what to do, or that `launchctl error` explains the number.
func (e *Error) Hint() string {
	if t, ok := codeTexts[e.Code]; ok {
		return t.hint
	}
	return fmt.Sprintf("`launchctl error %d` explains the number", int(e.Code))
}

// failedText is "Bootstrap failed: 5: Input/output error" and its sisters.
var failedText = regexp.MustCompile(`failed: ([0-9]{1,3}):`)

// newError reads the code from what launchctl printed, where it is more exact
// than the exit status (1 was seen with a printed 5), else from the status.
func newError(verb, target string, status int, stderr []byte) *Error {
	e := &Error{Verb: verb, Target: target, Code: Code(status), Message: message(stderr)}
	m := failedText.FindStringSubmatch(e.Message)
	switch {
	case m != nil:
		n, _ := strconv.Atoi(m[1]) // three digits
		e.Code = Code(n)
	case strings.HasPrefix(e.Message, "Could not find service"):
		e.Code = NoSuchService
	}
	return e
}

// message returns the first line that says something, cut to 200 bytes. Newer
// releases put "Bad request." before the line that has the reason (nix#9978).
func message(stderr []byte) string {
	first := ""
	for line := range strings.Lines(string(stderr[:min(len(stderr), 4096)])) {
		line = strings.TrimSpace(line)
		line = strings.ToValidUTF8(line[:min(len(line), 200)], "")
		if line != "" && line != "Bad request." {
			return line
		}
		if first == "" {
			first = line
		}
	}
	return first
}
