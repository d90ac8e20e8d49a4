package pfsim

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/pfconf"
)

// Numbers of tags with a meaning of their own; those of rules are positive, 0 is none.
const (
	noTag      = -1 // no rule has set a tag in this evaluation
	foreignTag = -2 // the packet has a tag that no rule names
)

// evaluation is one packet at one hook: the kernel's pf_pdesc and the local variables of
// pf_test and the functions that it calls.
type evaluation struct {
	m      *Machine
	p      Packet // with what pf has changed so far
	on     *kif
	dir    pfconf.Direction
	family pfconf.Family
	tag    int // of the packet
	// sport and dport are the numbers that translation treats as ports: those of TCP and
	// UDP, an ICMP identifier (in both), or an ESP SPI (in dport).
	sport, dport uint32

	reassembled bool // the matching scrub rule reassembles fragments
	bytes       int  // of the datagram that was reassembled here
	rewritten   bool // by a translation rule
	normTCP     bool // the matching scrub rule has reassemble tcp

	rule       *crule // that decides
	anchor     *crule // the main ruleset's anchor rule through which rule was reached
	translated *crule // the translation rule; nil: none
	state      *state // made by the packet, or to which it belongs
	created    bool   // state is new
	verdict    Verdict
	// dropped is the reason for a drop that no rule decided, otherwise DecidedByRule.
	dropped Decider
}

// Forward judges a packet that arrives on one interface and, if it passes there, leaves
// with the changes made so far on another, which may be the same. On an interface that
// doesn't exist it is dropped.
func (m *Machine) Forward(p Packet, in, out string) Judgement {
	var j Judgement
	m.hook(&j.In, &p, in, pfconf.In)
	j.Verdict = j.In.Verdict
	if j.In.Pass() {
		m.hook(&j.Out, &j.In.Packet, out, pfconf.Out)
		j.Verdict = j.Out.Verdict
	}
	return j
}

// Receive judges a packet that arrives for the host itself.
func (m *Machine) Receive(p Packet, in string) Judgement {
	var j Judgement
	m.hook(&j.In, &p, in, pfconf.In)
	j.Verdict = j.In.Verdict
	return j
}

// Send judges a packet that the host itself sends.
func (m *Machine) Send(p Packet, out string) Judgement {
	var j Judgement
	m.hook(&j.Out, &p, out, pfconf.Out)
	j.Verdict = j.Out.Verdict
	return j
}

// hook judges a packet on one interface in one direction (pf_test, pf_test6).
func (m *Machine) hook(h *Hook, p *Packet, name string, dir pfconf.Direction) {
	h.Seen, h.Packet = true, *p
	k := m.kifs[name]
	switch {
	case !m.enabled, k != nil && k.skip:
		h.Decider = DecidedBySkip
		return
	case k == nil || !k.exists || !sane(p):
		h.Verdict, h.Decider = VerdictDrop, DecidedByForm
		return
	}
	m.walk.gaveUp = false
	e := &m.eval
	*e = evaluation{m: m, p: *p, on: k, dir: dir, rule: &m.fallback}
	e.p.Src, e.p.Dst = p.Src.WithZone(""), p.Dst.WithZone("")
	e.family = pfconf.Inet6
	if p.Src.Is4() {
		e.family = pfconf.Inet
	}
	e.setTag(p.Tag)
	e.run()
	e.report(h)
}

// setTag sets e.tag to the number of the packet's tag.
func (e *evaluation) setTag(name string) {
	if e.tag = e.m.tags[name]; e.tag == 0 && name != "" {
		e.tag = foreignTag
	}
}

// sane reports whether the packet's addresses can be those of an IP header.
func sane(p *Packet) bool {
	return p.Src.IsValid() && p.Dst.IsValid() && p.Src.BitLen() == p.Dst.BitLen() && !p.Src.Is4In6() && !p.Dst.Is4In6()
}

// report fills in h with the result of the evaluation.
func (e *evaluation) report(h *Hook) {
	h.Verdict, h.Reassembled = e.verdict, e.bytes
	switch {
	case e.created:
		h.State = StateCreated
	case e.state != nil:
		h.State = StateMatched
	}
	switch {
	case e.dropped != DecidedByRule:
		h.Decider = e.dropped
	case e.rule.rule == nil:
		h.Decider = DecidedByDefault
	case !e.rule.loaded:
		h.Decider = DecidedByRemoved
	default:
		h.Rule, h.Anchor = e.rule.rule, e.rule.anchor
	}
	if e.translated != nil {
		h.Translation, h.TranslationAnchor = e.translated.rule, e.translated.anchor
	}
	if e.verdict != VerdictPass {
		return
	}
	if e.tag >= 0 {
		e.p.Tag = e.m.tagOf[e.tag]
	}
	h.Packet = e.p
}

// drop drops the packet for another reason than a rule.
func (e *evaluation) drop(by Decider) {
	e.verdict, e.dropped = VerdictDrop, by
}

// run evaluates the packet (pf_test and pf_test6): normalise, find its state or else
// judge it by the rules, check IP options, count. A packet with options that aren't
// allowed is dropped at the end, so the state that it made stays.
func (e *evaluation) run() {
	switch {
	case !e.normalize() || !e.p.Fragment && !e.formed():
		e.drop(DecidedByForm)
	case e.p.Fragment:
		e.testFragment()
	default:
		e.judge()
	}
	if e.verdict == VerdictPass && e.p.Options && !e.optionsAllowed() {
		e.m.totals[countOption]++
		e.drop(DecidedByProtocol)
	}
	if e.state != nil && e.state.tag != 0 {
		e.tag = e.state.tag
	}
	if e.m.walk.gaveUp {
		e.drop(DecidedByForm)
	}
	e.account()
}

// formed reports whether a packet that is no fragment is well formed: pf drops TCP and UDP
// with port 0, and TCP whose flags scrub refuses.
func (e *evaluation) formed() bool {
	switch e.p.Proto {
	case pfconf.ProtoTCP:
		return e.normalizeTCP() && e.p.SrcPort != 0 && e.p.DstPort != 0
	case pfconf.ProtoUDP:
		return e.p.SrcPort != 0 && e.p.DstPort != 0
	}
	return true
}

// optionsAllowed reports whether the packet may have IP options: the rule that decided, or
// the one that made its state, has allow-opts. The default rule doesn't.
func (e *evaluation) optionsAllowed() bool {
	return e.state != nil && e.state.allowOpts || e.rule.allowOpts
}

// judge looks for the packet's state and, if there is none, judges it by the rules.
func (e *evaluation) judge() {
	e.setPorts()
	if pass := e.testState(); pass {
		e.rule, e.anchor, e.translated = e.state.rule, e.state.anchor, e.state.nat
		return
	}
	if e.state == nil && e.verdict == VerdictPass {
		e.testRules()
	}
}

// setPorts sets e.sport and e.dport by the packet's protocol.
func (e *evaluation) setPorts() {
	e.sport, e.dport = 0, 0
	switch {
	case e.p.Proto == pfconf.ProtoTCP || e.p.Proto == pfconf.ProtoUDP:
		e.sport, e.dport = uint32(e.p.SrcPort), uint32(e.p.DstPort)
	case e.isICMP():
		e.sport = uint32(e.p.ICMPID)
		e.dport = e.sport
	case e.p.Proto == protoESP:
		e.dport = e.p.SPI
	}
}

// isICMP reports whether the packet is ICMP over IPv4 or ICMPv6 over IPv6.
func (e *evaluation) isICMP() bool {
	return e.p.Proto == pfconf.ProtoICMP && e.family == pfconf.Inet || e.p.Proto == pfconf.ProtoICMPv6 && e.family == pfconf.Inet6
}

// isICMPError reports whether the packet is an ICMP message about another packet
// (pf_icmp_mapping in pf.c): unreachable, source quench, redirect, time exceeded and
// parameter problem, or an ICMPv6 type of 1 to 4.
func (e *evaluation) isICMPError() bool {
	if !e.isICMP() {
		return false
	}
	switch t := e.p.ICMPType; e.family {
	case pfconf.Inet:
		return t == 3 || t == 4 || t == 5 || t == 11 || t == 12
	default:
		return t >= 1 && t <= 4
	}
}

// scopeMismatch compares the criteria that each kind of rule has: interface, direction,
// family and protocol.
func (e *evaluation) scopeMismatch(r *crule) mismatch {
	switch {
	case r.kif != nil && (r.kif == e.on) == r.ifNot:
		return skipInterface
	case r.dir != pfconf.Both && r.dir != e.dir:
		return skipDirection
	case r.family != pfconf.AnyFamily && r.family != e.family:
		return skipFamily
	case r.proto != 0 && r.proto != e.p.Proto:
		return skipProto
	}
	return matched
}

// tagMatches reports whether the packet has the tag that a rule requires. tag is the one
// that an earlier rule of this evaluation has set, which counts instead of the packet's,
// or noTag (pf_match_tag).
func (e *evaluation) tagMatches(r *crule, tag int) bool {
	if tag == noTag {
		tag = e.tag
	}
	return (r.tagged == tag) != r.notTagged
}

// filterMismatch returns the first criterion of a filter rule, or of the call of an
// anchor, that the translated packet doesn't meet.
func (e *evaluation) filterMismatch(r *crule, tag int) mismatch {
	p := &e.p
	if by := e.scopeMismatch(r); by != matched {
		return by
	}
	ports := r.proto == pfconf.ProtoTCP || r.proto == pfconf.ProtoUDP
	switch {
	case !r.from.addr.matches(e.m, p.Src):
		return skipSource
	case ports && !r.from.port.matches(p.SrcPort):
		return skipSourcePort
	case !r.to.addr.matches(e.m, p.Dst):
		return skipDestination
	case ports && !r.to.port.matches(p.DstPort):
		return skipDestinationPort
	case r.icmpType != 0 && r.icmpType != int(p.ICMPType)+1,
		r.icmpCode != 0 && r.icmpCode != int(p.ICMPCode)+1,
		r.tos != 0 && r.tos&p.TOS == 0,
		r.fragment,
		p.Proto == pfconf.ProtoTCP && p.Flags&r.flagMask != r.flags,
		r.noUser,
		r.prob != 0 && e.m.rand.Float64() >= r.prob,
		r.tagged != 0 && !e.tagMatches(r, tag),
		r.noOS:
		return mismatchOther
	}
	return matched
}

// fragmentMismatch is filterMismatch for a fragment, whose ports and flags aren't
// known: rules that compare them don't match. So pass, which compares flags by default,
// matches no fragment of TCP.
func (e *evaluation) fragmentMismatch(r *crule, tag int) mismatch {
	p := &e.p
	if by := e.scopeMismatch(r); by != matched {
		return by
	}
	ports := !r.from.port.any || !r.to.port.any
	unknown := false // the rule compares what a fragment doesn't show
	switch p.Proto {
	case pfconf.ProtoUDP:
		unknown = ports
	case pfconf.ProtoTCP:
		unknown = ports || r.flagMask != 0
	case pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		unknown = r.icmpType != 0 || r.icmpCode != 0
	}
	switch {
	case !r.from.addr.matches(e.m, p.Src):
		return skipSource
	case !r.to.addr.matches(e.m, p.Dst):
		return skipDestination
	case r.tos != 0 && r.tos&p.TOS == 0, r.noOS, unknown,
		r.prob != 0 && e.m.rand.Float64() >= r.prob,
		r.tagged != 0 && !e.tagMatches(r, tag):
		return mismatchOther
	}
	return matched
}

// filter evaluates the filter rules and sets e.rule to the last that matches, or the
// first with quick. It returns the tag that matching rules set, which on a fragment they
// don't.
func (e *evaluation) filter(tag int) int {
	w := &e.m.walk
	w.begin(e.m, filterList)
	for r := w.next(); r != nil; r = w.next() {
		by := matched
		if e.p.Fragment {
			by = e.fragmentMismatch(r, tag)
		} else {
			by = e.filterMismatch(r, tag)
		}
		if by != matched {
			w.miss(r, by)
			continue
		}
		if r.tag != 0 && !e.p.Fragment {
			tag = r.tag
		}
		if r.call != nil {
			w.stepInto(r)
			continue
		}
		w.match = true
		e.rule, e.anchor = r, w.top
		if r.quick {
			break
		}
		w.skip()
	}
	return tag
}

// testFragment judges a fragment that isn't reassembled (pf_test_fragment): without
// translation, state or tags, and without an answer if it is blocked.
func (e *evaluation) testFragment() {
	e.filter(noTag)
	e.m.totals[countMatch]++
	if e.rule.block {
		e.verdict = VerdictDrop
	}
}

// testRules judges a packet without a state (pf_test_rule): translate, filter, make a
// state.
func (e *evaluation) testRules() {
	before, sport, dport := e.p, e.sport, e.dport
	t, translated := e.findTranslation()
	tag := noTag
	if translated {
		e.translated = t.rule
		e.apply(&t)
		if t.rule.tag != 0 {
			tag = t.rule.tag
		}
	}
	// From here on the rules see the packet as it will leave.
	if !translated || !t.rule.natPass {
		tag = e.filter(tag)
	}
	if e.m.walk.gaveUp {
		return
	}
	e.m.totals[countMatch]++
	if e.rule.block {
		e.verdict = e.answer()
		return
	}
	if tag > 0 {
		e.tag = tag
	}
	// An ICMP error makes no state. A translated packet always does, whatever the rules
	// say, since answers need it to be translated back.
	if e.isICMPError() || e.rule.keep == pfconf.StateDefault && !translated && !e.normTCP {
		return
	}
	inner := stateSide{stateHost{before.Src, sport}, stateHost{before.Dst, dport}}
	port := sport
	if e.dir == pfconf.In {
		port = dport
	}
	if translated {
		port = t.port
	}
	if !e.makeState(inner, port, max(tag, 0)) {
		e.verdict = VerdictDrop
	}
}

// answer returns the verdict on a packet that e.rule blocks.
func (e *evaluation) answer() Verdict {
	r, p := e.rule, &e.p
	switch {
	// No reset answers a reset; block return then sends an unreachable.
	case p.Proto == pfconf.ProtoTCP && r.returnReset && p.Flags&pfconf.FlagRST == 0:
		// To log a packet the kernel writes the translated header into it, without the
		// checksum, which follows at the end. pf then takes the segment for damaged and
		// sends no reset.
		if e.rewritten && (r.log || e.translated.log) {
			e.m.totals[countChecksum]++
			return VerdictDrop
		}
		return VerdictReset
	case r.returnICMP && !e.isICMP() && p.Proto != protoESP && p.Proto != protoAH:
		return VerdictUnreachable
	}
	return VerdictDrop
}

// apply translates the packet. When an rdr rule restores the source of an answer, the
// kernel also writes the port into the destination.
func (e *evaluation) apply(t *translation) {
	p := &e.p
	srcChanged, dstChanged := p.Src != t.src, p.Dst != t.dst
	e.rewritten = true
	switch {
	case p.Proto == pfconf.ProtoTCP || p.Proto == pfconf.ProtoUDP:
		port := uint16(t.port)
		if srcChanged {
			p.SrcPort = port
			e.sport = t.port
		}
		rdr := t.rule.action == pfconf.Rdr
		if rdr && (dstChanged || p.DstPort != port) {
			p.DstPort = port
			e.dport = t.port
		}
	case p.Proto == pfconf.ProtoICMP && e.family == pfconf.Inet:
		if srcChanged {
			p.ICMPID = uint16(t.port)
		}
	}
	p.Src, p.Dst = t.src, t.dst
}

// stateSide has both ends of a flow as they are on one side of a translation.
type stateSide struct{ src, dst stateHost }

// makeState adds a state for the packet. before has its ends before translation and port
// is the one that translation chose. It reports whether it could: false if a limit is
// reached or the new state collides with another, and then the packet is dropped.
func (e *evaluation) makeState(before stateSide, port uint32, tag int) bool {
	m, r := e.m, e.rule
	if e.translated != nil && e.p.Proto == protoESP && e.dir == pfconf.Out && e.espBlocked(before.src.addr) {
		return false
	}
	if r.max > 0 && r.states >= int(r.max) {
		m.totals[countStateLimit]++
		return false
	}
	var source *sourceNode
	if r.tracksSources() {
		// The source as the rule sees it: after a translation.
		if source = m.sourceOf(r, e.p.Src); source == nil {
			m.totals[countSourceLimit]++
			return false
		}
	}
	if m.states.n > m.limits.states {
		m.totals[countMemory]++
		m.giveBack(source)
		return false
	}
	s := &state{
		rule: r, nat: e.translated, anchor: e.anchor, allowOpts: r.allowOpts, tag: tag,
		created: m.seconds(), last: m.seconds(),
	}
	if r.bound {
		s.kif = e.on
	}
	e.firstPeers(s)
	if s.source = source; source != nil {
		source.states++
	}
	if !m.states.insert(s, e.newKey(before, port)) {
		m.totals[countInsertFailed]++
		m.leaveSource(s)
		return false
	}
	m.totals[countInserts]++
	// The rules exist as long as their states, even when they are unloaded.
	for _, r := range [...]*crule{s.rule, s.nat, s.anchor} {
		if r != nil {
			r.states++
		}
	}
	e.state, e.created = s, true
	return true
}

// espBlocked reports whether another inner host has a half-open ESP state with the same
// outside addresses. Only one may wait for the remote side's SPI, since the first answer
// could belong to either.
func (e *evaluation) espBlocked(inner netip.Addr) bool {
	k := outsideKey(protoESP, filterUnset, stateHost{addr: e.p.Src}, stateHost{addr: e.p.Dst})
	s := e.m.states.find(k, pfconf.In, e.on)
	return s != nil && s.key.lan.addr != inner
}

// newKey returns the key of a new state, from the packet's ends before and after
// translation. The kernel stores ICMPv6 states as ICMP.
func (e *evaluation) newKey(before stateSide, port uint32) *stateKey {
	k := &stateKey{proto: e.p.Proto, dir: e.dir}
	after := stateSide{stateHost{e.p.Src, e.sport}, stateHost{e.p.Dst, e.dport}}
	switch k.proto {
	case pfconf.ProtoICMPv6:
		k.proto = pfconf.ProtoICMP
	case pfconf.ProtoUDP:
		k.filter = addrPortDependent
		if e.translated != nil && (e.p.SrcPort != ikePort || e.p.DstPort != ikePort) {
			k.filter = max(k.filter, e.translated.pool.extFilter)
		}
	}
	near, far := &after.src, &after.dst
	nearBefore, farBefore := &before.src, &before.dst
	if e.dir == pfconf.In {
		near, far, nearBefore, farBefore = far, near, farBefore, nearBefore
	}
	switch k.proto {
	case pfconf.ProtoICMP:
		near.port, far.port = port, 0
		if e.translated == nil {
			nearBefore.port, farBefore.port = port, 0
		}
	case protoESP:
		if e.dir == pfconf.Out {
			nearBefore.port = 0
		}
	}
	if e.dir == pfconf.Out {
		k.gwy, k.extGwy, k.lan, k.extLan = *near, *far, *nearBefore, *farBefore
	} else {
		k.lan, k.extLan, k.gwy, k.extGwy = *near, *far, *nearBefore, *farBefore
	}
	return k
}
