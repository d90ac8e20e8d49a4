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

// DoctorOthersLimit bounds Doctor's examination of other software. If that takes longer, the
// last result of [Explainer.Run] counts, so that Doctor answers well within the 10 s that the
// command waits.
const DoctorOthersLimit = 5 * time.Second

// Doctor checks every precondition, in the order of checkNames and then one check for each
// problem that belongs to none of them. A check on which others depend comes before them; while
// it fails, they refer to it by Follows and have no hint of their own, so that one fault is
// reported once. Unlike status, Doctor examines other software anew and writes a trial file into
// the state directory.
func (x *Explainer) Doctor(ctx context.Context) []api.Check {
	c, _ := x.o.Held()
	if x.o.Host.Others != nil {
		limit, cancel := context.WithTimeout(ctx, DoctorOthersLimit)
		x.examineOthers(limit, c)
		cancel()
	}
	checks := x.checks(c, x.knownProblems(c), x.checkStateDir(ctx))
	for i := range checks {
		checks[i].Message, checks[i].Hint = plain.Text(checks[i].Message), plain.Text(checks[i].Hint)
	}
	return checks
}

const (
	// nameHelper and nameStateDir are names of checks that are used more than once.
	nameHelper   = "helper"
	nameStateDir = "state folder"
)

// checks returns all checks; stateDir is the result of checkStateDir, which has to wait. Each of the problems goes into the check that it belongs to, or
// becomes a check of its own at the end.
func (x *Explainer) checks(c held.State, problems []host.Problem, stateDir api.Check) []api.Check {
	doc := x.o.Wanted.Document()
	var cause host.Problem // of the helper not enforcing; its check reports that
	// take moves the problems of a kind out of problems: each becomes a failed check of that
	// name. Without any the check is OK, with the message otherwise, unless the kind isn't
	// examined or the cause is of it.
	take := func(name string, kind host.ProblemKind, otherwise string) (out []api.Check) {
		problems = slices.DeleteFunc(slices.Clone(problems), func(p host.Problem) bool {
			if p.Kind == kind {
				out = append(out, api.Check{Name: name, Message: p.Message, Hint: p.Hint})
				return true
			}
			return false
		})
		reason, unexamined := x.o.Host.Unexamined[kind]
		if !unexamined {
			reason, unexamined = c.Unexamined[kind]
		}
		switch {
		case out != nil:
		case cause.Kind == kind:
			out = []api.Check{{Name: name, Message: cause.Message, Follows: nameHelper}}
		case unexamined:
			out = []api.Check{{Name: name, OK: true, Message: "not examined on this host: " + reason}}
		default:
			out = []api.Check{{Name: name, OK: true, Message: otherwise}}
		}
		return out
	}
	enforcing := c.Phase == api.Enforcing
	// follows marks a failed check as a consequence while the helper doesn't enforce.
	follows := func(check api.Check) api.Check {
		if !check.OK && !enforcing {
			check.Follows, check.Hint = nameHelper, ""
		}
		return check
	}
	helper := api.Check{Name: nameHelper, OK: enforcing, Message: "the state is " + c.Phase, Hint: "wait, or see: meshhelper events"}
	if !enforcing && len(c.Problems) > 0 {
		cause = c.Problems[0] // reported by the check of the helper, so not once more at the end
		problems = slices.DeleteFunc(slices.Clone(problems), func(p host.Problem) bool { return p == cause })
		helper.Message += ": " + cause.Step + ": " + cause.Message
		if cause.Hint != "" {
			helper.Hint = cause.Hint
		}
	}
	checks := []api.Check{
		helper, stateDir,
		follows(api.Check{
			Name: "wanted state", OK: c.Enforced == doc.Generation, Message: fmt.Sprintf("generation %d is wanted, %d in force", doc.Generation, c.Enforced), Hint: "see the problems below",
		}),
		follows(api.Check{Name: "tunnel device", OK: c.Tunnel != nil, Message: fmt.Sprintf("the mesh interface is %q, UDP port %d", c.Interface, c.ListenPort), Hint: "the helper makes it again by itself"}),
		follows(checkPort(c)),
		follows(api.Check{Name: "packet filter", OK: enforcing, Message: "our rules are read back and compared", Hint: "they aren't loaded as they should be"}),
	}
	checks = append(checks, take("host firewall", host.KindHostFirewall, "no rule of other software's is known to stop WireGuard's own packets")...)
	checks = append(checks, take("other packet filters", host.KindOtherFilters, "no rule of other software's is known to stop what peers may do")...)
	checks = append(checks, take(stepPrefix, host.KindPrefix, "nothing else on this host is known to have a part of it")...)
	checks = append(checks, checkUplink(c), checkForwarding(c), x.checkEndpoint(c, doc), x.checkPeerEndpoints(c, doc), x.checkClock(), checkFlows(c))
	for _, p := range problems {
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

// checkProblems returns the failed checks as problems, for status, without those that known
// has. Only checks that cost no question to the host are among them.
func (x *Explainer) checkProblems(c held.State, known []host.Problem) (out []host.Problem) {
	if c.Phase != api.Enforcing {
		return nil // they would be consequences
	}
	if p := x.stateDirProblem.Load(); p != nil {
		out = append(out, *p)
	}
	doc := x.o.Wanted.Document()
	for _, check := range []api.Check{checkUplink(c), x.checkEndpoint(c, doc), x.checkPeerEndpoints(c, doc), x.checkClock(), checkFlows(c)} {
		if !check.OK && !slices.ContainsFunc(known, func(p host.Problem) bool { return p.Message == check.Message }) {
			out = append(out, host.Problem{Step: check.Name, Message: check.Message, Hint: check.Hint})
		}
	}
	return out
}

// checkNames has the names of the checks behind that of the helper itself, in the order of
// [Explainer.Doctor]. A command lists the same checks where no helper answers.
var checkNames = []string{
	nameStateDir, "wanted state", "tunnel device", "UDP port", "packet filter", "host firewall", "other packet filters",
	stepPrefix, "default route", "forwarding", "endpoint", "peers' endpoints", "clock", "flows",
}

// noInterface stands for the mesh interface where there is none, since policy.Compile needs
// a name. No interface can have this one: Linux refuses it (dev_valid_name of net/core/dev.c),
// and macOS names interfaces by driver and number.
const noInterface = ".."

// ChecksWithout returns the checks of [Explainer.Doctor] for a command that gets no answer from
// a helper. why says so in a clause, such as "no helper answers". They are marked as not checked
// and as consequences of that, except for the one of the mesh
// prefixes: it compares them with the addresses of the host's interfaces, which needs no root. With nil prefixes that isn't checked
// either: a running helper's own interface has addresses there.
func ChecksWithout(why string, prefixes []netip.Prefix, interfaces []policy.Interface) (out []api.Check) {
	for _, name := range checkNames {
		c := api.Check{Name: name, Message: "not checked: " + why, Follows: nameHelper}
		if name != stepPrefix || prefixes == nil {
			out = append(out, c)
			continue
		}
		r, err := policy.Compile(policy.Mesh{Prefixes: prefixes}, policy.Host{Interface: noInterface, Interfaces: interfaces}, time.Time{})
		if err != nil {
			c.Message = "not checked: " + err.Error()
			out = append(out, c)
			continue
		}
		overlaps := overlapProblems(r, &wanted.Settings{})
		for _, p := range overlaps {
			out = append(out, api.Check{Name: name, Message: p.Message, Hint: p.Hint})
		}
		if len(overlaps) == 0 {
			out = append(out, api.Check{Name: name, OK: true, Message: "no interface has an address inside the mesh prefixes; routes and DNS servers aren't checked: " + why})
		}
	}
	return out
}

// checkPort fails if WireGuard's UDP port isn't served.
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

// checkUplink fails if a peer may route and the host has no default route. A host with an uplink
// for one family only is OK: peers reach the internet by that family.
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

// mayRoute reports whether any peer may route. Without one the host needs neither an uplink nor
// forwarding.
func mayRoute(c held.State) bool {
	return c.Ruleset != nil && slices.ContainsFunc(c.Ruleset.Peers(), func(p policy.PeerRules) bool { return p.Permissions.Has(mesh.Routing) })
}

// checkForwarding fails if a peer may route and the host forwards neither family. One family is
// enough: a host without IPv6 doesn't forward that.
func checkForwarding(c held.State) api.Check {
	may := mayRoute(c)
	on := c.Forwarding.IPv4 || c.Forwarding.IPv6
	out := api.Check{Name: "forwarding", OK: on || !may, Message: "off, and no peer may route", Hint: "the helper switches it on; something else may switch it off"}
	switch {
	case on:
		word := map[bool]string{true: "on", false: "off"}
		out.Message = fmt.Sprintf("%s for IPv4, %s for IPv6", word[c.Forwarding.IPv4], word[c.Forwarding.IPv6])
	case may:
		out.Message = "off, although a peer may route"
	}
	return out
}

// clockSlack is how far the wall clock may be behind: a step of a time daemon isn't worth a
// problem.
const clockSlack = 5 * time.Second

// checkClock fails if the wall clock is behind the clock by which timed permissions end, which
// never goes back behind the time on disk ([wanted.State.Now]): after a boot without a network,
// or after someone set it back.
func (x *Explainer) checkClock() api.Check {
	behind := x.o.Wanted.Now().Sub(x.o.Wall()).Round(time.Second)
	message := "the wall clock isn't behind the last time that was saved"
	if behind > 0 {
		message = fmt.Sprintf("the wall clock is %v behind the last time that was saved", behind)
	}
	return api.Check{
		Name: "clock", OK: behind < clockSlack, Message: message,
		Hint: "set the clock; until it has caught up, timed permissions end by the time that was saved",
	}
}

// checkFlows names the peer that uses the largest share of the packet filter's entries that it
// may have, and fails once a peer has all of its share.
func checkFlows(c held.State) api.Check {
	check := api.Check{Name: "flows", OK: true, Message: "no peer has flows"}
	if c.Guard == nil || c.Ruleset == nil {
		return check
	}
	stats, total, largest := c.Guard.Stats(), 0, -1.0
	for _, p := range c.Ruleset.Peers() {
		s, ok := stats[p.PublicKey]
		if total += s.Held; !ok || s.Limit == 0 || s.Held == 0 {
			continue
		}
		if share := float64(s.Held) / float64(s.Limit); share > largest {
			largest = share
			check.Message = fmt.Sprintf("%s has most: %d of the %d entries of the packet filter that a peer may have", p.Name, s.Held, s.Limit)
			check.OK = s.Held < s.Limit
		}
	}
	if total > 0 {
		check.Message += fmt.Sprintf("; all peers together have %d", total)
	}
	if c.Limits.PerPeer > 0 {
		check.Message += fmt.Sprintf("; the packet filter by itself lets a peer have at most %d", c.Limits.PerPeer)
	}
	check.Hint = "its new flows are refused until others end; other peers have shares of their own"
	return check
}
