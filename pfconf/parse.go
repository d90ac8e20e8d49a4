package pfconf

import (
	"fmt"
	"strings"
)

// Names resolves service and protocol names that aren't built in, by the databases of a
// host, which differ between hosts. The zero value resolves only built-in names.
type Names struct {
	// Service returns the port of a service. On a Mac it should ask net.LookupPort:
	// pfctl shows ports by the thousands of names in /etc/services. optional
	Service func(name string) (port uint16, ok bool)
	// Proto returns the number of a protocol, from /etc/protocols. optional
	Proto func(name string) (number uint8, ok bool)
}

// Parse reads a ruleset as pfctl -f does, with macros, lists and inline anchors. The
// last line must end in a newline. It refuses a text that pfctl refuses on every host;
// [Ruleset.Expand] checks what depends on the host's interfaces. Errors are of type
// [*SyntaxError].
//
// Parse never panics, and its memory is bounded by a multiple of the text's length plus
// a constant for macros.
func Parse(text string) (*Ruleset, error) { return Names{}.Parse(text) }

// Parse is [Parse] with names of the host.
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

// A parser is a recursive-descent parser with one token of lookahead, for the grammar
// of pfctl's parse.y. The first error sticks: tok is then the end of the text, at which
// every production stops, so that callers needn't check for errors after each step.
type parser struct {
	lex   *lexer
	names Names
	tok   token // the lookahead
	err   error
	depth int                    // of nested lists and anchors
	pos   map[Statement]position // where each statement begins, for errors of validate

	// shown selects the language that pfctl prints, which differs from the one that it
	// reads: it has no quotes around names, and options in other places.
	shown  bool
	counts bool // -vv: a count follows names, <t:2>, (en0:1)
}

// advance reads the next token. A macro is defined while the newline behind it is the
// lookahead, so its value is known from the next line on.
func (p *parser) advance() {
	if p.err != nil {
		return
	}
	if p.tok, p.err = p.lex.next(); p.err != nil {
		p.tok = token{kind: tokEOF}
	}
}

// expected fails because the current token isn't what the grammar expects.
func (p *parser) expected(what string) { p.found(p.tok, what) }

// found fails because token t isn't what the grammar expects.
func (p *parser) found(t token, what string) {
	p.fail(&SyntaxError{Line: t.pos.line, Column: t.pos.col, Found: t.describe(), Expected: what})
}

// refuse fails because of a token that fits the grammar but that pfctl refuses.
func (p *parser) refuse(t token, format string, args ...any) {
	p.fail(&SyntaxError{Line: t.pos.line, Column: t.pos.col, Problem: fmt.Sprintf(format, args...)})
}

// fail keeps the first error and makes the parser see the end of the text.
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

// accept consumes the token if it is the keyword, and reports whether it was.
func (p *parser) accept(keyword string) bool {
	if !p.is(keyword) {
		return false
	}
	p.advance()
	return true
}

// isPunct reports whether the token is this punctuation.
func (p *parser) isPunct(s string) bool {
	return p.tok.kind == tokPunct && p.tok.text == s
}

// acceptPunct consumes the token if it is this punctuation, and reports whether it was.
func (p *parser) acceptPunct(s string) bool {
	if !p.isPunct(s) {
		return false
	}
	p.advance()
	return true
}

// expectPunct consumes this punctuation or fails.
func (p *parser) expectPunct(s string) {
	if !p.acceptPunct(s) {
		p.expected(s)
	}
}

// expect consumes the keyword or fails.
func (p *parser) expect(keyword string) {
	if !p.accept(keyword) {
		p.expected(keyword)
	}
}

// str reads a string: a word that is no keyword, or a quoted one. what describes it in
// an error.
func (p *parser) str(what string) string {
	s := p.tok.text
	if p.tok.kind != tokString {
		p.expected(what)
		return ""
	}
	p.advance()
	return s
}

// strs reads one or more strings and joins them by spaces, as the production varstring
// or string of parse.y does for tags, anchors and files.
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

// number reads a number from lo to hi, both included.
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

// skipNewlines skips newlines in lists, which may span several lines. pfctl takes them in
// fewer places (optnl in parse.y). That doesn't matter for texts of this package, which
// prints lists on one line.
func (p *parser) skipNewlines() {
	for p.tok.kind == tokNewline {
		p.advance()
	}
}

// list reads one item, or items in braces, with or without commas and newlines between
// them.
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

// enter begins a nested list or anchor, or fails if they are nested too deep for a
// recursive parser. If it returns true, leave must follow.
func (p *parser) enter() bool {
	if p.depth >= maxNested {
		p.refuse(p.tok, "nested more than %d deep", maxNested)
		return false
	}
	p.depth++
	return true
}

func (p *parser) leave() { p.depth-- }

// statements reads statements up to the end of the text, or in the body of an anchor up
// to the closing brace. What pfctl shows may lack the last newline.
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

// endOfLine describes what must follow a statement. Of a text without a newline at its
// end pfctl says no more than "syntax error", so this says what to do.
func endOfLine(t token) string {
	if t.kind == tokEOF {
		return "a newline after the last line"
	}
	return "the end of the line or another option"
}

// statement reads one statement. The body of an anchor may only have filter rules and
// anchors.
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

// anyStatement describes what a line may begin with.
const anyStatement = "pass, block, nat, rdr, binat, no, scrub, anchor, table, set, antispoof, load or a macro"

// anchorActions are the anchor calls but those of filter rules, whose grammar differs.
var anchorActions = map[string]Action{
	"nat-anchor": NatAnchor, "rdr-anchor": RdrAnchor, "binat-anchor": BinatAnchor,
	"scrub-anchor": ScrubAnchor, "dummynet-anchor": DummynetAnchor,
}

// macro reads name = value. Apple's dummynet rules come here too, because dummynet is no
// keyword, so that a macro can have that name.
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

// canonicalNumber returns a token's text. Of a number pfctl keeps the value only, so 007
// becomes 7.
func canonicalNumber(t token) string {
	if t.kind == tokNumber {
		return fmt.Sprint(t.num)
	}
	return t.text
}

// text keeps a statement that isn't understood as text: its tokens up to the end of the
// line, or of the line on which its last brace closes. first is a word of it that has
// been read.
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

// option reads a set line. Values are checked later, in checkOption, except those that
// are keywords of the grammar.
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

// optionNames are the words after set, from the production option of parse.y.
var optionNames = set("timeout", "limit", "skip", "block-policy", "state-policy", "require-order", "hostid",
	"loginterface", "optimization", "ruleset-optimization", "debug", "fingerprints")

// oneOf reads one of these words, some of which are keywords.
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

// kindOf returns the kind of token as which the lexer reads a word without quotes.
func kindOf(w string) tokenKind {
	if keywords[w] {
		return tokKeyword
	}
	return tokString
}

// hostID reads the number after set hostid, which unlike others may be hexadecimal. It
// identifies the host in pfsync(4); 0 is reserved.
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

// parseUint reads a number as strtoul(3) with base 0 does: 0x begins a hexadecimal one, 0
// an octal one. It fails for numbers of more than 44 bits; callers take at most 32.
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

// lower returns an ASCII letter in lower case.
func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c - 'A' + 'a'
	}
	return c
}

// table reads a table's definition: options and lists in any order, each any number of
// times.
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

// cutCount removes the count of addresses that pfctl -vv shows behind a name.
func cutCount(name string) string {
	if i := strings.LastIndexByte(name, ':'); i >= 0 {
		return name[:i]
	}
	return name
}

// tableAddrs reads the list of a table's entries, which unlike other lists may be empty.
func (p *parser) tableAddrs() []Address {
	p.advance()
	p.skipNewlines()
	if p.acceptPunct("}") {
		return nil
	}
	return p.addrItems()
}

// antispoof reads an antispoof statement. Its label may stand only once, as pfctl has it.
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

// byte reads a number from 0 to 255.
func (p *parser) byte(what string) *uint8 {
	n := uint8(p.number(0, 255, what))
	return &n
}
