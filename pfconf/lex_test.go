package pfconf

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// lexAll returns a text's tokens, one word each, and the error that ended them.
func lexAll(l *lexer) ([]string, error) {
	var all []string
	for {
		t, err := l.next()
		if err != nil || t.kind == tokEOF {
			return all, err
		}
		switch t.kind {
		case tokNewline:
			all = append(all, "NL")
		case tokString:
			all = append(all, "S:"+t.text)
		case tokKeyword:
			all = append(all, "K:"+t.text)
		case tokNumber:
			all = append(all, fmt.Sprint("N:", t.num))
		case tokPunct:
			all = append(all, t.text)
		}
	}
}

// TestLexer pins how pfctl splits text into tokens, including surprising cases.
func TestLexer(t *testing.T) {
	macros := map[string]string{"if": "en0", "list": "a b", "empty": "", "dollar": "$if"}
	for _, tt := range []struct{ text, want string }{
		{"pass in\n", "K:pass K:in NL"},
		{"on\"en0\"proto", "S:on\"en0\"proto"},
		{"\"on\"in {in}", "S:on K:in { K:in }"},
		{"10 10/8 10.0.0.1 -5 5-6 5x", "N:10 N:10 / N:8 S:10.0.0.1 N:-5 S:5-6 S:5x"},
		{"10) 10, 10} 10= 10/ 10< 10> 10{", "N:10 ) N:10 , N:10 } N:10 = N:10 / S:10 < S:10 > S:10 {"},
		{"80:90 :5 ::1 fe80::1%en0", "S:80:90 S::5 S:::1 S:fe80::1%en0"},
		{"-> - > >< <> < > <= -x", "-> - > >< <> < > < = - S:x"},
		{"S/SA FLAGS flags", "S:S / S:SA S:FLAGS K:flags"},
		{"a;b a.b a'b a\"b a|b", "S:a;b S:a.b S:a'b S:a\"b S:a|b"},
		{"a # b\nc", "S:a NL S:c"},
		{"a \\\n b", "S:a S:b"},
		{"a\\\nb", "S:ab"},
		{"a\\bc", "S:abc"},
		{"# a \\\n b\nc", "NL S:c"},
		{"\"a\\\"b\" 'a\"b' \"a\nb\" \"a\\\nb\" \"a\\b\"", `S:a"b S:a"b S:ab S:ab S:a\b`},
		{"$if $if:network $if.5", "S:en0 S:en0:network S:en0.5"},
		{"$list$if", "S:a S:b$if"},
		{"x$if", "S:x$if"},
		{"$empty$if", "S:en0"},
		{"\"$if\"", "S:$if"},
		{"$dollar", "$ S:if"},
		{"_a _1 é", "S:_a S:_1 \xc3 \xa9"},
		{"\r", "\r"},
	} {
		l := newLexer(tt.text)
		l.macros = macros
		got, err := lexAll(l)
		if err != nil || strings.Join(got, " ") != tt.want {
			t.Errorf("%q:\n got %s (%v)\nwant %s", tt.text, strings.Join(got, " "), err, tt.want)
		}
	}
}

func TestLexerRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"\"a":                   "line 1, column 1: found a quoted string without end",
		"a\n  'b\nc":            "line 2, column 3: found a quoted string without end",
		"\"a\x00\"":             "line 1, column 3: the text has a zero byte",
		"$nosuch":               "line 1, column 1: macro $nosuch isn't defined",
		"99999999999999999999 ": "line 1, column 1: the number is out of range",
	} {
		if _, err := lexAll(newLexer(text)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", text, err, want)
		}
	}
}

// TestPositions checks the positions of tokens, including those from macros and after
// joined lines.
func TestPositions(t *testing.T) {
	l := newLexer("a\n  bb \\\n cc $m\n12.3 x")
	l.macros["m"] = "dd ee"
	var got []string
	for {
		tok, err := l.next()
		if err != nil {
			t.Fatal(err)
		}
		if tok.kind == tokEOF {
			break
		}
		if tok.kind == tokString {
			got = append(got, fmt.Sprintf("%s@%d:%d", tok.text, tok.pos.line, tok.pos.col))
		}
	}
	if want := "a@1:1 bb@2:3 cc@3:2 dd@3:5 ee@3:5 12.3@4:1 x@4:6"; strings.Join(got, " ") != want {
		t.Errorf("got %s\nwant %s", strings.Join(got, " "), want)
	}
}

// TestWordsComeBack checks that word writes any string in a form that parses to the same
// string, whatever follows.
func TestWordsComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.OneOf(rapid.String(), rapid.StringMatching(`["'\\ $#a1<:]{0,8}`)).Draw(t, "s")
		if !quotable(s) {
			return
		}
		for _, text := range []string{word(s) + " ", quote(s) + "\n", "<" + word(s) + ">"} {
			got, err := lexAll(newLexer(text))
			if err != nil || !strings.Contains(" "+strings.Join(got, " ")+" ", " S:"+s+" ") {
				t.Fatalf("%q written %q is read as %q, %v", s, text, got, err)
			}
		}
	})
}

func TestQuotable(t *testing.T) {
	for s, want := range map[string]bool{"": true, "a b": true, `a"b'c`: true, `a\b`: true, `a\`: false, "a\nb": false,
		"a\x00": false, strings.Repeat("x", maxToken): true, strings.Repeat("x", maxToken+1): false} {
		if quotable(s) != want {
			t.Errorf("quotable(%q) is %t", clip(s), !want)
		}
	}
}
