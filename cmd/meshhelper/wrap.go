package main

import (
	"fmt"
	"io"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// wrap breaks a line between words, where columns isn't 0; next stands before each line
// but the first. A word that is longer than a line stays whole, to be copied.
func wrap(columns int, first, next, text string) string {
	var out strings.Builder
	line := first
	for i, word := range strings.Split(text, " ") {
		switch {
		case i == 0:
		case columns > 0 && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > columns:
			out.WriteString(strings.TrimRight(line, " ") + "\n")
			line = next
		default:
			line += " "
		}
		line += word
	}
	return out.String() + line
}

// wrapLines breaks each line of a text that is longer than columns, and goes on below its
// first letter.
func wrapLines(columns int, text string) string {
	return wrapAt(columns, text, func(line string) int { return len(line) - len(strings.TrimLeft(line, " ")) })
}

// wrapAt breaks each line of a text, and goes on below what begins at the byte that at
// returns.
func wrapAt(columns int, text string, at func(line string) int) string {
	if columns == 0 {
		return text
	}
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if copied.MatchString(line) {
			continue
		}
		n := at(line)
		lines[i] = wrap(columns, line[:n], strings.Repeat(" ", n), line[n:])
	}
	return strings.Join(lines, "\n")
}

// copied finds a line of a WireGuard configuration, which is copied into one and so stays
// whole.
var copied = regexp.MustCompile(`^ *[A-Z][A-Za-z]* = `)

// listed finds the text of a line of a help's list, behind a command or a flag: at most
// 40 characters and two or more spaces stand before it.
var listed = regexp.MustCompile(`^ *(\S.{0,40}?\s{2,})?`)

// wrapHelp breaks a help for the terminal: the lines of each paragraph, which the source
// breaks, are joined before; lists and examples, which are indented or have columns, keep
// theirs.
func wrapHelp(columns int, text string) string {
	if columns == 0 {
		return text
	}
	prose := func(line string) bool {
		return line != "" && line[0] != ' ' && line[0] != '\t' && !strings.Contains(line, "  ")
	}
	var lines []string
	goesOn := false
	for line := range strings.SplitSeq(text, "\n") {
		if goesOn && prose(line) {
			lines[len(lines)-1] += " " + line
		} else {
			lines = append(lines, line)
		}
		goesOn = prose(line) && !strings.HasSuffix(line, ":")
	}
	return wrapAt(columns, strings.Join(lines, "\n"), func(line string) int { return len(listed.FindString(line)) })
}

// wrapHelpOf returns help as it is printed at a terminal.
func (a *app) wrapHelpOf(help func(*cobra.Command, []string)) func(*cobra.Command, []string) {
	return func(c *cobra.Command, args []string) {
		var text strings.Builder
		c.SetOut(&text)
		help(c, args)
		c.SetOut(nil)
		fmt.Fprint(a.stdout, wrapHelp(a.columns, text.String()))
	}
}

// say writes a line of the answer, at a terminal broken between words.
func (a *app) say(format string, args ...any) {
	fmt.Fprintln(a.stdout, wrapLines(a.columns, fmt.Sprintf(format, args...)))
}

// sayWrapped writes a line of the answer that goes on, at a terminal, behind next. A line
// of a configuration stands below first, as it is.
func (a *app) sayWrapped(first, next, text string) {
	if copied.MatchString(text) {
		a.sayWhole(strings.TrimRight(first, " ") + "\n  " + text)
		return
	}
	fmt.Fprintln(a.stdout, wrap(a.columns, first, next, text))
}

// talk writes a line beside the answer, at a terminal broken between words.
func (a *app) talk(format string, args ...any) {
	fmt.Fprintln(a.stderr, wrapLines(a.talkColumns, fmt.Sprintf(format, args...)))
}

// sayWhole writes what is to be copied or scanned as it is.
func (a *app) sayWhole(text string) { io.WriteString(a.stdout, text+"\n") }
