package plain

import "testing"

func TestPlain(t *testing.T) {
	for text, want := range map[string]string{
		"chain «für» of table ip t": "chain «für» of table ip t",
		"a\x1b[2J\nok all is fine":  `a\x1b[2J\nok all is fine`,
		"\u202e\u009b\x7f\xff":      `\u202e\u009b\x7f\ufffd`,
	} {
		if got := Text(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
