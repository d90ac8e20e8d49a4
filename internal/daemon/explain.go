package daemon

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/plain"
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

// Rules returns the rules as loaded, which the loop reads back and compares at
// every tick; or, where a language is named, as they would be loaded in that: in the
// host's own by what is known of it, and in others by defaults.
func (d *Daemon) Rules(_ context.Context, language string) (api.Rules, error) {
	c, _ := d.condition()
	r := c.read
	out := api.Rules{Platform: language}
	if language == "" {
		out.Platform = d.opts.Host.Language
	} else {
		r = c.ruleset
	}
	if language == "" && r == nil && c.loaded != nil {
		e := api.Errorf(api.CodeNotReady, "no rules are known to be loaded as they should be")
		if len(c.problems) > 0 {
			e = api.Errorf(api.CodeNotReady, "%s: %s: %s", e.Message, c.problems[0].Step, c.problems[0].Message)
		}
		return out, e.WithHint("see `meshhelper doctor`; how they would be loaded is said with --platform %s", out.Platform)
	}
	rules, ok := d.opts.Languages[out.Platform]
	switch {
	case !ok:
		return out, api.Errorf(api.CodeUnsupported, "rules can't be shown for platform %.20q", out.Platform).WithHint("it is %s", d.languages())
	case r == nil:
		return out, api.Errorf(api.CodeNotReady, "nothing is loaded yet").WithHint("see `meshhelper status`")
	}
	render := rules.Render
	if d.opts.Host.Renderer != nil && out.Platform == d.opts.Host.Language {
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

// languages lists the names of the languages that rules can be shown in.
func (d *Daemon) languages() string {
	names := slices.Sorted(maps.Keys(d.opts.Languages))
	slices.Reverse(names)
	last := len(names) - 1
	if last < 1 {
		return strings.Join(names, "")
	}
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// Explain says what happens to a packet on this host, all things taken together: the
// policy, whether it is in force, the way that the kernel would send the packet, and what
// other software's rules do with it and with its answer.
func (d *Daemon) Explain(ctx context.Context, q api.Question) (api.Explanation, error) {
	c, _ := d.condition()
	if c.ruleset == nil {
		return api.Explanation{}, api.Errorf(api.CodeNotReady, "the host wasn't observed yet").WithHint("see `meshhelper status`")
	}
	doc := d.wanted.Document()
	i, err := doc.Find(q.Peer)
	if err != nil {
		return api.Explanation{}, err
	}
	q.Peer = doc.Peers[i].Name
	a, err := ask(c.ruleset.At(d.wanted.Now()), q)
	if err != nil {
		return api.Explanation{}, err
	}
	e, err := a.explain(d.loadedLanguage(c))
	if err != nil || !e.Pass {
		if r := c.ruleset; a.v.Class == policy.InMesh && r.IsOthers(a.packet.Dst) {
			e.Command = changePrefix(r, a.packet.Dst)
		}
		return e, err
	}
	e.Until = permittedUntil(&doc.Peers[i], a.v.Rule)
	e.Stops = d.stops(ctx, c, a)
	e.Unclear = true
	for i, s := range e.Stops {
		e.Stops[i].Message, e.Stops[i].Hint = plain.Text(s.Message), plain.Text(s.Hint)
		if !s.Answer {
			e.Pass, e.Unclear = false, e.Unclear && s.Unclear
		}
	}
	e.Unclear = e.Unclear && !e.Pass
	return e, nil
}

// loadedLanguage is the host's own, of the rules that it was found to have loaded; zero
// where it isn't known to have any.
func (d *Daemon) loadedLanguage(c condition) Language {
	l := d.opts.Languages[d.opts.Host.Language]
	if d.opts.Host.Renderer != nil {
		l.Render = c.render
	}
	if c.read == nil || l.Render == nil || l.Find == nil {
		return Language{}
	}
	render := l.Render
	l.Render = func(*policy.Ruleset) (anchor, text string, err error) { return render(c.read) }
	return l
}

// permittedUntil returns when the permissions by which a line of the policy lets a peer's packet
// pass end, or zero.
func permittedUntil(p *mesh.Peer, rule policy.Rule) (end time.Time) {
	for _, one := range map[policy.Rule][]mesh.Permissions{
		policy.RuleIncoming: {mesh.Incoming}, policy.RuleInternet: {mesh.Routing}, policy.RuleLAN: {mesh.Routing, mesh.LAN},
	}[rule] {
		if until := p.Permissions.Of(one).Until; !until.IsZero() && (end.IsZero() || until.Before(end)) {
			end = until
		}
	}
	return end
}

// Explain judges q, whose Peer is a name, by r. With From and To, it judges the
// way back of the flow that the peer opened to To; with From alone, a packet
// that is no answer. The rule that holds the verdict is named in the
// language, unless that is zero.
func Explain(r *policy.Ruleset, q api.Question, l Language) (api.Explanation, error) {
	a, err := ask(r, q)
	if err != nil {
		return api.Explanation{}, err
	}
	return a.explain(l)
}

// asked is a question about a packet, and what the policy says.
type asked struct {
	r *policy.Ruleset
	q api.Question
	// forth is the packet that the peer sends, packet the one that is asked about.
	forth, packet host.Packet
	// answer says that packet answers forth; else it opens a flow.
	answer bool
	v      policy.Verdict
}

// ask judges what a question is about by the policy.
func ask(r *policy.Ruleset, q api.Question) (asked, error) {
	a := asked{r: r, q: q}
	target := q.To
	if !target.IsValid() {
		target = q.From
	}
	if !target.IsValid() {
		return a, api.Errorf(api.CodeBadRequest, "no destination is given").WithHint("say where to")
	}
	target = target.WithZone("").Unmap()
	if q.From = q.From.WithZone("").Unmap(); q.From.IsValid() && q.From.Is4() != target.Is4() {
		return a, api.Errorf(api.CodeBadAddress, "%v and %v aren't of one address family", q.From, target).WithHint("give both as IPv4, or both as IPv6")
	}
	proto, err := protoOf(q.Proto, target)
	if err != nil {
		return a, err
	}
	if q.Proto == "icmp" && q.Port != 0 {
		return a, api.Errorf(api.CodeBadRequest, "ICMP has no ports, and port %d is given", q.Port).WithHint("leave the port out, or ask for tcp or udp")
	}
	own, err := addressOf(r, q.Peer, target)
	if err != nil {
		return a, err
	}
	a.forth = host.Packet{In: r.Host().Interface, Packet: policy.Packet{
		Src: own, Dst: target, Proto: proto, SrcPort: 49152, DstPort: q.Port, ICMPType: echo(target),
	}}
	if q.From == own {
		return a, api.Errorf(api.CodeBadRequest, "%v is %s itself, and \"from\" is the other end, which sends to %s", own, q.Peer, q.Peer).
			WithHint("leave it out: what %s sends is what is judged without it", q.Peer)
	}
	a.packet = a.forth
	switch {
	case !q.From.IsValid():
		a.v = r.FromPeer(a.forth.Packet)
	case q.To.IsValid() && q.From == target:
		a.answer, a.packet = true, reverse(a.forth, arrivesBy(r, q.From))
		a.v = r.Reply(policy.ByPeer, a.forth.Packet, a.packet.In)
	default:
		// A host that the peer didn't send to opens a flow of its own.
		a.packet = host.Packet{In: arrivesBy(r, q.From), Packet: policy.Packet{
			Src: q.From, Dst: own, Proto: proto, SrcPort: q.Port, DstPort: a.forth.SrcPort, ICMPType: a.forth.ICMPType,
		}}
		a.v = a.packet.Judge(r)
	}
	return a, nil
}

// reverse returns the answer to a packet, as it comes in by an interface.
func reverse(p host.Packet, in string) host.Packet {
	p.In, p.Src, p.Dst, p.SrcPort, p.DstPort = in, p.Dst, p.Src, p.DstPort, p.SrcPort
	switch p.ICMPType { // an echo's reply (RFC 792, RFC 4443)
	case 8:
		p.ICMPType = 0
	case 128:
		p.ICMPType = 129
	}
	return p
}

// explain tells what the policy says, and by which rule of a language.
func (a asked) explain(l Language) (api.Explanation, error) {
	out := api.Explanation{
		Peer: a.q.Peer, Port: a.q.Port, Proto: a.q.Proto, From: a.packet.Src.String(), To: a.packet.Dst.String(),
		Direction: api.FromPeer, Pass: a.v.Pass, Policy: a.v.Rule.String(),
	}
	switch {
	case a.answer:
		out.Direction = api.AnswerToPeer
	case a.q.From.IsValid():
		out.Direction = api.ToPeer
	}
	if a.v.Class != 0 {
		out.Class = a.v.Class.String()
	}
	if a.v.Missing != 0 {
		out.Command = "meshhelper peer allow " + a.q.Peer + " " + strings.ReplaceAll(a.v.Missing.String(), ",", "")
	}
	if l.Render == nil {
		return out, nil
	}
	_, text, err := l.Render(a.r)
	if err != nil {
		return out, err
	}
	out.Loaded = l.Find(text, a.v.Rule, a.forth.Packet)
	return out, nil
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
