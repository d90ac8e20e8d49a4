package mesh

import (
	"strings"
	"testing"
)

func FuzzName(f *testing.F) {
	for _, s := range []string{"phone", "a.b-c_d", "-x", "", "1.2.3.4", "fd00::1", strings.Repeat("x", 64), "ä", "a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if CheckName(name) != nil {
			return
		}
		if len(name) == 0 || len(name) > 63 || name[0] == '-' || name[0] == '.' || strings.ContainsAny(name, "/ \t\n\"'\\%:=+") {
			t.Errorf("name %q is accepted", name)
		}
		if got := Closest(name, []string{name}); got != name {
			t.Errorf("Closest(%q) is %q", name, got)
		}
	})
}

// TestTypos checks the number of typos between two names, in which swapped letters count once.
func TestTypos(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"phone", "phone", 0}, {"fone", "phone", 2}, {"pohne", "phone", 1}, {"phon", "phone", 1}, {"", "ab", 2}, {"abc", "xyz", 3},
	} {
		if got := typos(c.a, c.b, 9); got != c.want {
			t.Errorf("typos(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
