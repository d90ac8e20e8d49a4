// Package plain makes texts of others safe to print.
package plain

import (
	"strconv"
	"strings"
	"unicode"
)

// Text returns a text with what a terminal doesn't print escaped, such as \x1b: names of
// interfaces, tables and chains, and what other programs say, may have any bytes, and
// could else forge lines or change the terminal.
func Text(s string) string {
	odd := func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }
	if strings.IndexFunc(s, odd) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if !odd(r) {
			b.WriteRune(r)
			continue
		}
		q := strconv.QuoteRuneToASCII(r)
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}
