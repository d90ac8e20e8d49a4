package imports

import (
	"flag"
	"fmt"
	"go/ast"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what the imports say into the pages of docs anew")

const page = "../../docs/architecture.md"

// TestTableOfThePage compares the table of docs/architecture.md with that of this test.
func TestTableOfThePage(t *testing.T) {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	parentheses := regexp.MustCompile(`\([^)]*\)`)
	found := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if len(cells) != 3 || !strings.HasPrefix(cells[0], "| `") {
			continue
		}
		room := strings.Trim(cells[0], "| `")
		may, known := rooms[room]
		if found[room] = true; !known && !strings.HasPrefix(room, "internal/lab/") {
			t.Errorf("the page has a room %s that the table hasn't", room)
			continue
		}
		var want []string
		for _, r := range may {
			if r == all {
				r = "all"
			}
			want = append(want, strings.TrimPrefix(r, "internal/"))
		}
		var got []string
		for one := range strings.SplitSeq(parentheses.ReplaceAllString(strings.Trim(cells[2], "| "), ""), ",") {
			if one = strings.TrimSpace(one); one != "nothing of ours" {
				got = append(got, one)
			}
		}
		if strings.HasPrefix(room, "internal/lab") {
			want = []string{"all"}
		}
		slices.Sort(want)
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%s: the page says %q, the table %q", room, got, want)
		}
	}
	for room := range rooms {
		if !found[room] {
			t.Errorf("the page lacks the room %s", room)
		}
	}
}

// groups are the rows of the figure, from the top.
var groups = []struct {
	name, title string
	rooms       []string
}{
	{"service", "the program and the service", []string{"cmd/meshhelper", "internal/daemon", "internal/install", "internal/api", "internal/explain", "internal/logfile", "internal/systemd"}},
	{"states", "three states, three owners", []string{"internal/wanted", "internal/learned", "internal/held", "internal/reconcile", "internal/resolve", "internal/events"}},
	{"enforcing", "what may pass, and three enforcers", []string{"internal/mesh", "internal/policy", "internal/flow", "internal/guard", "internal/tunnel", "internal/stock", "internal/host", "internal/host/linux", "internal/host/macos"}},
	{"libraries", "libraries that know no mesh", []string{"darwin", "pfconf", "pfconf/pfsim", "launchd"}},
}

// TestFigure draws the rooms of the program and their imports, and compares that with the
// figure of docs/architecture.md. An arrow that follows from two others is left out, and so
// are the small tools that many rooms use.
func TestFigure(t *testing.T) {
	figure := draw(t)
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "```mermaid\n", "```\n"
	before, rest, ok := strings.Cut(string(text), begin)
	old, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s has no figure", page)
	}
	if old == figure {
		return
	}
	if !*update {
		t.Fatalf("the figure isn't what the imports are; write it anew with go test ./internal/imports -run Figure -update\n%s", figure)
	}
	if err := os.WriteFile(page, []byte(before+begin+figure+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// draw returns the figure in Mermaid's language.
func draw(t *testing.T) string {
	uses := programImports(t)
	drawn := map[string]bool{}
	var b strings.Builder
	b.WriteString("flowchart TB\n")
	for _, g := range groups {
		fmt.Fprintf(&b, "  subgraph %s[%s]\n", g.name, g.title)
		for _, room := range g.rooms {
			if _, known := rooms[room]; !known {
				t.Errorf("the figure has a room %s that doesn't exist", room)
			}
			drawn[room] = true
			fmt.Fprintf(&b, "    %s[%s]\n", node(room), strings.TrimPrefix(room, "internal/"))
		}
		b.WriteString("  end\n")
	}
	for _, from := range slices.Sorted(maps.Keys(uses)) {
		for _, to := range slices.Sorted(maps.Keys(uses[from])) {
			if drawn[from] && drawn[to] && !follows(uses, from, to) {
				fmt.Fprintf(&b, "  %s --> %s\n", node(from), node(to))
			}
		}
	}
	for room := range rooms {
		if !drawn[room] && !slices.Contains(notDrawn, room) {
			t.Errorf("the room %s is neither drawn nor left out", room)
		}
	}
	return b.String()
}

// notDrawn are rooms that aren't drawn: small tools that many others use, and what isn't of
// the program.
var notDrawn = []string{
	"internal/owned", "internal/plain", "internal/retry", "internal/nlconn",
	"internal/imports", "internal/lab", "scripts", "darwin/darwintest", "launchd/launchdtest",
}

func node(room string) string {
	return strings.NewReplacer("/", "_", "internal/", "").Replace(room)
}

// follows reports whether from reaches to by another room, too.
func follows(uses map[string]map[string]bool, from, to string) bool {
	seen := map[string]bool{}
	var reaches func(room string) bool
	reaches = func(room string) bool {
		if room == to {
			return true
		}
		if seen[room] {
			return false
		}
		seen[room] = true
		for next := range uses[room] {
			if reaches(next) {
				return true
			}
		}
		return false
	}
	for next := range uses[from] {
		if next != to && reaches(next) {
			return true
		}
	}
	return false
}

// programImports returns which rooms each room imports outside of its tests.
func programImports(t *testing.T) map[string]map[string]bool {
	uses := map[string]map[string]bool{}
	eachFile(t, "../..", func(path string, f *ast.File) {
		from, _, known := roomOf(filepath.ToSlash(filepath.Dir(path)))
		if !known {
			return // TestRooms says so
		}
		if uses[from] == nil {
			uses[from] = map[string]bool{}
		}
		for _, i := range f.Imports {
			name, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			short, ours := strings.CutPrefix(name, module)
			if to, _, known := roomOf(short); ours && known && to != from {
				uses[from][to] = true
			}
		}
	})
	return uses
}
