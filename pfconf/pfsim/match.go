package pfsim

import "github.com/meshhelper/meshhelper/pfconf"

// The states of one end of a flow that isn't TCP: PFUDPS_*, PFESPS_* and PFOTHERS_* of xnu
// bsd/net/pfvar.h.
const (
	peerSilent   = iota // has sent nothing
	peerSingle          // has sent, and got no answer
	peerMultiple        // both ends have sent
	// peerEstablished is peerMultiple by ESP's name.
	peerEstablished = peerMultiple
)

// testState looks for the packet's state, updates it and translates the packet by it. It
// reports whether the state passes the packet. If not, e.state is nil, or the state that
// refuses the packet.
func (e *evaluation) testState() bool {
	switch {
	case e.p.Proto == pfconf.ProtoTCP:
		return e.testTCP()
	case e.p.Proto == pfconf.ProtoUDP:
		return e.testUDP()
	case e.isICMPError():
		return e.testICMPError()
	case e.isICMP():
		return e.testICMP()
	case e.p.Proto == protoESP:
		return e.testESP()
	}
	return e.testOther()
}

// find looks up a state by the packet's ends, on the side of a translation from which the
// packet comes: inside for an outbound packet, outside for an inbound one
// (pf_find_state).
func (e *evaluation) find(proto pfconf.Proto, filter endpointFilter, src, dst stateHost) *state {
	e.m.totals[countSearches]++
	if e.dir == pfconf.Out {
		return e.m.states.find(insideKey(proto, filter, src, dst), pfconf.Out, e.on)
	}
	return e.m.states.find(outsideKey(proto, filter, dst, src), pfconf.In, e.on)
}

// findUDP looks up a UDP state, first one that filters by address and port, then, if there
// are any, those with looser filtering.
func (e *evaluation) findUDP(src, dst stateHost) *state {
	s := e.find(pfconf.ProtoUDP, addrPortDependent, src, dst)
	for f := addrDependent; s == nil && f <= endpointIndependent && e.m.states.looseUDP > 0; f++ {
		s = e.find(pfconf.ProtoUDP, f, src, dst)
	}
	return s
}

// findPorts looks up a state by the packet's addresses and these ports.
func (e *evaluation) findPorts(proto pfconf.Proto, sport, dport uint32) *state {
	return e.find(proto, filterUnset, stateHost{e.p.Src, sport}, stateHost{e.p.Dst, dport})
}

// ends returns the state's peers for the packet's sender and its receiver.
func (e *evaluation) ends(s *state) (src, dst *peer) {
	if e.dir == s.key.dir {
		return &s.src, &s.dst
	}
	return &s.dst, &s.src
}

// touch restarts a state's timeout, which from now on is t.
func (e *evaluation) touch(s *state, t timeoutKind) {
	s.last, s.timeout = e.m.seconds(), t
}

// track updates the state of a flow without connections. Its timeout depends on whether
// both ends have sent.
func (e *evaluation) track(s *state, single, multiple timeoutKind) {
	src, dst := e.ends(s)
	if src.state < peerSingle {
		src.state = peerSingle
	}
	if dst.state == peerSingle {
		dst.state = peerMultiple
	}
	if src.state == peerMultiple && dst.state == peerMultiple {
		e.touch(s, multiple)
	} else {
		e.touch(s, single)
	}
}

// translate rewrites the packet by the state's key: the source of an outbound packet, the
// destination of an inbound one.
func (e *evaluation) translate(k *stateKey) {
	h := k.lan
	if e.dir == pfconf.Out {
		h = k.gwy
	}
	p := &e.p
	if e.dir == pfconf.Out {
		p.Src = h.addr
	} else {
		p.Dst = h.addr
	}
	switch {
	case p.Proto == pfconf.ProtoTCP || p.Proto == pfconf.ProtoUDP:
		if e.dir == pfconf.Out {
			p.SrcPort = uint16(h.port)
		} else {
			p.DstPort = uint16(h.port)
		}
	case p.Proto == pfconf.ProtoICMP && e.family == pfconf.Inet:
		p.ICMPID = uint16(h.port)
	}
}

// testUDP is pf_test_state_udp.
func (e *evaluation) testUDP() bool {
	// Between two ports 500 the kernel looks up only packets that are long enough for IKE,
	// since it tells IKE flows apart by their cookies. A second shorter packet finds no
	// state, tries to make one and is dropped for the collision.
	if e.sport == ikePort && e.dport == ikePort && e.p.Len < ikeMinimum {
		return false
	}
	s := e.findUDP(stateHost{e.p.Src, e.sport}, stateHost{e.p.Dst, e.dport})
	if e.state = s; s == nil {
		return false
	}
	e.track(s, udpSingle, udpMultiple)
	e.follow(s.key)
	if s.key.translated() {
		e.translate(s.key)
	}
	return true
}

// follow updates the far end in the key of a flow with looser filtering to that of the
// last packet.
func (e *evaluation) follow(k *stateKey) {
	if k.filter <= addrPortDependent {
		return
	}
	ext, h := &k.extGwy, stateHost{e.p.Src, e.sport}
	if e.dir == pfconf.Out {
		ext, h = &k.extLan, stateHost{e.p.Dst, e.dport}
	}
	if ext.port = h.port; k.filter == endpointIndependent {
		ext.addr = h.addr
	}
}

// testICMP is the first half of pf_test_state_icmp, for queries and answers.
func (e *evaluation) testICMP() bool {
	// Of messages without an identifier the kernel compares the same two bytes.
	id := uint32(e.p.ICMPID)
	s := e.findPorts(pfconf.ProtoICMP, id, id)
	if e.state = s; s == nil {
		return false
	}
	e.touch(s, icmpError)
	if s.key.translated() {
		e.translate(s.key)
	}
	return true
}

// testOther is pf_test_state_other, for protocols of which only addresses are compared.
func (e *evaluation) testOther() bool {
	s := e.findPorts(e.p.Proto, 0, 0)
	if e.state = s; s == nil {
		return false
	}
	e.track(s, otherSingle, otherMultiple)
	if s.key.addrTranslated() {
		e.translate(s.key)
	}
	return true
}

// testESP is pf_test_state_esp. Each end chooses the SPI of packets to it, so the SPI of
// answers isn't known before the first one, which completes the state's key.
func (e *evaluation) testESP() bool {
	spi := e.p.SPI
	s := e.find(protoESP, filterUnset, stateHost{addr: e.p.Src}, stateHost{e.p.Dst, spi})
	if s == nil {
		if s = e.find(protoESP, filterUnset, stateHost{addr: e.p.Src}, stateHost{addr: e.p.Dst}); s != nil && !e.m.states.learnSPI(s, e.dir, spi) {
			e.m.removeState(s)
			return false
		}
	}
	if e.state = s; s == nil {
		return false
	}
	src, dst := e.ends(s)
	if src.state < peerSingle {
		src.state = peerSingle
	}
	// With packets in both directions the tunnel is established, and its state lives
	// longer.
	if dst.state >= peerSingle {
		src.state, dst.state = peerEstablished, peerEstablished
		e.touch(s, espEstablished)
	} else {
		e.touch(s, espInitiating)
	}
	if s.key.addrTranslated() {
		e.translate(s.key)
	}
	return true
}

// learnSPI stores a half-open ESP state under the SPI of the answer to it, and reports
// whether no other state had that key.
func (t *stateTable) learnSPI(s *state, dir pfconf.Direction, spi uint32) bool {
	k := s.key
	if dir == pfconf.In {
		delete(t.outside, k.outside())
		k.lan.port, k.gwy.port = spi, spi
		out := k.outside()
		if t.outside[out] != nil {
			return false
		}
		t.outside[out] = k
		return true
	}
	delete(t.inside, k.inside())
	k.extLan.port = spi
	in := k.inside()
	if t.inside[in] != nil {
		return false
	}
	t.inside[in] = k
	return true
}

// testICMPError is the second half of pf_test_state_icmp. An error belongs to the state of
// the packet that it quotes, and is translated with it. It doesn't restart the state's
// timeout.
func (e *evaluation) testICMPError() bool {
	q := e.p.Quoted
	if q == nil || q.Later || !q.Src.IsValid() || q.Src.BitLen() != e.p.Src.BitLen() || q.Dst.BitLen() != q.Src.BitLen() {
		return false
	}
	s := e.findQuoted(q)
	if e.state = s; s == nil {
		return false
	}
	if q.Proto == pfconf.ProtoTCP && !e.quotedInWindow(s, q.Seq) {
		e.m.totals[countMismatch]++
		e.drop(DecidedByProtocol)
		return false
	}
	if s.key.translated() {
		e.translateError(s.key)
	}
	return true
}

// findQuoted looks up the state of a quoted packet, which went in the opposite direction.
// The kernel looks for echo messages of ICMPv6 under ICMPv6, but stores their states under
// ICMP, so it finds none.
func (e *evaluation) findQuoted(q *Quoted) *state {
	src, dst := stateHost{addr: q.Src.WithZone("")}, stateHost{addr: q.Dst.WithZone("")}
	switch q.Proto {
	case pfconf.ProtoTCP:
		src.port, dst.port = uint32(q.SrcPort), uint32(q.DstPort)
	case pfconf.ProtoUDP:
		src.port, dst.port = uint32(q.SrcPort), uint32(q.DstPort)
		return e.findUDP(dst, src)
	case pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		src.port, dst.port = uint32(q.ICMPID), uint32(q.ICMPID)
	}
	return e.find(q.Proto, filterUnset, dst, src)
}

// quotedInWindow reports whether the quoted segment's sequence number lies within its
// sender's window, so that an attacker can't make up an error without knowing it.
func (e *evaluation) quotedInWindow(s *state, seq uint32) bool {
	// The error comes from the receiver of the quoted segment, or from a router before it.
	dst, src := e.ends(s)
	shift := maxWinShift
	if src.wscale != 0 && dst.wscale&wscaleFlag != 0 {
		shift = int(dst.wscale & wscaleMask)
	}
	seq -= src.seqdiff
	return seqGEQ(src.seqhi, seq) && seqGEQ(seq, src.seqlo-uint32(dst.maxWin)<<shift)
}

// translateError translates an error and, in a copy, the packet that it quotes.
func (e *evaluation) translateError(k *stateKey) {
	q := *e.p.Quoted
	port, addr := &q.SrcPort, &q.Src
	h := k.lan
	if e.dir == pfconf.Out {
		port, addr, h = &q.DstPort, &q.Dst, k.gwy
		e.p.Src = h.addr
	} else {
		e.p.Dst = h.addr
	}
	*addr = h.addr
	switch q.Proto {
	case pfconf.ProtoTCP, pfconf.ProtoUDP:
		*port = uint16(h.port)
	case pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		q.ICMPID = uint16(h.port)
	}
	e.p.Quoted = &q
}

// scrub returns the first scrub rule that matches, nil if there is none or it begins with
// no. Ports are compared only with tcp: pf normalises the IP header first, of all packets,
// and TCP later.
func (e *evaluation) scrub(tcp bool) *crule {
	w := &e.m.walk
	w.begin(e.m, scrubList)
	for r := w.next(); r != nil; r = w.next() {
		switch {
		case !e.scrubMatches(r, tcp):
			w.skip()
		case r.call != nil:
			w.stepInto(r)
		case r.action == pfconf.NoScrub:
			return nil
		default:
			return r
		}
	}
	return nil
}

// scrubMatches reports whether a scrub rule matches.
func (e *evaluation) scrubMatches(r *crule, tcp bool) bool {
	scope := e.scopeMismatch(r)
	if scope == skipProto && !tcp && e.family == pfconf.Inet6 {
		// For IPv6 the kernel doesn't compare the protocol here, which may be behind
		// extension headers.
		scope = matched
	}
	return scope == matched && r.from.addr.matches(e.m, e.p.Src) && r.to.addr.matches(e.m, e.p.Dst) &&
		(!tcp || scrubPort(r.from.port, e.p.SrcPort) && scrubPort(r.to.port, e.p.DstPort)) && !r.noOS
}

// scrubPort reports whether a port matches in a scrub rule. pf_normalize_tcp passes the
// operator where pf_match_xport expects a protocol, so that the port is compared only if
// the operator's number is one that has ports there: >< and >.
func scrubPort(p cport, n uint16) bool {
	return p.any || p.op != pfconf.Inside && p.op != pfconf.Greater || p.matches(n)
}

// normalize is pf_normalize_ip and pf_normalize_ip6 as far as verdicts depend on them:
// fragments that match a scrub rule wait for others, and the last one continues as the
// whole datagram. It reports whether the packet continues; if not, it is dropped.
func (e *evaluation) normalize() bool {
	if len(e.m.main.lists[scrubList]) == 0 {
		return true
	}
	r := e.scrub(false)
	if r == nil {
		return true
	}
	r.count(e.p.size())
	if e.family == pfconf.Inet && r.noDF {
		e.p.DontFragment = false
	}
	if e.p.Fragment {
		switch {
		case e.family == pfconf.Inet && e.p.DontFragment:
			e.m.totals[countFragment]++
			return false
		case r.fragKeep:
			return true
		case e.p.FragmentLen == 0:
			return false
		}
		switch e.reassemble() {
		case reassemblyBad:
			e.m.totals[countFragment]++
			return false
		case reassemblyWaits:
			return false
		}
	}
	e.reassembled = !r.fragKeep
	return true
}

// normalizeTCP is pf_normalize_tcp. It reports whether the combination of flags is valid,
// and clears FIN of a segment with SYN.
func (e *evaluation) normalizeTCP() bool {
	if len(e.m.main.lists[scrubList]) == 0 {
		return true
	}
	r := e.scrub(true)
	if r == nil {
		return true
	}
	r.count(e.p.size())
	e.normTCP = r.normTCP
	f := e.p.Flags
	switch {
	case f&pfconf.FlagSYN != 0 && f&pfconf.FlagRST != 0, f&(pfconf.FlagSYN|pfconf.FlagACK|pfconf.FlagRST) == 0:
		e.m.totals[countNormalize]++
		return false
	case f&pfconf.FlagSYN != 0:
		f &^= pfconf.FlagFIN
	}
	if f&pfconf.FlagACK == 0 && f&(pfconf.FlagFIN|pfconf.FlagPSH|pfconf.FlagURG) != 0 {
		e.m.totals[countNormalize]++
		return false
	}
	e.p.Flags = f
	return true
}
