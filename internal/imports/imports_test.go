// Package imports keeps the table of rooms true: what each package of the module
// may import of the others, and which one alone has a heavy dependency.
package imports

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/meshhelper/meshhelper/"

// all stands for every package of the module.
const all = "*"

// rooms lists what each package may import of the module, beside packages below
// itself. docs/architecture.md explains it.
var rooms = map[string][]string{
	"cmd/meshhelper":      {all},
	"internal/api":        {"internal/events", "internal/mesh", "internal/owned"},
	"internal/daemon":     {"internal/api", "internal/events", "internal/explain", "internal/held", "internal/host", "internal/learned", "internal/mesh", "internal/plain", "internal/policy", "internal/reconcile", "internal/resolve", "internal/retry", "internal/stock", "internal/tunnel", "internal/wanted"},
	"internal/events":     {"internal/owned", "internal/plain"},
	"internal/explain":    {"internal/api", "internal/events", "internal/held", "internal/host", "internal/learned", "internal/mesh", "internal/owned", "internal/plain", "internal/policy", "internal/retry", "internal/wanted"},
	"internal/flow":       {"internal/mesh", "internal/policy"},
	"internal/held":       {"internal/guard", "internal/host", "internal/learned", "internal/mesh", "internal/policy", "internal/tunnel"},
	"internal/guard":      {"internal/flow", "internal/mesh", "internal/policy"},
	"internal/host":       {"internal/mesh", "internal/owned", "internal/policy"},
	"internal/host/linux": {"internal/flow", "internal/host", "internal/mesh", "internal/nlconn", "internal/policy"},
	"internal/host/macos": {"darwin", "internal/flow", "internal/host", "internal/mesh", "internal/owned", "internal/policy", "pfconf", "pfconf/pfsim"},
	"internal/imports":    {},
	"internal/install":    {"internal/host", "internal/owned", "launchd"},
	"internal/lab":        {all},
	"internal/learned":    {"internal/mesh", "internal/owned"},
	"internal/logfile":    {},
	"internal/mesh":       {},
	"internal/nlconn":     {},
	"internal/owned":      {},
	"internal/plain":      {},
	"internal/policy":     {"internal/mesh"},
	"internal/reconcile":  {"internal/api", "internal/events", "internal/guard", "internal/held", "internal/host", "internal/learned", "internal/mesh", "internal/policy", "internal/retry", "internal/tunnel", "internal/wanted"},
	"internal/resolve":    {"internal/learned", "internal/mesh", "internal/retry"},
	"internal/retry":      {},
	"internal/stock":      {"internal/mesh"},
	"internal/systemd":    {},
	"internal/tunnel":     {"internal/mesh", "internal/nlconn"},
	"internal/wanted":     {"internal/api", "internal/events", "internal/host", "internal/mesh", "internal/owned", "internal/retry"},
	"darwin":              {"pfconf"},
	"darwin/darwintest":   {"darwin", "darwin/internal/xnu", "pfconf", "pfconf/pfsim"},
	"launchd":             {},
	"launchd/launchdtest": {"launchd"},
	"pfconf":              {},
	"pfconf/pfsim":        {"pfconf"},
	"scripts":             {},
}

// testsMay lists what tests may import besides.
var testsMay = []string{"internal/owned", "darwin/darwintest", "launchd/launchdtest", "internal/logfile", "internal/host/hostfake", "internal/host/hosttest", "internal/lab/netlab", "internal/lab/rulesets", "internal/lab/simmac", "internal/policy", "internal/guard", "internal/flow", "internal/flow/flowtest", "internal/mesh", "internal/mesh/meshtest", "internal/tunnel", "pfconf", "pfconf/internal/vectors", "pfconf/pfsim"}

// only lists the rooms that may have a dependency which others must not.
var only = map[string][]string{
	"github.com/spf13/cobra":            {"cmd/meshhelper"},
	"gvisor.dev/gvisor":                 {"internal/lab"},
	"github.com/google/nftables":        {"internal/host/linux", "internal/nlconn", "internal/lab"},
	"github.com/vishvananda/netlink":    {"internal/host/linux", "internal/nlconn", "internal/lab"},
	"howett.net/plist":                  {"launchd"},
	"github.com/piglig/go-qr":           {"internal/stock"},
	"golang.zx2c4.com/wireguard/device": {"internal/tunnel", "internal/lab"},
	"golang.zx2c4.com/wireguard/conn":   {"internal/tunnel", "internal/lab"},
}

// TestRooms parses the imports of every Go file, whatever system it is for.
func TestRooms(t *testing.T) {
	files := 0
	err := filepath.WalkDir("../..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		hidden := strings.HasPrefix(entry.Name(), ".") && path != "../.."
		if entry.IsDir() && (hidden || entry.Name() == "testdata") {
			return fs.SkipDir
		}
		if filepath.Ext(path) != ".go" {
			return nil
		}
		files++
		checkFile(t, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 50 {
		t.Errorf("only %d files were found", files)
	}
	for room := range rooms {
		if _, err := os.Stat(filepath.Join("../..", room)); err != nil {
			t.Errorf("the table has a room that doesn't exist: %v", err)
		}
	}
	t.Logf("%d files", files)
}

// TestProgramHasNoTests lists what the program is built of: nothing that is for
// tests only, whatever imports it.
func TestProgramHasNoTests(t *testing.T) {
	for _, system := range []string{"darwin", "linux", "windows"} {
		cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", module+"cmd/meshhelper")
		cmd.Env = append(os.Environ(), "GOOS="+system, "CGO_ENABLED=0")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("list packages for %s: %v", system, err)
		}
		packages := strings.Fields(string(out))
		if len(packages) < 50 {
			t.Errorf("only %d packages for %s", len(packages), system)
		}
		for _, p := range packages {
			for _, forTests := range []string{module + "internal/lab", module + "internal/host/hostfake", module + "internal/host/hosttest", module + "darwin/darwintest", module + "launchd/launchdtest", module + "pfconf/internal", "gvisor.dev/", "testing", "pgregory.net/", "github.com/makiuchi-d/"} {
				if strings.HasPrefix(p, forTests) {
					t.Errorf("the program for %s has %s", system, p)
				}
			}
		}
	}
}

// forTests are what only tests need: no symbol of it is in the program. Of pfsim the
// helper on a Mac judges with Machine; what runs a packet filter on is PF's.
var forTests = []string{"darwin/darwintest.", "launchd/launchdtest.", "pfconf/internal/vectors.", "pfconf/pfsim.(*PF).", "pfconf/pfsim.NewPF",
	"pfconf/pfsim.State.", "pfconf/pfsim.RuleCounters.", "internal/lab/"}

// TestProgramLinksNoTests builds the program as a release does, looks for what only
// tests need, and says how big it is. Where the host isn't a Mac, pf's evaluator isn't
// linked either.
func TestProgramLinksNoTests(t *testing.T) {
	for _, system := range []string{"darwin/arm64", "linux/amd64", "windows/amd64"} {
		t.Run(system, func(t *testing.T) {
			goos, arch, _ := strings.Cut(system, "/")
			program := filepath.Join(t.TempDir(), "meshhelper")
			cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", program, module+"cmd/meshhelper")
			cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH="+arch, "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("build: %v\n%s", err, out)
			}
			info, err := os.Stat(program)
			if err != nil {
				t.Fatal(err)
			}
			symbols, err := exec.CommandContext(t.Context(), "go", "tool", "nm", program).Output()
			if err != nil {
				t.Fatalf("list symbols: %v", err)
			}
			if !strings.Contains(string(symbols), module+"internal/daemon.") {
				t.Fatal("the program has no symbols of its own")
			}
			unwanted := forTests
			if judges := strings.Contains(string(symbols), " "+module+"pfconf/pfsim.(*Machine).Forward"); goos != "darwin" {
				unwanted = append(slices.Clone(unwanted), "pfconf/pfsim.(*Machine).")
			} else if !judges {
				t.Error("the program doesn't judge other software's rules, or its symbols have other names")
			}
			for symbol := range strings.Lines(string(symbols)) {
				for _, u := range unwanted {
					if strings.Contains(symbol, " "+module+u) {
						t.Errorf("linked: %s", strings.TrimSpace(symbol))
					}
				}
			}
			t.Logf("%d bytes", info.Size())
		})
	}
}

func checkFile(t *testing.T, path string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	rel, err := filepath.Rel("../..", path)
	if err != nil {
		t.Fatal(err)
	}
	dir, test := filepath.ToSlash(filepath.Dir(rel)), strings.HasSuffix(path, "_test.go")
	room, may, known := roomOf(dir)
	if !known {
		t.Errorf("%s: the folder %s isn't in the table", rel, dir)
		return
	}
	if test {
		may = append(slices.Clone(may), testsMay...)
	}
	for _, i := range f.Imports {
		name, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		if own, ok := strings.CutPrefix(name, module); ok {
			if !allowed(own, room, may) {
				t.Errorf("%s imports %s, which %s may not", rel, own, room)
			}
			continue
		}
		for dependency, holders := range only {
			if (name == dependency || strings.HasPrefix(name, dependency+"/")) && !test && !slices.Contains(holders, room) {
				t.Errorf("%s imports %s, which only %v may", rel, name, holders)
			}
		}
	}
}

// renames lists the files of the program, beside internal/owned, that rename one, and why.
var renames = map[string]string{
	"internal/api/listen.go":      "a dead socket is put aside before it is removed",
	"internal/wanted/store.go":    "two files are written before any is renamed; both are owned's",
	"internal/logfile/logfile.go": "a full log gets an older name",
}

// TestFilesAreReplacedByOwned finds files that are replaced by hand: what makes that safe
// after a crash, and among other users, is in internal/owned.
func TestFilesAreReplacedByOwned(t *testing.T) {
	left := maps.Clone(renames)
	eachFile(t, "../..", func(path string, f *ast.File) {
		if room, _, _ := roomOf(filepath.ToSlash(filepath.Dir(path))); room == "internal/owned" || room == "internal/lab" {
			return
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if of, ok := call.X.(*ast.Ident); !ok || of.Name != "os" || call.Sel.Name != "CreateTemp" && call.Sel.Name != "Rename" {
				return true
			}
			if _, known := renames[path]; !known || call.Sel.Name == "CreateTemp" {
				t.Errorf("%s calls os.%s: have internal/owned replace the file", path, call.Sel.Name)
			}
			delete(left, path)
			return true
		})
	})
	for path := range left {
		t.Errorf("%s renames nothing any more: take it off the list", path)
	}
}

// roomOf returns the entry of the table for a folder: the nearest one at or above it.
func roomOf(dir string) (room string, may []string, known bool) {
	for name, its := range rooms {
		if (dir == name || strings.HasPrefix(dir, name+"/")) && len(name) > len(room) {
			room, may, known = name, its, true
		}
	}
	return room, may, known
}

func allowed(own, room string, may []string) bool {
	if of, _, _ := roomOf(own); of == room {
		return true
	}
	return slices.Contains(may, all) || slices.Contains(may, own)
}
