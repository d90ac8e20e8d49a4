// Package plain makes text from outside the program safe to print.
//
// Names of interfaces, tables and chains, and the output of other programs, may contain any
// bytes. Printed as they are, they could forge lines of a report or a log, or send control
// sequences to the terminal.
package plain

import (
	"strconv"
	"strings"
	"unicode"
)

// Text returns s with every rune that isn't printable (unicode.IsPrint) escaped as in a Go
// string literal, such as \x1b or \n. Letters outside ASCII stay. An invalid byte becomes
// \ufffd.
func Text(s string) string {
	escaped := func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }
	if strings.IndexFunc(s, escaped) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if !escaped(r) {
			b.WriteRune(r)
			continue
		}
		q := strconv.QuoteRuneToASCII(r) // with single quotes
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}
