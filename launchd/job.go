package launchd

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"howett.net/plist"
)

// MaxPlist is the largest property list that Parse reads, in bytes. A job's is
// one or two kilobytes.
const MaxPlist = 64 << 10

// maxDepth of elements in a property list; a job's has four or five.
const maxDepth = 32

// Process types of launchd.plist(5). The default is Standard, which throttles CPU and I/O
// lightly; a daemon that forwards packets wants Interactive.
const (
	Background  = "Background"
	Standard    = "Standard"
	Adaptive    = "Adaptive"
	Interactive = "Interactive"
)

// A Job is the property list of one daemon, with the keys of launchd.plist(5) that a
// daemon without sockets, timers or Mach services needs. Zero values aren't written.
// Times are in whole seconds, paths are absolute.
type Job struct {
	// Label names the job; its file is Label + ".plist". Required.
	Label string `plist:"Label"`
	// Program is the executable. Optional: ProgramArguments[0] by default.
	Program string `plist:"Program,omitempty"`
	// ProgramArguments is the argument vector, the first an absolute path: launchd
	// would search a bare name in a minimal PATH. Required.
	ProgramArguments []string `plist:"ProgramArguments"`
	// RunAtLoad starts the job when it is loaded, so at boot.
	RunAtLoad bool `plist:"RunAtLoad,omitempty"`
	// KeepAlive says when launchd starts the job again.
	KeepAlive *KeepAlive `plist:"KeepAlive,omitempty"`
	// ThrottleInterval is the shortest time between two starts, 10 s by default: a
	// program that crashes at once is restarted that often.
	ThrottleInterval *int `plist:"ThrottleInterval,omitempty"`
	// ExitTimeOut is the time from SIGTERM to SIGKILL. The default differs by release,
	// and 0 means forever, so set it.
	ExitTimeOut *int `plist:"ExitTimeOut,omitempty"`
	// ProcessType is Background, Standard, Adaptive or Interactive.
	ProcessType string `plist:"ProcessType,omitempty"`
	// UserName and GroupName are the user and group that the job runs as; root and wheel
	// by default.
	UserName  string `plist:"UserName,omitempty"`
	GroupName string `plist:"GroupName,omitempty"`
	// Umask is the job's umask, which also applies to the two files below.
	Umask *Umask `plist:"Umask,omitempty"`
	// WorkingDirectory is / by default.
	WorkingDirectory string `plist:"WorkingDirectory,omitempty"`
	// EnvironmentVariables are added to launchd's minimal environment. `launchctl print`
	// shows them to every user, so they must hold no secrets.
	EnvironmentVariables map[string]string `plist:"EnvironmentVariables,omitempty"`
	// StandardOutPath and StandardErrorPath are files that launchd creates; their
	// directory must exist.
	StandardOutPath   string `plist:"StandardOutPath,omitempty"`
	StandardErrorPath string `plist:"StandardErrorPath,omitempty"`
	// SoftResourceLimits and HardResourceLimits are limits of setrlimit(2), by launchd's
	// names for them. Check refuses NumberOfFiles.
	SoftResourceLimits map[string]int `plist:"SoftResourceLimits,omitempty"`
	HardResourceLimits map[string]int `plist:"HardResourceLimits,omitempty"`
	// AssociatedBundleIdentifiers ties the job to a signed app in Login Items; of
	// no use to a bare executable.
	AssociatedBundleIdentifiers []string `plist:"AssociatedBundleIdentifiers,omitempty"`

	// Unknown are the keys that Parse found and that have no field here, sorted. Render
	// would lose them, so Check reports them.
	Unknown []string `plist:"-"`
}

// A KeepAlive says when launchd starts a job again: always, or while one of the
// conditions holds. Any KeepAlive also starts the job when it is loaded.
type KeepAlive struct {
	// Always excludes the conditions: if it is set, they aren't written.
	Always bool
	// SuccessfulExit: after exit status 0 (true) or any other (false).
	SuccessfulExit *bool
	// Crashed: after a signal that makes a crash report (true), or not (false).
	Crashed *bool
	// PathState: while each path exists (true) or doesn't (false).
	PathState map[string]bool
	// OtherJobEnabled: while each label is loaded (true) or not (false).
	OtherJobEnabled map[string]bool
	// Ignored are conditions that launchd no longer implements (NetworkState) or that this
	// package doesn't know. Only Parse sets it; Check reports it.
	Ignored []string
}

// MarshalPlist returns a boolean or a dictionary, as launchd.plist(5) defines KeepAlive.
func (k *KeepAlive) MarshalPlist() (any, error) {
	if k.Always {
		return true, nil
	}
	d := map[string]any{}
	if k.SuccessfulExit != nil {
		d["SuccessfulExit"] = *k.SuccessfulExit
	}
	if k.Crashed != nil {
		d["Crashed"] = *k.Crashed
	}
	if len(k.PathState) > 0 {
		d["PathState"] = k.PathState
	}
	if len(k.OtherJobEnabled) > 0 {
		d["OtherJobEnabled"] = k.OtherJobEnabled
	}
	if len(d) == 0 {
		return false, nil
	}
	return d, nil
}

// UnmarshalPlist reads either form.
func (k *KeepAlive) UnmarshalPlist(unmarshal func(any) error) error {
	*k = KeepAlive{}
	if unmarshal(&k.Always) == nil {
		return nil
	}
	var d struct {
		SuccessfulExit  *bool           `plist:"SuccessfulExit"`
		Crashed         *bool           `plist:"Crashed"`
		PathState       map[string]bool `plist:"PathState"`
		OtherJobEnabled map[string]bool `plist:"OtherJobEnabled"`
	}
	if err := unmarshal(&d); err != nil {
		return err
	}
	k.SuccessfulExit, k.Crashed = d.SuccessfulExit, d.Crashed
	k.PathState, k.OtherJobEnabled = d.PathState, d.OtherJobEnabled
	var all map[string]any
	if err := unmarshal(&all); err != nil {
		return err
	}
	known := []string{"SuccessfulExit", "Crashed", "PathState", "OtherJobEnabled"}
	k.Ignored = unknownKeys(all, known)
	return nil
}

// A Umask is the set of permission bits that a job's new files don't get.
type Umask uint32

// MarshalPlist returns an integer, written in decimal. launchd reads only a string with a
// leading 0 as octal.
func (u Umask) MarshalPlist() (any, error) { return uint64(u), nil }

// UnmarshalPlist reads an integer, or a string in C's notation.
func (u *Umask) UnmarshalPlist(unmarshal func(any) error) error {
	// The string first: plist would read "022" into an integer as decimal.
	var s string
	if unmarshal(&s) == nil {
		n, err := strconv.ParseUint(s, 0, 32)
		if err != nil {
			return fmt.Errorf("read Umask %q: %w", s, errors.Unwrap(err))
		}
		*u = Umask(n)
		return nil
	}
	var n uint64
	if err := unmarshal(&n); err != nil {
		return err
	}
	if n > 0o7777 {
		return fmt.Errorf("read Umask %d: out of range", n)
	}
	*u = Umask(n)
	return nil
}

// Render checks the job and returns its property list as XML. The error of a job that
// breaks a rule wraps the first [Violation].
func (j *Job) Render() ([]byte, error) {
	if problems := j.Check(); len(problems) > 0 {
		return nil, fmt.Errorf("render property list of %q: %w", j.Label, problems[0])
	}
	var b bytes.Buffer
	e := plist.NewEncoderForFormat(&b, plist.XMLFormat)
	e.Indent("\t")
	if err := e.Encode(j); err != nil {
		return nil, fmt.Errorf("render property list of %q: %w", j.Label, err)
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// Parse reads an XML property list of at most MaxPlist bytes. It doesn't check the job;
// keys without a field go to Unknown. It refuses the binary format, which launchd also
// reads: that can describe an exponentially large tree, and no daemon is installed with it.
func Parse(data []byte) (*Job, error) {
	if len(data) > MaxPlist {
		return nil, fmt.Errorf("parse property list: %d bytes, at most %d allowed", len(data), MaxPlist)
	}
	if err := wellFormed(data); err != nil {
		return nil, fmt.Errorf("parse property list: %w", err)
	}
	var all map[string]any
	format, err := plist.Unmarshal(data, &all)
	if err != nil {
		return nil, fmt.Errorf("parse property list: %w", err)
	}
	if format != plist.XMLFormat || all == nil {
		return nil, errors.New("parse property list: not an XML dictionary")
	}
	var j Job
	if _, err := plist.Unmarshal(data, &j); err != nil {
		return nil, fmt.Errorf("parse property list: %w", err)
	}
	j.Unknown = unknownKeys(all, jobKeys())
	return &j, nil
}

// wellFormed fails unless data is one XML element, at most maxDepth deep, with only space
// around it. The library would parse anything else as one of NeXTSTEP's text formats,
// which launchd doesn't read.
func wellFormed(data []byte) error {
	d := xml.NewDecoder(bytes.NewReader(data))
	depth, elements := 0, 0
	for {
		token, err := d.Token()
		if err == io.EOF && elements == 1 {
			return nil
		}
		if err != nil {
			return err
		}
		switch t := token.(type) {
		case xml.StartElement:
			if depth == 0 {
				elements++
			}
			if depth++; depth > maxDepth || elements > 1 {
				return errors.New("elements too deep, or more than one")
			}
		case xml.EndElement:
			depth--
		case xml.CharData:
			if depth == 0 && len(bytes.TrimSpace(t)) > 0 {
				return errors.New("text outside the property list")
			}
		}
	}
}

// unknownKeys returns the keys of d that aren't in known, sorted.
func unknownKeys(d map[string]any, known []string) []string {
	var unknown []string
	for k := range d {
		if !slices.Contains(known, k) {
			unknown = append(unknown, k)
		}
	}
	slices.Sort(unknown)
	return unknown
}
