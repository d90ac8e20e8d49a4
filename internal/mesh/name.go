package mesh

import (
	"fmt"
	"net/netip"
	"strings"
)

const maxName = 63

// CheckName refuses a name that would be mistaken for an option, a path, an
// address or a key where peers are named.
func CheckName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("name %.70q has %d characters, want 1 to %d", name, len(name), maxName)
	}
	for _, c := range name {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		switch {
		case !letter && c >= 0x80:
			return fmt.Errorf("name %q has %q, and letters are a to z and A to Z only", name, c)
		case !letter && !strings.ContainsRune("-_.", c):
			return fmt.Errorf("name %q has a character other than letters, digits, dots, hyphens and underscores: %q", name, c)
		}
	}
	if name[0] == '-' || name[0] == '.' {
		return fmt.Errorf("name %q starts with %q", name, name[0])
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return fmt.Errorf("name %q is an address", name)
	}
	if _, err := ParsePublicKey(name); err == nil {
		return fmt.Errorf("name %q is a key", name)
	}
	return nil
}

// Closest returns the name that ref was probably meant to be, or "": the one
// with the fewest typing errors, at most two and not more than half of it.
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

// typos counts the insertions, deletions, replacements and swaps of neighbours
// that turn a into b (the optimal string alignment distance), or returns limit
// if the lengths alone take as many.
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
