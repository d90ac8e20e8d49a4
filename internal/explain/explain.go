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

// Explain says what happens to a packet on this host. It considers the policy, whether that
// is in force, the route that the kernel would choose, and what other software's rules do with
// the packet and with its answer. q.Peer is a name, a mesh address or a public key. The errors
// are *[api.Error]: CodeNotReady before the first look at the host, or what is wrong with q.
func (x *Explainer) Explain(ctx context.Context, q api.Question) (api.Explanation, error) {
	leave, err := x.enter(ctx)
	if err != nil {
		return api.Explanation{}, err
	}
	defer leave()
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
	e, err := evaluate(c.Ruleset.At(x.o.Wanted.Now()), q)
	if err != nil {
		return api.Explanation{}, err
	}
	out, err := e.explain(x.loadedLanguage(c))
	if err != nil || !out.Pass {
		if r := c.Ruleset; e.verdict.Class == policy.InMesh && r.IsOthers(e.packet.Dst) {
			out.Command = changePrefix(r, e.packet.Dst)
		}
		return out, err
	}
	out.Until = permittedUntil(&doc.Peers[i].Permissions, e.verdict.Rule)
	out.Stops = x.stops(ctx, c, e)
	// A stop of the answer doesn't stop the packet itself. The result is unclear if each stop
	// of the packet is.
	out.Unclear = true
	for i, s := range out.Stops {
		out.Stops[i].Message, out.Stops[i].Hint = plain.Text(s.Message), plain.Text(s.Hint)
		if !s.Answer {
			out.Pass, out.Unclear = false, out.Unclear && s.Unclear
		}
	}
	out.Unclear = out.Unclear && !out.Pass
	return out, nil
}

// Explain returns the verdict of r on q, whose Peer must be a name, without a running helper.
// With To alone, the peer sends to To; with From equal to To, the packet answers a flow that
// the peer opened to To; with From alone, it opens a flow to the peer. The rule that decides is
// printed in the language l, unless l is zero. grants are the peer's permissions, whose ends a
// ruleset doesn't have. The errors are *[api.Error].
func Explain(r *policy.Ruleset, q api.Question, grants mesh.Grants, l Language) (api.Explanation, error) {
	e, err := evaluate(r, q)
	if err != nil {
		return api.Explanation{}, err
	}
	out, err := e.explain(l)
	if out.Pass {
		out.Until = permittedUntil(&grants, e.verdict.Rule)
	}
	return out, err
}

// permittedUntil returns when the first of the permissions ends by which a rule of the policy
// passes a peer's packet, or zero if none of them has an end.
func permittedUntil(p *mesh.Grants, rule policy.Rule) (end time.Time) {
	by := map[policy.Rule]mesh.Permissions{
		policy.RuleIncoming: mesh.Incoming, policy.RuleInternet: mesh.Routing, policy.RuleLAN: mesh.Routing | mesh.LAN,
	}[rule]
	if s, ok := policy.ServiceBy(rule); ok {
		by = s.Needs
	}
	for _, one := range by.List() {
		if until := p.Of(one.Set).Until; !until.IsZero() && (end.IsZero() || until.Before(end)) {
			end = until
		}
	}
	return end
}

// explain returns the verdict, with the command that would permit a refused packet, and the
// rule in the language l that enforces the verdict.
func (e evaluation) explain(l Language) (api.Explanation, error) {
	out := api.Explanation{
		Peer: e.q.Peer, Port: e.q.Port, Proto: e.q.Proto, From: e.packet.Src.String(), To: e.packet.Dst.String(),
		Direction: api.FromPeer, Pass: e.verdict.Pass, Policy: e.verdict.Rule.String(),
	}
	switch {
	case e.answer:
		out.Direction = api.AnswerToPeer
	case e.q.From.IsValid():
		out.Direction = api.ToPeer
	}
	if e.verdict.Class != 0 {
		out.Class = e.verdict.Class.String()
	}
	if e.verdict.Missing != 0 {
		out.Command = "meshhelper peer allow " + e.q.Peer + " " + strings.ReplaceAll(e.verdict.Missing.String(), ",", "")
	}
	if l.Render == nil {
		return out, nil
	}
	_, text, err := l.Render(e.rules)
	if err != nil {
		return out, err
	}
	out.Loaded = l.Find(text, e.verdict.Rule, e.forth.Packet)
	return out, nil
}
