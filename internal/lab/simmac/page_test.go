package simmac

// The list of assumptions in the documentation.

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMacPage keeps the list of assumptions in docs/macos.md true.
func TestMacPage(t *testing.T) {
	page, err := os.ReadFile("../../../docs/macos.md")
	if err != nil {
		t.Fatal(err)
	}
	const head = "\n| assumption | source |\n|---|---|\n"
	_, table, found := strings.Cut(string(page), head)
	if !found {
		t.Fatalf("the page has no table %q", head)
	}
	table, _, _ = strings.Cut(table, "\n\n")
	got := slices.DeleteFunc(strings.Split(table, "\n"), func(line string) bool { return line == "" })
	var want []string
	for _, a := range Assumptions() {
		want = append(want, fmt.Sprintf("| `%s` | %s |", a.Name, a.Source))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("docs/macos.md (-assumed +written):\n%s", diff)
	}
}
