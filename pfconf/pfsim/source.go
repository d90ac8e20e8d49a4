package pfsim

import (
	"net/netip"

	"github.com/meshhelper/meshhelper/pfconf"
)

// defaultSourceLimit is the default of set limit src-nodes (PFSNODE_HIWAT of xnu
// bsd/net/pfvar.h).
const defaultSourceLimit = 10000

// sourceKey identifies a source node. With source-track rule each rule has nodes of its
// own, with source-track global all such rules share them.
type sourceKey struct {
	rule *crule // nil: global
	addr netip.Addr
}

// sourceNode has the counts of one source, the kernel's pf_src_node. It exists until the
// timeout src.track after its last state ended.
type sourceNode struct {
	key    sourceKey
	states int
	conn   int // states whose TCP handshake is complete
	rate   threshold
	// idle is set after the last state ended, and expire is then the second at which the
	// node is removed.
	idle   bool
	expire int64
}

// threshold measures a rate, the kernel's pf_threshold. An event adds thresholdUnit to
// count, which decays linearly to 0 over some seconds without events.
type threshold struct {
	limit   uint32 // events times thresholdUnit
	seconds uint32
	count   uint32
	last    int64 // second of the last event
}

// thresholdUnit is PF_THRESHOLD_MULT: counting in thousandths keeps precision in the
// kernel's integers.
const thresholdUnit = 1000

// add counts an event (pf_add_threshold).
func (t *threshold) add(now int64) {
	if diff := uint32(now - t.last); diff >= t.seconds {
		t.count = 0
	} else {
		t.count -= t.count * diff / t.seconds
	}
	t.count += thresholdUnit
	t.last = now
}

// exceeded reports whether the rate is above the limit (pf_check_threshold).
func (t *threshold) exceeded() bool { return t.count > t.limit }

// tracksSources reports whether the rule counts its states by source.
func (r *crule) tracksSources() bool { return r.track != pfconf.NoSourceTrack }

// sourceOf returns the node of a rule for an address, a new one if there is none, and nil
// if a limit of the rule or of the machine is reached (pf_insert_src_node).
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

// giveBack removes a node that was made for a state that then couldn't be made. As in the
// kernel, the rule's own count of sources stays as it is.
func (m *Machine) giveBack(n *sourceNode) {
	if n != nil && n.states == 0 && !n.idle {
		delete(m.sources, n.key)
	}
}

// leaveSource removes a state from the counts of its source (pf_src_tree_remove_state).
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

// purgeSources removes expired nodes. The kernel does so every timeout interval, 10 seconds
// (pf_purge_expired_src_nodes); here it happens in the second in which they expire.
func (m *Machine) purgeSources() {
	for key, n := range m.sources {
		if n.states == 0 && n.expire <= m.seconds() {
			m.dropSource(key)
		}
	}
}

// dropSource removes a node.
func (m *Machine) dropSource(key sourceKey) {
	if key.rule != nil {
		key.rule.sources--
	}
	delete(m.sources, key)
}

// clearSources removes all nodes, as pfctl -F Sources does. Existing states are no longer
// counted.
func (m *Machine) clearSources() {
	for s := m.states.first; s != nil; s = s.next {
		s.source = nil
	}
	for key := range m.sources {
		m.dropSource(key)
	}
}

// SourceCount returns the number of source nodes, those of rules and global ones.
func (m *PF) SourceCount() int { return len(m.sources) }

// connected counts a complete handshake for the state's source and reports whether it
// exceeds a limit (pf_src_connlimit). If so, the state ends, the source enters the table
// of overload, and with flush its other states end. The kernel drops packets of such
// states until it purges them, within a second; here they are removed at once.
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

// insert adds an address to the table in effect, as the kernel does for overload
// (pfr_insert_kentry). It silently does nothing if the table is full.
func (t *ktable) insert(a netip.Addr) {
	if t.flags&tableActive == 0 && t.root != nil {
		t = t.root
	}
	p := netip.PrefixFrom(a, a.BitLen())
	if _, ok := t.set.get(p); !ok && !a.IsUnspecified() && t.set.n < maxEntries {
		t.set.set(p, false)
	}
}

// endOthers ends the states of a rule's source: those of the rule, or with flush global
// all. As in the kernel, the direction of the state that exceeded the limit decides which
// end of the other states is compared with the source.
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
