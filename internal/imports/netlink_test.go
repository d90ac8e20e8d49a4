package imports

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The libraries of netlink, none of which asks again by itself for a list that was
// interrupted.
const (
	vishvananda = "github.com/vishvananda/netlink"
	mdlayher    = "github.com/mdlayher/netlink"
	nftables    = "github.com/google/nftables"
)

// opens lists what opens a socket of a library, and which files of the program may beside
// internal/nlconn. What is only changed by it needs no list.
var opens = map[string]map[string][]string{
	vishvananda: {"NewHandle": nil, "NewHandleAt": nil, "NewHandleAtFrom": nil},
	mdlayher:    {"Dial": {"internal/host/linux/transaction_linux.go"}, "NewConn": nil},
	nftables:    {"New": {"internal/host/linux/transaction_linux.go", "internal/lab/netlab/nft_linux.go"}},
}

// TestListsAreWhole has every list of the kernel's be read through internal/nlconn, which
// asks again for one that was interrupted. Which functions read lists is taken from the
// library's own words about them.
func TestListsAreWhole(t *testing.T) {
	reads := listers(t)
	for _, known := range []string{"AddrList", "LinkList", "RouteList", "RuleList", "XfrmPolicyList"} {
		if !reads[known] {
			t.Fatalf("%s isn't among the functions that read lists: %v", known, reads)
		}
	}
	whole := map[string]bool{}
	eachFile(t, "../../internal/nlconn", func(_ string, f *ast.File) {
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv != nil {
				whole[fn.Name.Name] = true
			}
		}
	})
	used, sockets := 0, 0
	eachFile(t, "../..", func(path string, f *ast.File) {
		if strings.HasPrefix(path, "internal/nlconn/") {
			return
		}
		libraries := map[string]string{} // by the name that the file has for them
		for _, i := range f.Imports {
			name, _ := strconv.Unquote(i.Path.Value) // it was parsed
			if opens[name] == nil {
				continue
			}
			if libraries[filepath.Base(name)] = name; i.Name != nil {
				libraries[i.Name.Name] = name
			}
		}
		linux := strings.HasSuffix(path, "_linux.go")
		ast.Inspect(f, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			of, _ := s.X.(*ast.Ident)
			library := ""
			if of != nil {
				library = libraries[of.Name]
			}
			may, opened := opens[library][s.Sel.Name]
			switch {
			case opened && !slices.Contains(may, path):
				t.Errorf("%s opens a socket by %s.%s: open it by internal/nlconn", path, library, s.Sel.Name)
			case opened:
				sockets++
			case library == vishvananda && reads[s.Sel.Name]:
				t.Errorf("%s reads a list by %s.%s, on a socket of its own: read it by internal/nlconn", path, library, s.Sel.Name)
			case library == "" && linux && reads[s.Sel.Name] && !whole[s.Sel.Name]:
				t.Errorf("%s calls %s, which internal/nlconn doesn't replace", path, s.Sel.Name)
			case library == "" && linux && reads[s.Sel.Name]:
				used++
			}
			return true
		})
	})
	if used < 5 || sockets < 2 {
		t.Errorf("only %d lists and %d sockets were found: nothing is proved", used, sockets)
	}
}

// listers returns the functions and methods of vishvananda/netlink whose comments say that
// their result may be of an interrupted list.
func listers(t *testing.T) map[string]bool {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", vishvananda).Output()
	if err != nil {
		t.Fatalf("find the library: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), "*.go"))
	if err != nil || len(files) < 20 {
		t.Fatalf("%d files of the library, %v", len(files), err)
	}
	all := map[string]bool{}
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && strings.Contains(fn.Doc.Text(), "ErrDumpInterrupted") {
				all[fn.Name.Name] = true
			}
		}
	}
	return all
}

// eachFile parses the files of the module below a folder, without tests, and names them as
// seen from the module.
func eachFile(t *testing.T, dir string, do func(path string, f *ast.File)) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		rel, err := filepath.Rel("../..", path)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err == nil {
			do(filepath.ToSlash(rel), f)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
