package imports

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityPage checks that the tests which docs/security.md names exist in
// the packages that it names with them.
func TestSecurityPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	word := regexp.MustCompile("`[a-z/]+`|(Test|Fuzz)[A-Za-z0-9]+")
	named := 0
	for line := range strings.Lines(string(page)) {
		room := ""
		for _, w := range word.FindAllString(line, -1) {
			if w[0] == '`' {
				room = strings.Trim(w, "`")
				continue
			}
			named++
			if !hasTest(t, room, w) {
				t.Errorf("package %q has no %s", room, w)
			}
		}
	}
	if named == 0 {
		t.Error("the page names no test")
	}
}

// hasTest reports whether a test function is in the files of a package.
func hasTest(t *testing.T, room, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../..", room, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "\nfunc "+name+"(") {
			return true
		}
	}
	return false
}
