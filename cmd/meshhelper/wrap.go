package main

import (
	"fmt"
	"io"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// wrap breaks text between words into lines of at most columns characters; 0 means no
// limit. first is the start of the first line and next that of the others. A word longer
// than a line, such as a key or a path, stays whole, so that it can be copied.
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

// wrapLines breaks each line of text that is longer than columns, and indents its
// continuation like the line itself.
func wrapLines(columns int, text string) string {
	return wrapAt(columns, text, func(line string) int { return len(line) - len(strings.TrimLeft(line, " ")) })
}

// wrapAt is wrapLines with a hanging indent: at returns the width of the indent for a
// line, in bytes. What stands before it is ASCII, so that bytes are columns.
func wrapAt(columns int, text string, at func(line string) int) string {
	if columns == 0 {
		return text
	}
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if configLine.MatchString(line) {
			continue
		}
		n := at(line)
		lines[i] = wrap(columns, line[:n], strings.Repeat(" ", n), line[n:])
	}
	return strings.Join(lines, "\n")
}

// configLine matches a line of a WireGuard configuration, such as "  AllowedIPs = ::/0". It
// is never broken, because the reader copies it into a file.
var configLine = regexp.MustCompile(`^ *[A-Z][A-Za-z]* = `)

// listPrefix matches what stands before the description in a list of commands, flags or
// settings: an indent, at most 41 characters, and two or more spaces. The longest flag with
// its type fits; prose has no two spaces in a row.
var listPrefix = regexp.MustCompile(`^ *(\S.{0,40}?\s{2,})?`)

// wrapHelp breaks a help text for a terminal of so many columns. It first joins the lines
// of each paragraph, which the source code breaks at its own width. Lists and examples,
// which are indented or in columns, keep their lines.
func wrapHelp(columns int, text string) string {
	if columns == 0 {
		return text
	}
	prose := func(line string) bool {
		return line != "" && line[0] != ' ' && line[0] != '\t' && !strings.Contains(line, "  ")
	}
	var lines []string
	joins := false // whether the previous line's paragraph may go on
	for line := range strings.SplitSeq(text, "\n") {
		if joins && prose(line) {
			lines[len(lines)-1] += " " + line
		} else {
			lines = append(lines, line)
		}
		joins = prose(line) && !strings.HasSuffix(line, ":")
	}
	return wrapAt(columns, strings.Join(lines, "\n"), func(line string) int { return len(listPrefix.FindString(line)) })
}

// wrapHelpOf returns a help function that prints what help would, wrapped for the terminal.
// It prints to a.stdout itself, where cobra's would go to the command's output.
func (a *app) wrapHelpOf(help func(*cobra.Command, []string)) func(*cobra.Command, []string) {
	return func(c *cobra.Command, args []string) {
		var text strings.Builder
		c.SetOut(&text)
		help(c, args)
		c.SetOut(nil)
		fmt.Fprint(a.stdout, wrapHelp(a.columns, text.String()))
	}
}

// say writes a line of the answer to stdout, on a terminal broken between words.
func (a *app) say(format string, args ...any) {
	fmt.Fprintln(a.stdout, wrapLines(a.columns, fmt.Sprintf(format, args...)))
}

// sayWrapped writes a line of the answer that begins with first. On a terminal each
// continuation begins with next. A line of a configuration follows on a line of its own,
// unbroken.
func (a *app) sayWrapped(first, next, text string) {
	if configLine.MatchString(text) {
		a.sayVerbatim(strings.TrimRight(first, " ") + "\n  " + text)
		return
	}
	fmt.Fprintln(a.stdout, wrap(a.columns, first, next, text))
}

// talk writes a remark to stderr, on a terminal broken between words, so that stdout holds
// only the answer and can be piped.
func (a *app) talk(format string, args ...any) {
	fmt.Fprintln(a.stderr, wrapLines(a.talkColumns, fmt.Sprintf(format, args...)))
}

// sayVerbatim writes text to stdout without breaking lines: a configuration to copy, a
// script, or a QR code.
func (a *app) sayVerbatim(text string) { io.WriteString(a.stdout, text+"\n") }
