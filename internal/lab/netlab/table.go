package netlab

// The table of what reaches what, as the demo prints it.

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// Table shows which host reaches which, for people: a row for each source, a column
// for each destination, in the order in which they were first set.
type Table struct {
	rows, columns []string
	cells         map[[2]string]string
}

// Set writes a cell.
func (t *Table) Set(row, column, text string) {
	if t.cells == nil {
		t.cells = map[[2]string]string{}
	}
	t.rows = addOnce(t.rows, row)
	t.columns = addOnce(t.columns, column)
	t.cells[[2]string{row, column}] = text
}

func addOnce(list []string, s string) []string {
	for _, have := range list {
		if have == s {
			return list
		}
	}
	return append(list, s)
}

// Write prints the table with its columns aligned. A cell that was never set is a
// dot. paint, if not nil, may colour a cell; it gets the text and returns what to
// print in its place, which must be as wide.
func (t *Table) Write(w io.Writer, indent string, paint func(string) string) error {
	widths := make([]int, len(t.columns)+1)
	for _, r := range t.rows {
		widths[0] = max(widths[0], utf8.RuneCountInString(r))
	}
	for i, c := range t.columns {
		widths[i+1] = utf8.RuneCountInString(c)
		for _, r := range t.rows {
			widths[i+1] = max(widths[i+1], utf8.RuneCountInString(t.cell(r, c)))
		}
	}
	lines := []string{t.line(widths, "", t.columns, nil)}
	for _, r := range t.rows {
		cells := make([]string, len(t.columns))
		for i, c := range t.columns {
			cells[i] = t.cell(r, c)
		}
		lines = append(lines, t.line(widths, r, cells, paint))
	}
	for _, line := range lines {
		if _, err := fmt.Fprintln(w, indent+strings.TrimRight(line, " ")); err != nil {
			return err
		}
	}
	return nil
}

func (t *Table) cell(row, column string) string {
	if text, ok := t.cells[[2]string{row, column}]; ok {
		return text
	}
	return "."
}

func (t *Table) line(widths []int, first string, cells []string, paint func(string) string) string {
	var b strings.Builder
	b.WriteString(pad(first, widths[0]))
	for i, text := range cells {
		b.WriteString("  ")
		shown := text
		if paint != nil {
			shown = paint(text)
		}
		b.WriteString(shown + pad("", widths[i+1]-utf8.RuneCountInString(text)))
	}
	return b.String()
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}
