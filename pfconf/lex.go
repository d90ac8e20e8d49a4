package pfconf

import (
	"fmt"
	"strconv"
	"strings"
)

// Limits on what a text may expand to. Macros are pasted as text and lists multiply, so
// without limits a few lines could use any amount of memory. Those that pfctl doesn't
// have are far beyond what a real ruleset needs.
const (
	maxToken  = 8095    // bytes of one word: pfctl's buffer, yylex in parse.y
	maxMacro  = 1 << 18 // bytes of one macro's value
	maxPasted = 1 << 23 // bytes that all uses of macros paste
	maxNested = 64      // depth of nested anchors or lists: the kernel's pf_anchor_stack
	maxRules  = 1 << 17 // rules that a text expands to
	maxErrors = 60      // bytes of foreign text that an error quotes
)

// A SyntaxError says where and why a text isn't a valid pf.conf. Either Found and
// Expected are set, or Problem.
type SyntaxError struct {
	Line, Column int // both count from 1; columns are bytes
	// Found is the word that doesn't fit the grammar, quoted or described, and Expected
	// what may stand in its place.
	Found, Expected string
	// Problem says why pf refuses a text that fits the grammar.
	Problem string
}

// Error returns the position and the problem on one line.
func (e *SyntaxError) Error() string {
	if e.Problem != "" {
		return fmt.Sprintf("line %d, column %d: %s", e.Line, e.Column, e.Problem)
	}
	return fmt.Sprintf("line %d, column %d: found %s, expected %s", e.Line, e.Column, e.Found, e.Expected)
}

type tokenKind uint8

const (
	tokEOF     tokenKind = iota
	tokNewline           // the end of a statement
	tokString            // a word that is no keyword, or a quoted string
	tokKeyword
	tokNumber
	tokPunct // one byte, or ->, >< or <>
)

// A position is where a token begins, both counted from 1. A token from a macro's value
// has the position at which the macro is used.
type position struct{ line, col int }

// A token is a word, a number or punctuation.
type token struct {
	kind tokenKind
	text string // of a number: as it was written
	num  int64
	pos  position
}

// describe returns how an error names the token.
func (t token) describe() string {
	switch t.kind {
	case tokEOF:
		return "the end of the text"
	case tokNewline:
		return "the end of the line"
	}
	text := t.text
	if len(text) > maxErrors {
		text = text[:maxErrors] + "…"
	}
	return strconv.Quote(text)
}

// A lexer splits text into tokens exactly as pfctl does (yylex, lgetc, lungetc and
// findeol in parse.y): most punctuation continues a word, quotes included; a backslash
// joins lines, also in comments; $name pastes a macro's value in front of the rest of
// the text, so $if:network works. The position of each byte is kept for errors.
type lexer struct {
	src  string
	off  int
	pos  position // of src[off]
	back []char   // bytes put back, the next to be read last

	macros map[string]string // values by name, of those defined so far
	// While inMacro is set, macro is the value that is read, from macroOff on. A negative
	// macroOff is the number of bytes to read from back first: those put back at the
	// beginning of the value come from before it.
	macro    string
	macroOff int
	inMacro  bool
	macroPos position // at which the macro is used
	pasted   int      // bytes, see maxPasted
}

// A char is a byte with its position; c is -1 at the end of the text.
type char struct {
	c   int
	pos position
}

func newLexer(src string) *lexer {
	return &lexer{src: src, pos: position{1, 1}, macros: map[string]string{}}
}

// raw reads the next byte of the source, past macros and what was put back.
func (l *lexer) raw() char {
	if l.off >= len(l.src) {
		return char{-1, l.pos}
	}
	ch := char{int(l.src[l.off]), l.pos}
	l.off++
	l.pos.col++
	if ch.c == '\n' {
		l.pos = position{l.pos.line + 1, 1}
	}
	return ch
}

// get reads the next byte. Outside quotes it drops a backslash, and a newline after it,
// which is how lines are joined (lgetc in parse.y).
func (l *lexer) get(quoted bool) char {
	if l.inMacro {
		if l.macroOff >= 0 {
			if l.macroOff < len(l.macro) {
				l.macroOff++
				return char{int(l.macro[l.macroOff-1]), l.macroPos}
			}
			l.inMacro = false
		} else {
			l.macroOff++
		}
	}
	if n := len(l.back); n > 0 {
		ch := l.back[n-1]
		l.back = l.back[:n-1]
		return ch
	}
	ch := l.raw()
	for !quoted && ch.c == '\\' {
		next := l.raw()
		if next.c != '\n' {
			return char{next.c, ch.pos}
		}
		ch = l.raw()
	}
	return ch
}

// unget puts a byte back (lungetc in parse.y). Within a macro's value that is a step
// back; at its beginning, the byte came from before the macro.
func (l *lexer) unget(ch char) {
	if ch.c < 0 {
		return
	}
	if l.inMacro {
		l.macroOff--
		if l.macroOff >= 0 {
			return
		}
	}
	l.back = append(l.back, ch)
}

// fail returns a SyntaxError for a problem at a position.
func (l *lexer) fail(pos position, problem string) error {
	return &SyntaxError{Line: pos.line, Column: pos.col, Problem: problem}
}

// next returns the next token. A $ inside a macro's value pastes nothing, so macros can't
// expand each other for ever.
func (l *lexer) next() (token, error) {
	for {
		ch := l.get(false)
		for ch.c == ' ' || ch.c == '\t' {
			ch = l.get(false)
		}
		if ch.c == '#' {
			for ch.c != '\n' && ch.c >= 0 {
				ch = l.get(false)
			}
		}
		if ch.c == '$' && !l.inMacro {
			if err := l.paste(ch.pos); err != nil {
				return token{}, err
			}
			continue
		}
		return l.scan(ch)
	}
}

// paste continues with a macro's value. The $ has been read.
func (l *lexer) paste(pos position) error {
	var name []byte
	ch := l.get(false)
	for isAlnum(ch.c) || ch.c == '_' {
		if name = append(name, byte(ch.c)); len(name) > maxToken {
			return l.fail(pos, "the name of the macro is too long")
		}
		ch = l.get(false)
	}
	l.unget(ch)
	value, ok := l.macros[string(name)]
	if !ok {
		return l.fail(pos, fmt.Sprintf("macro $%s isn't defined", clip(string(name))))
	}
	if l.pasted += len(value); l.pasted > maxPasted {
		return l.fail(pos, fmt.Sprintf("macros make more than %d bytes of text", maxPasted))
	}
	l.macro, l.macroOff, l.inMacro, l.macroPos = value, 0, true, pos
	return nil
}

// scan reads the token that begins with ch, which is no space.
func (l *lexer) scan(ch char) (token, error) {
	switch {
	case ch.c < 0:
		return token{kind: tokEOF, pos: ch.pos}, nil
	case ch.c == '\n':
		return token{kind: tokNewline, pos: ch.pos}, nil
	case ch.c == '\'' || ch.c == '"':
		return l.quoted(ch)
	case ch.c == '<' || ch.c == '>' || ch.c == '-':
		if t, ok := l.pair(ch); ok {
			return t, nil
		}
	}
	if ch.c == '-' || isDigit(ch.c) {
		if t, ok, err := l.number(ch); ok || err != nil {
			return t, err
		}
		if ch.c == '-' {
			return token{kind: tokPunct, text: "-", pos: ch.pos}, nil
		}
	}
	if isAlnum(ch.c) || ch.c == ':' || ch.c == '_' {
		return l.word(ch)
	}
	return token{kind: tokPunct, text: string([]byte{byte(ch.c)}), pos: ch.pos}, nil
}

// pair reads <>, >< or ->, whose first byte is ch, and reports whether it was one.
func (l *lexer) pair(ch char) (token, bool) {
	want := '>'
	if ch.c == '>' {
		want = '<'
	}
	next := l.get(false)
	if next.c == int(want) {
		return token{kind: tokPunct, text: string([]byte{byte(ch.c), byte(want)}), pos: ch.pos}, true
	}
	l.unget(next)
	return token{}, false
}

// quoted reads a string in single or double quotes. Newlines in it are dropped, and a
// backslash escapes only the quote that the string began with. So a string can't end
// in a backslash; see quotable.
func (l *lexer) quoted(open char) (token, error) {
	var buf []byte
	for {
		ch := l.get(true)
		switch {
		case ch.c < 0:
			return token{}, &SyntaxError{Line: open.pos.line, Column: open.pos.col,
				Found: "a quoted string without end", Expected: string([]byte{byte(open.c)})}
		case ch.c == '\n':
			continue
		case ch.c == open.c:
			return token{kind: tokString, text: string(buf), pos: open.pos}, nil
		case ch.c == '\\':
			next := l.get(true)
			if next.c == open.c {
				ch = next
			} else if next.c == '\n' {
				continue
			} else {
				l.unget(next)
			}
		case ch.c == 0:
			return token{}, l.fail(ch.pos, "the text has a zero byte")
		}
		if buf = append(buf, byte(ch.c)); len(buf) > maxToken {
			return token{}, l.fail(open.pos, "the string is too long")
		}
	}
}

// number reads an integer and reports whether it was one. Digits that continue as
// something else, as in 10.0.0.1, are put back for word to read.
func (l *lexer) number(first char) (token, bool, error) {
	var few [24]char
	read := append(few[:0], first)
	ch := l.get(false)
	for isDigit(ch.c) {
		if read = append(read, ch); len(read) > maxToken {
			return token{}, false, l.fail(first.pos, "the number is too long")
		}
		ch = l.get(false)
	}
	l.unget(ch)
	ends := ch.c < 0 || isSpace(ch.c) || strings.IndexByte("),/}=", byte(ch.c)) >= 0
	if (len(read) == 1 && first.c == '-') || !ends {
		for i := len(read) - 1; i > 0; i-- {
			l.unget(read[i])
		}
		return token{}, false, nil
	}
	text := make([]byte, len(read))
	for i, r := range read {
		text[i] = byte(r.c)
	}
	n, err := strconv.ParseInt(string(text), 10, 64)
	if err != nil {
		return token{}, false, l.fail(first.pos, "the number is out of range")
	}
	return token{kind: tokNumber, text: string(text), num: n, pos: first.pos}, true, nil
}

// direct reports whether the next bytes come straight from the source, so that a token
// can be sliced out of it without copying.
func (l *lexer) direct() bool { return !l.inMacro && len(l.back) == 0 && l.off > 0 }

// directWord slices a word out of the source. Almost all words are read this way; those
// with a backslash or of too many bytes it leaves to word.
func (l *lexer) directWord(first char) (string, bool) {
	if !l.direct() || int(l.src[l.off-1]) != first.c {
		return "", false
	}
	end := l.off
	for end < len(l.src) && inWord(int(l.src[end])) && l.src[end] != '\\' {
		end++
	}
	if end < len(l.src) && l.src[end] == '\\' || end-l.off >= maxToken {
		return "", false
	}
	text := l.src[l.off-1 : end]
	l.pos.col += end - l.off
	l.off = end
	return text, true
}

// word reads a word, through macros and joined lines.
func (l *lexer) word(first char) (token, error) {
	if text, ok := l.directWord(first); ok {
		return wordToken(text, first.pos), nil
	}
	buf := []byte{byte(first.c)}
	ch := l.get(false)
	for inWord(ch.c) {
		if buf = append(buf, byte(ch.c)); len(buf) > maxToken {
			return token{}, l.fail(first.pos, "the word is too long")
		}
		ch = l.get(false)
	}
	l.unget(ch)
	return wordToken(string(buf), first.pos), nil
}

// wordToken returns the token for an unquoted word: a keyword or a string.
func wordToken(text string, pos position) token {
	t := token{kind: tokString, text: text, pos: pos}
	if keywords[text] {
		t.kind = tokKeyword
	}
	return t
}

func isDigit(c int) bool { return c >= '0' && c <= '9' }

func isAlnum(c int) bool {
	return isDigit(c) || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

func isSpace(c int) bool { return c == ' ' || c >= '\t' && c <= '\r' }

// inWord reports whether a byte may continue a word: letters, digits and all
// punctuation except that of the grammar (allowed_in_string in parse.y).
func inWord(c int) bool {
	switch c {
	case '(', ')', '{', '}', '<', '>', '!', '=', '/', '#', ',':
		return false
	}
	return c > ' ' && c < 0x7f
}

// clip shortens foreign text for an error.
func clip(s string) string {
	if len(s) > maxErrors {
		return s[:maxErrors] + "…"
	}
	return s
}

// bareWord reports whether a string that is written without quotes, with a space
// behind it, is read back as the same string.
func bareWord(s string) bool {
	if s == "" || len(s) > maxToken || keywords[s] {
		return false
	}
	if c := int(s[0]); !isAlnum(c) && c != ':' && c != '_' {
		return false
	}
	digits := true
	for i := range len(s) {
		if c := int(s[i]); !inWord(c) || c == '\\' {
			return false
		} else if !isDigit(c) {
			digits = false
		}
	}
	return !digits
}

// quote returns a string in quotes. Not every string can be written: see quotable.
func quote(s string) string {
	if strings.Contains(s, `"`) && !strings.Contains(s, "'") {
		return "'" + s + "'"
	}
	return `"` + strings.ReplaceAll(s, `"`, `\"`) + `"`
}

// quotable reports whether the lexer reads what quote returns as the same string:
// there is no way to write a newline, a zero byte or a backslash at the end.
func quotable(s string) bool {
	return len(s) <= maxToken && !strings.ContainsAny(s, "\n\x00") && !strings.HasSuffix(s, `\`)
}

// word returns a string as it can be written: without quotes if it is read back so,
// otherwise in quotes.
func word(s string) string {
	if bareWord(s) {
		return s
	}
	return quote(s)
}
