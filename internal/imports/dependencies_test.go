package imports

import (
	"encoding/json"
	"fmt"
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

const dependenciesPage = "../../docs/dependencies.md"

// onlyTests is the cell of a module that only files of tests import.
const onlyTests = "tests"

// TestTableOfDependencies holds the table of docs/dependencies.md to go.mod and to the imports: a
// row for each module that go.mod requires directly, with the folders that import it outside
// of tests. With -update it writes the folders anew; why a module is used is for a person to
// write, so it adds no row.
func TestTableOfDependencies(t *testing.T) {
	users := moduleUsers(t)
	text, err := os.ReadFile(dependenciesPage)
	if err != nil {
		t.Fatal(err)
	}
	var page strings.Builder
	rows := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		module := strings.TrimPrefix(cells[0], "| ")
		if len(cells) != 3 || !strings.Contains(module, "/") {
			page.WriteString(line)
			continue
		}
		if rows[module] {
			t.Errorf("the page has two rows of %s", module)
		}
		rows[module] = true
		want, required := users[module]
		if !required {
			t.Errorf("the page has a row of %s, which go.mod doesn't require directly", module)
			page.WriteString(line)
			continue
		}
		if cells[1] != want && !*update {
			t.Errorf("%s: the page says\n%s\nand the imports are\n%s\nwrite them anew with go test ./internal/imports -run TableOfDependencies -update", module, cells[1], want)
		}
		fmt.Fprintf(&page, "| %s | %s | %s\n", module, want, cells[2])
	}
	for module := range users {
		if !rows[module] {
			t.Errorf("the page lacks a row of %s", module)
		}
	}
	if *update && !t.Failed() {
		if err := os.WriteFile(dependenciesPage, []byte(page.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// moduleUsers returns the cell of the table for each module that go.mod requires directly.
// Files of tests count only if no other file imports the module. A module that nothing
// imports is an error: it should leave go.mod.
func moduleUsers(t *testing.T) map[string]string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "mod", "edit", "-json").Output()
	if err != nil {
		t.Fatalf("read go.mod: %v", err)
	}
	var file struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(out, &file); err != nil {
		t.Fatalf("read go.mod: %v", err)
	}
	folders, tested := map[string]map[string]bool{}, map[string]bool{}
	for _, r := range file.Require {
		if !r.Indirect {
			folders[r.Path] = map[string]bool{}
		}
	}
	err = filepath.WalkDir("../..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel("../..", filepath.Dir(path))
		if err != nil {
			return err
		}
		for _, i := range f.Imports {
			m := moduleOf(t, i, folders)
			switch {
			case m == "":
			case strings.HasSuffix(path, "_test.go"):
				tested[m] = true
			default:
				folders[m][filepath.ToSlash(rel)] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	users := map[string]string{}
	for m, in := range folders {
		switch {
		case len(in) > 0:
			users[m] = "`" + strings.Join(slices.Sorted(maps.Keys(in)), "`, `") + "`"
		case tested[m]:
			users[m] = onlyTests
		default:
			t.Errorf("go.mod requires %s, which no file imports", m)
		}
	}
	return users
}

// moduleOf returns the module of an import among the keys of modules, the one with the
// longest path if several fit, or "" for the standard library and the module itself.
func moduleOf(t *testing.T, i *ast.ImportSpec, modules map[string]map[string]bool) (module string) {
	t.Helper()
	name, err := strconv.Unquote(i.Path.Value)
	if err != nil {
		t.Fatal(err)
	}
	for m := range modules {
		if (name == m || strings.HasPrefix(name, m+"/")) && len(m) > len(module) {
			module = m
		}
	}
	return module
}
