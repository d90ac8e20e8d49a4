package daemon

import (
	"context"
	"fmt"
	"slices"

	"github.com/meshhelper/meshhelper/internal/api"
)

// checkFlows tells which peer has come nearest to the bound of its flows.
func checkFlows(c condition) api.Check {
	check := api.Check{Name: "flows", OK: true, Message: "no peer has flows"}
	if c.guard == nil || c.ruleset == nil {
		return check
	}
	stats, all, most := c.guard.Stats(), 0, -1.0
	for _, p := range c.ruleset.Peers() {
		s, ok := stats[p.ID]
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
	if c.limits.PerPeer > 0 {
		check.Message += fmt.Sprintf("; the packet filter by itself lets a peer have at most %d", c.limits.PerPeer)
	}
	check.Hint = "its new flows are refused until others end; other peers have shares of their own"
	return check
}

// Doctor looks at every precondition.
func (d *Daemon) Doctor(context.Context) ([]api.Check, error) {
	c, _ := d.condition()
	s := d.Status()
	checks := []api.Check{
		{Name: "helper", OK: s.State == api.Enforcing, Message: "the state is " + s.State, Hint: "see the problems below"},
		{Name: "wanted state", OK: s.Enforced == s.Generation, Message: fmt.Sprintf("generation %d is wanted, %d in force", s.Generation, s.Enforced), Hint: "see the problems below"},
		{Name: "tunnel device", OK: c.tunnel != nil, Message: fmt.Sprintf("the mesh interface is %q, UDP port %d", s.Interface, s.ListenPort), Hint: "the helper makes it again by itself"},
		{Name: "packet filter", OK: s.State == api.Enforcing, Message: "our rules were read back and compared", Hint: "they aren't loaded as they should be; see the problems below"},
		{Name: "default route", OK: s.Uplink != "", Message: fmt.Sprintf("the uplink is %q", s.Uplink), Hint: "without a default route peers reach no internet"},
		checkForwarding(s),
		d.checkClock(),
		checkFlows(c),
	}
	for _, p := range s.Problems {
		checks = append(checks, api.Check{Name: p.Step, Message: p.Message, Hint: p.Hint})
	}
	for i := range checks {
		if checks[i].OK {
			checks[i].Hint = ""
		}
	}
	return checks, nil
}

// checkForwarding wants forwarding while a peer may route.
func checkForwarding(s api.Status) api.Check {
	may := slices.ContainsFunc(s.Peers, func(p api.Peer) bool { return p.Permissions.Routing.Allowed })
	on := s.Forwarding.IPv4 || s.Forwarding.IPv6
	out := api.Check{Name: "forwarding", OK: on || !may, Message: "off, and no peer may route", Hint: "the helper switches it on; something else may switch it off"}
	switch {
	case on:
		out.Message = fmt.Sprintf("IPv4 %v, IPv6 %v", s.Forwarding.IPv4, s.Forwarding.IPv6)
	case may:
		out.Message = "off, although a peer may route"
	}
	return out
}

// checkClock compares the wall clock with the one that grants end by.
func (d *Daemon) checkClock() api.Check {
	behind := d.clock.now().Sub(d.opts.Wall())
	return api.Check{
		Name: "clock", OK: behind < jump,
		Message: fmt.Sprintf("the wall clock is %v behind the last time that was saved", max(behind, 0).Round(1e9)),
		Hint:    "set the clock; until it has caught up, timed permissions end by the time that was saved",
	}
}
