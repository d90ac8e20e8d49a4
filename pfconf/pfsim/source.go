package pfsim

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/pfconf"
)

// defaultSourceLimit is how many sources pf tracks unless told otherwise
// (PFSNODE_HIWAT of bsd/net/pfvar.h).
const defaultSourceLimit = 10000

// sourceKey is by what a source is found: with source-track rule each rule counts
// for itself, with global all of them together.
type sourceKey struct {
	rule *crule // nil: global
	addr netip.Addr
}

// sourceNode counts for one source, the kernel's pf_src_node. It stays for the
// timeout src.track after its last state.
type sourceNode struct {
	key    sourceKey
	states int
	conn   int // finished handshakes among them
	rate   threshold
	// idle is set once there were states and are none, and expire is then the
	// second at which the node goes.
	idle   bool
	expire int64
}

// threshold is the kernel's measure of a rate (pf_threshold): events count a
// thousandfold and fade away over some seconds.
type threshold struct {
	limit, seconds, count uint32
	last                  int64
}

const thresholdUnit = 1000

func (t *threshold) add(now int64) {
	if diff := uint32(now - t.last); diff >= t.seconds {
		t.count = 0
	} else {
		t.count -= t.count * diff / t.seconds
	}
	t.count += thresholdUnit
	t.last = now
}

func (t *threshold) exceeded() bool { return t.count > t.limit }

// tracksSources says whether states of the rule are counted by source.
func (r *crule) tracksSources() bool { return r.track != pfconf.NoSourceTrack }

// sourceOf returns the node under which a rule counts an address, a new one if
// need be, and nil if a limit of the rule or of the machine is reached
// (pf_insert_src_node).
func (m *Machine) sourceOf(r *crule, a netip.Addr) *sourceNode {
	key := sourceKey{addr: a}
	if r.track == pfconf.SourceTrackRule {
		key.rule = r
	}
	if n := m.sources[key]; n != nil {
		if o := r.rule.StateOptions; o.MaxSrcStates > 0 && n.states >= int(o.MaxSrcStates) {
			return nil
		}
		return n
	}
	o := r.rule.StateOptions
	if o.MaxSrcNodes > 0 && r.sources >= int(o.MaxSrcNodes) || len(m.sources) > m.limits.sources {
		return nil
	}
	n := &sourceNode{key: key, rate: threshold{
		limit: o.MaxSrcConnRate.Count * thresholdUnit, seconds: o.MaxSrcConnRate.Seconds, last: m.seconds(),
	}}
	m.sources[key] = n
	if key.rule != nil {
		r.sources++
	}
	return n
}

// giveBack forgets a node that was made for a state which then couldn't be. The
// kernel leaves the rule's own count of sources as it is.
func (m *Machine) giveBack(n *sourceNode) {
	if n != nil && n.states == 0 && !n.idle {
		delete(m.sources, n.key)
	}
}

// leaveSource takes a state off its source's count. A running kernel looks for
// nodes without states every few seconds.
func (m *Machine) leaveSource(s *state) {
	n := s.source
	if n == nil {
		return
	}
	s.source = nil
	if s.established {
		n.conn--
	}
	if n.states--; n.states > 0 {
		return
	}
	t := s.rule.timeouts[srcTrack]
	if t == 0 {
		t = m.timeouts[srcTrack]
	}
	if t == 0 {
		m.dropSource(n.key)
		return
	}
	n.idle, n.expire = true, m.seconds()+int64(t)
}

// purgeSources forgets the sources that have had no states for long enough.
func (m *Machine) purgeSources() {
	for key, n := range m.sources {
		if n.states == 0 && n.expire <= m.seconds() {
			m.dropSource(key)
		}
	}
}

func (m *Machine) dropSource(key sourceKey) {
	if key.rule != nil {
		key.rule.sources--
	}
	delete(m.sources, key)
}

// clearSources is pfctl -F Sources: states go on uncounted.
func (m *Machine) clearSources() {
	for s := m.states.first; s != nil; s = s.next {
		s.source = nil
	}
	for key := range m.sources {
		m.dropSource(key)
	}
}

// SourceCount returns how many sources are tracked, by rules and globally.
func (m *PF) SourceCount() int { return len(m.sources) }

// connected counts a finished handshake for the state's source and reports
// whether that is one too many (pf_src_connlimit). If so, the state ends, the
// source comes into the table of overload, and its other states end with flush. A
// running kernel drops the packets of such states until it purges them, within a
// second; here they are gone at once.
func (e *evaluation) connected(s *state) (tooMany bool) {
	m, n, o := e.m, s.source, s.rule.rule.StateOptions
	n.conn++
	s.established = true
	n.rate.add(m.seconds())
	if !(o.MaxSrcConn > 0 && n.conn > int(o.MaxSrcConn)) && !(o.MaxSrcConnRate.Count > 0 && n.rate.exceeded()) {
		return false
	}
	rule, dir, flush := s.rule, s.key.dir, false
	if rule.overload != nil {
		rule.overload.insert(n.key.addr)
		flush = o.Flush != pfconf.NoFlush
	}
	m.removeState(s)
	if flush {
		m.endOthers(rule, dir, n.key.addr)
	}
	return true
}

// insert is how the kernel itself adds an address, to the table that is in
// effect.
func (t *ktable) insert(a netip.Addr) {
	if t.flags&tableActive == 0 && t.root != nil {
		t = t.root
	}
	p := netip.PrefixFrom(a, a.BitLen())
	if _, ok := t.set.get(p); !ok && !a.IsUnspecified() && t.set.n < maxEntries {
		t.set.set(p, false)
	}
}

// endOthers ends the states of a source of a rule: those of the rule, or all with
// flush global. On which side of a state the source is asked for depends on the
// direction of the one that went too far.
func (m *Machine) endOthers(rule *crule, dir pfconf.Direction, source netip.Addr) {
	for s := m.states.first; s != nil; {
		next := s.next
		near := s.key.extLan.addr
		if dir == pfconf.Out {
			near = s.key.lan.addr
		}
		if near == source && (rule.rule.StateOptions.Flush == pfconf.FlushGlobal || s.rule == rule) {
			m.removeState(s)
		}
		s = next
	}
}
