package trial

// The comparison of explain's and doctor's answers with the fate of packets.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// probed is a probe of C's, explain's answer about it, and its fate.
type probed struct {
	netlab.Probe
	passes, ok, internet bool
}

// The names of doctor's checks of other software's rules.
const (
	hostFirewall = "host firewall"
	otherFilters = "other packet filters"
)

// compareDoctor compares doctor's answers with the fate of C's probes, and of datagrams
// to and from WireGuard's port. general means that the host's unusual rules don't concern
// only the probes' destination, which doctor doesn't check.
func (a *oracle) compareDoctor(probes []probed, general bool) {
	a.t.Helper()
	checks := a.doctor()
	known := slices.DeleteFunc(slices.Clone(probes), func(p probed) bool { return p.ok || p.passes })
	inside, outside := a.tunnel(failed(checks, hostFirewall))
	all := !slices.ContainsFunc(checks, func(c api.Check) bool { return !c.OK })
	if all {
		a.fine++
	} else {
		a.wrong++
	}
	if inside.lost+outside.lost > 0 && len(failed(checks, hostFirewall)) == 0 {
		a.t.Errorf("doctor reports nothing that stops WireGuard, but %d datagrams to it and %d from it were lost: %+v", inside.lost, outside.lost, checks)
	}
	if all && general && len(known) > 0 {
		a.t.Errorf("doctor reports no problem, but this doesn't get through: %+v", known)
	}
	dies := func(message string, internet bool) bool {
		return slices.ContainsFunc(probes, func(p probed) bool {
			switch {
			case p.ok, p.internet != internet:
				return false
			case strings.Contains(message, " TCP packets "):
				return p.Proto == netlab.TCP
			case strings.Contains(message, " UDP packets "):
				return p.Proto == netlab.UDP
			}
			return true
		})
	}
	for _, message := range failed(checks, hostFirewall) {
		lost := inside.lost
		if strings.Contains(message, "from this host to") {
			lost = outside.lost
		}
		if lost == 0 && !unsure(message) {
			a.t.Errorf("doctor says %q, but no datagram was lost", message)
		}
	}
	for _, message := range failed(checks, otherFilters) {
		there, here := strings.Contains(message, " the internet"), strings.Contains(message, "to this host")
		if !unsure(message) && (there && !dies(message, true) || here && !dies(message, false)) {
			a.t.Errorf("doctor says %q, but every probe gets through: %+v", message, probes)
		}
	}
}

// unsure reports whether a message says that the check couldn't find something out.
func unsure(message string) bool {
	return strings.Contains(message, " may ") || strings.HasSuffix(message, "isn't known")
}

// failed returns the messages of a check that reports a problem.
func failed(checks []api.Check, name string) (out []string) {
	for _, c := range checks {
		if c.Name == name && !c.OK {
			out = append(out, c.Message)
		}
	}
	return out
}

func (a *oracle) doctor() (checks []api.Check) {
	a.t.Helper()
	o, err := a.Do(a.t.Context(), "doctor", "--json")
	if jerr := json.Unmarshal([]byte(o.Stdout), &checks); jerr != nil {
		a.t.Fatalf("doctor: %q, %v, %v", o.Stdout, err, jerr)
	}
	return checks
}

// datagrams counts the lost datagrams of one direction.
type datagrams struct{ lost int }

// tunnel sends datagrams between WireGuard's port on B's uplink and two devices, one
// known and one unknown, in both directions. Each is the first of its flow. Unless said
// has a message that some are stopped, it waits for all of them to arrive.
func (a *oracle) tunnel(said []string) (inside, outside datagrams) {
	a.t.Helper()
	at := netlab.Addresses()
	unknown := []netip.Addr{netip.MustParseAddr("198.51.100.99"), netip.MustParseAddr("2001:db8:99::99")}
	type sent struct {
		text string
		out  bool
	}
	var all []sent
	a.receive() // the probes' packets, which may fill the buffer
	for i, own := range at.BUplink.List() {
		b := netip.AddrPortFrom(own, listenPort)
		for _, far := range []netip.Addr{at.D.List()[i], unknown[i]} {
			for _, out := range []bool{false, true} {
				a.sent++
				s := sent{fmt.Sprintf("datagram %d.", a.sent), out}
				all = append(all, s)
				device := netip.AddrPortFrom(far, uint16(20000+a.sent))
				if out {
					a.emit(netlab.UDPPacket(b, device, []byte(s.text)), far)
				} else if err := a.W.Forge("b0", netlab.UDPPacket(device, b, []byte(s.text))); err != nil {
					a.t.Fatal(err)
				}
			}
		}
	}
	wait := netlab.PassWait
	if len(said) > 0 {
		wait = netlab.RefuseWait
	}
	for end := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		inside, outside = datagrams{}, datagrams{}
		a.receive()
		packets, err := a.out.Packets()
		if err != nil {
			a.t.Fatal(err)
		}
		for _, s := range all {
			left := slices.ContainsFunc(packets, func(p netlab.Packet) bool { return bytes.Equal(p.Payload, []byte(s.text)) })
			switch {
			case s.out && !left:
				outside.lost++
			case !s.out && !slices.Contains(a.got, s.text):
				inside.lost++
			}
		}
		if inside.lost+outside.lost == 0 || time.Now().After(end) {
			return inside, outside
		}
	}
}

// open opens the capture and the sockets that show what B sends and receives.
func (a *oracle) open() {
	a.t.Helper()
	var err error
	if a.out, err = a.B.Watch(func(p netlab.Packet) bool {
		return p.Out && p.Link == netlab.Uplink && bytes.HasPrefix(p.Payload, []byte("datagram "))
	}); err != nil {
		a.t.Fatal(err)
	}
	if err := a.B.Do(func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_UDP)
			if err != nil {
				return err
			}
			a.t.Cleanup(func() { unix.Close(fd) })
			a.in = append(a.in, fd)
		}
		return nil
	}); err != nil {
		a.t.Fatal(err)
	}
}

// receive reads the packets that were delivered to B.
func (a *oracle) receive() {
	buf := make([]byte, 1<<16)
	for _, fd := range a.in {
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				break
			}
			if i := bytes.Index(buf[:n], []byte("datagram ")); i >= 0 {
				a.got = append(a.got, string(buf[i:n]))
			}
		}
	}
}

// emit has B send a packet of its own, by its routes and its packet filter.
func (a *oracle) emit(packet []byte, to netip.Addr) {
	a.t.Helper()
	if err := a.B.Do(func() error {
		family, level, option := unix.AF_INET, unix.IPPROTO_IP, unix.IP_HDRINCL
		var dst unix.Sockaddr
		if to.Is4() {
			dst = &unix.SockaddrInet4{Addr: to.As4()}
		} else {
			family, level, option = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_HDRINCL
			dst = &unix.SockaddrInet6{Addr: to.As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
			return err
		}
		// A filter on the way out returns an error to the sender.
		_ = unix.Sendto(fd, packet, 0, dst)
		return nil
	}); err != nil {
		a.t.Fatal(err)
	}
}
