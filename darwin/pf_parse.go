package darwin

import (
	"fmt"
	"strconv"
	"strings"
)

// ParseToken finds the token in what `pfctl -E` wrote on stderr:
//
//	pf enabled
//	Token : 11012949885072952621
func ParseToken(stderr []byte) (Token, error) {
	for line := range strings.Lines(string(stderr)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok || strings.TrimSpace(key) != "Token" {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read token %q: not a number", value)
		}
		return Token(n), nil
	}
	return 0, fmt.Errorf("no token in the answer %q", firstLine(stderr))
}

// Info is the part of `pfctl -s info` that is used.
type Info struct{ Enabled bool }

// ParseInfo reads the first line, "Status: Enabled for 0 days 00:00:00 …" or
// "Status: Disabled …".
func ParseInfo(out string) (Info, error) {
	for line := range strings.Lines(out) {
		rest, ok := strings.CutPrefix(line, "Status:")
		if !ok {
			continue
		}
		if f := strings.Fields(rest); len(f) > 0 && (f[0] == "Enabled" || f[0] == "Disabled") {
			return Info{Enabled: f[0] == "Enabled"}, nil
		}
	}
	return Info{}, fmt.Errorf("read packet filter status: no status in %q", firstLine([]byte(out)))
}

// A Reference is one row of `pfctl -s References`. The name is that of the
// program that asked, so `pfctl` for everybody who runs it, and its process is
// mostly gone: only the token tells whose it is.
type Reference struct {
	PID   int
	Name  string
	Token Token
}

// ParseReferences reads the table that pfctl prints:
//
//	TOKENS:
//	PID      Process Name                 TOKEN                    TIMESTAMP
//	4063     pfctl                        15053025338191571182     0 days 00:00:00
//
// or "No pf starter references held". Text of another form is an error, since
// "none" would be acted on.
func ParseReferences(out string) ([]Reference, error) {
	var refs []Reference
	heading := false
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || isNoise(strings.TrimSpace(line)) || f[0] == "TOKENS:":
		case strings.HasPrefix(line, "No pf starter references held"):
			return nil, nil
		case f[0] == "PID":
			heading = true
		case heading:
			r, err := parseReference(f)
			if err != nil {
				return nil, err
			}
			refs = append(refs, r)
		}
	}
	if !heading {
		return nil, fmt.Errorf("read packet filter references: unexpected text %q", firstLine([]byte(out)))
	}
	return refs, nil
}

// parseReference reads one row from both ends: a process name may have spaces,
// and the age is "N days HH:MM:SS".
func parseReference(f []string) (Reference, error) {
	n := len(f)
	if n < 6 || !strings.HasPrefix(f[n-2], "day") {
		return Reference{}, fmt.Errorf("read packet filter reference: unexpected row %q", strings.Join(f, " "))
	}
	pid, err := strconv.ParseInt(f[0], 10, 32)
	if err != nil {
		return Reference{}, fmt.Errorf("read packet filter reference: process %q is not a number", f[0])
	}
	token, err := strconv.ParseUint(f[n-4], 10, 64)
	if err != nil {
		return Reference{}, fmt.Errorf("read packet filter reference: token %q is not a number", f[n-4])
	}
	return Reference{PID: int(pid), Name: strings.Join(f[1:n-4], " "), Token: Token(token)}, nil
}

// ParseSkipped finds the interfaces marked "(skip)" in `pfctl -v -s Interfaces`,
// where interfaces start a line and their counters are indented:
//
//	en0
//	lo0 (skip)
func ParseSkipped(out string) []string {
	var names []string
	for line := range strings.Lines(out) {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), " (skip)"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}
