package linux

import (
	"fmt"

	"github.com/mdlayher/netlink"

	"github.com/meshhelper/meshhelper/internal/platform"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// ports is the range that peers' translated flows leave from.
type ports struct {
	diag *netlink.Conn // asks for the host's sockets
	// now is the range as last observed; without any no flow is translated. Flows
	// that run may have any port of around, but for those of host.
	now, around portRange
	host        hostPorts
}

// observePorts chooses the range of ports for translated flows. Where none is left,
// the host forwards nothing for peers. A program that begins to listen in the range,
// or a changed sysctl, is noticed at the next look, of which the kernel doesn't tell:
// until then a flow of a peer may have that port.
func (p *Platform) observePorts(h *policy.Host) error {
	host, err := readHostPorts(p.forward.sys)
	if err != nil {
		return err
	}
	settled := host
	bound, err := boundPorts(p.ports.diag)
	if err != nil {
		return err
	}
	host.taken = append(host.taken, bound...)
	if p.enforced != nil {
		// Also while the tunnel's sockets are being opened again.
		port := p.enforced.Mesh().ListenPort
		host.taken = append(host.taken, portRange{port, port})
	}
	p.ports.host, p.ports.now, p.ports.around = host, host.keep(p.ports.now), portRange{}
	if p.ports.now.size() == 0 {
		h.Forwarding = policy.Families{}
	} else {
		p.ports.around = settled.around(p.ports.now)
	}
	return nil
}

// driftPorts says whether the table translates to another range than was observed.
func (p *Platform) driftPorts() []string {
	if p.loadedPorts == p.ports.now || p.ports.now.size() == 0 {
		return nil
	}
	return []string{fmt.Sprintf("a program or a setting of the host took one of the ports %v of peers' flows, so that they now leave from %v",
		p.loadedPorts, p.ports.now)}
}

// portProblems says that no range is left.
func (p *Platform) portProblems() []platform.Problem {
	if p.ports.now.size() > 0 {
		return nil
	}
	return []platform.Problem{{
		Step: lookAround,
		Message: fmt.Sprintf("no %d ports in a row are left for peers' flows to the internet and the lan, so that these are refused: "+
			"the others are privileged, local (net.ipv4.ip_local_port_range), reserved (net.ipv4.ip_local_reserved_ports) or in use", minPorts),
		Hint: "narrow net.ipv4.ip_local_port_range, to 32768 60999 as by default; `ss -lntu` lists the programs that listen",
	}}
}
