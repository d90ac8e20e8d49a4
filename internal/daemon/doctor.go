package daemon

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/internal/plain"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// checkFlows tells which peer has come nearest to the bound of its flows.
func checkFlows(c condition) api.Check {
	check := api.Check{Name: "flows", OK: true, Message: "no peer has flows"}
	if c.guard == nil || c.ruleset == nil {
		return check
	}
	stats, all, most := c.guard.Stats(), 0, -1.0
	for _, p := range c.ruleset.Peers() {
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
	if c.limits.PerPeer > 0 {
		check.Message += fmt.Sprintf("; the packet filter by itself lets a peer have at most %d", c.limits.PerPeer)
	}
	check.Hint = "its new flows are refused until others end; other peers have shares of their own"
	return check
}

// doctorLook bounds Doctor's look at other software; where it takes longer, what was found
// before counts.
const doctorLook = 5 * time.Second

// Doctor looks at every precondition, in an order that doesn't change: what several others
// follow from is said first, and once.
func (d *Daemon) Doctor(ctx context.Context) ([]api.Check, error) {
	c, _ := d.condition()
	if d.opts.Host.Others != nil {
		limit, cancel := context.WithTimeout(ctx, doctorLook)
		d.lookOnce(limit, c)
		cancel()
	}
	checks := d.checks(c, d.problems(c), d.tryFolder(ctx))
	for i := range checks {
		checks[i].Message, checks[i].Hint = plain.Text(checks[i].Message), plain.Text(checks[i].Hint)
	}
	return checks, nil
}

// The names of checks that others refer to.
const (
	checkHelper = "helper"
	checkFolder = "state folder"
	// othersStep is the step of problems with other software's packet filters.
	othersStep = "look at other packet filters"
)

// checks returns all checks. found are the problems that were found already, each of which
// is in one check.
func (d *Daemon) checks(c condition, found []host.Problem, folder api.Check) []api.Check {
	doc := d.wanted.Document()
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
	enforcing := c.state == api.Enforcing
	// follows marks what needn't be looked at by itself while the helper doesn't enforce.
	follows := func(check api.Check) api.Check {
		if !check.OK && !enforcing {
			check.Follows, check.Hint = checkHelper, ""
		}
		return check
	}
	helper := api.Check{Name: checkHelper, OK: enforcing, Message: "the state is " + c.state, Hint: "wait, or see: meshhelper events"}
	if !enforcing && len(c.problems) > 0 {
		cause := c.problems[0]
		found = slices.DeleteFunc(slices.Clone(found), func(p host.Problem) bool { return p == cause })
		helper.Message += ": " + cause.Step + ": " + cause.Message
		if cause.Hint != "" {
			helper.Hint = cause.Hint
		}
	}
	checks := []api.Check{
		helper, folder,
		follows(api.Check{
			Name: "wanted state", OK: c.enforced == doc.Generation, Message: fmt.Sprintf("generation %d is wanted, %d in force", doc.Generation, c.enforced), Hint: "see the problems below",
		}),
		follows(api.Check{Name: "tunnel device", OK: c.tunnel != nil, Message: fmt.Sprintf("the mesh interface is %q, UDP port %d", c.iface, c.listenPort), Hint: "the helper makes it again by itself"}),
		follows(checkPort(c)),
		follows(api.Check{Name: "packet filter", OK: enforcing, Message: "our rules are read back and compared", Hint: "they aren't loaded as they should be"}),
	}
	checks = append(checks, wrong("host firewall", "no rule of other software's is known to stop WireGuard's own packets", func(p host.Problem) bool { return p.Tunnel })...)
	checks = append(checks, wrong("other packet filters", "no rule of other software's is known to stop what peers may do", func(p host.Problem) bool { return p.Step == othersStep })...)
	checks = append(checks, wrong(stepPrefix, "nothing else on this host is known to have a part of it", func(p host.Problem) bool { return p.Step == stepPrefix })...)
	checks = append(checks, checkUplink(c), checkForwarding(c), d.checkEndpoint(c, doc), d.checkNames(doc), d.checkClock(), checkFlows(c))
	for _, p := range found {
		check := api.Check{Name: p.Step, Message: p.Message, Hint: p.Hint}
		if slices.Contains(c.problems, p) {
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

// more returns what the checks find that isn't among the problems yet, for status.
func (d *Daemon) more(c condition, found []host.Problem) (out []host.Problem) {
	if c.state != api.Enforcing {
		return nil // it would follow from that
	}
	if p := d.full.Load(); p != nil {
		out = append(out, *p)
	}
	doc := d.wanted.Document()
	for _, check := range []api.Check{checkUplink(c), d.checkEndpoint(c, doc), d.checkNames(doc), d.checkClock(), checkFlows(c)} {
		if !check.OK && !slices.ContainsFunc(found, func(p host.Problem) bool { return p.Message == check.Message }) {
			out = append(out, host.Problem{Step: check.Name, Message: check.Message, Hint: check.Hint})
		}
	}
	return out
}

// tryLimit bounds the wait for the disk of a trial.
const tryLimit = 2 * time.Second

// tryFolder writes a file into the state folder and removes it again, so that a disk that
// is full or read-only is known before a change can't be saved.
func (d *Daemon) tryFolder(ctx context.Context) api.Check {
	dir := d.opts.StateDir
	check := api.Check{Name: checkFolder, Hint: folderHint(dir)}
	limit, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	j := d.wanted.Queue("try", func() error { return tryWrite(dir) })
	select {
	case <-j.Done():
		if check.OK = j.Err() == nil; check.OK {
			check.Message = fmt.Sprintf("%s takes what is written", dir)
		} else {
			check.Message = fmt.Sprintf("nothing can be written into %q: %v", dir, j.Err())
		}
	case <-limit.Done():
		check.Message = fmt.Sprintf("the disk of %q doesn't answer", dir)
	}
	return check
}

func folderHint(dir string) string {
	return fmt.Sprintf("make room on the disk of %q, or make it writable: a change made meanwhile is lost at a restart", dir)
}

// lookForRoom has the state folder's file system asked, without a write, whether it takes
// anything, for status. The caller doesn't wait for the disk.
func (d *Daemon) lookForRoom() {
	dir := d.opts.StateDir
	d.wanted.Queue("room", func() error {
		err := roomIn(dir)
		if d.full.Store(nil); err != nil {
			d.full.Store(&host.Problem{Step: checkFolder, Message: fmt.Sprintf("nothing can be written into %q: %v", dir, err), Hint: folderHint(dir)})
		}
		return err
	})
}

// tryBytes is more than a file system keeps for what is nearly full.
const tryBytes = 64 << 10

func tryWrite(dir string) error {
	temp, err := owned.WriteTemp(dir, "trial", bytes.NewReader(make([]byte, tryBytes)), 0o600)
	if err != nil {
		return err
	}
	return os.Remove(temp)
}

// checkPort wants WireGuard's UDP port to be served.
func checkPort(c condition) api.Check {
	out := api.Check{Name: "UDP port", Hint: "another program may hold the port: see which, for instance with ss -lunp; the helper tries again"}
	if c.tunnel == nil {
		out.Message = "there is no tunnel that listens"
		return out
	}
	if err := c.tunnel.Listening(); err != nil {
		out.Message = err.Error()
		return out
	}
	out.OK, out.Message = true, fmt.Sprintf("WireGuard listens on UDP port %d", c.listenPort)
	return out
}

// checkUplink wants a default route while a peer may route.
func checkUplink(c condition) api.Check {
	out := api.Check{Name: "default route", OK: true, Hint: "give the host a default route: without one peers reach no internet"}
	switch up4, up6 := c.host.Uplink4, c.host.Uplink6; {
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
func mayRoute(c condition) bool {
	return c.ruleset != nil && slices.ContainsFunc(c.ruleset.Peers(), func(p policy.PeerRules) bool { return p.Permissions.Has(mesh.Routing) })
}

// checkEndpoint looks whether peers can reach this host where their configurations say.
func (d *Daemon) checkEndpoint(c condition, doc *wanted.Document) api.Check {
	out := api.Check{Name: "endpoint", OK: true}
	e := d.wanted.Settings().Endpoint
	own := hostAddresses(c.host)
	if e.Host == "" {
		a, ok := uplinkAddress(c.host)
		switch {
		case !ok:
			out.Message = "not known: there is no uplink, nor an endpoint"
		case isPublic(a):
			out.Message = fmt.Sprintf("peers find the host at the uplink's address %v", a)
		default:
			d.aboutPrivate(&out, c, doc, fmt.Sprintf("the uplink's address %v", a), a)
		}
		return out
	}
	at, err := netip.ParseAddr(e.Host)
	addresses := []netip.Addr{at.Unmap()}
	if err != nil {
		d.mu.Lock()
		err := d.unresolved[e.Host]
		d.mu.Unlock()
		o := d.learned.Outside()
		addresses = o.Addresses
		switch {
		case err != nil:
			out.OK, out.Message = false, fmt.Sprintf("the name %q of this host's endpoint doesn't resolve: %v", e.Host, err)
			if len(addresses) == 0 {
				out.Message += ": new devices don't find this host, and as long as the router's public address isn't known, peers with routing reach the router by that address even without lan"
			}
			out.Hint = "correct the name, or the host's DNS; peers look it up, too"
			return out
		case o.Left > 0:
			out.OK, out.Message = false, fmt.Sprintf("%q has more addresses than count as this host's: %d don't, and peers with routing reach them without lan", e.Host, o.Left)
			out.Hint = "give the endpoint a name that is this host's alone: meshhelper settings endpoint HOST"
			return out
		}
		if len(addresses) == 0 {
			out.Message = fmt.Sprintf("%q is being looked up", e.Host)
			return out
		}
	}
	for _, a := range addresses {
		switch {
		case !slices.Contains(own, a):
			continue
		case !isPublic(a):
			d.aboutPrivate(&out, c, doc, fmt.Sprintf("%s, this host's endpoint,", e.Host), a)
		default:
			out.Message = fmt.Sprintf("%s is %v, an address of this host", e.Host, a)
		}
		return out
	}
	a := addresses[0]
	if direct, lost := lostAddress(c.host, a); lost {
		out.OK = false
		out.Message = fmt.Sprintf("%s, this host's endpoint, is %v, which isn't an address of this host any more, nor its router's: it has %v itself", e.Host, a, direct)
		out.Hint = "correct it (meshhelper settings endpoint HOST) or what its name stands for, and print the peers' configurations again: meshhelper peer config NAME"
		return out
	}
	out.Message = fmt.Sprintf("%s is %v, taken for the router's address: it has to forward the UDP port to this host", e.Host, a)
	return out
}

// aboutPrivate says of an endpoint at the host's private address a that devices elsewhere
// don't reach it. Without a peer, nothing has to be reached yet.
func (d *Daemon) aboutPrivate(out *api.Check, c condition, doc *wanted.Document, what string, a netip.Addr) {
	out.OK = len(doc.Peers) == 0
	out.Message = what + " is private, and nothing is known to be forwarded to it: peers elsewhere don't reach this host"
	out.Hint = fmt.Sprintf("forward UDP port %d on the router to %v, and tell the helper the router's name or public address: meshhelper settings endpoint HOST", c.listenPort, a)
	if from, heard := d.heardFromOutside(c, doc); heard {
		out.Message = fmt.Sprintf("%s is private: devices elsewhere don't reach it by the configurations that are printed now, although one reaches this host from %v, by another address", what, from)
		out.Hint = "tell the helper that address or name: meshhelper settings endpoint HOST"
	}
}

// lostAddress reports whether an endpoint that isn't an address of the host can't be its
// router's either: it is inside a network that the host is attached to, or the host has a
// public address of the family itself.
func lostAddress(h policy.Host, endpoint netip.Addr) (has netip.Addr, lost bool) {
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			a := p.Addr()
			switch {
			case i.Name == h.Interface || a.Is4() != endpoint.Is4() || a.IsLinkLocalUnicast() || a.IsLoopback():
			case !isPublic(endpoint) && p.Masked().Contains(endpoint), i.Name == h.Uplink(a) && isPublic(a):
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}

func hostAddresses(h policy.Host) (out []netip.Addr) {
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			out = append(out, p.Addr())
		}
	}
	return out
}

// isPublic reports whether an address can be reached from the internet: neither private
// (RFC 1918, RFC 4193) nor a carrier's (RFC 6598), nor link-local.
func isPublic(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !a.IsPrivate() && !sharedSpace.Contains(a)
}

// heardFromOutside returns the public address of a peer that began to speak to this host,
// which didn't know where the peer was.
func (d *Daemon) heardFromOutside(c condition, doc *wanted.Document) (netip.Addr, bool) {
	stats := c.numbers().tunnel
	for i := range doc.Peers {
		p := &doc.Peers[i]
		if s := stats[p.PublicKey]; p.Endpoint == "" && !s.LastHandshake.IsZero() && isPublic(s.Endpoint.Addr()) {
			return s.Endpoint.Addr(), true
		}
	}
	return netip.Addr{}, false
}

// checkNames wants the names in peers' endpoints to resolve.
func (d *Daemon) checkNames(doc *wanted.Document) api.Check {
	out := api.Check{Name: "peers' endpoints", OK: true, Message: "none is a name that doesn't resolve"}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range doc.Peers {
		e, err := mesh.ParseEndpoint(doc.Peers[i].Endpoint, 0)
		if err != nil {
			continue
		}
		if failure := d.unresolved[e.Host]; failure != nil {
			out.OK = false
			out.Message = fmt.Sprintf("the endpoint %q of %s doesn't resolve: %v", doc.Peers[i].Endpoint, doc.Peers[i].Name, failure)
			out.Hint = "correct it, or the host's DNS; until then the peer has to connect by itself"
			return out
		}
	}
	return out
}

// checkForwarding wants forwarding while a peer may route.
func checkForwarding(c condition) api.Check {
	may := mayRoute(c)
	on := c.forwarding.IPv4 || c.forwarding.IPv6
	out := api.Check{Name: "forwarding", OK: on || !may, Message: "off, and no peer may route", Hint: "the helper switches it on; something else may switch it off"}
	switch {
	case on:
		out.Message = fmt.Sprintf("IPv4 %v, IPv6 %v", c.forwarding.IPv4, c.forwarding.IPv6)
	case may:
		out.Message = "off, although a peer may route"
	}
	return out
}

// checkClock compares the wall clock with the one that grants end by.
func (d *Daemon) checkClock() api.Check {
	behind := d.wanted.Now().Sub(d.opts.Wall())
	return api.Check{
		Name: "clock", OK: behind < minSleep,
		Message: fmt.Sprintf("the wall clock is %v behind the last time that was saved", max(behind, 0).Round(1e9)),
		Hint:    "set the clock; until it has caught up, timed permissions end by the time that was saved",
	}
}
