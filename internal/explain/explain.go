package explain

import (
	"context"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/plain"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Explain says what happens to a packet on this host, all things taken together: the
// policy, whether it is in force, the way that the kernel would send the packet, and what
// other software's rules do with it and with its answer.
func (x *Explainer) Explain(ctx context.Context, q api.Question) (api.Explanation, error) {
	c, _ := x.o.Held()
	if c.Ruleset == nil {
		return api.Explanation{}, api.Errorf(api.CodeNotReady, "the host wasn't observed yet").WithHint("see `meshhelper status`")
	}
	doc := x.o.Wanted.Document()
	i, err := doc.Find(q.Peer)
	if err != nil {
		return api.Explanation{}, err
	}
	q.Peer = doc.Peers[i].Name
	a, err := ask(c.Ruleset.At(x.o.Wanted.Now()), q)
	if err != nil {
		return api.Explanation{}, err
	}
	e, err := a.explain(x.loadedLanguage(c))
	if err != nil || !e.Pass {
		if r := c.Ruleset; a.v.Class == policy.InMesh && r.IsOthers(a.packet.Dst) {
			e.Command = changePrefix(r, a.packet.Dst)
		}
		return e, err
	}
	e.Until = permittedUntil(&doc.Peers[i], a.v.Rule)
	e.Stops = x.stops(ctx, c, a)
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

// permittedUntil returns when the permissions by which a line of the policy lets a peer's packet
// pass end, or zero.
func permittedUntil(p *mesh.Peer, rule policy.Rule) (end time.Time) {
	by := map[policy.Rule]mesh.Permissions{
		policy.RuleIncoming: mesh.Incoming, policy.RuleInternet: mesh.Routing, policy.RuleLAN: mesh.Routing | mesh.LAN,
	}[rule]
	if s, ok := policy.ServiceBy(rule); ok {
		by = s.Needs
	}
	for _, one := range by.List() {
		if until := p.Permissions.Of(one.Set).Until; !until.IsZero() && (end.IsZero() || until.Before(end)) {
			end = until
		}
	}
	return end
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
