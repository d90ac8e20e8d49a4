package linux

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// portRange is the ports from first to last, inclusive. The zero value is empty.
type portRange struct{ first, last uint16 }

// size returns the number of ports in the range.
func (r portRange) size() int {
	if r == (portRange{}) {
		return 0
	}
	return int(r.last) - int(r.first) + 1
}

// has reports whether the range contains a port.
func (r portRange) has(port uint16) bool { return r.size() > 0 && r.first <= port && port <= r.last }

// overlaps reports whether the ranges share a port.
func (r portRange) overlaps(s portRange) bool {
	return r.size() > 0 && s.size() > 0 && r.first <= s.last && s.first <= r.last
}

// String returns the range as nft writes it.
func (r portRange) String() string { return fmt.Sprintf("%d-%d", r.first, r.last) }

const (
	// minPorts is the size of the smallest range that peers' flows are translated to.
	// With fewer ports, one could be guessed, and two peers that use the same server
	// would collide.
	minPorts = 512
	// lastPrivileged is the last port that only root may bind by default
	// (ip_unprivileged_port_start in ip(7)).
	lastPrivileged = 1023
)

// defaultPorts is the range on a host with Linux's default ephemeral ports, 32768 to
// 60999, on which no program listens below that (ip_local_port_range in
// Documentation/networking/ip-sysctl.rst).
var defaultPorts = portRange{lastPrivileged + 1, 32767}

// hostPorts are the ports that the host uses or may use: privileged and ephemeral ones,
// those reserved by a sysctl, and those of sockets. A peer's flow that was translated to
// one of them could take packets that are meant for the host.
type hostPorts struct {
	privileged uint16 // last privileged port
	taken      []portRange
	// bound are the ports of sockets, with the user of each. Any user can change these,
	// so they matter only when a range is chosen; afterwards those in the range are
	// excluded from it.
	bound map[uint16]uint32
}

// allows reports whether a range is large enough and has no port that the host's settings
// reserve.
func (h hostPorts) allows(r portRange) bool {
	return r.size() >= minPorts && r.first > h.privileged &&
		!slices.ContainsFunc(h.taken, r.overlaps)
}

// free returns the largest range without any of the host's ports, if it is at least a
// quarter of the largest range that the settings leave, and otherwise that one, whatever
// sockets are in it. So a user can't leave peers without a range by binding a few ports
// far apart. It is empty if no range has minPorts.
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

// largest returns the largest unprivileged range between those taken.
func (h hostPorts) largest(taken []portRange) portRange {
	taken = slices.Clone(taken)
	slices.SortFunc(taken, func(a, b portRange) int { return cmp.Compare(a.first, b.first) })
	taken = append(taken, portRange{65535, 65535}) // ends the last gap
	best, next := portRange{}, int(h.privileged)+1
	for _, t := range taken {
		if n := int(t.first) - next; n >= minPorts && n > best.size() {
			best = portRange{uint16(next), t.first - 1}
		}
		next = max(next, int(t.last)+1)
	}
	return best
}

// around returns the widest range that contains r and none of the ports that the host's
// settings reserve.
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

// boundIn returns the ports of a range that sockets use, in order.
func (h hostPorts) boundIn(r portRange) []uint16 {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(h.bound)), func(port uint16) bool { return !r.has(port) })
}

// most returns the user whose sockets use the most ports of a range, and how many.
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

// keep returns the range to use after had: the same one as long as the host's settings
// allow it. Sockets don't change it.
func (h hostPorts) keep(had portRange) portRange {
	if h.allows(had) {
		return had
	}
	return h.free()
}

// readHostPorts reads the host's ports except those of sockets.
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
	// Exists since Linux 4.11. It may be lower than the default, but ports below 1024 are
	// never a peer's.
	if text, err = s.read("ipv4/ip_unprivileged_port_start"); err == nil {
		if start, err := strconv.ParseUint(text, 10, 16); err == nil && start > 0 {
			h.privileged = max(h.privileged, uint16(start-1))
		}
	}
	return h, nil
}

// parseLocalPorts parses ip_local_port_range: two numbers.
func parseLocalPorts(text string) (portRange, error) {
	fields := strings.Fields(text)
	if len(fields) != 2 {
		return portRange{}, fmt.Errorf("read local ports %q: want two numbers", text)
	}
	return parsePortRange(fields[0], fields[1])
}

// parsePorts parses ip_local_reserved_ports, such as "1,2-4,10".
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

// parsePortRange parses the first and the last port of a range.
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
