package darwin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// A PortRange is a range of TCP and UDP ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Contains reports whether a port is in the range.
func (r PortRange) Contains(port uint16) bool { return r.First <= port && port <= r.Last }

// Ports returns the number of ports in the range, 0 for the zero value.
func (r PortRange) Ports() int {
	if r == (PortRange{}) {
		return 0
	}
	return int(r.Last) - int(r.First) + 1
}

// String returns the range in the notation of pf.conf(5), such as 1024:65535.
func (r PortRange) String() string { return fmt.Sprintf("%d:%d", r.First, r.Last) }

// EphemeralPorts returns the ranges from which the kernel assigns ports to sockets that
// don't ask for a certain one, without the range of privileged ports.
func (s *Sysctl) EphemeralPorts() ([]PortRange, error) {
	var out []PortRange
	for _, ends := range [][2]string{{xnu.PortFirst, xnu.PortLast}, {xnu.PortHiFirst, xnu.PortHiLast}} {
		first, err := s.port(ends[0])
		if err != nil {
			return nil, err
		}
		last, err := s.port(ends[1])
		if err != nil {
			return nil, err
		}
		// If first is above last, the kernel counts downwards.
		out = append(out, PortRange{min(first, last), max(first, last)})
	}
	return out, nil
}

func (s *Sysctl) port(name string) (uint16, error) {
	v, err := s.get(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("read %s: %q is not a port", name, v)
	}
	return uint16(n), nil
}

// Sockets holds the local ports of all sockets of this Mac, both address families together,
// sorted and without duplicates. Flows of user-space stacks (Skywalk) are included.
type Sockets struct{ TCP, UDP []uint16 }

// ReadSockets reads the kernel's list of sockets without starting a process, as netstat(1)
// does (protopr in network_cmds netstat.tproj/inet.c).
func ReadSockets(k Kernel) (Sockets, error) {
	var s Sockets
	for _, one := range []struct {
		name  string
		ports *[]uint16
	}{{xnu.TCPSockets, &s.TCP}, {xnu.UDPSockets, &s.UDP}} {
		b, err := k.Table(one.name)
		if err != nil {
			return Sockets{}, fmt.Errorf("read %s: %w", one.name, err)
		}
		if *one.ports, err = parseSockets(b); err != nil {
			return Sockets{}, fmt.Errorf("read %s: %w", one.name, err)
		}
	}
	return s, nil
}

var errSocketList = errors.New("the list of sockets has an unknown format")

// parseSockets returns the local ports in a list of sockets, sorted, each once.
func parseSockets(b []byte) ([]uint16, error) {
	if len(b) < xnu.SizeXinpgen || binary.LittleEndian.Uint32(b) != xnu.SizeXinpgen {
		return nil, errSocketList
	}
	var ports []uint16
	for at := xnu.SizeXinpgen; ; {
		if len(b)-at < xnu.SocketAlignment {
			return nil, fmt.Errorf("%w: it has no end", errSocketList)
		}
		size, kind := int(binary.LittleEndian.Uint32(b[at:])), binary.LittleEndian.Uint32(b[at+4:])
		if size <= xnu.SizeXinpgen { // the last one
			break
		}
		if size > len(b)-at {
			return nil, fmt.Errorf("%w: %d bytes at %d of %d", errSocketList, size, at, len(b))
		}
		if kind == xnu.KindInpcb && size >= xnu.MinXinpcb {
			// A socket that isn't bound has port 0.
			if port := binary.BigEndian.Uint16(b[at+xnu.OffXinpLocal:]); port != 0 {
				ports = append(ports, port)
			}
		}
		at += (size + xnu.SocketAlignment - 1) &^ (xnu.SocketAlignment - 1)
		if at > len(b) {
			return nil, fmt.Errorf("%w: it has no end", errSocketList)
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports), nil
}
