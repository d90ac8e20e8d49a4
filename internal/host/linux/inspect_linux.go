package linux

import (
	"context"
	"fmt"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Inspect implements [host.Enforcer]: it reads back the table, the addresses, the routes
// and the forwarding flags.
func (p *Backend) Inspect(ctx context.Context, r *policy.Ruleset) (host.Report, error) {
	return ask(ctx, p, func() (host.Report, error) { return p.inspect(r) })
}

// inspect reads the table first, then the interface, then the sysctls.
func (p *Backend) inspect(r *policy.Ruleset) (host.Report, error) {
	report := host.Report{Forwarding: p.forward.now(p.name)}
	add := func(step string, differs []string) {
		for _, d := range differs {
			report.Drift = append(report.Drift, host.Problem{Step: step, Message: d, Hint: "the helper repairs it"})
		}
	}
	differs, err := p.driftTable(r)
	if err != nil {
		return report, stepError(StepTable, err)
	}
	add(StepTable, differs)
	if differs, err = p.driftLink(r); err != nil {
		return report, stepError(StepAddresses, err)
	}
	add(StepAddresses, differs)
	n := p.need(r)
	changes, err := p.forward.changes(n)
	if err != nil {
		return report, stepError(StepForwarding, err)
	}
	for _, c := range changes {
		if c.Found == c.Set {
			continue // already has the value, and is only recorded
		}
		add(StepForwarding, []string{fmt.Sprintf("%s is %s instead of %s", c.Name, c.Found, c.Set)})
	}
	add(StepForwarding, p.forward.drift(n))
	report.Problems = append(p.portProblems(), p.boundProblems()...)
	return report, nil
}

// driftTable compares the kernel's table with that of r.
func (p *Backend) driftTable(r *policy.Ruleset) ([]string, error) {
	if p.filter.loaded == nil || p.enforced != r {
		changes, ok := []setChange(nil), false
		if p.filter.loaded != nil {
			changes, ok = difference(p.filter.loaded, compile(r, p.params()))
		}
		if !ok || len(changes) > 0 {
			return []string{"another ruleset is loaded"}, nil
		}
	}
	differs, err := p.filter.drift()
	return append(differs, p.driftPorts()...), err
}

// driftLink compares the mesh interface's addresses and routes with those of r.
func (p *Backend) driftLink(r *policy.Ruleset) ([]string, error) {
	if index := p.indexOf(p.name); index != p.link.index || index == 0 {
		return []string{fmt.Sprintf("interface %s is gone", p.name)}, nil
	}
	var out []string
	have, err := p.link.addrs()
	if err != nil {
		return nil, err
	}
	ipv6 := p.hasIPv6()
	for _, a := range r.Mesh().Addresses {
		if !have[single(a)] && (a.Is4() || ipv6) {
			out = append(out, fmt.Sprintf("address %v is missing", a))
		}
	}
	routes, err := p.link.routes()
	if err != nil {
		return nil, err
	}
	missing := 0
	for to, want := range peerRoutes(r, ipv6) {
		if routes[to] != want {
			missing++
		}
	}
	if missing > 0 {
		out = append(out, fmt.Sprintf("%d routes to peers are missing", missing))
	}
	return out, nil
}

// now returns the families that the host forwards according to its sysctls.
func (f *forwarding) now(mesh string) policy.Families {
	on := func(name string) bool {
		v, err := f.sys.read(name)
		return err == nil && v != "0"
	}
	return policy.Families{
		IPv4: on("ipv4/ip_forward") || on(conf("ipv4", mesh, "forwarding")),
		IPv6: on(allForwarding6),
	}
}
