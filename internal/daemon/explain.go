package daemon

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Language is one that rulesets are enforced in.
type Language struct {
	// Render writes a ruleset. The anchor is where it is loaded, or "" where there
	// is no such thing.
	Render func(*policy.Ruleset) (anchor, text string, err error)
	// Find returns the rule in a rendered text that holds a line of the policy for
	// a family, or "".
	Find func(text string, rule policy.Rule, p policy.Packet) string
}

// languageOf names the language that a platform's rules are loaded in.
var languageOf = map[string]string{"linux": "nft", "darwin": "pf", "userspace": "guard"}

// Rules returns the rules as loaded, which the loop reads back and compares at
// every tick; or, where a language is named, as they would be loaded in that: in the
// host's own by what is known of it, and in others by defaults.
func (d *Daemon) Rules(_ context.Context, language string) (api.Rules, error) {
	c, _ := d.condition()
	r := c.loaded
	out := api.Rules{Platform: language}
	if language == "" {
		out.Platform = languageOf[d.opts.PlatformName]
	} else {
		r = c.ruleset
	}
	rules, ok := d.opts.Languages[out.Platform]
	switch {
	case !ok:
		return out, api.Errorf(api.CodeUnsupported, "rules can't be shown for platform %.20q", out.Platform).WithHint("it is pf, nft or guard")
	case r == nil:
		return out, api.Errorf(api.CodeNotReady, "nothing is loaded yet").WithHint("see `meshhelper status`")
	}
	render := rules.Render
	if _, renders := d.opts.Platform.(Renderer); renders && out.Platform == languageOf[d.opts.PlatformName] {
		switch {
		case c.render != nil:
			render = c.render
		case language == "":
			out.Text = "# No rules are loaded, for no peer may be routed and nothing is forwarded: the guard at the tunnel judges each packet.\n"
			return out, nil
		}
	}
	var err error
	out.Anchor, out.Text, err = render(r)
	return out, err
}

// Explain says what happens to a packet under the policy on this host.
func (d *Daemon) Explain(_ context.Context, q api.Question) (api.Explanation, error) {
	c, _ := d.condition()
	if c.ruleset == nil {
		return api.Explanation{}, api.Errorf(api.CodeNotReady, "the host wasn't observed yet").WithHint("see `meshhelper status`")
	}
	doc := d.wanted.Load()
	i, err := doc.find(q.Peer)
	if err != nil {
		return api.Explanation{}, err
	}
	q.Peer = doc.Peers[i].Name
	return Explain(c.ruleset, q, d.opts.Languages[languageOf[d.opts.PlatformName]])
}

// Explain judges q, whose Peer is a name, by r. With From and To, it judges the
// way back of the flow that the peer opened to To; with From alone, a packet
// that is no answer. The rule that holds the verdict is named in the
// language, unless that is zero.
func Explain(r *policy.Ruleset, q api.Question, l Language) (api.Explanation, error) {
	out := api.Explanation{Peer: q.Peer, Port: q.Port, Proto: q.Proto}
	target := q.To
	if !target.IsValid() {
		target = q.From
	}
	if !target.IsValid() {
		return out, api.Errorf(api.CodeBadRequest, "no destination is given").WithHint("say where to")
	}
	proto, err := protoOf(q.Proto, target)
	if err != nil {
		return out, err
	}
	own, err := addressOf(r, q.Peer, target)
	if err != nil {
		return out, err
	}
	forth := policy.Packet{In: r.Host().Interface, Src: own, Dst: target, Proto: proto, SrcPort: 49152, DstPort: q.Port, ICMPType: echo(target)}
	v := judge(r, forth, q)
	out.From, out.To = own.String(), target.String()
	if q.From.IsValid() {
		out.From, out.To = q.From.String(), own.String()
	}
	out.Pass, out.Policy = v.Pass, v.Rule.String()
	if v.Class != 0 {
		out.Class = v.Class.String()
	}
	if v.Missing != 0 {
		out.Command = "meshhelper peer allow " + q.Peer + " " + strings.ReplaceAll(v.Missing.String(), ",", "")
	}
	if l.Render == nil {
		return out, nil
	}
	_, text, err := l.Render(r)
	if err != nil {
		return out, err
	}
	out.Loaded = l.Find(text, v.Rule, forth)
	return out, nil
}

// judge decides forth, or what comes back.
func judge(r *policy.Ruleset, forth policy.Packet, q api.Question) policy.Verdict {
	if !q.From.IsValid() {
		return r.Decide(forth)
	}
	in := arrivesBy(r, q.From)
	if q.To.IsValid() && q.From == q.To {
		return r.DecideReply(forth, in)
	}
	// A host that the peer didn't send to opens a flow of its own.
	return r.Decide(policy.Packet{In: in, Src: q.From, Dst: forth.Src, Proto: forth.Proto, SrcPort: q.Port, DstPort: forth.SrcPort, ICMPType: forth.ICMPType})
}

// arrivesBy returns the interface by which packets of a come: the longest
// prefix's, else the uplink; empty for the host itself.
func arrivesBy(r *policy.Ruleset, a netip.Addr) string {
	h := r.Host()
	if slices.Contains(r.Mesh().Addresses, a) {
		return ""
	}
	in, bits := h.Uplink(a), -1
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			if p.Addr() == a {
				return ""
			}
			if p.Contains(a) && p.Bits() > bits {
				in, bits = i.Name, p.Bits()
			}
		}
	}
	for _, route := range h.Routes {
		if route.Prefix.Contains(a) && route.Prefix.Bits() > bits {
			in, bits = route.Interface, route.Prefix.Bits()
		}
	}
	return in
}

func protoOf(name string, target netip.Addr) (uint8, error) {
	switch name {
	case "tcp":
		return policy.ProtoTCP, nil
	case "udp":
		return policy.ProtoUDP, nil
	case "icmp":
		if target.Is4() {
			return policy.ProtoICMP, nil
		}
		return policy.ProtoICMPv6, nil
	}
	return 0, api.Errorf(api.CodeBadRequest, "protocol %.20q is unknown", name).WithHint("it is tcp, udp or icmp")
}

// echo returns the type of an echo request (RFC 792, RFC 4443).
func echo(target netip.Addr) uint8 {
	if target.Is4() {
		return 8
	}
	return 128
}

// addressOf returns the peer's address of the target's family.
func addressOf(r *policy.Ruleset, name string, target netip.Addr) (netip.Addr, error) {
	for _, p := range r.Peers() {
		if p.Name != name {
			continue
		}
		for _, a := range p.Addresses {
			if a.Is4() == target.Is4() {
				return a, nil
			}
		}
	}
	return netip.Addr{}, api.Errorf(api.CodeUnknownPeer, "peer %q isn't in the policy yet", name)
}

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
