package flow

import (
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Direction is the direction of a packet through the tunnel.
type Direction uint8

const (
	// FromPeer is out of the tunnel: WireGuard received it.
	FromPeer Direction = iota
	// ToPeer is into the tunnel: the host sends or forwards it.
	ToPeer
)

func (d Direction) opposite() Direction { return FromPeer + ToPeer - d }

// View is a Table with the ruleset that is in force. It may be used by many
// goroutines at once.
type View struct {
	table      *Table
	rules      *policy.Ruleset
	generation uint32
	shares     []*share // by index of the peer in the ruleset
}

// Ruleset returns the ruleset of the view.
func (v *View) Ruleset() *policy.Ruleset { return v.rules }

// Action is how the guard treats a packet.
type Action uint8

const (
	// Drop it in silence.
	Drop Action = iota
	// Answer it with ICMP "administratively prohibited", and drop it. The rate is
	// limited per peer; see answerRate.
	Answer
	// Pass it on.
	Pass
)

// Decision is a View's judgement of a packet. It has four fields because the compiler
// keeps that many in registers.
type Decision struct {
	Action Action
	// Class of the flow's destination as its opener sees it; of a refused packet
	// the class under which it is counted, 0 towards a peer.
	Class policy.Class
	// Rule decided; RuleNone for a packet of a flow that was found to pass before.
	Rule policy.Rule

	share *share // of the peer that the packet is from or to; nil: of none
}

// Judge decides on one IP packet at the tunnel at the time now, which is
// Table.Now's. It keeps no reference to b.
func (v *View) Judge(b []byte, d Direction, now Instant) Decision {
	var k key
	if plainKey(b, d, &k) {
		if e, class := v.fast(&k, d, now); e != nil {
			return Decision{Action: Pass, Class: class, share: e.share}
		}
	}
	return v.slow(b, d, now)
}

// slow judges any packet.
func (v *View) slow(b []byte, d Direction, now Instant) Decision {
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
func (v *View) fromPeer(p *packet, now Instant) Decision {
	var s *share
	var asked policy.Packet
	var decided policy.Verdict
	if p.fragment == later { // its ports are those of the first, which the share knows
		s = v.shareOf(p.from, p.v6)
	} else {
		p.describe(&asked)
		if decided = v.rules.FromPeer(asked); decided.Peer >= 0 {
			s = v.shares[decided.Peer]
		}
	}
	switch {
	case p.malformed:
		return refuse(s, policy.RuleMalformed, policy.Martian)
	case s == nil:
		return v.throughPeer(p, now)
	case p.isError:
		return v.quoting(p, s, FromPeer, now)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.fragment == later {
		if !s.pieces.complete(p) {
			return refuse(s, policy.RuleMalformed, policy.Martian)
		}
		p.describe(&asked)
		decided = v.rules.FromPeer(asked)
	}
	f := s.flow(keyOf(p.tuple, FromPeer), now)
	opener := FromPeer
	// Whatever the host opened, the peer may do what it may by itself.
	if f.entry != nil && f.entry.load()&(stateByHost|stateCut) == stateByHost {
		if byHost := v.mayOpen(f.key, ToPeer); byHost.Pass {
			opener, decided = ToPeer, byHost
		}
	}
	if !decided.Pass {
		f.cut(now)
		decision := refuse(s, decided.Rule, decided.Class)
		if decided.Answered() && p.fragment != later && s.answers.take(now) {
			decision.Action = Answer
		}
		return decision
	}
	if rule := v.remember(f, p, FromPeer, opener, decided.Class, now); rule != policy.RuleNone {
		return refuse(s, rule, decided.Class)
	}
	return Decision{Action: Pass, Class: decided.Class, Rule: decided.Rule, share: s}
}

// toPeer judges a packet into the tunnel. One that isn't for a peer's address is sent
// through a peer; WireGuard's allowed IPs choose which.
func (v *View) toPeer(p *packet, now Instant) Decision {
	peer := v.shareOf(p.to, p.v6)
	s := peer
	switch {
	case p.malformed:
		return refuse(peer, policy.RuleMalformed, 0)
	case peer == nil && p.isError:
		return refuse(nil, policy.RuleUnquoted, 0)
	case p.isError:
		return v.quoting(p, peer, ToPeer, now)
	case peer == nil:
		s = v.table.throughPeer
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.fragment == later && !s.sent.complete(p, now) {
		return refuse(peer, policy.RuleMalformed, 0)
	}
	f := s.flow(keyOf(p.tuple, ToPeer), now)
	opener := ToPeer
	var decided policy.Verdict
	if f.entry == nil {
		var asked policy.Packet
		p.describe(&asked)
		decided = v.rules.IntoTunnel(asked)
	} else {
		st := f.entry.load()
		if opener = st.opener(); opener == FromPeer && st.is(stateCut) {
			f.entry.touch(now)
			return refuse(peer, policy.RuleToPeer, 0)
		}
		decided = v.mayOpen(f.key, opener)
	}
	if !decided.Pass {
		f.cut(now)
		return refuse(peer, decided.Rule, 0)
	}
	v.remember(f, p, ToPeer, opener, decided.Class, now)
	return Decision{Action: Pass, Class: decided.Class, Rule: decided.Rule, share: peer}
}

// throughPeer judges a packet out of the tunnel whose source isn't a peer's address. It
// passes only as a reply to what the host sent through a peer, or as an error about that.
func (v *View) throughPeer(p *packet, now Instant) Decision {
	s := v.table.throughPeer
	s.mu.Lock()
	defer s.mu.Unlock()
	spoofed := refuse(nil, policy.RuleSpoofed, policy.Spoofed)
	if p.fragment == later && !s.pieces.complete(p) {
		return spoofed
	}
	k := keyOf(p.tuple, FromPeer)
	if p.isError {
		// A router behind the peer sends it, and what it quotes was sent by the host.
		if !p.quoted || p.quote.from != p.to {
			return spoofed
		}
		k = keyOf(p.quote, ToPeer)
	}
	f := s.flow(k, now)
	if f.entry == nil || f.entry.load().is(stateCut) {
		return spoofed
	}
	decided := v.mayOpen(k, ToPeer)
	if !decided.Pass {
		return spoofed
	}
	if !p.isError && v.remember(f, p, FromPeer, ToPeer, decided.Class, now) != policy.RuleNone {
		return spoofed
	}
	return Decision{Action: Pass, Rule: decided.Rule}
}

// quoting judges an ICMP error from or to a peer, which runs in direction d, by the flow
// of the packet that it quotes. That packet ran in the opposite direction, and the error
// is addressed to its sender. A peer's error quotes a packet to the peer itself, for any
// other flow isn't in the peer's share; an error to a peer may come from any router.
func (v *View) quoting(p *packet, s *share, d Direction, now Instant) Decision {
	var class policy.Class
	if d == FromPeer {
		class = v.rules.Class(p.to.netip(p.v6))
	}
	if !p.quoted || p.quote.v6 != p.v6 || p.quote.from != p.to {
		return refuse(s, policy.RuleUnquoted, class)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.flow(keyOf(p.quote, d.opposite()), now)
	if f.entry == nil || f.entry.load().is(stateCut) {
		return refuse(s, policy.RuleUnquoted, class)
	}
	decided := v.mayOpen(f.key, f.entry.load().opener())
	if !decided.Pass {
		return refuse(s, policy.RuleUnquoted, class)
	}
	return Decision{Action: Pass, Class: decided.Class, Rule: decided.Rule, share: s}
}

// mayOpen judges whether the end whose packets run in the direction opener may open the
// flow k now.
func (v *View) mayOpen(k key, opener Direction) policy.Verdict {
	by := policy.ByPeer
	if opener == ToPeer {
		by = policy.ByHost
	}
	t := k.tuple(opener)
	var opened policy.Packet
	t.describe(&opened)
	return v.rules.MayOpen(by, opened)
}

// shareOf returns the share of the peer with address a, or nil.
func (v *View) shareOf(a address, v6 bool) *share {
	i, ok := v.rules.PeerByAddr(a.netip(v6))
	if !ok {
		return nil
	}
	return v.shares[i]
}

// flowOf is a flow's place in a share, for as long as the share's mutex is held.
type flowOf struct {
	share *share
	key   key
	entry *entry // nil: the flow isn't remembered
}

// flow returns the flow k of the share. The share's mutex is held.
func (s *share) flow(k key, now Instant) flowOf { return flowOf{s, k, s.find(k, now)} }

// cut cuts a flow that the policy refuses, if it is remembered. A cut one stays cut for
// as long as an end sends.
func (f flowOf) cut(now Instant) {
	if f.entry == nil {
		return
	}
	f.entry.touch(now)
	if st := f.entry.load(); !st.is(stateCut) {
		f.share.set(f.entry, st.cut(), now)
	}
}

// remember adds a packet that the policy lets pass to its flow, whose destination has
// this class. It returns RuleNone, or the rule that refuses the packet: everything that
// a peer sends belongs to a flow that is remembered, and so is bounded, for the host's
// packet filter may keep state of whatever passes. The share's mutex is held.
func (v *View) remember(f flowOf, p *packet, d, opener Direction, class policy.Class, now Instant) policy.Rule {
	s, e := f.share, f.entry
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
		case !s.admit(class, now):
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
		e = s.add(f.key, opener, now)
	}
	proto := f.key.proto()
	at, atLeast := firstPhase(proto, p.flags), Instant(0) // atLeast bounds the timeout
	switch {
	case !runs:
		e.closed = 0
	case p.fragment == later: // of a packet that counted already
		at, atLeast = old.phase(), old.timeout()
	default:
		at, atLeast = old.phase().next(proto, d, opener, p.flags, now-e.closed > reborn), old.timeout()
		if at == closing {
			atLeast = 0
			if d == ToPeer && p.flags&(tcpFIN|tcpRST) != 0 {
				e.closed = now
			}
		}
	}
	e.touch(now)
	s.set(e, passing(v.generation, opener, at, class, proto, atLeast), now)
	v.table.slot(&f.key).Store(e)
	return policy.RuleNone
}

func refuse(s *share, rule policy.Rule, class policy.Class) Decision {
	return Decision{Rule: rule, Class: class, share: s}
}
