package linux

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

const (
	// crowdedShare is the part of the range, one in so many ports, from which on it is
	// said that sockets have it: so many of peers' first packets are lost.
	boundShare = 64
	// betweenCuts is how long after flows were deleted for a port that a program took
	// the next are, at least: any user takes ports, and all flows are read for it.
	cutInterval = time.Minute
)

// ports is the range that peers' translated flows leave from.
type ports struct {
	diag *nlconn.Conn // asks for the host's sockets
	// now is the range as last observed; without any no flow is translated. Flows
	// that run may have any port of around, but for those of host.
	now, around portRange
	host        hostPorts
	// strays says that flows of peers may have ports that sockets have by now; they
	// were last deleted at cutAt.
	collisions bool
	cutAt      time.Time
	// failed is why ports of sockets couldn't be left out.
	failed error
}

// observePorts chooses the range of ports for translated flows. Where the host's
// settings leave none, the host forwards nothing for peers. A program that begins to
// listen in the range, or a changed sysctl, is noticed at the next look, of which the
// kernel doesn't tell: until then a flow of a peer may have that port.
func (p *Backend) observePorts(h *policy.Host) error {
	host, err := readHostPorts(p.forward.sys)
	if err != nil {
		return err
	}
	settled := host
	if host.bound, err = boundPorts(p.ports.diag); err != nil {
		return err
	}
	if p.enforced != nil {
		// Also while the tunnel's sockets are being opened again.
		port := p.enforced.Mesh().ListenPort
		host.taken = append(host.taken, portRange{port, port})
		if _, ok := host.bound[port]; !ok && port != 0 {
			host.bound[port] = 0
		}
	}
	had := p.ports.host.bound
	p.ports.host, p.ports.now, p.ports.around = host, host.keep(p.ports.now), portRange{}
	if p.others != nil {
		p.others.port.Store(uint32(p.ports.now.first))
		p.others.mesh.Store(p.name)
	}
	if p.ports.now.size() == 0 {
		h.Forwarding = policy.Families{}
		return nil
	}
	p.ports.around = settled.around(p.ports.now)
	for _, port := range host.boundIn(p.ports.around) {
		if _, ok := had[port]; !ok {
			p.ports.collisions = true
		}
	}
	return nil
}

// leaveBound leaves out the ports of the range that sockets of the host have by now,
// and deletes the flows that have them. It changes elements of a set: to choose another
// range would load the table, which any user could bring about at each look.
func (p *Backend) excludeBound(ctx context.Context) {
	if p.filter.loaded == nil || p.ports.now != p.loadedPorts || p.enforced == nil {
		return // the next load has them
	}
	// What fails makes the table unknown, so that it is loaded.
	with := p.loadedParams
	with.sockets = p.ports.host.boundIn(p.ports.around)
	if p.ports.failed = p.filter.replaceSet(boundSet(with.sockets)); p.ports.failed == nil {
		p.renderWith(with)
	}
	if p.ports.failed != nil || !p.ports.collisions || !p.ports.cutAt.IsZero() && time.Since(p.ports.cutAt) < cutInterval {
		return
	}
	r, host := p.enforced, p.ports.host
	err := p.flows.each(ctx, unix.AF_UNSPEC, netip.Addr{}, func(e *flowEntry) error {
		if !e.translated() || !hasPorts(e.orig.proto) {
			return nil
		}
		if _, ok := host.bound[e.reply.dport]; !ok {
			return nil
		}
		if _, ok := r.PeerByAddr(e.orig.src); !ok {
			return nil
		}
		return p.flows.queueDelete(e)
	})
	if err == nil {
		err = p.flows.flush()
	}
	p.ports.collisions, p.ports.cutAt, p.ports.failed = err != nil, time.Now(), err
}

// driftPorts says whether the table translates to another range than was observed.
func (p *Backend) driftPorts() []string {
	if p.loadedPorts == p.ports.now || p.ports.now.size() == 0 {
		return nil
	}
	return []string{fmt.Sprintf("a setting of the host took one of the ports %v of peers' flows, so that they now leave from %v",
		p.loadedPorts, p.ports.now)}
}

// portProblems says that no range is left, or that sockets have much of it.
func (p *Backend) portProblems() (out []host.Problem) {
	if p.ports.failed != nil {
		out = append(out, host.Problem{
			Step: stepOthers, Message: "flows of peers may have ports that sockets of this host have: " + p.ports.failed.Error(),
			Hint: "the helper tries again",
		})
	}
	if p.ports.now.size() == 0 {
		return append(out, host.Problem{
			Step: stepOthers,
			Message: fmt.Sprintf("no %d ports in a row are left for peers' flows to the internet and the lan, so that these are refused: "+
				"the others are privileged, local (net.ipv4.ip_local_port_range), reserved (net.ipv4.ip_local_reserved_ports) or WireGuard's", minPorts),
			Hint: "narrow net.ipv4.ip_local_port_range, to 32768 60999 as by default",
		})
	}
	if n := len(p.ports.host.boundIn(p.ports.now)); n*boundShare > p.ports.now.size() {
		uid, most := p.ports.host.most(p.ports.now)
		out = append(out, host.Problem{
			Step: stepOthers,
			Message: fmt.Sprintf("sockets of this host have %d of the %d ports that peers' flows leave from, %d of them those of the user with the id %d: "+
				"as large a part of the first packets of peers' flows is lost", n, p.ports.now.size(), most, uid),
			Hint: "end the programs that have so many ports: `ss -lntup` lists them",
		})
	}
	return out
}
