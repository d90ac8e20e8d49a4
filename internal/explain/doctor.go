package explain

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/plain"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// DoctorLook bounds Doctor's question about other software. If it takes longer, the last
// answer of [Explainer.Run] counts, so that a doctor's report is there in time.
const DoctorLook = 5 * time.Second

// Doctor checks every precondition, in an order that doesn't change. A check on which others
// depend comes before them; while it fails, they refer to it by Follows and have no hint of
// their own, so that one fault is told once.
func (x *Explainer) Doctor(ctx context.Context) []api.Check {
	c, _ := x.o.Held()
	if x.o.Host.Others != nil {
		limit, cancel := context.WithTimeout(ctx, DoctorLook)
		x.askOthers(limit, c)
		cancel()
	}
	checks := x.checks(c, x.found(c), x.tryFolder(ctx))
	for i := range checks {
		checks[i].Message, checks[i].Hint = plain.Text(checks[i].Message), plain.Text(checks[i].Hint)
	}
	return checks
}

// The names of checks that others refer to.
const (
	checkHelper = "helper"
	checkFolder = "state folder"
	// othersStep is the step of problems with other software's packet filters.
	othersStep = "look at other packet filters"
)

// checks returns all checks. Each problem of found goes into the check that it belongs to, or
// is a check of its own at the end.
func (x *Explainer) checks(c held.State, found []host.Problem, folder api.Check) []api.Check {
	doc := x.o.Wanted.Document()
	wrong := func(name, otherwise string, is func(host.Problem) bool) (out []api.Check) {
		found = slices.DeleteFunc(slices.Clone(found), func(p host.Problem) bool {
			if is(p) {
				out = append(out, api.Check{Name: name, Message: p.Message, Hint: p.Hint})
				return true
			}
			return false
		})
		if out == nil {
			out = []api.Check{{Name: name, OK: true, Message: otherwise}}
		}
		return out
	}
	enforcing := c.Phase == api.Enforcing
	// follows marks what needn't be looked at by itself while the helper doesn't enforce.
	follows := func(check api.Check) api.Check {
		if !check.OK && !enforcing {
			check.Follows, check.Hint = checkHelper, ""
		}
		return check
	}
	helper := api.Check{Name: checkHelper, OK: enforcing, Message: "the state is " + c.Phase, Hint: "wait, or see: meshhelper events"}
	if !enforcing && len(c.Problems) > 0 {
		cause := c.Problems[0]
		found = slices.DeleteFunc(slices.Clone(found), func(p host.Problem) bool { return p == cause })
		helper.Message += ": " + cause.Step + ": " + cause.Message
		if cause.Hint != "" {
			helper.Hint = cause.Hint
		}
	}
	checks := []api.Check{
		helper, folder,
		follows(api.Check{
			Name: "wanted state", OK: c.Enforced == doc.Generation, Message: fmt.Sprintf("generation %d is wanted, %d in force", doc.Generation, c.Enforced), Hint: "see the problems below",
		}),
		follows(api.Check{Name: "tunnel device", OK: c.Tunnel != nil, Message: fmt.Sprintf("the mesh interface is %q, UDP port %d", c.Interface, c.ListenPort), Hint: "the helper makes it again by itself"}),
		follows(checkPort(c)),
		follows(api.Check{Name: "packet filter", OK: enforcing, Message: "our rules are read back and compared", Hint: "they aren't loaded as they should be"}),
	}
	checks = append(checks, wrong("host firewall", "no rule of other software's is known to stop WireGuard's own packets", func(p host.Problem) bool { return p.Tunnel })...)
	checks = append(checks, wrong("other packet filters", "no rule of other software's is known to stop what peers may do", func(p host.Problem) bool { return p.Step == othersStep })...)
	checks = append(checks, wrong(stepPrefix, "nothing else on this host is known to have a part of it", func(p host.Problem) bool { return p.Step == stepPrefix })...)
	checks = append(checks, checkUplink(c), checkForwarding(c), x.checkEndpoint(c, doc), x.checkNames(doc), x.checkClock(), checkFlows(c))
	for _, p := range found {
		check := api.Check{Name: p.Step, Message: p.Message, Hint: p.Hint}
		if slices.Contains(c.Problems, p) {
			check = follows(check)
		}
		checks = append(checks, check)
	}
	for i := range checks {
		if checks[i].OK {
			checks[i].Hint = ""
		}
	}
	return checks
}

// more returns what the checks find that isn't among the problems yet, for status.
func (x *Explainer) more(c held.State, found []host.Problem) (out []host.Problem) {
	if c.Phase != api.Enforcing {
		return nil // it would follow from that
	}
	if p := x.full.Load(); p != nil {
		out = append(out, *p)
	}
	doc := x.o.Wanted.Document()
	for _, check := range []api.Check{checkUplink(c), x.checkEndpoint(c, doc), x.checkNames(doc), x.checkClock(), checkFlows(c)} {
		if !check.OK && !slices.ContainsFunc(found, func(p host.Problem) bool { return p.Message == check.Message }) {
			out = append(out, host.Problem{Step: check.Name, Message: check.Message, Hint: check.Hint})
		}
	}
	return out
}

// helpersChecks are the checks of a helper, in the order of [Daemon.Doctor], behind the one
// of the helper itself.
var helpersChecks = []string{
	checkFolder, "wanted state", "tunnel device", "UDP port", "packet filter", "host firewall", "other packet filters",
	stepPrefix, "default route", "forwarding", "endpoint", "peers' endpoints", "clock", "flows",
}

// noInterface stands for the mesh interface where there is none: Linux lets no interface have
// the name (dev_valid_name of net/core/dev.c), and macOS numbers its own.
const noInterface = ".."

// ChecksWithout returns the checks of a helper where none answers: what they are about
// isn't looked at, but for the mesh prefixes, which the addresses of the host's interfaces
// are compared with.
func ChecksWithout(prefixes []netip.Prefix, interfaces []policy.Interface) (out []api.Check) {
	for _, name := range helpersChecks {
		c := api.Check{Name: name, Message: "not looked at, for no helper answers", Follows: checkHelper}
		if name != stepPrefix {
			out = append(out, c)
			continue
		}
		r, err := policy.Compile(policy.Mesh{Prefixes: prefixes}, policy.Host{Interface: noInterface, Interfaces: interfaces}, time.Time{})
		if err != nil {
			c.Message = "not looked at: " + err.Error()
			out = append(out, c)
			continue
		}
		overlaps := overlapProblems(r, &wanted.Settings{})
		for _, p := range overlaps {
			out = append(out, api.Check{Name: name, Message: p.Message, Hint: p.Hint})
		}
		if len(overlaps) == 0 {
			out = append(out, api.Check{Name: name, OK: true, Message: "no interface has an address inside the mesh prefixes; routes and DNS servers aren't looked at, for no helper answers"})
		}
	}
	return out
}

// checkPort wants WireGuard's UDP port to be served.
func checkPort(c held.State) api.Check {
	out := api.Check{Name: "UDP port", Hint: "another program may hold the port: see which, for instance with ss -lunp; the helper tries again"}
	if c.Tunnel == nil {
		out.Message = "there is no tunnel that listens"
		return out
	}
	if err := c.Tunnel.Listening(); err != nil {
		out.Message = err.Error()
		return out
	}
	out.OK, out.Message = true, fmt.Sprintf("WireGuard listens on UDP port %d", c.ListenPort)
	return out
}

// checkUplink wants a default route while a peer may route.
func checkUplink(c held.State) api.Check {
	out := api.Check{Name: "default route", OK: true, Hint: "give the host a default route: without one peers reach no internet"}
	switch up4, up6 := c.Host.Uplink4, c.Host.Uplink6; {
	case up4 == "" && up6 == "":
		out.OK, out.Message = !mayRoute(c), "the host has no default route"
	case up6 == "" || up6 == up4:
		out.Message = fmt.Sprintf("the uplink is %q", up4)
	case up4 == "":
		out.Message = fmt.Sprintf("the uplink is %q, for IPv6 alone", up6)
	default:
		out.Message = fmt.Sprintf("the uplink is %q, and %q for IPv6", up4, up6)
	}
	return out
}

// mayRoute reports whether a peer may route.
func mayRoute(c held.State) bool {
	return c.Ruleset != nil && slices.ContainsFunc(c.Ruleset.Peers(), func(p policy.PeerRules) bool { return p.Permissions.Has(mesh.Routing) })
}

// checkForwarding wants forwarding while a peer may route.
func checkForwarding(c held.State) api.Check {
	may := mayRoute(c)
	on := c.Forwarding.IPv4 || c.Forwarding.IPv6
	out := api.Check{Name: "forwarding", OK: on || !may, Message: "off, and no peer may route", Hint: "the helper switches it on; something else may switch it off"}
	switch {
	case on:
		out.Message = fmt.Sprintf("IPv4 %v, IPv6 %v", c.Forwarding.IPv4, c.Forwarding.IPv6)
	case may:
		out.Message = "off, although a peer may route"
	}
	return out
}

// clockSlack is how far apart two clocks may be that agree.
const clockSlack = 5 * time.Second

// checkClock compares the wall clock with the one that grants end by.
func (x *Explainer) checkClock() api.Check {
	behind := x.o.Wanted.Now().Sub(x.o.Wall())
	return api.Check{
		Name: "clock", OK: behind < clockSlack,
		Message: fmt.Sprintf("the wall clock is %v behind the last time that was saved", max(behind, 0).Round(1e9)),
		Hint:    "set the clock; until it has caught up, timed permissions end by the time that was saved",
	}
}

// checkFlows tells which peer has come nearest to the bound of its flows.
func checkFlows(c held.State) api.Check {
	check := api.Check{Name: "flows", OK: true, Message: "no peer has flows"}
	if c.Guard == nil || c.Ruleset == nil {
		return check
	}
	stats, all, most := c.Guard.Stats(), 0, -1.0
	for _, p := range c.Ruleset.Peers() {
		s, ok := stats[p.PublicKey]
		if all += s.Held; !ok || s.Limit == 0 || s.Held == 0 {
			continue
		}
		if share := float64(s.Held) / float64(s.Limit); share > most {
			most = share
			check.Message = fmt.Sprintf("%s has most: %d of the %d entries of the packet filter that a peer may have", p.Name, s.Held, s.Limit)
			check.OK = s.Held < s.Limit
		}
	}
	if all > 0 {
		check.Message += fmt.Sprintf("; all peers together have %d", all)
	}
	if c.Limits.PerPeer > 0 {
		check.Message += fmt.Sprintf("; the packet filter by itself lets a peer have at most %d", c.Limits.PerPeer)
	}
	check.Hint = "its new flows are refused until others end; other peers have shares of their own"
	return check
}
