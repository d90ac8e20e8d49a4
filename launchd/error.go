package launchd

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// A Code is the reason why launchctl failed: an errno below 100, launchd's own code above.
// The modern verbs exit with it. (The legacy `load` and `unload` exit 0 even when they
// fail, launchctl(1), so they aren't used.)
type Code int

// The codes that this package knows. `launchctl error N` prints the text of any code.
const (
	NoSuchProcess Code = 3   // bootout of a service that isn't loaded
	InputOutput   Code = 5   // bootstrap, for nearly every cause
	InProgress    Code = 36  // bootout goes on in the background
	Already       Code = 37  // bootstrap of a service that is loaded or being loaded
	Usage         Code = 64  // sysexits(3): an argument this release doesn't know
	NoSuchService Code = 113 // print and kickstart of a service that isn't loaded
	Disabled      Code = 119 // bootstrap of a service that `launchctl disable` has marked
	BadOwnership  Code = 122 // the property list's owner or mode; not confirmed
	// SwitchedOff is this package's own code: the user, or a profile, has switched the
	// daemon off. launchctl answers 5 then, or succeeds.
	SwitchedOff Code = -1
	// CodeSigning is this package's own code, too: the service is loaded, but the kernel
	// kills its program before the first instruction.
	CodeSigning Code = -2
)

// reasonCodeSigning is the exit reason of a process that the kernel killed because of its
// code signature (<sys/reason.h>). More text may follow, as in
// "OS_REASON_CODESIGNING | Launch Constraint Violation".
const reasonCodeSigning = "OS_REASON_CODESIGNING"

// codeTexts gives each code's meaning and what to do about it.
var codeTexts = map[Code]struct{ means, hint string }{
	NoSuchProcess: {"the service is not loaded", "nothing to unload; load it with bootstrap"},
	InputOutput: {"launchd refused without giving a reason",
		"check that the property list belongs to root with mode 0644, that the program exists, " +
			"that the service isn't disabled (launchctl print-disabled system), and that it is " +
			"switched on in System Settings > General > Login Items & Extensions; " +
			"if it was unloaded a moment ago, try again in a few seconds"},
	InProgress: {"the operation goes on in the background", "wait until `launchctl print` no longer finds the service"},
	Already:    {"the service is already loaded", "unload it first (launchctl bootout)"},
	Usage:      {"this macOS release doesn't know an argument", "report it with the output of sw_vers"},
	NoSuchService: {"the service is not loaded",
		"load it with bootstrap; if its property list is in place, look for it in System Settings > General > Login Items & Extensions"},
	SwitchedOff: {"the service is switched off in Login Items & Extensions",
		"switch it on in System Settings > General > Login Items & Extensions, then try again"},
	Disabled: {"the service is disabled", "enable it (sudo launchctl enable system/LABEL), then try again"},
	CodeSigning: {"macOS kills the program when it starts: its code signature isn't valid",
		"install it again, which replaces the file; if that doesn't help, sign the program " +
			"that is installed from (codesign --force --sign - FILE) and install it once more"},
	BadOwnership: {"the property list has a bad owner or mode", "chown root:wheel and chmod 0644 it"},
}

// Error returns the code's meaning. A Code is an error so that errors.Is can compare an
// [Error] with it.
func (c Code) Error() string {
	if t, ok := codeTexts[c]; ok {
		return t.means
	}
	return "launchctl error " + strconv.Itoa(int(c))
}

// An Error is one failed launchctl verb. errors.Is compares it with a Code.
type Error struct {
	Verb    string // enable, bootstrap, bootout, kickstart, print, print-disabled; also load and start, of this package
	Target  string // system/LABEL, or system
	Code    Code
	Message string // the first meaningful line that launchctl printed, or ""
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

// Hint returns what to do about the error, or where its number is explained.
func (e *Error) Hint() string {
	if t, ok := codeTexts[e.Code]; ok {
		return t.hint
	}
	return fmt.Sprintf("`launchctl error %d` explains the number", int(e.Code))
}

// failedText matches messages such as "Bootstrap failed: 5: Input/output error".
var failedText = regexp.MustCompile(`failed: ([0-9]{1,3}):`)

// newError takes the code from the message if it has one, which is more exact than the
// exit status (1 was seen with a printed 5), else from the status.
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

// message returns the first meaningful line of stderr, cut to 200 bytes. Newer
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
