package pfconf

import (
	"fmt"
	"strings"
)

// Names resolves service and protocol names by a host's own databases, which differ
// between hosts. The zero value resolves only the built-in names.
type Names struct {
	// Service returns the port of a service that isn't built in. On a Mac it
	// should ask net.LookupPort: pfctl shows ports by the thousands of names in
	// /etc/services. optional
	Service func(name string) (port uint16, ok bool)
	// Proto does the same for protocols. optional
	Proto func(name string) (number uint8, ok bool)
}

// Parse reads a ruleset as pfctl -f does: with macros, lists and inline anchors,
// the last line ended by a newline. It refuses what pfctl refuses on any host;
// what depends on the host's interfaces is left to [Ruleset.Expand]. Errors are
// of type [*SyntaxError].
//
// Parse never panics, and its memory is bounded by a multiple of the text's
// length and a constant for macros.
func Parse(text string) (*Ruleset, error) { return Names{}.Parse(text) }

// Parse is [Parse] with the host's names.
func (n Names) Parse(text string) (*Ruleset, error) {
	p := &parser{lex: newLexer(text), names: n, pos: map[Statement]position{}}
	p.advance()
	rs := &Ruleset{Statements: p.statements(false)}
	if p.err != nil {
		return nil, p.err
	}
	if err := rs.validate(); err != nil {
		pos := p.pos[err.statement]
		return nil, &SyntaxError{Line: pos.line, Column: pos.col, Problem: err.problem}
	}
	return rs, nil
}

// A parser is a recursive-descent parser with one token of lookahead. The first error
// sticks: tok is then the end of the text, at which every rule of the grammar stops.
type parser struct {
	lex   *lexer
	names Names
	tok   token
	err   error
	depth int
	pos   map[Statement]position

	// shown selects the language that pfctl prints, which differs from the one that it reads.
	shown  bool
	counts bool // names are followed by a count: <t:2>, (en0:1)
}

// advance reads the next token. A macro is defined before the newline after it is passed
// by, so that it holds from the next line on.
func (p *parser) advance() {
	if p.err != nil {
		return
	}
	if p.tok, p.err = p.lex.next(); p.err != nil {
		p.tok = token{kind: tokEOF}
	}
}

// expected fails with the current token as the one that was found.
func (p *parser) expected(what string) { p.found(p.tok, what) }

// found fails with the token that was found and a description of what was expected.
func (p *parser) found(t token, what string) {
	p.fail(&SyntaxError{Line: t.pos.line, Column: t.pos.col, Found: t.describe(), Expected: what})
}

// refuse fails because of what a token says.
func (p *parser) refuse(t token, format string, args ...any) {
	p.fail(&SyntaxError{Line: t.pos.line, Column: t.pos.col, Problem: fmt.Sprintf(format, args...)})
}

// fail keeps the first error and ends the text there.
func (p *parser) fail(err error) {
	if p.err == nil {
		p.err = err
	}
	p.tok = token{kind: tokEOF}
}

// is reports whether the token is the keyword; a quoted word isn't one.
func (p *parser) is(keyword string) bool {
	return p.tok.kind == tokKeyword && p.tok.text == keyword
}

// accept passes a keyword by if it is the next token.
func (p *parser) accept(keyword string) bool {
	if !p.is(keyword) {
		return false
	}
	p.advance()
	return true
}

func (p *parser) isPunct(s string) bool {
	return p.tok.kind == tokPunct && p.tok.text == s
}

// acceptPunct passes punctuation by if it is the next token.
func (p *parser) acceptPunct(s string) bool {
	if !p.isPunct(s) {
		return false
	}
	p.advance()
	return true
}

// expectPunct passes punctuation by or fails.
func (p *parser) expectPunct(s string) {
	if !p.acceptPunct(s) {
		p.expected(s)
	}
}

// expect passes a keyword by or fails.
func (p *parser) expect(keyword string) {
	if !p.accept(keyword) {
		p.expected(keyword)
	}
}

// str reads a word that is no keyword, or a quoted string.
func (p *parser) str(what string) string {
	s := p.tok.text
	if p.tok.kind != tokString {
		p.expected(what)
		return ""
	}
	p.advance()
	return s
}

// strs reads strings up to something else and joins them by spaces, as pfctl
// does for tags and anchors.
func (p *parser) strs(what string) string {
	s := p.str(what)
	for p.tok.kind == tokString {
		if len(s) > maxToken {
			p.refuse(p.tok, "%s is longer than %d bytes", what, maxToken)
			return ""
		}
		s += " " + p.str(what)
	}
	return s
}

// number reads a number from lo to hi.
func (p *parser) number(lo, hi int64, what string) int64 {
	t := p.tok
	if t.kind != tokNumber {
		p.expected(what)
		return 0
	}
	if t.num < lo || t.num > hi {
		p.refuse(t, "%d is no %s: it is from %d to %d", t.num, what, lo, hi)
		return 0
	}
	p.advance()
	return t.num
}

// skipNewlines is for lists, which may go over several lines. pfctl is stricter about
// where; this package prints lists on one line.
func (p *parser) skipNewlines() {
	for p.tok.kind == tokNewline {
		p.advance()
	}
}

// list reads one item, or items in braces with or without commas between them.
// Newlines may stand around items.
func list[T any](p *parser, item func() T) []T {
	if !p.acceptPunct("{") {
		return []T{item()}
	}
	var items []T
	p.skipNewlines()
	for {
		items = append(items, item())
		p.skipNewlines()
		if p.acceptPunct("}") || p.err != nil {
			return items
		}
		if p.acceptPunct(",") {
			p.skipNewlines()
		}
		if p.tok.kind == tokEOF {
			p.expected("}")
		}
	}
}

// enter counts what is nested; leave must follow if it is true.
func (p *parser) enter() bool {
	if p.depth >= maxNested {
		p.refuse(p.tok, "nested more than %d deep", maxNested)
		return false
	}
	p.depth++
	return true
}

func (p *parser) leave() { p.depth-- }

// statements reads statements up to the end, or for a body up to its brace.
func (p *parser) statements(body bool) []Statement {
	var all []Statement
	for {
		p.skipNewlines()
		if p.tok.kind == tokEOF || body && p.isPunct("}") {
			return all
		}
		start := p.tok.pos
		s := p.statement(body)
		if p.err != nil {
			return nil
		}
		p.pos[s] = start
		all = append(all, s)
		if p.tok.kind != tokNewline && !(p.shown && p.tok.kind == tokEOF) {
			p.expected(endOfLine(p.tok))
			return nil
		}
	}
}

// endOfLine says what should come after a statement. pfctl refuses a text without a
// newline at its end, and says no more than syntax error.
func endOfLine(t token) string {
	if t.kind == tokEOF {
		return "a newline after the last line"
	}
	return "the end of the line or another option"
}

// statement reads one statement, in a body only what may stand there.
func (p *parser) statement(body bool) Statement {
	switch {
	case p.is("pass"), p.is("block"):
		return p.filterRule()
	case p.is("anchor"):
		return p.anchorRule()
	case body:
		p.expected("pass, block, anchor or }")
		return nil
	case p.tok.kind == tokString:
		return p.macro()
	case p.tok.kind != tokKeyword:
		p.expected(anyStatement)
		return nil
	}
	switch p.tok.text {
	case "set":
		return p.option()
	case "table":
		return p.table()
	case "antispoof":
		return p.antispoof()
	case "load":
		return p.loadAnchor()
	case "altq", "queue", "include":
		return p.text("")
	case "scrub", "nat", "rdr", "binat", "no":
		return p.otherRule()
	}
	if action, ok := anchorActions[p.tok.text]; ok {
		return p.translationAnchor(action)
	}
	p.expected(anyStatement)
	return nil
}

const anyStatement = "pass, block, nat, rdr, binat, no, scrub, anchor, table, set, antispoof, load or a macro"

var anchorActions = map[string]Action{
	"nat-anchor": NatAnchor, "rdr-anchor": RdrAnchor, "binat-anchor": BinatAnchor,
	"scrub-anchor": ScrubAnchor, "dummynet-anchor": DummynetAnchor,
}

// macro reads name = value, or a statement of Apple's that begins with a word
// which is no keyword here.
func (p *parser) macro() Statement {
	name := p.tok
	p.advance()
	if name.text == "dummynet" && !p.isPunct("=") {
		return p.text(name.text)
	}
	if !p.isPunct("=") {
		p.found(name, anyStatement)
		return nil
	}
	p.advance()
	var value []string
	size := 0
	for p.tok.kind == tokString || p.tok.kind == tokNumber {
		value = append(value, canonicalNumber(p.tok))
		if size += len(p.tok.text) + 1; size > maxMacro {
			p.refuse(name, "macro %s is longer than %d bytes", clip(name.text), maxMacro)
			return nil
		}
		p.advance()
	}
	if value == nil {
		p.expected("the macro's value")
		return nil
	}
	m := &Macro{Name: name.text, Value: strings.Join(value, " ")}
	p.lex.macros[m.Name] = m.Value
	return m
}

// canonicalNumber returns a token's text; pfctl keeps a number's value only.
func canonicalNumber(t token) string {
	if t.kind == tokNumber {
		return fmt.Sprint(t.num)
	}
	return t.text
}

// text keeps an unknown statement as text: its tokens, up to the end of
// the line that is outside all braces.
func (p *parser) text(first string) *Text {
	var words []string
	if first != "" {
		words = append(words, first)
	}
	depth := 0
	for p.tok.kind != tokEOF && (p.tok.kind != tokNewline || depth > 0) {
		switch {
		case p.isPunct("{"):
			depth++
		case p.isPunct("}"):
			depth--
		}
		if p.tok.kind == tokString {
			words = append(words, word(p.tok.text))
		} else if p.tok.kind != tokNewline {
			words = append(words, p.tok.text)
		}
		p.advance()
	}
	return &Text{Text: strings.Join(words, " ")}
}

// loadAnchor reads load anchor name from file.
func (p *parser) loadAnchor() *LoadAnchor {
	p.advance()
	p.expect("anchor")
	l := &LoadAnchor{Anchor: p.strs("the name of the anchor")}
	p.expect("from")
	l.File = p.strs("the path of the file")
	return l
}

// option reads a set line.
func (p *parser) option() *Option {
	p.advance()
	o := &Option{Name: p.tok.text}
	if p.tok.kind != tokKeyword || !optionNames[o.Name] {
		p.expected("the name of an option")
		return o
	}
	p.advance()
	switch o.Name {
	case "timeout", "limit":
		o.Values = list(p, func() string {
			name := p.str("the name of a " + o.Name)
			return name + " " + fmt.Sprint(p.number(0, 1<<32-1, "value of a "+o.Name))
		})
	case "skip":
		for _, m := range p.interfaces() {
			if m.Not {
				p.refuse(p.tok, "set skip can't be negated")
			}
			o.Values = append(o.Values, m.Name)
		}
	case "block-policy":
		o.Values = []string{p.oneOf("drop", "return")}
	case "state-policy":
		o.Values = []string{p.oneOf("if-bound", "floating")}
	case "require-order":
		o.Values = []string{p.oneOf("yes", "no")}
	case "hostid":
		o.Values = []string{fmt.Sprint(p.hostID())}
	case "loginterface":
		if p.accept("all") {
			o.Values = []string{"all"}
			break
		}
		o.Values = []string{p.str("an interface or none")}
	case "ruleset-optimization":
		o.Values = []string{p.strs("none, basic or profile")}
	default:
		o.Values = []string{p.str("a value")}
	}
	return o
}

var optionNames = set("timeout", "limit", "skip", "block-policy", "state-policy", "require-order", "hostid",
	"loginterface", "optimization", "ruleset-optimization", "debug", "fingerprints")

// oneOf reads one of some words, keywords or not.
func (p *parser) oneOf(words ...string) string {
	for _, w := range words {
		if p.tok.text == w && p.tok.kind == kindOf(w) {
			p.advance()
			return w
		}
	}
	p.expected(strings.Join(words, " or "))
	return ""
}

// kindOf tells as what kind of token a word is read.
func kindOf(w string) tokenKind {
	if keywords[w] {
		return tokKeyword
	}
	return tokString
}

// hostID reads the only number that may be hexadecimal.
func (p *parser) hostID() int64 {
	t := p.tok
	n := t.num
	if t.kind == tokString {
		v, ok := parseUint(t.text)
		if !ok || v > 1<<32-1 {
			p.expected("a number")
			return 0
		}
		n = int64(v)
	} else if t.kind != tokNumber {
		p.expected("a number")
		return 0
	}
	if n <= 0 || n > 1<<32-1 {
		p.refuse(t, "the hostid is from 1 to %d", uint32(1<<32-1))
		return 0
	}
	p.advance()
	return n
}

// parseUint reads a number as C's strtoul with base 0 does: 0x is hexadecimal,
// 0 octal.
func parseUint(s string) (uint64, bool) {
	base := uint64(10)
	switch {
	case strings.HasPrefix(s, "0x"), strings.HasPrefix(s, "0X"):
		base, s = 16, s[2:]
	case len(s) > 1 && s[0] == '0':
		base, s = 8, s[1:]
	}
	if s == "" || len(s) > 32 {
		return 0, false
	}
	var n uint64
	for _, c := range []byte(s) {
		d := uint64(strings.IndexByte("0123456789abcdef", lower(c)))
		if d >= base || n > 1<<40 {
			return 0, false
		}
		n = n*base + d
	}
	return n, true
}

// lower is ToLower for an ASCII letter.
func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c - 'A' + 'a'
	}
	return c
}

// table reads a table's definition: its options and lists in any order and number.
func (p *parser) table() *Table {
	p.advance()
	t := &Table{Name: p.tableName()}
	for p.err == nil {
		switch {
		case p.isPunct("{"):
			t.HasAddrs = true
			t.Addrs = append(t.Addrs, p.tableAddrs()...)
		case p.accept("file"):
			t.Files = append(t.Files, p.str("the path of a file"))
		case p.tok.kind == tokString && p.tok.text == "persist":
			t.Persist = true
			p.advance()
		case p.tok.kind == tokString && p.tok.text == "const":
			t.Const = true
			p.advance()
		case p.tok.kind == tokString:
			p.expected("persist, const, file or {")
		default:
			return t
		}
	}
	return t
}

// tableName reads <name>.
func (p *parser) tableName() string {
	p.expectPunct("<")
	name := p.str("the name of a table")
	if p.counts {
		name = cutCount(name)
	}
	p.expectPunct(">")
	return name
}

// cutCount cuts the count off a name that pfctl -vv shows.
func cutCount(name string) string {
	if i := strings.LastIndexByte(name, ':'); i >= 0 {
		return name[:i]
	}
	return name
}

// tableAddrs reads the list of a table, which unlike others may be empty.
func (p *parser) tableAddrs() []Address {
	p.advance()
	p.skipNewlines()
	if p.acceptPunct("}") {
		return nil
	}
	return p.addrItems()
}

// antispoof reads antispoof.
func (p *parser) antispoof() *Antispoof {
	p.advance()
	a := &Antispoof{}
	a.Log, a.Quick = p.logQuick()
	p.expect("for")
	a.Interfaces = list(p, func() AntispoofInterface {
		if p.acceptPunct("(") {
			i := AntispoofInterface{Name: p.str("an interface"), Dynamic: true}
			p.expectPunct(")")
			return i
		}
		return AntispoofInterface{Name: p.str("an interface")}
	})
	a.Family = p.family()
	labelled := false
	for p.err == nil {
		switch t := p.tok; {
		case p.accept("label"):
			if labelled {
				p.refuse(t, "a second label")
			}
			labelled = true
			a.Label = p.str("the label")
		case p.accept("rtable"):
			a.RTable = p.byte("routing table")
		default:
			return a
		}
	}
	return a
}

// byte reads a number of eight bits.
func (p *parser) byte(what string) *uint8 {
	n := uint8(p.number(0, 255, what))
	return &n
}
