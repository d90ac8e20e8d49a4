package pfsim

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
)

// stateHost is one of the four ends of a state key, the kernel's pf_state_host. port may
// also be an ICMP identifier or an ESP SPI.
type stateHost struct {
	addr netip.Addr
	port uint32
}

// stateKey has the ends of a flow on both sides of a translation, the kernel's
// pf_state_key: lan and extLan on the inside, gwy and extGwy on the outside. For an
// inbound flow, lan and gwy are its destination and the others its source.
type stateKey struct {
	proto          pfconf.Proto
	filter         endpointFilter
	dir            pfconf.Direction // of the packet that made it
	lan, gwy       stateHost
	extLan, extGwy stateHost
	// states share the key: those bound to an interface, then the floating one.
	states []*state
}

// translated reports whether the two sides differ.
func (k *stateKey) translated() bool { return k.lan != k.gwy }

// addrTranslated is translated for protocols without ports.
func (k *stateKey) addrTranslated() bool { return k.lan.addr != k.gwy.addr }

// endpointFilter says which hosts may answer into a UDP flow (PF_EXTFILTER_*), and for
// extmap which flows share an outside port (PF_EXTMAP_*), in the terms of RFC 4787.
type endpointFilter uint8

const (
	filterUnset         endpointFilter = iota
	addrPortDependent                  // apd: only the flow's destination, from the same port
	addrDependent                      // ad: the destination, from any port
	endpointIndependent                // ei: any host
)

// endpointFilters are the words of extfilter and extmap.
var endpointFilters = map[string]endpointFilter{
	"apd": addrPortDependent, "ad": addrDependent, "ei": endpointIndependent,
}

// lookupKey identifies a state key on one of its sides. Fields that the key's protocol
// doesn't compare are zero.
type lookupKey struct {
	addr, ext netip.Addr // near end, far end
	port, to  uint32     // their ports
	proto     pfconf.Proto
	filter    endpointFilter
}

// insideKey returns the lookup key for the inside. It has the fields that the kernel
// compares in its tree of inside keys (pf_state_compare_lan_ext).
func insideKey(proto pfconf.Proto, filter endpointFilter, lan, ext stateHost) lookupKey {
	k := lookupKey{addr: lan.addr, ext: ext.addr, proto: proto}
	switch proto {
	case pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		k.port = lan.port
	case pfconf.ProtoTCP:
		k.port, k.to = lan.port, ext.port
	case pfconf.ProtoUDP:
		k.port, k.filter = lan.port, filter
		if filter < addrDependent {
			k.to = ext.port
		}
		// For IPv6 the kernel compares the far address all the same.
		if filter == endpointIndependent && lan.addr.Is4() {
			k.ext = netip.Addr{}
		}
	case protoESP:
		k.to = ext.port
	}
	return k
}

// outsideKey returns the lookup key for the outside (pf_state_compare_ext_gwy).
func outsideKey(proto pfconf.Proto, filter endpointFilter, gwy, ext stateHost) lookupKey {
	k := insideKey(proto, filter, gwy, ext)
	if proto == protoESP {
		k.port, k.to = gwy.port, 0
	}
	return k
}

// inside returns the lookup key of the inside.
func (k *stateKey) inside() lookupKey { return insideKey(k.proto, k.filter, k.lan, k.extLan) }

// outside returns the lookup key of the outside.
func (k *stateKey) outside() lookupKey { return outsideKey(k.proto, k.filter, k.gwy, k.extGwy) }

// peer is one end of a tracked connection, the kernel's pf_state_peer.
type peer struct {
	seqlo   uint32 // highest sequence number sent
	seqhi   uint32 // highest that the other end lets it send
	seqdiff uint32 // that modulate state adds to sequence numbers
	maxWin  uint16 // largest window seen, shifted by wscale
	wscale  uint8  // shift of its windows, with wscaleFlag if it is known
	state   uint8  // tcps* or peer*
}

// state is a state of one flow, the kernel's pf_state.
type state struct {
	id       uint64
	key      *stateKey // nil: removed
	kif      *kif      // nil: floating
	src, dst peer      // of the packet that made it

	rule, nat, anchor *crule // nat and anchor may be nil
	timeout           timeoutKind
	last              int64 // second of the last packet that restarted the timeout
	created           int64 // second
	tag               int   // that the rules set, for later packets
	allowOpts         bool
	source            *sourceNode // nil: not counted
	established       bool        // counted in source.conn

	prev, next *state // in stateTable
}

// stateTable has all states. A lookup from either side of a translation is one of a map.
type stateTable struct {
	inside, outside map[lookupKey]*stateKey
	first, last     *state // list of all, the oldest first
	n               int    // states
	looseUDP        int    // keys whose filter is looser than addrPortDependent
	nextID          uint64
	bindings        map[binding]*boundPort
}

// binding identifies the flows to which macOS gives the same outside port: the TCP
// connections from one inside port through one rule, whatever their destinations, and
// with extmap the UDP flows.
type binding struct {
	rule  *crule
	proto pfconf.Proto
	lan   stateHost
	ext   netip.Addr // with extmap ad
}

// bindingOf returns the binding of a flow through r, if it has one.
func bindingOf(r *crule, proto pfconf.Proto, lan stateHost, ext netip.Addr) (binding, bool) {
	b := binding{rule: r, proto: proto, lan: lan}
	switch {
	case r == nil:
		return b, false
	case proto == pfconf.ProtoTCP:
		return b, true
	case proto != pfconf.ProtoUDP || r.pool.extMap <= addrPortDependent:
		return b, false
	case r.pool.extMap == addrDependent:
		b.ext = ext
	}
	return b, true
}

// boundPort is the outside port of a binding.
type boundPort struct {
	port   uint32
	states int // that use it
}

// init makes t an empty table.
func (t *stateTable) init() {
	t.inside = map[lookupKey]*stateKey{}
	t.outside = map[lookupKey]*stateKey{}
	t.bindings = map[binding]*boundPort{}
}

// find returns the state of a packet with this key, direction and interface, nil if there
// is none. Of states that share a key, one that is bound to the interface comes before
// the floating one.
func (t *stateTable) find(k lookupKey, dir pfconf.Direction, on *kif) *state {
	var sk *stateKey
	if dir == pfconf.Out {
		sk = t.inside[k]
	} else {
		sk = t.outside[k]
	}
	if sk == nil {
		return nil
	}
	for _, s := range sk.states {
		if s.kif == nil || s.kif == on {
			return s
		}
	}
	return nil
}

// insert adds s with the key sk and reports whether it could. If a state has a key with
// the same inside, s gets that key instead, unless there is such a state for the same
// interface already (pf_insert_state).
func (t *stateTable) insert(s *state, sk *stateKey) bool {
	in := sk.inside()
	// So, as in the kernel, states of one flow on two interfaces share the translation of
	// the first.
	if cur := t.inside[in]; cur != nil {
		for _, o := range cur.states {
			if o.kif == s.kif {
				return false
			}
		}
		sk = cur
	} else {
		out := sk.outside()
		if t.outside[out] != nil {
			return false
		}
		t.inside[in], t.outside[out] = sk, sk
		if sk.filter > addrPortDependent {
			t.looseUDP++
		}
	}
	s.key = sk
	if s.kif == nil {
		sk.states = append(sk.states, s)
	} else {
		sk.states = append([]*state{s}, sk.states...)
	}
	t.nextID++
	s.id = t.nextID
	t.append(s)
	t.bind(s)
	return true
}

// append appends s to the list.
func (t *stateTable) append(s *state) {
	s.prev = t.last
	if t.last != nil {
		t.last.next = s
	} else {
		t.first = s
	}
	t.last = s
	t.n++
}

// bind records the outside port of s for later flows of the same binding.
func (t *stateTable) bind(s *state) {
	b, ok := bindingOf(s.nat, s.key.proto, s.key.lan, s.key.extLan.addr)
	if !ok {
		return
	}
	p := t.bindings[b]
	if p == nil {
		p = &boundPort{port: s.key.gwy.port}
		t.bindings[b] = p
	}
	p.states++
}

// unlink removes s from the table, and its key if no other state has it.
func (t *stateTable) unlink(s *state) {
	sk := s.key
	if b, ok := bindingOf(s.nat, sk.proto, sk.lan, sk.extLan.addr); ok {
		if p := t.bindings[b]; p != nil {
			if p.states--; p.states == 0 {
				delete(t.bindings, b)
			}
		}
	}
	for i, o := range sk.states {
		if o == s {
			sk.states = append(sk.states[:i], sk.states[i+1:]...)
			break
		}
	}
	if len(sk.states) == 0 {
		t.dropKey(sk)
	}
	if s.prev != nil {
		s.prev.next = s.next
	} else {
		t.first = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	} else {
		t.last = s.prev
	}
	s.key = nil
	t.n--
}

// dropKey removes a key from the maps, unless they have another in its place: learnSPI
// can leave a key that is stored on one side only.
func (t *stateTable) dropKey(sk *stateKey) {
	if sk.filter > addrPortDependent {
		t.looseUDP--
	}
	if in := sk.inside(); t.inside[in] == sk {
		delete(t.inside, in)
	}
	if out := sk.outside(); t.outside[out] == sk {
		delete(t.outside, out)
	}
}

// removeState ends a state. Rules that are no longer loaded and have no other state are
// released with it.
func (m *Machine) removeState(s *state) {
	m.states.unlink(s)
	m.totals[countRemovals]++
	m.leaveSource(s)
	for _, r := range [...]*crule{s.rule, s.nat, s.anchor} {
		if r != nil {
			r.states--
			m.releaseRule(r)
		}
	}
}

// purge removes what has expired. The kernel checks a part of its states each second
// (pf_purge_expired_states), so there a state may exist some seconds longer.
func (m *Machine) purge() {
	now := m.seconds()
	for s := m.states.first; s != nil; {
		next := s.next
		if m.expires(s) <= now {
			m.removeState(s)
		}
		s = next
	}
	m.purgeSources()
	m.purgeFragments()
}

// A State describes a state of pf, for one flow in one direction.
type State struct {
	ID uint64 // unique in the machine, ascending
	// Proto is the protocol. States of ICMPv6 have ICMP, as in the kernel.
	Proto pfconf.Proto
	// Direction is that of the packet that made the state.
	Direction pfconf.Direction
	// Interface is the one to which the state is bound; "": none, it is floating.
	Interface string
	// Lan and Gateway are the near end inside and outside of a translation, equal without
	// one. The near end of an inbound flow is its destination. For ICMP the port is the
	// identifier.
	Lan, Gateway netip.AddrPort
	// Ext and ExtGateway are the far end as seen from inside and from outside.
	Ext, ExtGateway netip.AddrPort
	// Opener and Answerer are the progress of the two ends in pfctl's words: ESTABLISHED
	// and the like for TCP, numbers for ICMP, and NO_TRAFFIC, SINGLE or MULTIPLE for all
	// else.
	Opener, Answerer string
	// Rule is the rule that made the state; nil: the default rule. Loaded reports whether
	// it is still in force.
	Rule   *pfconf.Rule
	Anchor string // path of the anchor that has Rule
	Loaded bool
	// Translation is the nat, binat or rdr rule; nil: none.
	Translation *pfconf.Rule
	// Age is the time since the first packet, and Expires the time until the state ends
	// without a further packet. Both are whole seconds.
	Age, Expires time.Duration
}

// String returns the state as a line of pfctl -s states (print_state in
// pf_print_state.c).
func (s State) String() string {
	var b strings.Builder
	on := s.Interface
	if on == "" {
		on = "ALL"
	}
	arrow, first, second := " -> ", s.Opener, s.Answerer
	if s.Direction == pfconf.In {
		arrow, first, second = " <- ", s.Answerer, s.Opener
	}
	fmt.Fprintf(&b, "%s %s ", on, s.Proto)
	if s.Lan != s.Gateway {
		b.WriteString(hostText(s.Lan) + arrow)
	}
	fmt.Fprintf(&b, "%s%s%s       %s:%s", hostText(s.Gateway), arrow, hostText(s.ExtGateway), first, second)
	return b.String()
}

// hostText returns an end of a state as pfctl prints it: 192.0.2.1:80, 2001:db8::1[80].
func hostText(a netip.AddrPort) string {
	switch {
	case a.Port() == 0:
		return a.Addr().String()
	case a.Addr().Is4():
		return a.String()
	}
	return fmt.Sprintf("%s[%d]", a.Addr(), a.Port())
}

// pfctl's words for the progress of an end: TCP states by their numbers in xnu
// bsd/netinet/tcp_fsm.h, and peer* for other protocols.
var (
	tcpPhases = [...]string{
		"CLOSED", "LISTEN", "SYN_SENT", "SYN_RCVD", "ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT_1", "CLOSING",
		"LAST_ACK", "FIN_WAIT_2", "TIME_WAIT",
	}
	otherPhases = [...]string{"NO_TRAFFIC", "SINGLE", "MULTIPLE"}
)

// phase returns pfctl's word for the progress of one end of a state.
func phase(proto pfconf.Proto, state uint8) string {
	switch {
	case proto == pfconf.ProtoTCP && int(state) < len(tcpPhases):
		return tcpPhases[state]
	case proto != pfconf.ProtoTCP && proto != pfconf.ProtoICMP && int(state) < len(otherPhases):
		return otherPhases[state]
	}
	return strconv.Itoa(int(state))
}

// States returns all states, the oldest first.
func (m *PF) States() []State {
	out := make([]State, 0, m.states.n)
	for s := m.states.first; s != nil; s = s.next {
		out = append(out, m.describe(s))
	}
	return out
}

// StateCount returns the number of states.
func (m *PF) StateCount() int { return m.states.n }

// describe returns a state as callers see it.
func (m *Machine) describe(s *state) State {
	k := s.key
	out := State{
		ID: s.id, Proto: k.proto, Direction: k.dir,
		Lan: k.lan.addrPort(), Gateway: k.gwy.addrPort(),
		Ext: k.extLan.addrPort(), ExtGateway: k.extGwy.addrPort(),
		Opener: phase(k.proto, s.src.state), Answerer: phase(k.proto, s.dst.state),
		Rule: s.rule.rule, Anchor: s.rule.anchor, Loaded: s.rule.loaded,
		Age:     time.Duration(m.seconds()-s.created) * time.Second,
		Expires: time.Duration(m.expires(s)-m.seconds()) * time.Second,
	}
	if s.kif != nil {
		out.Interface = s.kif.name
	}
	if s.nat != nil {
		out.Translation = s.nat.rule
	}
	return out
}

func (h stateHost) addrPort() netip.AddrPort { return netip.AddrPortFrom(h.addr, uint16(h.port)) }

// KillStates removes the states from src to dst, as pfctl -k src -k dst does, and returns
// their number. The source of a state is the end that opened it, by its inner address if
// it is translated. The zero Prefix for dst means any.
//
// pfctl prints the number modulo 256, because the kernel returns it in one byte.
func (m *PF) KillStates(src, dst netip.Prefix) int {
	killed := 0
	for s := m.states.first; s != nil; {
		next := s.next
		from, to := s.key.extLan.addr, s.key.lan.addr
		if s.key.dir == pfconf.Out {
			from, to = to, from
		}
		if contains(src, from) && (!dst.IsValid() || contains(dst, to)) {
			m.removeState(s)
			killed++
		}
		s = next
	}
	return killed
}

// FlushStates removes all states, as pfctl -F states does, and returns their number.
func (m *Machine) FlushStates() int {
	n := m.states.n
	for m.states.first != nil {
		m.removeState(m.states.first)
	}
	return n
}

// contains reports whether p is valid and contains a.
func contains(p netip.Prefix, a netip.Addr) bool { return p.IsValid() && p.Contains(a) }
