package mesh

import (
	"fmt"
	"net/netip"
	"strings"
)

// maxName is the longest name in bytes, as long as a DNS label (RFC 1035 section 2.3.4).
const maxName = 63

// A NameError says why a text can't be a peer's or a host's name.
type NameError struct {
	problem string // with the name, quoted
	Hint    string // what to do about this fault
}

// Error returns what is wrong with the name, which it quotes.
func (e *NameError) Error() string { return e.problem }

// nameErrorf returns a NameError.
func nameErrorf(hint, format string, args ...any) error {
	return &NameError{fmt.Sprintf(format, args...), hint}
}

// CheckName returns an error unless name has 1 to 63 ASCII letters, digits, dots, hyphens
// and underscores. It refuses a name that commands would take for an option, a path, an
// address or a key. The error is a *NameError.
func CheckName(name string) error {
	if name == "" {
		return nameErrorf("give a name of 1 to 63 characters", "the name is empty")
	}
	if len(name) > maxName {
		return nameErrorf("choose a shorter name", "name %.70q has %d characters, and %d are the most", name, len(name), maxName)
	}
	for _, c := range name {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		switch {
		case !letter && c >= 0x80:
			return nameErrorf("write it with other letters", "name %q has %q, and letters are a to z and A to Z only", name, c)
		case !letter && !strings.ContainsRune("-_.", c):
			return nameErrorf("leave it out, or write a hyphen in its place", "name %q has a character other than letters, digits, dots, hyphens and underscores: %q", name, c)
		}
	}
	if name[0] == '-' || name[0] == '.' {
		return nameErrorf("begin it with a letter, a digit or an underscore", "name %q starts with %q", name, name[0])
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return nameErrorf("choose a name that isn't an address", "name %q is an address", name)
	}
	if _, err := ParsePublicKey(name); err == nil {
		return nameErrorf("choose a name that isn't a key", "name %q is a key", name)
	}
	return nil
}

// Closest returns the name that ref is probably a misspelling of: the one that the fewest
// typing errors turn into ref, at most two, and at most half as many as ref has bytes. It
// returns "" if there is none. Names that differ from ref only in case come first.
func Closest(ref string, names []string) string {
	best, errors := "", min(2, len(ref)/2)+1
	for _, name := range names {
		if strings.EqualFold(ref, name) {
			return name
		}
		if n := typos(ref, name, errors); n < errors {
			best, errors = name, n
		}
	}
	return best
}

// typos returns how many insertions, deletions, substitutions and transpositions of adjacent
// bytes turn a into b (the optimal string alignment distance). It returns limit without
// counting if the difference of the lengths alone is as large, or a is longer than a name.
func typos(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit || len(a) > maxName {
		return limit
	}
	var before, last []int
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		before, last, row = last, row, make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return row[len(b)]
}
