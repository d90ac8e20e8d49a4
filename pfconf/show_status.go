package pfconf

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// An Info is the output of pfctl -s info (print_status in pfctl_parser.c).
type Info struct {
	Enabled bool
	// For is the time since pf was enabled or disabled, in whole seconds; 0 if it isn't
	// shown, as before the first change.
	For    time.Duration
	Debug  string // level of the kernel's messages: None, Urgent, Misc or Loud
	HostID string // 0x and hexadecimal digits, with -v
	// Checksum is the MD5 sum of the main ruleset as it was last loaded, with -v. Neither
	// anchors nor rules that were inserted into the main ruleset one by one change it
	// (pf_commit_rules in xnu bsd/net/pf_ioctl.c).
	Checksum string
	// States is the current number of states.
	States uint64
	// Counters has the totals by section and name, such as Counters["Counters"]["match"].
	Counters map[string]map[string]uint64
}

// Matched returns how many packets pf has judged by rules, and whether the output
// has that counter.
func (info *Info) Matched() (uint64, bool) {
	n, ok := info.Counters["Counters"]["match"]
	return n, ok
}

// ParseInfo reads the output of pfctl -s info, with or without -v. It fails if the line
// Status: is missing or can't be read; what it doesn't know of the rest it ignores.
func ParseInfo(text string) (*Info, error) {
	info := &Info{Counters: map[string]map[string]uint64{}}
	section, found := "", false
	for _, line := range strings.Split(text, "\n") {
		trimmed := strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "Status:") && !found:
			if err := info.status(trimmed); err != nil {
				return nil, err
			}
			found = true
		case strings.HasPrefix(line, "Hostid:"):
			info.HostID = strings.TrimSpace(strings.TrimPrefix(line, "Hostid:"))
		case strings.HasPrefix(line, "Checksum:"):
			info.Checksum = strings.TrimSpace(strings.TrimPrefix(line, "Checksum:"))
		case trimmed == "" || strings.Contains(trimmed, ":"):
		case line[0] != ' ':
			section, _, _ = strings.Cut(trimmed, "  ")
		default:
			info.counter(section, trimmed)
		}
	}
	if !found {
		return nil, errors.New("read pf's status: there is no Status: line")
	}
	info.States = info.Counters["State Table"]["current entries"]
	return info, nil
}

// status reads the line Status: Enabled for 0 days 00:00:00     Debug: Urgent.
func (info *Info) status(line string) error {
	status, debug, _ := strings.Cut(strings.TrimPrefix(line, "Status:"), "Debug:")
	info.Debug = strings.TrimSpace(debug)
	word, since, hasSince := strings.Cut(strings.TrimSpace(status), " for ")
	switch strings.TrimSpace(word) {
	case "Enabled":
		info.Enabled = true
	case "Disabled":
	default:
		return fmt.Errorf("read pf's status: %q is neither Enabled nor Disabled", clip(word))
	}
	if !hasSince {
		return nil
	}
	var err error
	if info.For, err = parseDays(strings.TrimSpace(since)); err != nil {
		return fmt.Errorf("read pf's status: %w", err)
	}
	return nil
}

// counter reads one line of a section: a name, a total, perhaps a rate per second.
func (info *Info) counter(section, line string) {
	name, rest, ok := strings.Cut(line, "  ")
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return
	}
	n, err := strconv.ParseUint(fields[0], 10, 64)
	if err != nil {
		return
	}
	if info.Counters[section] == nil {
		info.Counters[section] = map[string]uint64{}
	}
	info.Counters[section][name] = n
}

// parseDays reads 1 days 02:03:04.
func parseDays(s string) (time.Duration, error) {
	days, clock, ok := strings.Cut(s, " days ")
	n, err := strconv.ParseUint(days, 10, 16)
	d, clockErr := parseClock(clock)
	if !ok || err != nil || clockErr != nil {
		return 0, fmt.Errorf("%q is no span of days and hours", clip(s))
	}
	return time.Duration(n)*24*time.Hour + d, nil
}

// parseClock reads hours:minutes:seconds. A state's age has no days, so hours may exceed
// 23.
func parseClock(s string) (time.Duration, error) {
	parts := strings.Split(s, ":")
	if len(parts) != 3 {
		return 0, fmt.Errorf("%q is no time", clip(s))
	}
	var seconds uint64
	for _, part := range parts {
		n, err := strconv.ParseUint(part, 10, 20)
		if err != nil {
			return 0, fmt.Errorf("%q is no time", clip(s))
		}
		seconds = seconds*60 + n
	}
	return time.Duration(seconds) * time.Second, nil
}

// A Reference keeps pf enabled. pfctl -E makes one and pfctl -X releases it; pf is
// disabled when the last is released. pfctl -d disables pf and voids them all.
type Reference struct {
	PID     int    // of the process that made it, which may be gone
	Process string // its name: pfctl for each that was made with pfctl -E
	Token   uint64 // by which it is released
	Age     time.Duration
}

// ParseReferences reads the output of pfctl -s References. It fails at a line that is no
// reference.
func ParseReferences(text string) ([]Reference, error) {
	var all []Reference
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line == "TOKENS:" || noise[line] || strings.HasPrefix(line, "PID ") ||
			strings.HasPrefix(line, "No pf starter references") {
			continue
		}
		ref, err := parseReference(line)
		if err != nil {
			return nil, fmt.Errorf("read reference on line %d: %w", i+1, err)
		}
		all = append(all, ref)
	}
	return all, nil
}

// parseReference reads a row: PID, process, token, and age in days and hours. It reads
// from both ends, since the name of a process may contain anything.
func parseReference(line string) (Reference, error) {
	bad := fmt.Errorf("%q is no row of a process and its token", clip(line))
	fields := strings.Fields(line)
	n := len(fields)
	if n < 6 {
		return Reference{}, bad
	}
	pid, err := strconv.ParseInt(fields[0], 10, 32)
	if err != nil {
		return Reference{}, bad
	}
	token, err := strconv.ParseUint(fields[n-4], 10, 64)
	if err != nil {
		return Reference{}, bad
	}
	age, err := parseDays(strings.Join(fields[n-3:], " "))
	if err != nil {
		return Reference{}, bad
	}
	return Reference{PID: int(pid), Process: strings.Join(fields[1:n-4], " "), Token: token, Age: age}, nil
}

// ParseToken reads the token of a new [Reference], which pfctl -E prints on standard
// error as Token : 123.
func ParseToken(text string) (uint64, error) {
	for _, line := range strings.Split(text, "\n") {
		name, value, ok := strings.Cut(line, ":")
		if !ok || strings.TrimSpace(name) != "Token" {
			continue
		}
		token, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read pf's token: %q is no number", clip(value))
		}
		return token, nil
	}
	return 0, errors.New("read pf's token: there is no Token: line")
}

// A ShownState is a state as pfctl -ss prints it (print_state in pf_print_state.c). For
// ICMP a port is the identifier of echo messages.
type ShownState struct {
	Interface string // ALL: not bound to an interface
	Proto     string // name or number
	// Direction is that of the packet that made the state.
	Direction Direction
	// Inner is the near end of the flow: the source of an outbound one, the destination of
	// an inbound one. Translated is the same end as the far end sees it, which nat, binat
	// or rdr make different, and Outer is the far end.
	Inner      netip.AddrPort
	Translated netip.AddrPort
	Outer      netip.AddrPort
	// Source and Destination are the progress of the two ends in the order printed, such
	// as ESTABLISHED or MULTIPLE.
	Source, Destination string

	// The fields below are known with -v only.

	// Age is the time since the state was made, and Expires the time until it ends
	// without a further packet. Both are whole seconds.
	Age, Expires time.Duration
	// Packets and Bytes count in the state's direction and against it.
	Packets, Bytes [2]uint64
	// Rule is the number of the rule in its ruleset, and Anchor that of the main ruleset's
	// rule through which its anchor was called; -1: not shown.
	Anchor, Rule int
	More         []string // details that can't be read, such as sequence numbers
}

// ParseStates reads the output of pfctl -ss, with or without -v or -vv. It fails at a
// line that should begin a state and doesn't.
func ParseStates(text string) ([]ShownState, error) {
	var all []ShownState
	for i, line := range strings.Split(text, "\n") {
		trimmed := strings.TrimSpace(line)
		switch {
		case trimmed == "" || noise[trimmed] || trimmed == "STATES:":
		case line[0] == ' ' || line[0] == '\t':
			if len(all) == 0 {
				return nil, fmt.Errorf("read state on line %d: its first line is missing", i+1)
			}
			all[len(all)-1].detail(trimmed)
		default:
			s, err := parseState(trimmed)
			if err != nil {
				return nil, fmt.Errorf("read state on line %d: %w", i+1, err)
			}
			all = append(all, s)
		}
	}
	return all, nil
}

// parseState reads IF PROTO HOST [-> HOST] -> HOST   SOURCE:DESTINATION.
func parseState(line string) (ShownState, error) {
	bad := fmt.Errorf("%q isn't a state", clip(line))
	f := strings.Fields(line)
	if len(f) != 6 && len(f) != 8 {
		return ShownState{}, bad
	}
	s := ShownState{Interface: f[0], Proto: f[1], Anchor: -1, Rule: -1}
	var ok bool
	if s.Source, s.Destination, ok = strings.Cut(f[len(f)-1], ":"); !ok {
		return ShownState{}, bad
	}
	switch f[3] {
	case "->":
		s.Direction = Out
	case "<-":
		s.Direction = In
	default:
		return ShownState{}, bad
	}
	hosts := []netip.AddrPort{}
	for i := 2; i < len(f)-1; i += 2 {
		if i > 2 && f[i-1] != f[3] {
			return ShownState{}, bad
		}
		host, err := parseStateHost(f[i])
		if err != nil {
			return ShownState{}, err
		}
		hosts = append(hosts, host)
	}
	s.Inner, s.Translated, s.Outer = hosts[0], hosts[len(hosts)-2], hosts[len(hosts)-1]
	return s, nil
}

// parseStateHost reads 192.0.2.1:80 or 2001:db8::1[80]. Without a port, as for protocols
// that have none, it is 0.
func parseStateHost(s string) (netip.AddrPort, error) {
	if ip, port, ok := strings.Cut(strings.TrimSuffix(s, "]"), "["); ok {
		return hostPort(ip, port)
	}
	if ip, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(ip, 0), nil
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", clip(s))
	}
	return hostPort(s[:i], s[i+1:])
}

// hostPort reads an address and a port.
func hostPort(ip, port string) (netip.AddrPort, error) {
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", clip(ip))
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no port", clip(port))
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// detail reads an indented line, age 00:00:05, expires in 00:00:55, 1:1 pkts, 64:64 bytes,
// rule 3, and keeps any other in More.
func (s *ShownState) detail(line string) {
	if !strings.HasPrefix(line, "age ") || !s.details(strings.Split(line, ", ")) {
		s.More = append(s.More, line)
	}
}

// details reads the parts of a line and reports whether all could be read.
func (s *ShownState) details(parts []string) bool {
	var err error
	for _, part := range parts {
		switch f := strings.Fields(part); {
		case len(f) == 2 && f[0] == "age":
			s.Age, err = parseClock(f[1])
		case len(f) == 3 && f[0] == "expires":
			s.Expires, err = parseClock(f[2])
		case len(f) == 2 && f[1] == "pkts":
			s.Packets, err = parsePair(f[0])
		case len(f) == 2 && f[1] == "bytes":
			s.Bytes, err = parsePair(f[0])
		case len(f) == 2 && f[0] == "anchor":
			s.Anchor, err = strconv.Atoi(f[1])
		case len(f) == 2 && f[0] == "rule":
			s.Rule, err = strconv.Atoi(f[1])
		default:
			s.More = append(s.More, part)
		}
		if err != nil {
			return false
		}
	}
	return true
}

// parsePair reads two counters, one for each direction.
func parsePair(s string) (pair [2]uint64, err error) {
	a, b, _ := strings.Cut(s, ":")
	if pair[0], err = strconv.ParseUint(a, 10, 64); err != nil {
		return pair, err
	}
	pair[1], err = strconv.ParseUint(b, 10, 64)
	return pair, err
}
