package macos

import (
	"fmt"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
)

// Which ports peers' packets leave with. pf chooses a port that none of its states
// uses, and doesn't look at sockets (pf_get_sport in xnu bsd/net/pf.c); the range
// that it takes by itself, 50001 to 65535, is the one from which the kernel gives
// ports to this host's own sockets. There a peer's flow to a host could take the
// answers to this one's, or another peer's handshakes. So the rules name a range that
// this host has no socket in.
//
// That holds for TCP and UDP. The identifiers of peers' echoes are drawn from all
// 65,535 for IPv4, whatever a rule says, and kept for IPv6.
const (
	// lowestPort is above the ports that macOS's own services take by number when
	// they need them: of them, FaceTime's from 16384 to 16403 are the highest
	// (support.apple.com/103229).
	lowestPort = 20_000
	// fewestPorts is how many a range has at least. pf's states are told apart by
	// the other end, too, so that is the bound of flows to one port of one host.
	fewestPorts = 1024
	// ikePort is that of UDP which pf never changes.
	ikePort = 500
	// settlePorts is how long a range stays, and a port 500 counts as taken, at least.
	// Any user can take ports, and each change loads the anchor.
	minPortsAge = time.Minute
)

// defaultPorts is the range of a Mac whose sockets aren't known: below the ports that
// macOS gives out unless told otherwise (xnu bsd/netinet/in.h, IPPORT_HIFIRSTAUTO).
var defaultPorts = darwin.PortRange{First: lowestPort, Last: 49_151}

// choosePorts returns the longest range that has no port of ephemeral and none of
// taken, or now, if that still is one. Where sockets leave none that is long enough,
// which any user can bring about, it is the longest that has none of ephemeral. It
// reports false when there is none either.
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

// longest returns the longest of ranges; false: none has enough ports.
func longest(all []darwin.PortRange) (best darwin.PortRange, ok bool) {
	for _, r := range all {
		if n := r.Ports(); n >= fewestPorts && n > best.Ports() {
			best, ok = r, true
		}
	}
	return best, ok
}

// withoutPort returns the longer part of a range without a port.
func withoutPort(r darwin.PortRange, port uint16) darwin.PortRange {
	if port == 0 || !r.Contains(port) {
		return r
	}
	if below, above := port-r.First, r.Last-port; below >= above {
		return darwin.PortRange{First: r.First, Last: port - 1}
	}
	return darwin.PortRange{First: port + 1, Last: r.Last}
}

// freeRanges returns what is left of the ports from [lowestPort] on.
func freeRanges(ephemeral []darwin.PortRange, taken []uint16) []darwin.PortRange {
	gone := slices.Clone(ephemeral)
	for _, port := range taken {
		gone = append(gone, darwin.PortRange{First: port, Last: port})
	}
	slices.SortFunc(gone, func(a, b darwin.PortRange) int { return int(a.First) - int(b.First) })
	var out []darwin.PortRange
	next := lowestPort
	for _, r := range gone {
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

// ports is what the backend knows of this host's sockets.
type ports struct {
	// nat is the range for peers' packets, since at; none says that there is none,
	// and crowded that sockets of this host are in each that could be.
	nat           darwin.PortRange
	at            time.Time
	none, crowded bool
	// ikeUntil is until when a socket of this host counts as having UDP port 500.
	ikeUntil time.Time
	// sockets are those of the last look that didn't fail; nil: none has been made.
	sockets map[socketPort]struct{}
	// unseen is why the last look failed.
	readErr error
}

// socketPort is a port that a socket of this host has.
type socketPort struct {
	proto string // as pfctl shows it
	port  uint16
}

// ike reports whether a socket of this host has UDP port 500, or had it a short time
// ago. While sockets can't be read, what was read last counts, and before that it has.
func (p *ports) ike(now time.Time) bool {
	if p.readErr != nil && p.has("udp", ikePort) {
		return true
	}
	return now.Before(p.ikeUntil)
}

// has reports whether a socket of this host had a port at the last look. Before the
// first one only port 500 counts as taken.
func (p *ports) has(proto string, port uint16) bool {
	if p.sockets == nil {
		return proto == "udp" && port == ikePort
	}
	_, ok := p.sockets[socketPort{proto, port}]
	return ok
}

// observePorts looks at this host's sockets, which takes no process. A look that
// fails changes nothing, but for the first: then the usual range counts, and port 500 as
// taken.
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
		// Peers' flows that pf translates to that port end when flows are cut.
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
	// Ports that the kernel gives out by itself are left at once.
	overlaps := slices.ContainsFunc(ephemeral, func(e darwin.PortRange) bool { return e.First <= known.nat.Last && known.nat.First <= e.Last })
	if ok && r != known.nat && (known.at.IsZero() || overlaps || now.Sub(known.at) >= minPortsAge) {
		known.nat, known.at = r, now
	}
	known.crowded = ok && slices.ContainsFunc(taken, r.Contains)
}

// portProblems says what of this host's ports stands in the way.
func (b *Backend) portProblems() (out []host.Problem) {
	add := func(message, hint string) {
		out = append(out, host.Problem{Step: StepPorts, Message: message, Hint: hint})
	}
	const raise = "have net.inet.ip.portrange.first and hifirst be 49152, as macOS ships"
	switch {
	case b.ports.none:
		add(fmt.Sprintf("no %d ports in a row from %d on are left for what peers send: this host's own sockets may get them all", fewestPorts, lowestPort), raise)
	case b.ports.crowded:
		add(fmt.Sprintf("sockets of this host are among all ports from %d on, so what peers send leaves from ports that some have (%v)", lowestPort, b.ports.nat),
			"end the programs that have so many ports: netstat -an")
	}
	if b.ports.readErr != nil {
		add("this host's sockets can't be read: "+b.ports.readErr.Error(), "what was read last counts; the helper tries again")
	}
	return out
}
