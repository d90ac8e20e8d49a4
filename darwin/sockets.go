package darwin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
)

// The kernel variables of the ports that the kernel gives to sockets by itself (xnu
// bsd/netinet/in_pcb.c, in_pcbbind_check_port and net.inet.ip.portrange): those of
// sockets that ask for any, and those of sockets that ask for a high one
// (IP_PORTRANGE_HIGH). Both families use them.
const (
	portFirst   = "net.inet.ip.portrange.first"
	portLast    = "net.inet.ip.portrange.last"
	portHiFirst = "net.inet.ip.portrange.hifirst"
	portHiLast  = "net.inet.ip.portrange.hilast"
)

// A PortRange is a range of TCP and UDP ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Contains reports whether a port is in the range.
func (r PortRange) Contains(port uint16) bool { return r.First <= port && port <= r.Last }

// Ports returns how many ports are in the range; of the zero value none.
func (r PortRange) Ports() int {
	if r == (PortRange{}) {
		return 0
	}
	return int(r.Last) - int(r.First) + 1
}

// String returns the range as pf.conf(5) has it.
func (r PortRange) String() string { return fmt.Sprintf("%d:%d", r.First, r.Last) }

// EphemeralPorts returns the ranges from which the kernel gives ports to sockets that
// don't name one, privileged ones left out.
func (s *Sysctl) EphemeralPorts() ([]PortRange, error) {
	var out []PortRange
	for _, ends := range [][2]string{{portFirst, portLast}, {portHiFirst, portHiLast}} {
		first, err := s.port(ends[0])
		if err != nil {
			return nil, err
		}
		last, err := s.port(ends[1])
		if err != nil {
			return nil, err
		}
		// The kernel counts downwards from a first that is above the last.
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

// The kernel variables that list the sockets of a protocol.
const (
	tcpSockets = "net.inet.tcp.pcblist_n"
	udpSockets = "net.inet.udp.pcblist_n"
)

// Sockets are the local ports that the sockets of this Mac have, those of both
// families together, sorted. User-space flows (the kernel's Skywalk) are among them.
type Sockets struct{ TCP, UDP []uint16 }

// ReadSockets asks the kernel for its sockets, without a process: what netstat(1)
// does (network_cmds netstat.tproj/inet.c, protopr).
func ReadSockets(k Kernel) (Sockets, error) {
	var s Sockets
	for _, one := range []struct {
		name  string
		ports *[]uint16
	}{{tcpSockets, &s.TCP}, {udpSockets, &s.UDP}} {
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

// The list begins and ends with a struct xinpgen. In between are, for each socket,
// several structs that each begin with their length and kind and are padded to 8
// bytes; the one of kind XSO_INPCB has the ports (xnu bsd/netinet/in_pcblist.c,
// get_pcblist_n; bsd/netinet/in_pcb.h, struct xinpcb_n; bsd/sys/socketvar.h).
const (
	sizeXinpgen     = 24
	kindInpcb       = 0x10
	offXinpLocal    = 18 // inp_lport, in network order
	minXinpcb       = offXinpLocal + 2
	socketAlignment = 8
)

var errSocketList = errors.New("the list of sockets isn't understood")

// parseSockets returns the local ports in a list of sockets, sorted, each once.
func parseSockets(b []byte) ([]uint16, error) {
	if len(b) < sizeXinpgen || binary.LittleEndian.Uint32(b) != sizeXinpgen {
		return nil, errSocketList
	}
	var ports []uint16
	for at := sizeXinpgen; ; {
		if len(b)-at < socketAlignment {
			return nil, fmt.Errorf("%w: it has no end", errSocketList)
		}
		size, kind := int(binary.LittleEndian.Uint32(b[at:])), binary.LittleEndian.Uint32(b[at+4:])
		if size <= sizeXinpgen { // the last one
			break
		}
		if size > len(b)-at {
			return nil, fmt.Errorf("%w: %d bytes at %d of %d", errSocketList, size, at, len(b))
		}
		if kind == kindInpcb && size >= minXinpcb {
			// 0 is a socket that isn't bound.
			if port := binary.BigEndian.Uint16(b[at+offXinpLocal:]); port != 0 {
				ports = append(ports, port)
			}
		}
		at += (size + socketAlignment - 1) &^ (socketAlignment - 1)
		if at > len(b) {
			return nil, fmt.Errorf("%w: it has no end", errSocketList)
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports), nil
}
