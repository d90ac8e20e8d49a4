package pfconf

import (
	"fmt"
	"strconv"
	"strings"
)

// Limits on the expansion of macros. They are pasted as text, so without a limit a few
// lines of them could expand without end.
const (
	maxToken  = 8095    // bytes of one word, as pfctl's buffer
	maxMacro  = 1 << 18 // bytes of one macro
	maxPasted = 1 << 23 // bytes that all uses of macros paste
	maxNested = 64      // anchors or lists within each other, as pf's stack
	maxRules  = 1 << 17 // rules that a text expands to
	maxErrors = 60      // bytes of foreign text that an error repeats
)

// A SyntaxError says where and why a text isn't pf.conf.
type SyntaxError struct {
	Line, Column int // both count from 1; columns are bytes
	// Found and Expected are for people: the offending word and what may stand
	// in its place.
	Found, Expected string
	// Problem is set instead for what the grammar allows but pf refuses.
	Problem string
}

// Error returns the position and what is wrong, on one line.
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

// A position is where a token begins. For text out of a macro that is the
// place of its use.
type position struct{ line, col int }

type token struct {
	kind tokenKind
	text string // of a number: as it was written
	num  int64
	pos  position
	// quoted distinguishes "1" from 1 in kept text only.
	quoted bool
}

// describe names the token in an error.
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

// A lexer cuts text into tokens exactly as pfctl's does: a word goes on through
// most punctuation, quotes included; a backslash joins lines, also in comments;
// $name pastes a macro's text in front of the rest, so $if:network works.
type lexer struct {
	src  string
	off  int
	pos  position // of src[off]
	back []char   // read again first, the last one first

	macros   map[string]string
	macro    string // being pasted
	macroOff int    // may be negative: that many come from back first
	inMacro  bool
	macroPos position
	pasted   int
}

// A char is a byte with its place; c is -1 at the end.
type char struct {
	c   int
	pos position
}

// newLexer returns a lexer at the start of a text.
func newLexer(src string) *lexer {
	return &lexer{src: src, pos: position{1, 1}, macros: map[string]string{}}
}

// raw reads the next byte of the source.
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

// get reads the next byte; outside quotes a backslash is dropped, together with
// the newline after it.
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

// unget puts a byte back. Within a macro that is a step back; at its beginning the byte
// came from before it.
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

// fail makes an error of a place.
func (l *lexer) fail(pos position, problem string) error {
	return &SyntaxError{Line: pos.line, Column: pos.col, Problem: problem}
}

// next returns the next token.
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

// paste begins to read a macro's text; $ has been read.
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

// scan reads the token that begins with a byte.
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

// pair reads <>, >< and ->.
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

// quoted reads a string. Newlines in it are dropped, and a backslash only quotes the
// quote: there is no other way to write one, and none to write a backslash at the end.
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
			return token{kind: tokString, text: string(buf), pos: open.pos, quoted: true}, nil
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

// number reads an integer. Digits that go on as something else, as in 10.0.0.1,
// are put back for word.
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

// direct tells whether what follows comes straight from the source, so that a
// token can be cut out of it.
func (l *lexer) direct() bool { return !l.inMacro && len(l.back) == 0 && l.off > 0 }

// directWord cuts a word out of the source. It leaves to word what has a
// backslash or is too long.
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

// word reads a word byte by byte, through macros and joined lines.
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

// wordToken tells keywords from other words.
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

// inWord is true for the bytes that may go on in a word: letters, digits and
// all punctuation but that of the grammar.
func inWord(c int) bool {
	switch c {
	case '(', ')', '{', '}', '<', '>', '!', '=', '/', '#', ',':
		return false
	}
	return c > ' ' && c < 0x7f
}

// clip bounds foreign text in an error.
func clip(s string) string {
	if len(s) > maxErrors {
		return s[:maxErrors] + "…"
	}
	return s
}

// bareWord tells whether a string, written without quotes and followed by a
// space, is read as that same string.
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

// quote writes a string in quotes. The lexer can't be given all: see quotable.
func quote(s string) string {
	if strings.Contains(s, `"`) && !strings.Contains(s, "'") {
		return "'" + s + "'"
	}
	return `"` + strings.ReplaceAll(s, `"`, `\"`) + `"`
}

// quotable tells whether quote's text is read as the same string: there is no
// way to write a newline, a zero byte or a backslash at the end.
func quotable(s string) bool {
	return len(s) <= maxToken && !strings.ContainsAny(s, "\n\x00") && !strings.HasSuffix(s, `\`)
}

// word writes a string bare where that is read back, else in quotes.
func word(s string) string {
	if bareWord(s) {
		return s
	}
	return quote(s)
}
