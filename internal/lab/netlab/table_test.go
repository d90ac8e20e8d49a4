package netlab

// Printing of a table of results.

import (
	"strings"
	"testing"
)

func TestTable(t *testing.T) {
	var table Table
	table.Set("C", "internet", "yes")
	table.Set("C", "A", "–")
	table.Set("L", "A", "no answer")
	var out strings.Builder
	paint := func(s string) string { return "<" + s + ">" }
	if err := table.Write(&out, "  ", paint); err != nil {
		t.Fatal(err)
	}
	want := `     internet  A
  C  <yes>       <–>
  L  <.>         <no answer>
`
	if got := out.String(); got != want {
		t.Errorf("table is\n%swant\n%s", got, want)
	}
}
