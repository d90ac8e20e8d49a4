package launchd_test

import (
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/launchd"
)

const label = "org.example.daemon"

// daemon returns the job of the golden file.
func daemon() *launchd.Job {
	return &launchd.Job{
		Label:                label,
		ProgramArguments:     []string{"/Library/PrivilegedHelperTools/" + label, "run", "--endpoint", "a&b <c>"},
		RunAtLoad:            true,
		KeepAlive:            &launchd.KeepAlive{Always: true},
		ExitTimeOut:          new(20),
		ProcessType:          launchd.Interactive,
		Umask:                new(launchd.Umask(0o022)),
		EnvironmentVariables: map[string]string{"GOTRACEBACK": "single"},
		StandardErrorPath:    "/var/log/example/stderr.log",
	}
}

// TestRenderGolden renders the job of the golden file and parses it back.
func TestRenderGolden(t *testing.T) {
	got, err := daemon().Render()
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join("testdata", label+".plist"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("rendered (-want +got):\n%s", diff)
	}
	parsed, err := launchd.Parse(got)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(daemon(), parsed); diff != "" {
		t.Errorf("parsed again (-want +got):\n%s", diff)
	}
}

// TestKeepAliveForms renders and parses each form of KeepAlive.
func TestKeepAliveForms(t *testing.T) {
	for name, k := range map[string]*launchd.KeepAlive{
		"never":      {},
		"always":     {Always: true},
		"conditions": {SuccessfulExit: new(false), Crashed: new(true), PathState: map[string]bool{"/x": true}, OtherJobEnabled: map[string]bool{"o": false}},
	} {
		t.Run(name, func(t *testing.T) {
			j := daemon()
			j.KeepAlive = k
			data, err := j.Render()
			if err != nil {
				t.Fatal(err)
			}
			got, err := launchd.Parse(data)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(j, got); diff != "" {
				t.Errorf("parsed again (-want +got):\n%s", diff)
			}
		})
	}
}

// inPlist wraps s in a property list's dictionary.
func inPlist(s string) []byte {
	return []byte(`<?xml version="1.0" encoding="UTF-8"?><plist version="1.0"><dict>` + s + `</dict></plist>`)
}

// TestParseOthers parses a job with keys and forms that Render doesn't write.
func TestParseOthers(t *testing.T) {
	j, err := launchd.Parse(inPlist(`<key>Label</key><string>x</string>
<key>ProgramArguments</key><array><string>/bin/x</string></array>
<key>Umask</key><string>027</string><key>MachServices</key><dict><key>a</key><true/></dict>
<key>KeepAlive</key><dict><key>NetworkState</key><true/></dict>`))
	if err != nil {
		t.Fatal(err)
	}
	if *j.Umask != 0o027 {
		t.Errorf("a string umask is octal: got %#o", uint32(*j.Umask))
	}
	if !slices.Equal(j.Unknown, []string{"MachServices"}) {
		t.Errorf("unknown keys %q", j.Unknown)
	}
	var rules []string
	for _, v := range j.Check() {
		rules = append(rules, v.Rule)
	}
	if want := []string{"keep alive", "unknown keys"}; !slices.Equal(rules, want) {
		t.Errorf("broken rules %q, want %q", rules, want)
	}
}

// TestParseRefuses parses malformed jobs and property lists.
func TestParseRefuses(t *testing.T) {
	for name, in := range map[string]string{
		"nothing":        "",
		"not XML":        `{ Label = x; }`,
		"binary":         "bplist00\xd1\x01\x02",
		"an array":       `<?xml version="1.0"?><plist version="1.0"><array/></plist>`,
		"a wrong type":   string(inPlist(`<key>ProgramArguments</key><string>/bin/x</string>`)),
		"a bad umask":    string(inPlist(`<key>Umask</key><string>09</string>`)),
		"a huge umask":   string(inPlist(`<key>Umask</key><integer>70000</integer>`)),
		"cut off":        `<?xml version="1.0"?><plist version="1.0"><dict><key>Label</key>`,
		"too much":       string(inPlist(strings.Repeat(" ", launchd.MaxPlist))),
		"a bad keyalive": string(inPlist(`<key>KeepAlive</key><dict><key>Crashed</key><string>x</string></dict>`)),
	} {
		t.Run(name, func(t *testing.T) {
			if j, err := launchd.Parse([]byte(in)); err == nil {
				t.Errorf("parsed as %+v", j)
			}
		})
	}
}

// TestCheckRules breaks one rule of a job at a time: Check names it, and Render refuses
// the job.
func TestCheckRules(t *testing.T) {
	for _, tt := range []struct {
		rule  string
		spoil func(*launchd.Job)
	}{
		{"label", func(j *launchd.Job) { j.Label = "" }},
		{"label", func(j *launchd.Job) { j.Label = "../../etc/x" }},
		{"label", func(j *launchd.Job) { j.Label = strings.Repeat("x", 129) }},
		{"arguments", func(j *launchd.Job) { j.ProgramArguments = nil }},
		{"arguments", func(j *launchd.Job) { j.ProgramArguments[0] = "daemon" }},
		{"arguments", func(j *launchd.Job) { j.ProgramArguments[0] = "/opt/../tmp/x" }},
		{"program", func(j *launchd.Job) { j.Program = "daemon" }},
		{"output", func(j *launchd.Job) { j.StandardOutPath = "log" }},
		{"errors", func(j *launchd.Job) { j.StandardErrorPath = "log" }},
		{"directory", func(j *launchd.Job) { j.WorkingDirectory = "." }},
		{"process type", func(j *launchd.Job) { j.ProcessType = "interactive" }},
		{"exit timeout", func(j *launchd.Job) { j.ExitTimeOut = new(0) }},
		{"throttle", func(j *launchd.Job) { j.ThrottleInterval = new(-1) }},
		{"umask", func(j *launchd.Job) { j.Umask = new(launchd.Umask(0o1000)) }},
		{"keep alive", func(j *launchd.Job) { j.KeepAlive.Ignored = []string{"NetworkState"} }},
		{"file limit", func(j *launchd.Job) { j.SoftResourceLimits = map[string]int{"NumberOfFiles": 1 << 16} }},
		{"file limit", func(j *launchd.Job) { j.HardResourceLimits = map[string]int{"NumberOfFiles": 1 << 16} }},
		{"environment", func(j *launchd.Job) { j.EnvironmentVariables = map[string]string{"A=B": ""} }},
		{"text", func(j *launchd.Job) { j.ProgramArguments[1] = "a\x00b" }},
		{"text", func(j *launchd.Job) { j.EnvironmentVariables["X"] = "\xff" }},
		{"unknown keys", func(j *launchd.Job) { j.Unknown = []string{"Sockets"} }},
	} {
		j := daemon()
		tt.spoil(j)
		got := j.Check()
		if len(got) != 1 || got[0].Rule != tt.rule {
			t.Errorf("want only rule %q broken, got %+v", tt.rule, got)
		}
		if _, err := j.Render(); err == nil {
			t.Errorf("rule %q is broken, but the job was rendered", tt.rule)
		}
	}
}

// TestCheckFile breaks one rule of a property list's file at a time, as launchd checks
// them.
func TestCheckFile(t *testing.T) {
	good := launchd.File{Path: "/Library/LaunchDaemons/" + label + ".plist", Mode: 0o644}
	if v := launchd.CheckFile(good, label); len(v) > 0 {
		t.Errorf("a valid file breaks %v", v)
	}
	for rule, spoil := range map[string]func(*launchd.File){
		"place": func(f *launchd.File) { f.Path = "/tmp/" + label + ".plist" },
		"name":  func(f *launchd.File) { f.Path = "/Library/LaunchDaemons/other.plist" },
		"owner": func(f *launchd.File) { f.UID = 501 },
		"mode":  func(f *launchd.File) { f.Mode = 0o664 },
		"type":  func(f *launchd.File) { f.Mode = 0o644 | fs.ModeSymlink },
	} {
		f := good
		spoil(&f)
		if v := launchd.CheckFile(f, label); len(v) != 1 || v[0].Rule != rule {
			t.Errorf("want only rule %q broken, got %v", rule, v)
		}
	}
	world := good
	world.Mode = 0o646
	if v := launchd.CheckFile(world, label); len(v) != 1 {
		t.Errorf("world-writable file: %v", v)
	}
}

// TestCheckProgram makes one file on the path to the program unsafe at a time.
func TestCheckProgram(t *testing.T) {
	chain := func() []launchd.File {
		return []launchd.File{
			{Path: "/Library/PrivilegedHelperTools/x", Mode: 0o755},
			{Path: "/Library/PrivilegedHelperTools", Mode: fs.ModeDir | 0o755},
			{Path: "/Library", Mode: fs.ModeDir | 0o755},
			{Path: "/", Mode: fs.ModeDir | 0o755},
		}
	}
	if v := launchd.CheckProgram(chain()); len(v) > 0 {
		t.Errorf("a valid chain breaks %v", v)
	}
	for name, spoil := range map[string]func([]launchd.File){
		"owner of program":    func(c []launchd.File) { c[0].UID = 501 },
		"group may write":     func(c []launchd.File) { c[1].Mode |= 0o020 },
		"sticky is no help":   func(c []launchd.File) { c[2].Mode = fs.ModeDir | fs.ModeSticky | 0o777 },
		"link on the way":     func(c []launchd.File) { c[1].Mode = fs.ModeSymlink | 0o755 },
		"link as program":     func(c []launchd.File) { c[0].Mode = fs.ModeSymlink | 0o755 },
		"not executable":      func(c []launchd.File) { c[0].Mode = 0o644 },
		"directory of a user": func(c []launchd.File) { c[2].UID = 501 },
	} {
		c := chain()
		spoil(c)
		if v := launchd.CheckProgram(c); len(v) != 1 {
			t.Errorf("%s: want one broken rule, got %v", name, v)
		}
	}
}

// TestChainOfThisBinary checks that Chain lists the test binary and its directories up to
// the root.
func TestChainOfThisBinary(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c, err := launchd.Chain(exe)
	if err != nil {
		t.Fatal(err)
	}
	if c[0].Path != exe || !c[0].Mode.IsRegular() || c[len(c)-1].Path != "/" {
		t.Errorf("chain of %q: %+v", exe, c)
	}
	if _, err := launchd.Chain("relative"); err == nil {
		t.Error("Chain accepted a relative path")
	}
}

// FuzzParse checks that a parsed job without broken rules renders, and that the rendering
// is stable.
func FuzzParse(f *testing.F) {
	golden, err := os.ReadFile(filepath.Join("testdata", label+".plist"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden)
	f.Add(inPlist(`<key>Label</key><string>x</string><key>Umask</key><string>022</string>`))
	f.Add(inPlist(`<key>KeepAlive</key><dict><key>PathState</key><dict><key>/x</key><false/></dict></dict>`))
	f.Add([]byte("{Label = x;}"))
	f.Add(inPlist(strings.Repeat("<array>", 5000)))
	f.Fuzz(func(t *testing.T, in []byte) {
		j, err := launchd.Parse(in)
		if err != nil || len(j.Check()) > 0 {
			return
		}
		out, err := j.Render()
		if err != nil {
			t.Fatalf("a valid job isn't rendered: %v", err)
		}
		again, err := launchd.Parse(out)
		if err != nil {
			t.Fatalf("a rendered job isn't parsed: %v\n%s", err, out)
		}
		once, err := again.Render()
		if err != nil || string(once) != string(out) {
			t.Fatalf("rendered differently again: %v\nfirst\n%s\nsecond\n%s", err, out, once)
		}
	})
}

// TestEveryKeyIsWritten checks that each field of Job is written under its own name.
func TestEveryKeyIsWritten(t *testing.T) {
	j := daemon()
	v := reflect.ValueOf(j).Elem()
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("plist"), ",")
		if name != "-" && name != v.Type().Field(i).Name {
			t.Errorf("field %s is written as %q", v.Type().Field(i).Name, name)
		}
	}
	j.ThrottleInterval = new(math.MaxInt32)
	if v := j.Check(); len(v) != 1 {
		t.Errorf("a throttle interval beyond the limit: %v", v)
	}
}
