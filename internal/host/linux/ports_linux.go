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
	// boundShare: it is reported when sockets use more than one in boundShare ports of
	// the range, because that share of peers' first packets is lost.
	boundShare = 64
	// cutInterval is the shortest time between two deletions of flows for ports that
	// programs took: any user can take ports, and each deletion reads all flows.
	cutInterval = time.Minute
)

// ports is the range of ports that peers' flows are translated to.
type ports struct {
	diag *nlconn.Conn // lists the host's sockets (sock_diag(7))
	// now is the range as last observed; if it is empty no flow is translated. Running
	// flows may have any port of around, except those of host.
	now, around portRange
	host        hostPorts
	// collisions is set if flows of peers may have ports that sockets took. Such flows
	// were last deleted at cutAt.
	collisions bool
	cutAt      time.Time
	// failed is the error of excluding sockets' ports from the range.
	failed error
}

// observePorts chooses the range of ports for translated flows. If the host's settings
// leave none, the host forwards nothing for peers. The kernel doesn't report when a
// program binds a port or a sysctl changes, so until the next observation a flow of a
// peer may have such a port.
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
		// Count WireGuard's port even while its sockets are being reopened.
		port := p.enforced.Mesh().ListenPort
		host.taken = append(host.taken, portRange{port, port})
		if _, ok := host.bound[port]; !ok && port != 0 {
			host.bound[port] = 0
		}
	}
	had := p.ports.host.bound
	p.ports.host, p.ports.now, p.ports.around = host, host.keep(p.ports.now), portRange{}
	p.observed.port.Store(uint32(p.ports.now.first))
	p.observed.mesh.Store(&meshInterface{p.name, p.cfg.Addresses})
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

// excludeBound excludes the ports of the range that sockets use by now, and deletes the
// flows that have them. It changes set elements: choosing another range would load the
// whole table, and any user could cause that at each observation.
func (p *Backend) excludeBound(ctx context.Context) {
	if p.filter.loaded == nil || p.ports.now != p.loadedPorts || p.enforced == nil {
		return // the next load excludes them
	}
	// After a failure the table is unknown, and loaded again.
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

// driftPorts reports that the loaded table has another range than the observed one.
func (p *Backend) driftPorts() []string {
	if p.loadedPorts == p.ports.now || p.ports.now.size() == 0 {
		return nil
	}
	return []string{fmt.Sprintf("a setting of the host claims one of the ports %v of peers' flows, which now leave from %v",
		p.loadedPorts, p.ports.now)}
}

// portProblems reports that no range is left, or that sockets use much of it.
func (p *Backend) portProblems() (out []host.Problem) {
	if p.ports.failed != nil {
		out = append(out, host.Problem{
			Step: stepOthers, Kind: host.KindOtherFilters, Message: "flows of peers may have the ports of this host's sockets: " + p.ports.failed.Error(),
			Hint: "the helper tries again",
		})
	}
	if p.ports.now.size() == 0 {
		return append(out, host.Problem{
			Step: stepOthers, Kind: host.KindOtherFilters,
			Message: fmt.Sprintf("no %d ports in a row are left for peers' flows to the internet and the lan, so these are refused: "+
				"the others are privileged, local (net.ipv4.ip_local_port_range), reserved (net.ipv4.ip_local_reserved_ports) or WireGuard's", minPorts),
			Hint: "narrow net.ipv4.ip_local_port_range, to 32768 60999 as by default",
		})
	}
	if n := len(p.ports.host.boundIn(p.ports.now)); n*boundShare > p.ports.now.size() {
		uid, most := p.ports.host.most(p.ports.now)
		out = append(out, host.Problem{
			Step: stepOthers, Kind: host.KindOtherFilters,
			Message: fmt.Sprintf("sockets of this host use %d of the %d ports that peers' flows leave from, %d of them by the user with the ID %d: "+
				"the same share of the first packets of peers' flows is lost", n, p.ports.now.size(), most, uid),
			Hint: "stop the programs that use so many ports: `ss -lntup` lists them",
		})
	}
	return out
}
