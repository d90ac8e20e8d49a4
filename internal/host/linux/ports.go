package linux

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// portRange is the ports from first to last, both included. The zero value has
// none.
type portRange struct{ first, last uint16 }

// size returns how many ports are in the range.
func (r portRange) size() int {
	if r == (portRange{}) {
		return 0
	}
	return int(r.last) - int(r.first) + 1
}

func (r portRange) has(port uint16) bool { return r.size() > 0 && r.first <= port && port <= r.last }

func (r portRange) overlaps(s portRange) bool {
	return r.size() > 0 && s.size() > 0 && r.first <= s.last && s.first <= r.last
}

// String is the range as nft writes it.
func (r portRange) String() string { return fmt.Sprintf("%d-%d", r.first, r.last) }

const (
	// minPorts is the size of the smallest range that peers' flows are translated
	// to: with fewer, a port could be guessed, and two peers that use the same
	// server get in each other's way.
	minPorts = 512
	// lastPrivileged is the last port that only root binds by default (ip(7),
	// ip_unprivileged_port_start).
	lastPrivileged = 1023
)

// defaultPorts is the range on a host with Linux's default of local ports, 32768
// to 60999, on which nothing listens below (ip_local_port_range in the kernel's
// Documentation/networking/ip-sysctl.rst).
var defaultPorts = portRange{lastPrivileged + 1, 32767}

// hostPorts are the ports that are the host's, or may come to be: the privileged
// ones, those that the kernel gives to its sockets, those that it is told to
// reserve for programs, and those that sockets are bound to. A translated flow of
// a peer that had one could take what is sent to the host.
type hostPorts struct {
	privileged uint16 // the last one
	taken      []portRange
	// bound are the ports of sockets, with their users. Any user changes them, so that
	// they choose a range only once, and are left out of it from then on.
	bound map[uint16]uint32
}

// allows reports whether the range is wide enough, and has no port that the host's
// settings take.
func (h hostPorts) allows(r portRange) bool {
	return r.size() >= minPorts && r.first > h.privileged &&
		!slices.ContainsFunc(h.taken, r.overlaps)
}

// free returns the largest range of ports that has none of the host's, where that is
// at least a quarter of what the host's settings leave, and else the largest that
// these leave, whatever sockets are in it: otherwise any user could leave peers no
// range, with some ports far apart. It is the zero range where no range has minPorts.
func (h hostPorts) free() portRange {
	whole := h.largest(h.taken)
	taken := slices.Clone(h.taken)
	for port := range h.bound {
		taken = append(taken, portRange{port, port})
	}
	if r := h.largest(taken); 4*r.size() >= whole.size() {
		return r
	}
	return whole
}

// largest returns the largest unprivileged range of ports between those taken.
func (h hostPorts) largest(taken []portRange) portRange {
	taken = slices.Clone(taken)
	slices.SortFunc(taken, func(a, b portRange) int { return cmp.Compare(a.first, b.first) })
	taken = append(taken, portRange{65535, 65535}) // never bad, and it ends the last gap
	best, next := portRange{}, int(h.privileged)+1
	for _, t := range taken {
		if n := int(t.first) - next; n >= minPorts && n > best.size() {
			best = portRange{uint16(next), t.first - 1}
		}
		next = max(next, int(t.last)+1)
	}
	return best
}

// around returns the widest range with r in it and none of the ports that the host's
// settings take.
func (h hostPorts) around(r portRange) portRange {
	first, last := int(h.privileged)+1, 65535
	for _, t := range h.taken {
		switch {
		case t.last < r.first:
			first = max(first, int(t.last)+1)
		case t.first > r.last:
			last = min(last, int(t.first)-1)
		}
	}
	return portRange{uint16(first), uint16(last)}
}

// has reports whether a port is the host's.
func (h hostPorts) has(port uint16) bool {
	_, bound := h.bound[port]
	return bound || port <= h.privileged || slices.ContainsFunc(h.taken, func(t portRange) bool { return t.has(port) })
}

// boundIn returns the ports of a range that sockets have, in order.
func (h hostPorts) boundIn(r portRange) []uint16 {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(h.bound)), func(port uint16) bool { return !r.has(port) })
}

// most returns the user whose sockets have the most ports of a range, and how many.
func (h hostPorts) most(r portRange) (uid uint32, number int) {
	by := map[uint32]int{}
	for _, port := range h.boundIn(r) {
		by[h.bound[port]]++
	}
	for _, u := range slices.Sorted(maps.Keys(by)) {
		if by[u] > number {
			uid, number = u, by[u]
		}
	}
	return uid, number
}

// keep returns the range to use when had was in use: the same one for as long as the
// host's settings allow it. Programs that take ports don't change it.
func (h hostPorts) keep(had portRange) portRange {
	if h.allows(had) {
		return had
	}
	return h.free()
}

// readHostPorts reads which ports are the host's, but for those that sockets are
// bound to.
func readHostPorts(s sysctls) (hostPorts, error) {
	h := hostPorts{privileged: lastPrivileged}
	text, err := s.read("ipv4/ip_local_port_range")
	if err != nil {
		return h, err
	}
	local, err := parseLocalPorts(text)
	if err != nil {
		return h, err
	}
	h.taken = append(h.taken, local)
	if text, err = s.read("ipv4/ip_local_reserved_ports"); err != nil {
		return h, err
	}
	reserved, err := parsePorts(text)
	if err != nil {
		return h, err
	}
	h.taken = append(h.taken, reserved...)
	// Newer than the others (4.11), and it may be lower than by default, which
	// doesn't make those ports a peer's.
	if text, err = s.read("ipv4/ip_unprivileged_port_start"); err == nil {
		if start, err := strconv.ParseUint(text, 10, 16); err == nil && start > 0 {
			h.privileged = max(h.privileged, uint16(start-1))
		}
	}
	return h, nil
}

// parseLocalPorts reads ip_local_port_range: two numbers.
func parseLocalPorts(text string) (portRange, error) {
	fields := strings.Fields(text)
	if len(fields) != 2 {
		return portRange{}, fmt.Errorf("read local ports %q: want two numbers", text)
	}
	return parsePortRange(fields[0], fields[1])
}

// parsePorts reads ip_local_reserved_ports, such as "1,2-4,10".
func parsePorts(text string) ([]portRange, error) {
	if text == "" {
		return nil, nil
	}
	var out []portRange
	for part := range strings.SplitSeq(text, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		r, err := parsePortRange(first, last)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

func parsePortRange(first, last string) (portRange, error) {
	a, err := strconv.ParseUint(first, 10, 16)
	if err != nil {
		return portRange{}, fmt.Errorf("read port %q: %w", first, err)
	}
	b, err := strconv.ParseUint(last, 10, 16)
	if err != nil {
		return portRange{}, fmt.Errorf("read port %q: %w", last, err)
	}
	if b < a {
		return portRange{}, fmt.Errorf("read ports %s to %s: the last is before the first", first, last)
	}
	return portRange{uint16(a), uint16(b)}, nil
}
