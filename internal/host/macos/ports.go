package macos

import (
	"fmt"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
)

// The source ports of peers' translated packets. pf chooses a port that none of its
// states uses, and doesn't consult the sockets (pf_get_sport in xnu bsd/net/pf.c). Its
// default range, 50001 to 65535 (pf.conf(5)), is inside the kernel's ephemeral ports,
// 49152 to 65535, so a peer's flow could take over answers to this host's sockets, or
// another peer's handshakes with WireGuard's port. So the nat rules name a range in
// which this host has no socket.
//
// That holds for TCP and UDP. pf draws the identifiers of translated ICMP echo
// requests from all 65,535 whatever the rule says, and keeps those of ICMPv6.
const (
	// lowestPort is above the fixed ports of macOS's own services, of which FaceTime's
	// 16384 to 16403 are the highest (support.apple.com/103229).
	lowestPort = 20_000
	// fewestPorts is the minimum length of a range. States also differ by the other
	// end, so this bounds the flows to one port of one host only.
	fewestPorts = 1024
	// ikePort is the UDP source port that pf never changes.
	ikePort = 500
	// minPortsAge is how long a range stays in use, and port 500 counts as in use, at
	// least. Any user can open and close sockets, and each change of the range loads the
	// anchor.
	minPortsAge = time.Minute
)

// defaultPorts is the range if the host's sockets can't be read: up to macOS's first
// ephemeral port by default (IPPORT_HIFIRSTAUTO, 49152, xnu bsd/netinet/in.h).
var defaultPorts = darwin.PortRange{First: lowestPort, Last: 49_151}

// choosePorts returns the longest range with no port of ephemeral or taken, or now if
// that still has none. If sockets leave no range of [fewestPorts], which any user can
// cause by opening many, it returns the longest range with no port of ephemeral. It
// returns false if there is none either.
func choosePorts(now darwin.PortRange, ephemeral []darwin.PortRange, taken []uint16) (r darwin.PortRange, ok bool) {
	free := freeRanges(ephemeral, taken)
	for _, f := range free {
		if now.First != 0 && f.Contains(now.First) && f.Contains(now.Last) {
			return now, true
		}
	}
	if r, ok = longest(free); ok {
		return r, true
	}
	return longest(freeRanges(ephemeral, nil))
}

// longest returns the longest range; false if none has [fewestPorts].
func longest(all []darwin.PortRange) (best darwin.PortRange, ok bool) {
	for _, r := range all {
		if n := r.Ports(); n >= fewestPorts && n > best.Ports() {
			best, ok = r, true
		}
	}
	return best, ok
}

// withoutPort returns the range, or the longer part beside port if that is inside.
func withoutPort(r darwin.PortRange, port uint16) darwin.PortRange {
	if port == 0 || !r.Contains(port) {
		return r
	}
	if below, above := port-r.First, r.Last-port; below >= above {
		return darwin.PortRange{First: r.First, Last: port - 1}
	}
	return darwin.PortRange{First: port + 1, Last: r.Last}
}

// freeRanges returns the ranges from [lowestPort] to 65535 without these ports.
func freeRanges(ephemeral []darwin.PortRange, taken []uint16) []darwin.PortRange {
	used := slices.Clone(ephemeral)
	for _, port := range taken {
		used = append(used, darwin.PortRange{First: port, Last: port})
	}
	slices.SortFunc(used, func(a, b darwin.PortRange) int { return int(a.First) - int(b.First) })
	var out []darwin.PortRange
	next := lowestPort
	for _, r := range used {
		if int(r.First) > next {
			out = append(out, darwin.PortRange{First: uint16(next), Last: r.First - 1})
		}
		next = max(next, int(r.Last)+1)
	}
	if next <= 65_535 {
		out = append(out, darwin.PortRange{First: uint16(next), Last: 65_535})
	}
	return out
}

// ports is the range for peers' packets, and what it was chosen by.
type ports struct {
	// nat is the range, chosen at the time at. none means that there is no range, and
	// crowded that sockets of this host have ports in every possible one.
	nat           darwin.PortRange
	at            time.Time
	none, crowded bool
	// ikeUntil is until when UDP port 500 counts as in use by a socket of this host.
	ikeUntil time.Time
	// sockets has the ports at the last successful read; nil before the first.
	sockets map[socketPort]struct{}
	// readErr is why the last read failed; nil if it succeeded.
	readErr error
}

// socketPort is a port that a socket of this host has.
type socketPort struct {
	proto string // as pfctl shows it
	port  uint16
}

// ike reports whether a socket of this host has UDP port 500, or had it less than
// [minPortsAge] ago. While the sockets can't be read the last result counts, and
// before the first one true.
func (p *ports) ike(now time.Time) bool {
	if p.readErr != nil && p.has("udp", ikePort) {
		return true
	}
	return now.Before(p.ikeUntil)
}

// has reports whether a socket of this host had a port at the last read. Before the
// first one it is true for UDP port 500 only.
func (p *ports) has(proto string, port uint16) bool {
	if p.sockets == nil {
		return proto == "udp" && port == ikePort
	}
	_, ok := p.sockets[socketPort{proto, port}]
	return ok
}

// observePorts reads this host's sockets, which takes no process, and chooses the range.
// A failed read changes nothing, except that [defaultPorts] is used if none succeeded
// before.
func (b *Backend) observePorts() {
	sockets, err := darwin.ReadSockets(b.o.Kernel)
	var ephemeral []darwin.PortRange
	if err == nil {
		ephemeral, err = b.sysctl.EphemeralPorts()
	}
	now, known := b.o.Now(), &b.ports
	if known.readErr = err; err != nil {
		if known.nat == (darwin.PortRange{}) {
			known.nat = defaultPorts
		}
		return
	}
	if slices.Contains(sockets.UDP, ikePort) {
		// The next Cut kills peers' flows that pf translates from that port.
		b.unwantedStates = b.unwantedStates || !known.ike(now)
		known.ikeUntil = now.Add(minPortsAge)
	}
	known.sockets = make(map[socketPort]struct{}, len(sockets.TCP)+len(sockets.UDP))
	for proto, ports := range map[string][]uint16{"tcp": sockets.TCP, "udp": sockets.UDP} {
		for _, port := range ports {
			known.sockets[socketPort{proto, port}] = struct{}{}
		}
	}
	taken := append(slices.Clone(sockets.TCP), sockets.UDP...)
	r, ok := choosePorts(known.nat, ephemeral, taken)
	known.none = !ok
	// A range that overlaps the ephemeral ports is replaced at once.
	overlaps := slices.ContainsFunc(ephemeral, func(e darwin.PortRange) bool { return e.First <= known.nat.Last && known.nat.First <= e.Last })
	if ok && r != known.nat && (known.at.IsZero() || overlaps || now.Sub(known.at) >= minPortsAge) {
		known.nat, known.at = r, now
	}
	known.crowded = ok && slices.ContainsFunc(taken, r.Contains)
}

// portProblems reports why peers' packets have no range, or one with sockets in it.
func (b *Backend) portProblems() (out []host.Problem) {
	add := func(message, hint string) {
		out = append(out, host.Problem{Step: StepPorts, Message: message, Hint: hint})
	}
	const raise = "set net.inet.ip.portrange.first and hifirst to 49152, macOS's default"
	switch {
	case b.ports.none:
		add(fmt.Sprintf("no %d ports in a row from %d on are left for peers' packets: this host's own sockets may get all of them", fewestPorts, lowestPort), raise)
	case b.ports.crowded:
		add(fmt.Sprintf("sockets of this host are among all ports from %d on, so peers' packets leave from ports that some of them have (%v)", lowestPort, b.ports.nat),
			"end the programs with so many open ports: netstat -an")
	}
	if b.ports.readErr != nil {
		add("this host's sockets can't be read: "+b.ports.readErr.Error(), "the helper uses what it read last, and tries again")
	}
	return out
}
