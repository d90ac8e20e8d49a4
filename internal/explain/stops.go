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

// stopsLimit bounds all questions to the host about one packet: after it no new one is asked.
// A route lookup that began before may still wait for a running Enforce ([host.Ways]).
const stopsLimit = 5 * time.Second

// stops returns the reasons other than the policy why a packet that the policy passes, or its
// answer, doesn't arrive: the policy isn't in force, the kernel routes it elsewhere, or other
// software's rules drop it. The packet is followed in the order in which it meets them. The
// answer is examined only if the packet itself isn't known to be stopped.
func (x *Explainer) stops(ctx context.Context, c held.State, e evaluation) []api.Stop {
	ctx, cancel := context.WithTimeout(ctx, stopsLimit)
	defer cancel()
	if s, stopped := x.notInForce(c, e); stopped {
		return []api.Stop{s}
	}
	t := &trace{x: x, ctx: ctx, evaluation: e}
	m := e.rules.Host().Interface // packets to the peer must leave by it
	if t.checkTunnel(c); t.stopped() {
		return t.stops
	}
	switch {
	case e.q.From.IsValid() && !e.answer: // a packet that the host forwards or sends to the peer
		t.checkRoute(e.packet, m, false)
		t.checkOthers(e.packet, m, false, false)
		t.checkOthers(reverse(e.packet, m), "", true, true)
	default:
		if t.checkPeerPacket(); len(t.stops) > 0 {
			break
		}
		t.checkOthers(e.forth, t.egress, false, false)
		if !t.stopped() {
			back := reverse(e.forth, t.egress)
			t.checkRoute(back, m, true)
			t.checkOthers(back, m, true, true)
		}
	}
	return t.stops
}

// notInForce returns why the host doesn't do now what the policy says of a packet: the helper
// is starting or closed, WireGuard's port isn't served, the guard still has older rules,
// forwarding is off, or the peer has used up its share of flows.
func (x *Explainer) notInForce(c held.State, e evaluation) (api.Stop, bool) {
	const see = "see: meshhelper doctor"
	inForce := x.o.InForce()
	switch {
	case c.Phase == api.Starting:
		return api.Stop{Message: "the helper is starting, and nothing of a peer passes yet", Hint: "wait until `meshhelper status` says enforcing"}, true
	case c.Phase != api.Enforcing || inForce == nil || c.Tunnel == nil:
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
	if now, err := evaluate(inForce.At(x.o.Wanted.Now()), e.q); err != nil || !now.verdict.Pass {
		return api.Stop{Message: "the last change isn't in force yet", Hint: see}, true
	}
	if e.verdict.NAT() && !c.Forwarding.Of(e.forth.Dst) {
		return api.Stop{Message: "the host's forwarding of this address family is off", Hint: see}, true
	}
	if e.verdict.Peer >= 0 && !e.q.From.IsValid() && c.Guard != nil {
		if s := c.Guard.Stats()[e.rules.Peers()[e.verdict.Peer].PublicKey]; s.Limit > 0 && s.Held >= s.Limit {
			return api.Stop{
				Message: fmt.Sprintf("%s has %d flows, as many as it may, and a new one is refused", e.q.Peer, s.Held),
				Hint:    "wait until others of its flows end",
			}, true
		}
	}
	return api.Stop{}, false
}

// trace follows a packet and its answer through the host, and collects what stops them.
type trace struct {
	evaluation
	x     *Explainer
	ctx   context.Context // ends after stopsLimit
	stops []api.Stop
	// egress is the interface that forth leaves by, "" if it is for the host itself.
	egress string
	// subject is the packet that checkOthers asks about, as a message names it; "" means the
	// packet of the question.
	subject string
}

// runningFor is how long after its last handshake a tunnel counts as running: WireGuard
// makes a new handshake every two minutes while there is traffic (REKEY_AFTER_TIME,
// whitepaper 6.1), and uses none that is older than three (REJECT_AFTER_TIME).
const runningFor = 3 * time.Minute

// checkTunnel asks what other software's rules do with the datagrams that carry the packet
// between the peer's device and this host. If the tunnel runs, they belong to a flow that a
// stateful filter already knows; otherwise the device's datagram is the first of its flow.
// The host's own outer address is the one that a route lookup returns, or without one the
// uplink's.
func (t *trace) checkTunnel(c held.State) {
	n, _ := c.ReadNumbers()
	if t.verdict.Peer < 0 || t.verdict.Peer >= len(t.rules.Peers()) {
		return
	}
	s := n.Tunnel[mesh.PublicKey(t.rules.Peers()[t.verdict.Peer].PublicKey)]
	remote, facts := s.Endpoint, t.rules.Host()
	if !remote.IsValid() {
		return
	}
	uplink, local := facts.Uplink(remote.Addr()), facts.Source4
	if remote.Addr().Is6() {
		local = facts.Source6
	}
	if ways := t.x.o.Host.Ways; ways != nil {
		if way, err := ways.Way(t.ctx, host.Packet{Packet: policy.Packet{Dst: remote.Addr()}}); err == nil && way.Interface != "" && way.Source.IsValid() {
			uplink, local = way.Interface, way.Source
		}
	}
	if uplink == "" || !local.IsValid() {
		return
	}
	running := !s.LastHandshake.IsZero() && t.x.o.Wanted.Now().Sub(s.LastHandshake) < runningFor
	port := t.rules.Mesh().ListenPort
	t.subject = "WireGuard's datagrams from the device"
	t.checkOthers(host.Packet{In: uplink, Packet: policy.Packet{Src: remote.Addr(), Dst: local, Proto: policy.ProtoUDP, SrcPort: remote.Port(), DstPort: port}}, "", running, false)
	t.subject = "WireGuard's datagrams to the device"
	t.checkOthers(host.Packet{Packet: policy.Packet{Src: local, Dst: remote.Addr(), Proto: policy.ProtoUDP, SrcPort: port, DstPort: remote.Port()}}, uplink, running, false)
	t.subject = ""
}

// addStop adds a reason why the packet of the question doesn't pass or, with back, why a
// packet in the opposite direction doesn't. An answer in question can't exist without the
// packet that it answers, so that a stop of the latter stops the answer, too.
func (t *trace) addStop(back bool, s api.Stop) {
	switch {
	case t.answer && !back:
		s.Message = "the packet that it answers doesn't pass: " + s.Message
	case !t.answer && back:
		s.Answer = true
	}
	t.stops = append(t.stops, s)
}

// checkPeerPacket compares the kernel's route for the packet that the peer sends with the way
// out that the policy passes it by ([policy.Exit]), and sets egress. The rules as loaded pass it
// by that way alone, so that a packet which the kernel sends another way is dropped.
func (t *trace) checkPeerPacket() {
	p, exit := t.forth, t.verdict.Exit
	if t.answer {
		exit = t.rules.FromPeer(p.Packet).Exit
	}
	host := t.rules.Host()
	switch exit {
	case policy.ExitUplink:
		t.egress = host.Uplink(p.Dst)
	case policy.ExitOther:
		t.egress = interfaceTo(t.rules, p.Dst)
	}
	w, ok := t.route(p, false)
	if !ok {
		return
	}
	switch {
	case w.Refused != "":
		t.addStop(false, api.Stop{Message: refusal(w.Refused), Hint: t.routeHint(p)})
	case exit == policy.ExitHost && !w.Local:
		t.addStop(false, api.Stop{Message: fmt.Sprintf("the kernel doesn't take it for itself, but sends it by %s", w.Interface), Hint: t.routeHint(p)})
	case exit == policy.ExitUplink && w.Interface != t.egress:
		t.addStop(false, api.Stop{
			Message: fmt.Sprintf("the kernel sends it by %s, and what peers send to the internet leaves by %s only", destination(w), t.egress),
			Hint:    t.routeHint(p),
		})
	case exit == policy.ExitOther && (w.Local || w.Interface == host.Interface):
		t.addStop(false, api.Stop{Message: fmt.Sprintf("the kernel sends it by %s", destination(w)), Hint: t.routeHint(p)})
	}
	if t.egress = w.Interface; w.Local {
		t.egress = ""
	}
}

// routeHint returns the hint for a packet that a route of the host stops.
func (t *trace) routeHint(p host.Packet) string {
	return "see the routes of the host: " + t.x.o.Host.Ways.WayCommand(p.Dst)
}

// stopped reports whether something certainly stops the packet, so that there is no answer.
func (t *trace) stopped() bool {
	return slices.ContainsFunc(t.stops, func(s api.Stop) bool { return !s.Unclear })
}

// checkOthers asks what other software's rules do with a packet that leaves by out ("" if it is
// for the host itself), on hosts whose rules can be evaluated ([host.Judge]). reply says that
// the other end opened the flow, back is as for addStop.
func (t *trace) checkOthers(p host.Packet, out string, reply, back bool) {
	judge := t.x.o.Host.Judge
	if judge == nil {
		return
	}
	by, err := judge.ByOthers(t.ctx, p, out, reply)
	if err != nil {
		t.addStop(back, api.Stop{Message: "other software's rules can't be read: " + err.Error(), Hint: "ask again", Unclear: true})
		return
	}
	subject := "it"
	if t.subject != "" {
		subject = t.subject
	}
	s := api.Stop{Unclear: by.Unclear, Hint: "let it pass there, in the software that it belongs to"}
	may := ""
	if by.Unclear {
		may = "may "
	}
	switch by.Does {
	case host.OthersDrop:
		s.Message = by.Where + " " + verb(may, "drop", "drops") + " " + subject
	case host.OthersRedirect:
		s.Message = by.Where + " " + verb(may, "send", "sends") + " " + subject + " to another destination"
		s.Hint = "take it out of the redirection there, in the software that it belongs to"
	case host.OthersUntrack: // such as NOTRACK in the raw table
		if t.subject != "" {
			return // the tunnel's datagrams aren't translated
		}
		s.Message = by.Where + " " + verb(may, "take", "takes") + " it out of connection tracking, so that it isn't translated"
		// A packet that needs no translation passes without connection tracking, too.
		s.Unclear = s.Unclear || !t.verdict.NAT()
	default:
		if !by.Unclear || t.subject != "" {
			return
		}
		s.Message = "what " + by.Where + " does with it isn't known"
	}
	t.addStop(back, s)
}

// verb returns the third person of a verb, or its plain form after a may that isn't empty.
func verb(may, plain, third string) string {
	if may != "" {
		return may + plain
	}
	return third
}

// checkRoute compares the kernel's route for a packet to the peer with out, the mesh interface.
func (t *trace) checkRoute(p host.Packet, out string, back bool) {
	w, ok := t.route(p, back)
	switch {
	case !ok:
	case w.Refused != "":
		t.addStop(back, api.Stop{Message: refusal(w.Refused), Hint: t.routeHint(p)})
	case w.Interface != out:
		t.addStop(back, api.Stop{Message: fmt.Sprintf("the kernel sends it by %s, and not into the tunnel", destination(w)), Hint: t.routeHint(p)})
	}
}

// route looks up the kernel's route for a packet. It reports false if the host has no route
// lookup or the lookup failed; a failure is an unclear stop.
func (t *trace) route(p host.Packet, back bool) (host.Way, bool) {
	ways := t.x.o.Host.Ways
	if ways == nil {
		return host.Way{}, false
	}
	w, err := host.Way{}, t.ctx.Err()
	if err == nil {
		w, err = ways.Way(t.ctx, p)
	}
	if err != nil {
		t.addStop(back, api.Stop{Message: "its route can't be looked up: " + err.Error(), Hint: "ask again", Unclear: true})
	}
	return w, err == nil
}

// destination names where a way leads: this host or an interface.
func destination(w host.Way) string {
	if w.Local {
		return "this host itself"
	}
	return w.Interface
}

// refusal returns the message for a packet that the kernel doesn't send; why is one of the
// reasons in [host.Way].
func refusal(why string) string {
	if why == host.WayNone {
		return "the host has no route to its destination"
	}
	return "the host's route to its destination is of the kind " + why
}
