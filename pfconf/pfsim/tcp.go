package pfsim

import "github.com/meshhelper/meshhelper/pfconf"

// The states of one end of a TCP connection, TCPS_* of xnu bsd/netinet/tcp_fsm.h. pf uses
// only these: an end that has sent a FIN is in tcpsClosing, and in tcpsFinWait2 once that
// is acknowledged; after a reset both are in tcpsTimeWait.
const (
	tcpsClosed      = 0
	tcpsSynSent     = 2
	tcpsEstablished = 4
	tcpsClosing     = 7
	tcpsFinWait2    = 9
	tcpsTimeWait    = 10
)

const (
	// peer.wscale is a shift, wscaleMask, and wscaleFlag if the end offered one in its SYN
	// (PF_WSCALE_MASK and PF_WSCALE_FLAG of xnu bsd/net/pfvar.h).
	wscaleFlag = 0x80
	wscaleMask = 0x0f
	// maxWinShift is the largest shift (TCP_MAX_WINSHIFT, RFC 7323).
	maxWinShift = 14
	// maxAckWindow is how far an acknowledgement may be off, and the sequence number of a
	// loose match: the largest unscaled window and a packet (MAXACKWINDOW in pf.c).
	maxAckWindow = 0xffff + 1500
)

// seqGEQ reports whether sequence number a is at or behind b. Sequence numbers wrap
// around, so their distance is compared.
func seqGEQ(a, b uint32) bool { return int32(a-b) >= 0 }

// seqGT reports whether sequence number a is behind b.
func seqGT(a, b uint32) bool { return int32(a-b) > 0 }

// scaleOption returns the window scale that a SYN offers, with wscaleFlag; 0 without.
func (p *Packet) scaleOption() uint8 {
	if !p.HasScale {
		return 0
	}
	return min(p.Scale, maxWinShift) | wscaleFlag
}

// end returns the sequence number behind the segment. SYN and FIN count one each.
func (p *Packet) end() uint32 {
	end := p.Seq + p.Len
	if p.Flags&pfconf.FlagSYN != 0 {
		end++
	}
	if p.Flags&pfconf.FlagFIN != 0 {
		end++
	}
	return end
}

// firstPeers sets a new state's ends and timeout by its first packet.
func (e *evaluation) firstPeers(s *state) {
	s.src.state = peerSingle
	switch e.p.Proto {
	case pfconf.ProtoTCP:
		e.firstTCP(s)
	case pfconf.ProtoUDP:
		s.timeout = udpFirst
	case pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		s.src.state = peerSilent
		s.timeout = icmpFirst
	case protoGRE:
		// The kernel uses the timeouts of PPTP's GRE for all GRE.
		s.timeout = greInitiating
	case protoESP:
		s.timeout = espFirst
	default:
		s.timeout = otherFirst
	}
}

// firstTCP is firstPeers for TCP.
func (e *evaluation) firstTCP(s *state) {
	p := &e.p
	s.src = peer{
		seqlo: p.Seq, seqhi: p.end() + 1, state: tcpsSynSent,
		maxWin: max(p.Window, 1),
	}
	if p.Flags&pfconf.FlagSYN != 0 {
		s.src.wscale = p.scaleOption()
	}
	if shift := s.src.wscale & wscaleMask; shift != 0 {
		s.src.maxWin = unscale(s.src.maxWin, shift)
	}
	if p.Flags&(pfconf.FlagSYN|pfconf.FlagACK) == pfconf.FlagSYN && e.rule.keep == pfconf.ModulateState {
		s.src.seqdiff = max(e.m.rand.Uint32(), 1)
		p.Seq += s.src.seqdiff
	}
	s.dst = peer{seqhi: 1, maxWin: 1, state: tcpsClosed}
	s.timeout = tcpFirst
}

// unscale divides the window of a SYN by the scale, rounding up. That window isn't scaled,
// while peer.maxWin is.
func unscale(win uint16, shift uint8) uint16 {
	return uint16((int(win) + 1<<shift - 1) >> shift)
}

// segment has the numbers of a TCP segment that tracking compares.
type segment struct {
	src, dst *peer  // sender and receiver
	seq, end uint32 // first sequence number, and the one behind the last
	ack      uint32
	win      uint32
	sws, dws uint8 // shifts of src's and dst's windows
}

// testTCP is pf_test_state_tcp: the sequence tracking of Guido van Rooij's
// "Real Stateful TCP Packet Filtering in IP Filter".
func (e *evaluation) testTCP() bool {
	s := e.findPorts(pfconf.ProtoTCP, e.sport, e.dport)
	if s == nil {
		return false
	}
	src, dst := e.ends(s)
	if e.p.Flags&(pfconf.FlagSYN|pfconf.FlagACK) == pfconf.FlagSYN && dst.state >= tcpsFinWait2 && src.state >= tcpsFinWait2 {
		// A new connection with the ports of one that has ended: the rules judge it.
		e.m.removeState(s)
		return false
	}
	e.state = s
	orig := e.p.Seq
	g := e.measure(src, dst)
	skew := int32(dst.seqlo - g.ack)
	switch {
	case e.inWindow(g, skew, orig):
		e.advance(s, g)
		if e.verdict != VerdictPass {
			return false
		}
	case e.looseMatch(g):
		e.advanceLoosely(g)
	default:
		e.refuse(g)
		return false
	}
	if s.key.translated() {
		e.translate(s.key)
	}
	return true
}

// measure returns the numbers that the checks compare, and modulates the packet's. From an
// end's first segment it learns that end's numbers.
func (e *evaluation) measure(src, dst *peer) segment {
	p := &e.p
	g := segment{src: src, dst: dst, seq: p.Seq, win: uint32(p.Window)}
	// The window of a SYN is never scaled (RFC 7323).
	if p.Flags&pfconf.FlagSYN == 0 {
		g.sws, g.dws = shiftOf(src), shiftOf(dst)
	}
	if src.seqlo == 0 {
		e.firstOfEnd(&g)
	} else {
		g.ack = p.Ack - dst.seqdiff
		if src.seqdiff != 0 {
			p.Seq += src.seqdiff
			p.Ack = g.ack
		}
		g.end = g.seq + p.end() - p.Seq
	}
	// A segment without an acknowledgement, or with one about which nothing is known,
	// passes the check of it.
	if p.Flags&pfconf.FlagACK == 0 ||
		g.ack == 0 && p.Flags&(pfconf.FlagACK|pfconf.FlagRST) == pfconf.FlagACK|pfconf.FlagRST ||
		dst.state < tcpsSynSent {
		g.ack = dst.seqlo
	}
	// A segment without data passes the check of its number. So does a reset with any
	// number, unless scrub reassembles; see inWindow.
	if g.seq == g.end {
		g.seq, g.end = src.seqlo, src.seqlo
	}
	return g
}

// shiftOf returns the shift of an end's windows. If the handshake wasn't seen, or no end
// offered to scale, the kernel assumes the largest shift.
func shiftOf(p *peer) uint8 {
	if p.wscale&wscaleFlag != 0 {
		return p.wscale & wscaleMask
	}
	return maxWinShift
}

// firstOfEnd sets an end's numbers by its first segment.
func (e *evaluation) firstOfEnd(g *segment) {
	p, src, dst := &e.p, g.src, g.dst
	g.ack = p.Ack
	length := p.end() - p.Seq
	if dst.seqdiff != 0 && src.seqdiff == 0 {
		src.seqdiff = max(e.m.rand.Uint32(), 1)
		g.ack = p.Ack - dst.seqdiff
		p.Seq += src.seqdiff
		p.Ack = g.ack
	}
	g.end = g.seq + length
	if p.Flags&pfconf.FlagSYN != 0 && dst.wscale&wscaleFlag != 0 {
		e.negotiateScale(g)
	}
	src.seqlo = g.seq
	src.state = max(src.state, tcpsSynSent)
	// If the connection was picked up in the middle, the other end's window isn't known.
	if hi := g.end + max(1, uint32(dst.maxWin)<<g.dws); src.seqhi == 1 || seqGEQ(hi, src.seqhi) {
		src.seqhi = hi
	}
	src.maxWin = max(src.maxWin, uint16(g.win))
}

// negotiateScale handles the answer to a SYN that offered window scaling: it accepts it,
// or else neither end scales.
func (e *evaluation) negotiateScale(g *segment) {
	src, dst := g.src, g.dst
	src.wscale = e.p.scaleOption()
	if src.wscale&wscaleFlag == 0 {
		dst.maxWin = uint16(min(0xffff, uint32(dst.maxWin)<<(dst.wscale&wscaleMask)))
		dst.wscale = 0
		return
	}
	g.sws, g.dws = src.wscale&wscaleMask, dst.wscale&wscaleMask
	g.win = (g.win + 1<<g.sws - 1) >> g.sws
}

// inWindow reports whether a segment lies within the window that its receiver allows, and
// its acknowledgement within what was sent. If scrub reassembles fragments, a reset must
// have the expected number or one next to it. skew is how far the acknowledgement is
// behind, and orig the sequence number in the packet.
func (e *evaluation) inWindow(g segment, skew int32, orig uint32) bool {
	return seqGEQ(g.src.seqhi, g.end) &&
		seqGEQ(g.seq, g.src.seqlo-uint32(g.dst.maxWin)<<g.dws) &&
		skew >= -maxAckWindow && int64(skew) <= int64(maxAckWindow)<<g.sws &&
		(e.p.Flags&pfconf.FlagRST == 0 || orig == g.src.seqlo || orig == g.src.seqlo+1 || orig+1 == g.src.seqlo || !e.reassembled)
}

// slide advances the windows of both ends: what the sender has sent, and what it lets the
// receiver send.
func (g segment) slide() {
	g.src.maxWin = max(g.src.maxWin, uint16(g.win))
	if seqGT(g.end, g.src.seqlo) {
		g.src.seqlo = g.end
	}
	if hi := g.ack + g.win<<g.sws; seqGEQ(hi, g.dst.seqhi) {
		g.dst.seqhi = g.ack + max(g.win<<g.sws, 1)
	}
}

// advance updates a connection by a segment in the window, and restarts its timeout.
func (e *evaluation) advance(s *state, g segment) {
	g.slide()
	src, dst, f := g.src, g.dst, e.p.Flags
	if f&pfconf.FlagSYN != 0 {
		src.state = max(src.state, tcpsSynSent)
	}
	if f&pfconf.FlagFIN != 0 {
		src.state = max(src.state, tcpsClosing)
	}
	if f&pfconf.FlagACK != 0 {
		switch dst.state {
		case tcpsSynSent:
			dst.state = tcpsEstablished
			if src.state == tcpsEstablished && s.source != nil && e.connected(s) {
				e.m.totals[countSourceLimit]++
				e.drop(DecidedByProtocol)
				return
			}
		case tcpsClosing:
			dst.state = tcpsFinWait2
		}
	}
	if f&pfconf.FlagRST != 0 {
		src.state, dst.state = tcpsTimeWait, tcpsTimeWait
	}
	e.touch(s, tcpTimeout(src.state, dst.state))
}

// tcpTimeout returns the timeout of a connection whose ends are in these states.
func tcpTimeout(a, b uint8) timeoutKind {
	low, high := min(a, b), max(a, b)
	switch {
	case low >= tcpsFinWait2:
		return tcpClosed
	case low >= tcpsClosing:
		return tcpFinWait
	case low < tcpsEstablished:
		return tcpOpening
	case high >= tcpsClosing:
		return tcpClosing
	}
	return tcpEstablished
}

// looseMatch reports whether a segment is close enough to the window to pass while one end
// of the connection hasn't been seen yet, or has closed. Such segments don't restart the
// timeout.
func (e *evaluation) looseMatch(g segment) bool {
	return (g.dst.state < tcpsSynSent || g.dst.state >= tcpsFinWait2 || g.src.state >= tcpsFinWait2) &&
		seqGEQ(g.src.seqhi+maxAckWindow, g.end) &&
		seqGEQ(g.seq, g.src.seqlo-maxAckWindow)
}

// advanceLoosely updates a connection by a loosely matching segment.
func (e *evaluation) advanceLoosely(g segment) {
	g.slide()
	if e.p.Flags&pfconf.FlagFIN != 0 {
		g.src.state = max(g.src.state, tcpsClosing)
	}
	if e.p.Flags&pfconf.FlagRST != 0 {
		g.src.state, g.dst.state = tcpsTimeWait, tcpsTimeWait
	}
}

// refuse drops a segment outside the window. During the handshake the kernel answers it
// with a reset and forgets the sender's numbers.
func (e *evaluation) refuse(g segment) {
	e.m.totals[countMismatch]++
	e.drop(DecidedByProtocol)
	if g.dst.state == tcpsSynSent && g.src.state == tcpsSynSent {
		if e.p.Flags&pfconf.FlagRST == 0 {
			e.verdict = VerdictReset
		}
		g.src.seqlo, g.src.seqhi, g.src.maxWin = 0, 1, 1
	}
}
