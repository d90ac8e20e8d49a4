package explain

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// stopsLimit is when no further question is put to the host about one packet. A question
// to its kernel may take as long again.
const stopsLimit = 5 * time.Second

// stops returns what other than the policy stops a packet that the policy lets pass, and
// its answer: that the policy isn't in force, the way that the kernel sends it, and other
// software's rules.
func (x *Explainer) stops(ctx context.Context, c held.State, a asked) []api.Stop {
	ctx, cancel := context.WithTimeout(ctx, stopsLimit)
	defer cancel()
	if s, stopped := x.notInForce(c, a); stopped {
		return []api.Stop{s}
	}
	t := &trip{x: x, ctx: ctx, a: a}
	m := a.r.Host().Interface
	if t.tunnel(c); t.ends() {
		return t.stops
	}
	switch {
	case a.q.From.IsValid() && !a.answer: // the host's own packet to the peer
		t.leg(a.packet, m, false)
		t.others(a.packet, m, false, false)
		t.others(reverse(a.packet, m), "", true, true)
	default:
		if t.followPacket(); len(t.stops) > 0 {
			break
		}
		t.others(a.forth, t.by, false, false)
		if !t.ends() {
			back := reverse(a.forth, t.by)
			t.leg(back, m, true)
			t.others(back, m, true, true)
		}
	}
	return t.stops
}

// notInForce tells why what the policy says of a packet isn't enforced now.
func (x *Explainer) notInForce(c held.State, a asked) (api.Stop, bool) {
	const see = "see: meshhelper doctor"
	judged := x.o.InForce()
	switch {
	case c.Phase == api.Starting:
		return api.Stop{Message: "the helper is starting, and nothing of a peer passes yet", Hint: "wait until `meshhelper status` says enforcing"}, true
	case c.Phase != api.Enforcing || judged == nil || c.Tunnel == nil:
		s := api.Stop{Message: "the helper is closed, and nothing of a peer passes", Hint: see}
		if len(c.Problems) > 0 {
			p := c.Problems[0]
			s.Message += ": " + p.Step + ": " + p.Message
			if p.Hint != "" {
				s.Hint = p.Hint
			}
		}
		return s, true
	}
	if err := c.Tunnel.Listening(); err != nil {
		return api.Stop{Message: "WireGuard's UDP port isn't served, and nothing of a peer arrives: " + err.Error(), Hint: see}, true
	}
	if now, err := ask(judged.At(x.o.Wanted.Now()), a.q); err != nil || !now.v.Pass {
		return api.Stop{Message: "the last change isn't in force yet", Hint: see}, true
	}
	if v := a.v; v.NAT() && !c.Forwarding.Of(a.forth.Dst) {
		return api.Stop{Message: "the host's forwarding of this address family is off", Hint: see}, true
	}
	if a.v.Peer >= 0 && !a.q.From.IsValid() && c.Guard != nil {
		if s := c.Guard.Stats()[a.r.Peers()[a.v.Peer].PublicKey]; s.Limit > 0 && s.Held >= s.Limit {
			return api.Stop{
				Message: fmt.Sprintf("%s has %d flows, as many as it may, and a new one is refused", a.q.Peer, s.Held),
				Hint:    "wait until others of its flows end",
			}, true
		}
	}
	return api.Stop{}, false
}

// trip is the way of a packet and of its answer through the host.
type trip struct {
	x     *Explainer
	ctx   context.Context
	a     asked
	stops []api.Stop
	// by is the interface that forth leaves by, "" for the host itself.
	by string
	// carries says of which datagrams others is asked; "" for the packet itself.
	carries string
}

// runningFor is how long after its last handshake a tunnel counts as running: WireGuard
// makes a new handshake every two minutes while there is traffic (REKEY_AFTER_TIME,
// whitepaper 6.1).
const runningFor = 3 * time.Minute

// tunnel asks what other software's rules do with the datagrams that carry the packet
// between the peer's device and this host. Of a tunnel that runs they belong to a known
// flow; otherwise the device's are the first of theirs.
func (t *trip) tunnel(c held.State) {
	n, _ := c.ReadNumbers()
	if t.a.v.Peer < 0 || t.a.v.Peer >= len(t.a.r.Peers()) {
		return
	}
	s := n.Tunnel[mesh.PublicKey(t.a.r.Peers()[t.a.v.Peer].PublicKey)]
	far, facts := s.Endpoint, t.a.r.Host()
	if !far.IsValid() {
		return
	}
	by, own := facts.Uplink(far.Addr()), facts.Source4
	if far.Addr().Is6() {
		own = facts.Source6
	}
	if ways := t.x.o.Host.Ways; ways != nil {
		if way, err := ways.Way(t.ctx, host.Packet{Packet: policy.Packet{Dst: far.Addr()}}); err == nil && way.Interface != "" && way.Source.IsValid() {
			by, own = way.Interface, way.Source
		}
	}
	if by == "" || !own.IsValid() {
		return
	}
	running := !s.LastHandshake.IsZero() && t.x.o.Wanted.Now().Sub(s.LastHandshake) < runningFor
	port := t.a.r.Mesh().ListenPort
	t.carries = "WireGuard's datagrams from the device"
	t.others(host.Packet{In: by, Packet: policy.Packet{Src: far.Addr(), Dst: own, Proto: policy.ProtoUDP, SrcPort: far.Port(), DstPort: port}}, "", running, false)
	t.carries = "WireGuard's datagrams to the device"
	t.others(host.Packet{Packet: policy.Packet{Src: own, Dst: far.Addr(), Proto: policy.ProtoUDP, SrcPort: port, DstPort: far.Port()}}, by, running, false)
	t.carries = ""
}

// stop adds a reason why the packet that was asked about doesn't pass or, with back, why a
// packet in the opposite direction doesn't.
func (t *trip) stop(back bool, s api.Stop) {
	switch {
	case t.a.answer && !back:
		s.Message = "the packet that it answers doesn't pass: " + s.Message
	case !t.a.answer && back:
		s.Answer = true
	}
	t.stops = append(t.stops, s)
}

// followPacket follows the packet that the peer sends.
func (t *trip) followPacket() {
	p, exit := t.a.forth, t.a.v.Exit
	if t.a.answer {
		exit = t.a.r.FromPeer(p.Packet).Exit
	}
	host := t.a.r.Host()
	switch exit {
	case policy.ExitUplink:
		t.by = host.Uplink(p.Dst)
	case policy.ExitOther:
		t.by = arrivesBy(t.a.r, p.Dst)
	}
	w, ok := t.way(p, false)
	if !ok {
		return
	}
	switch {
	case w.Refused != "":
		t.stop(false, api.Stop{Message: wayRefused(w.Refused), Hint: t.see(p)})
	case exit == policy.ExitHost && !w.Local:
		t.stop(false, api.Stop{Message: fmt.Sprintf("the kernel doesn't take it for itself, but sends it by %s", w.Interface), Hint: t.see(p)})
	case exit == policy.ExitUplink && w.Interface != t.by:
		t.stop(false, api.Stop{
			Message: fmt.Sprintf("the kernel sends it by %s, and what peers send to the internet leaves by %s only", orHost(w), t.by),
			Hint:    t.see(p),
		})
	case exit == policy.ExitOther && (w.Local || w.Interface == host.Interface):
		t.stop(false, api.Stop{Message: fmt.Sprintf("the kernel sends it by %s", orHost(w)), Hint: t.see(p)})
	}
	if t.by = w.Interface; w.Local {
		t.by = ""
	}
}

// see is the hint of what a route of the host stops.
func (t *trip) see(p host.Packet) string {
	return "see the routes of the host: " + t.x.o.Host.Ways.WayCommand(p.Dst)
}

// ends reports whether the packet is known to be stopped, so that there is no answer.
func (t *trip) ends() bool {
	return slices.ContainsFunc(t.stops, func(s api.Stop) bool { return !s.Unclear })
}

// others asks what other software's rules do with a packet, on hosts where they can be
// judged. reply says that the other end opened its flow.
func (t *trip) others(p host.Packet, out string, reply, back bool) {
	judge := t.x.o.Host.Judge
	if judge == nil {
		return
	}
	by, err := judge.ByOthers(t.ctx, p, out, reply)
	if err != nil {
		t.stop(back, api.Stop{Message: "other software's rules can't be read: " + err.Error(), Hint: "ask again", Unclear: true})
		return
	}
	it := "it"
	if t.carries != "" {
		it = t.carries
	}
	s := api.Stop{Unclear: by.Unclear, Hint: "let it pass there, in the software that it belongs to"}
	may := ""
	if by.Unclear {
		may = "may "
	}
	switch by.Does {
	case host.OthersDrop:
		s.Message = by.Where + " " + verb(may, "drop", "drops") + " " + it
	case host.OthersRedirect:
		s.Message = by.Where + " " + verb(may, "send", "sends") + " " + it + " to another destination"
		s.Hint = "take it out of the redirection there, in the software that it belongs to"
	case host.OthersUntrack:
		if t.carries != "" {
			return // it is for this host, and not translated
		}
		s.Message = by.Where + " " + verb(may, "take", "takes") + " it out of connection tracking, so that it isn't translated"
		// What isn't translated passes nevertheless.
		s.Unclear = s.Unclear || !t.a.v.NAT()
	default:
		if !by.Unclear || t.carries != "" {
			return
		}
		s.Message = "what " + by.Where + " does with it isn't known"
	}
	t.stop(back, s)
}

// verb returns a verb for one subject: after "may " it has its plain form.
func verb(may, plural, singular string) string {
	if may != "" {
		return may + plural
	}
	return singular
}

// leg asks for the way of a packet that is to leave by out.
func (t *trip) leg(p host.Packet, out string, back bool) {
	w, ok := t.way(p, back)
	switch {
	case !ok:
	case w.Refused != "":
		t.stop(back, api.Stop{Message: wayRefused(w.Refused), Hint: t.see(p)})
	case w.Interface != out:
		t.stop(back, api.Stop{Message: fmt.Sprintf("the kernel sends it by %s, and not into the tunnel", orHost(w)), Hint: t.see(p)})
	}
}

// way asks the kernel, where it can be asked.
func (t *trip) way(p host.Packet, back bool) (host.Way, bool) {
	ways := t.x.o.Host.Ways
	if ways == nil {
		return host.Way{}, false
	}
	w, err := host.Way{}, t.ctx.Err()
	if err == nil {
		w, err = ways.Way(t.ctx, p)
	}
	if err != nil {
		t.stop(back, api.Stop{Message: "the kernel doesn't tell which way it would send it: " + err.Error(), Hint: "ask again", Unclear: true})
	}
	return w, err == nil
}

// orHost names where a way leads.
func orHost(w host.Way) string {
	if w.Local {
		return "this host itself"
	}
	return w.Interface
}

// wayRefused says that the kernel sends a packet nowhere.
func wayRefused(why string) string {
	if why == host.WayNone {
		return "the host has no route to its destination"
	}
	return "the host's route to its destination is of the kind " + why
}
