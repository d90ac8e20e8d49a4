package flow

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Direction says which way a packet goes through the tunnel.
type Direction uint8

const (
	// FromPeer is out of the tunnel: WireGuard received it.
	FromPeer Direction = iota
	// ToPeer is into the tunnel: the host sends or forwards it.
	ToPeer
)

// View is a Table with the ruleset that is in force. It may be used by many
// goroutines at once.
type View struct {
	table      *Table
	rules      *policy.Ruleset
	generation uint32
	iface      string       // the mesh interface
	own        []netip.Addr // the host's mesh addresses
	shares     []*share     // by index of the peer in the ruleset
}

// Ruleset returns the ruleset of the view.
func (v *View) Ruleset() *policy.Ruleset { return v.rules }

// Action is what is to be done with a packet.
type Action uint8

const (
	// Drop it in silence.
	Drop Action = iota
	// Answer it with ICMP "administratively prohibited", and drop it. A View says
	// so at most so often per peer; see answerRate.
	Answer
	// Pass it on.
	Pass
)

// Verdict is what a View says of a packet. Four fields, because the compiler
// keeps so many in registers.
type Verdict struct {
	Action Action
	// Class of the flow's destination as its opener sees it; of a refused packet
	// the class under which it is counted, 0 towards a peer.
	Class policy.Class
	// Rule decided; RuleNone for a packet of a flow that was found to pass before.
	Rule policy.Rule

	share *share // whose packet it is; nil: no peer's
}

// Judge decides on one IP packet at the tunnel at the time now, which is
// Table.Now's. It keeps no reference to b.
func (v *View) Judge(b []byte, d Direction, now Instant) Verdict {
	var k key
	if plainKey(b, d, &k) {
		if e, class := v.fast(&k, d, now); e != nil {
			return Verdict{Action: Pass, Class: class, share: e.share}
		}
	}
	return v.slow(b, d, now)
}

// slow judges any packet.
func (v *View) slow(b []byte, d Direction, now Instant) Verdict {
	var p packet
	p.parse(b)
	if d == FromPeer {
		return v.fromPeer(&p, now)
	}
	return v.toPeer(&p, now)
}

// fast finds the flow of a plain packet if this view found it to pass before,
// without a lock.
func (v *View) fast(k *key, d Direction, now Instant) (*entry, policy.Class) {
	e := v.table.slot(k).Load()
	if e == nil {
		return nil, 0
	}
	plain := statePlainFar | statePasses
	if d == ToPeer {
		plain = statePlainNear | statePasses
	}
	st, ok := e.lookup(k)
	if !ok || st&plain != plain || st.generation() != v.generation || e.expired(st, now) {
		return nil, 0
	}
	e.touch(now)
	return e, st.class()
}

// fromPeer judges a packet out of the tunnel.
func (v *View) fromPeer(p *packet, now Instant) Verdict {
	if p.malformed || p.isError || p.fragment == later {
		return v.oddFromPeer(p, now)
	}
	var asked policy.Packet
	p.ask(v.iface, &asked)
	decided := v.rules.Decide(asked)
	if decided.Peer < 0 {
		return v.throughPeer(p, now)
	}
	s := v.shares[decided.Peer]
	s.mu.Lock()
	defer s.mu.Unlock()
	return v.far(p, s, decided, now)
}

// oddFromPeer judges what the policy alone can't read.
func (v *View) oddFromPeer(p *packet, now Instant) Verdict {
	s := v.shareOf(p.from, p.v6)
	switch {
	case p.malformed:
		return refuse(s, policy.RuleMalformed, policy.Martian)
	case s == nil:
		return v.throughPeer(p, now)
	case p.isError:
		return v.errorFromPeer(p, s, now)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.pieces.complete(p) {
		return refuse(s, policy.RuleMalformed, policy.Martian)
	}
	var asked policy.Packet
	p.ask(v.iface, &asked)
	return v.far(p, s, v.rules.Decide(asked), now)
}

// far judges a packet from the far end, which is a peer; decided is what the
// policy says of the packet by itself. The share's mutex is held.
func (v *View) far(p *packet, s *share, decided policy.Verdict, now Instant) Verdict {
	k := keyOf(p.tuple, FromPeer)
	e := s.find(k, now)
	opener := FromPeer
	// Whatever the host opened, the peer may do what it may by itself.
	if e != nil && e.load()&(stateByHost|stateCut) == stateByHost {
		if byHost := v.mayOpen(k, ToPeer); byHost.Pass {
			opener, decided = ToPeer, byHost
		}
	}
	if !decided.Pass {
		v.cutIfLive(s, e, now)
		verdict := refuse(s, decided.Rule, decided.Class)
		if decided.Answered() && p.fragment != later && s.answers.take(now) {
			verdict.Action = Answer
		}
		return verdict
	}
	if rule := v.note(s, e, k, p, FromPeer, opener, decided, now); rule != policy.RuleNone {
		return refuse(s, rule, decided.Class)
	}
	return Verdict{Action: Pass, Class: decided.Class, Rule: decided.Rule, share: s}
}

// toPeer judges a packet into the tunnel.
func (v *View) toPeer(p *packet, now Instant) Verdict {
	s := v.shareOf(p.to, p.v6)
	if p.malformed {
		return refuse(s, policy.RuleMalformed, 0)
	}
	if s == nil {
		return v.viaPeer(p, now)
	}
	if p.isError {
		return v.errorToPeer(p, s, now)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return v.near(p, s, now)
}

// near judges a packet from the near end. The share's mutex is held.
func (v *View) near(p *packet, s *share, now Instant) Verdict {
	if p.fragment == later && !s.sent.complete(p, now) {
		return refuse(s, policy.RuleMalformed, 0)
	}
	k := keyOf(p.tuple, ToPeer)
	e := s.find(k, now)
	opener := ToPeer
	var decided policy.Verdict
	switch {
	case e == nil:
		var asked policy.Packet
		p.ask("", &asked)
		decided = v.hostMay(&asked)
	case e.load().is(stateCut) && e.load().opener() == FromPeer:
		e.touch(now)
		return refuse(s, policy.RuleToPeer, 0)
	default:
		opener = e.load().opener()
		decided = v.mayOpen(k, opener)
	}
	if !decided.Pass {
		v.cutIfLive(s, e, now)
		return refuse(s, decided.Rule, 0)
	}
	v.note(s, e, k, p, ToPeer, opener, decided, now)
	return Verdict{Action: Pass, Class: decided.Class, Rule: decided.Rule, share: s}
}

// viaPeer judges a packet into the tunnel that isn't for a peer: what the host
// sends through one. Which, and whether to any, is up to WireGuard's allowed IPs.
func (v *View) viaPeer(p *packet, now Instant) Verdict {
	if p.isError {
		return refuse(nil, policy.RuleUnquoted, 0)
	}
	s := v.table.viaPeers
	s.mu.Lock()
	defer s.mu.Unlock()
	verdict := v.near(p, s, now)
	verdict.share = nil
	return verdict
}

// throughPeer judges a packet out of the tunnel whose source isn't a peer's. It
// passes only as an answer to what the host sent through a peer.
func (v *View) throughPeer(p *packet, now Instant) Verdict {
	s := v.table.viaPeers
	s.mu.Lock()
	defer s.mu.Unlock()
	spoofed := refuse(nil, policy.RuleSpoofed, policy.Spoofed)
	if p.fragment == later && !s.pieces.complete(p) {
		return spoofed
	}
	k := keyOf(p.tuple, FromPeer)
	if p.isError {
		// A router behind the peer: whatever it quotes was sent by the host.
		if !p.quoted || p.quote.from != p.to {
			return spoofed
		}
		k = keyOf(p.quote, ToPeer)
	}
	e := s.find(k, now)
	if e == nil || e.load().is(stateCut) {
		return spoofed
	}
	decided := v.mayOpen(k, ToPeer)
	if !decided.Pass {
		return spoofed
	}
	if !p.isError && v.note(s, e, k, p, FromPeer, ToPeer, decided, now) != policy.RuleNone {
		return spoofed
	}
	return Verdict{Action: Pass, Rule: decided.Rule}
}

// mayOpen says whether the flow k may be opened by opener now.
func (v *View) mayOpen(k key, opener Direction) policy.Verdict {
	t := k.tuple(opener)
	var asked policy.Packet
	if opener == FromPeer {
		t.ask(v.iface, &asked)
		return v.rules.Decide(asked)
	}
	t.ask("", &asked)
	return v.hostMay(&asked)
}

// hostMay says whether a packet into the tunnel that is in no flow may pass:
// only the host itself sends one, from its mesh address, to a peer or to what
// routing leads to through one. Anything else is forwarded for a host that may
// open nothing here.
func (v *View) hostMay(asked *policy.Packet) policy.Verdict {
	decided := v.rules.Decide(*asked)
	switch {
	case !decided.Pass || decided.Rule == policy.RuleHostToPeer:
		return decided
	case decided.Rule == policy.RuleTunnel:
		// Through a peer, the tunnel would carry itself, as far as that peer likes.
		return policy.Verdict{Rule: policy.RuleWireGuard, Peer: -1}
	}
	class := v.rules.Class(asked.Dst)
	if slices.Contains(v.own, asked.Src) && (class == policy.OnLAN || class == policy.Internet) && !asked.IsRedirect() {
		return decided
	}
	return policy.Verdict{Rule: policy.RuleToPeer, Peer: -1}
}

// shareOf returns the share of the peer with address a, or nil.
func (v *View) shareOf(a address, v6 bool) *share {
	i, ok := v.rules.PeerByAddr(a.netip(v6))
	if !ok {
		return nil
	}
	return v.shares[i]
}

// note remembers a packet that the policy lets pass. It returns RuleNone, or the
// rule that refuses the packet: everything that a peer sends belongs to a flow
// that is remembered, and so is bounded, for the host's packet filter may keep
// state of whatever passes. The share's mutex is held.
func (v *View) note(s *share, e *entry, k key, p *packet, d, opener Direction, decided policy.Verdict, now Instant) policy.Rule {
	var old state
	if e != nil {
		old = e.load()
	}
	if d == FromPeer && p.fragment != whole {
		switch malformed, full := s.admitFragment(p, now); {
		case malformed:
			return policy.RuleMalformed
		case full:
			s.full.Add(1)
			return policy.RuleFull
		}
	}
	runs := e != nil && !old.is(stateCut) && old.opener() == opener
	if !runs && opener == FromPeer {
		switch {
		case !p.opens:
			return policy.RuleUnasked
		case !s.admit(decided.Class, now):
			s.full.Add(1)
			return policy.RuleFull
		}
	}
	switch {
	case p.fragment == whole:
	case d == FromPeer:
		s.noteFragment(p, now)
	case p.fragment == first:
		s.sent.remember(p, now)
	}
	if e == nil {
		if !p.opens {
			return policy.RuleNone
		}
		e = s.add(k, opener, now)
	}
	at, before := firstPhase(k.proto(), p.flags), Instant(0)
	if runs {
		at, before = e.advance(k.proto(), p, d, now)
	} else {
		e.closed = 0
	}
	e.touch(now)
	s.set(e, passing(v.generation, opener, at, decided.Class, k.proto(), before), now)
	v.table.slot(&k).Store(e)
	return policy.RuleNone
}

// advance returns the phase of a running flow after a packet, and the timeout
// that it must not come below.
func (e *entry) advance(proto uint8, p *packet, d Direction, now Instant) (at phase, before Instant) {
	st := e.load()
	at, before = st.phase(), st.timeout()
	if p.fragment == later { // of a packet that was noted
		return at, before
	}
	at = at.next(proto, d, st.opener(), p.flags, now-e.closed > reborn)
	if at != closing {
		return at, before
	}
	if d == ToPeer && p.flags&(tcpFIN|tcpRST) != 0 {
		e.closed = now
	}
	return at, 0
}

// cutIfLive cuts a flow that was found to be refused. A cut one stays cut for as
// long as an end sends.
func (v *View) cutIfLive(s *share, e *entry, now Instant) {
	if e == nil {
		return
	}
	e.touch(now)
	if st := e.load(); !st.is(stateCut) {
		s.set(e, st.cut(), now)
	}
}

// errorFromPeer judges an ICMP error that a peer sends: to the sender of the packet
// that it quotes, which was sent to the peer itself, or else its flow isn't in the
// peer's share.
func (v *View) errorFromPeer(p *packet, s *share, now Instant) Verdict {
	if p.quoted && p.quote.v6 == p.v6 && p.quote.from == p.to {
		if verdict, ok := v.quoted(s, keyOf(p.quote, ToPeer), now); ok {
			return verdict
		}
	}
	class := v.rules.Class(p.to.netip(p.v6))
	return refuse(s, policy.RuleUnquoted, class)
}

// errorToPeer judges an ICMP error, from whichever router, about a packet that
// the peer sent.
func (v *View) errorToPeer(p *packet, s *share, now Instant) Verdict {
	if p.quoted && p.quote.v6 == p.v6 && p.quote.from == p.to {
		if verdict, ok := v.quoted(s, keyOf(p.quote, FromPeer), now); ok {
			return verdict
		}
	}
	return refuse(s, policy.RuleUnquoted, 0)
}

// quoted judges an ICMP error by the flow that the quoted packet belongs to.
func (v *View) quoted(s *share, k key, now Instant) (Verdict, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.find(k, now)
	if e == nil || e.load().is(stateCut) {
		return Verdict{}, false
	}
	decided := v.mayOpen(k, e.load().opener())
	return Verdict{Action: Pass, Class: decided.Class, Rule: decided.Rule, share: s}, decided.Pass
}

func refuse(s *share, rule policy.Rule, class policy.Class) Verdict {
	return Verdict{Rule: rule, Class: class, share: s}
}
