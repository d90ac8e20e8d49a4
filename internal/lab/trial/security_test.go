package trial

// The tests that docs/security.md names.

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// named matches the name of a test or a fuzz target in docs/security.md.
var named = regexp.MustCompile("`([a-z/]+)\\.((?:Test|Fuzz)[A-Za-z0-9]+)`")

// TestSecurityPage checks that every test named in docs/security.md exists.
func TestSecurityPage(t *testing.T) {
	const root = "../../.."
	page, err := os.ReadFile(filepath.Join(root, "docs/security.md"))
	if err != nil {
		t.Fatal(err)
	}
	all := named.FindAllStringSubmatch(string(page), -1)
	if len(all) < 30 {
		t.Errorf("the page names only %d tests", len(all))
	}
	for _, m := range all {
		files, err := filepath.Glob(filepath.Join(root, m[1], "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		function := regexp.MustCompile(`(?m)^func ` + m[2] + `\(`)
		found := false
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			found = found || function.Match(text)
		}
		if !found {
			t.Errorf("%s has no %s", m[1], m[2])
		}
	}
}
