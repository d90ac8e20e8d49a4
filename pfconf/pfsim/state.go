package pfsim

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
)

// stateHost is one of the four ends of a state key. port is also an ICMP
// identifier or an ESP SPI.
type stateHost struct {
	addr netip.Addr
	port uint32
}

// stateKey is what a flow looks like on both sides of a translation, as the
// kernel's pf_state_key: lan and ext on the inside, gwy and ext on the outside.
// For a flow that comes in, the host is lan and the sender ext.
type stateKey struct {
	proto          pfconf.Proto
	filter         endpointFilter
	dir            pfconf.Direction
	lan, gwy       stateHost
	extLan, extGwy stateHost
	// states share the key: those bound to an interface, then the floating one.
	states []*state
}

// translated says whether the two sides differ.
func (k *stateKey) translated() bool { return k.lan != k.gwy }

// addrTranslated is the same for protocols without ports.
func (k *stateKey) addrTranslated() bool { return k.lan.addr != k.gwy.addr }

// endpointFilter is from where answers to a UDP flow may come (PF_EXTFILTER_,
// and PF_EXTMAP_ for which flows share an outside port): from the address and
// port that it goes to, from any port of the address, from anywhere (RFC 4787).
type endpointFilter uint8

const (
	filterUnset endpointFilter = iota
	addrPortDependent
	addrDependent
	endpointIndependent
)

// endpointFilters are the words of extfilter and extmap.
var endpointFilters = map[string]endpointFilter{
	"apd": addrPortDependent, "ad": addrDependent, "ei": endpointIndependent,
}

// lookupKey is by what a key is found on one of its sides: fields that its
// protocol doesn't compare are zero.
type lookupKey struct {
	addr, ext netip.Addr
	port, to  uint32
	proto     pfconf.Proto
	filter    endpointFilter
}

// insideKey is the order of the kernel's lan_ext tree.
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
		// For IPv6 the kernel compares the address even so.
		if filter == endpointIndependent && lan.addr.Is4() {
			k.ext = netip.Addr{}
		}
	case protoESP:
		k.to = ext.port
	}
	return k
}

// outsideKey is the order of the kernel's ext_gwy tree.
func outsideKey(proto pfconf.Proto, filter endpointFilter, gwy, ext stateHost) lookupKey {
	k := insideKey(proto, filter, gwy, ext)
	if proto == protoESP {
		k.port, k.to = gwy.port, 0
	}
	return k
}

// inside and outside are by what the key is found.
func (k *stateKey) inside() lookupKey  { return insideKey(k.proto, k.filter, k.lan, k.extLan) }
func (k *stateKey) outside() lookupKey { return outsideKey(k.proto, k.filter, k.gwy, k.extGwy) }

// peer is one end of a tracked connection, the kernel's pf_state_peer.
type peer struct {
	seqlo   uint32 // highest sequence number sent
	seqhi   uint32 // highest that the other side lets it send
	seqdiff uint32 // what modulation adds
	maxWin  uint16
	wscale  uint8 // with wscaleFlag
	state   uint8
}

// state is the kernel's pf_state.
type state struct {
	id       uint64
	key      *stateKey // nil: unlinked
	kif      *kif      // nil: floating
	src, dst peer

	rule, nat, anchor *crule // nat and anchor: nil without
	timeout           timeoutKind
	last              int64 // second of the last packet that counted
	created           int64
	tag               int
	allowOpts         bool
	source            *sourceNode // nil: not counted
	established       bool        // counted as a connection of its source

	prev, next *state // of stateTable.first
}

// stateTable holds the states, findable from both sides.
type stateTable struct {
	inside, outside map[lookupKey]*stateKey
	first, last     *state // in the order of their making
	n               int
	looseUDP        int // keys with more than addrPortDependent
	nextID          uint64
	bindings        map[binding]*boundPort
}

// binding is what macOS gives one outside port: the TCP connections of one
// inside port through one rule, whatever their destinations, and with extmap
// the UDP flows.
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

type boundPort struct {
	port   uint32
	states int
}

func (t *stateTable) init() {
	t.inside = map[lookupKey]*stateKey{}
	t.outside = map[lookupKey]*stateKey{}
	t.bindings = map[binding]*boundPort{}
}

// find returns the state that a packet with this key has on the interface, in
// this direction.
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

// insert adds s with the key sk. If another state has the same inside, s joins
// its key, however it is translated itself; false when that collides.
func (t *stateTable) insert(s *state, sk *stateKey) bool {
	in := sk.inside()
	// This is the kernel's way, and it shows: states of one flow on two
	// interfaces share the translation of the first.
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

// append puts s at the end of the list.
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

// bind notes which outside port s uses.
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

// unlink takes s out of the table.
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

// dropKey forgets a key, if it is what is found under its looks.
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

// removeState ends a state, and with it what it kept alive of a rule that is no
// longer loaded.
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

// purge removes the states whose time is up. A running kernel looks at a part of
// them each second, so there one may live some seconds longer.
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

// A State is what pf knows of one flow.
type State struct {
	ID uint64
	// Proto is the protocol; ICMPv6 is filed under ICMP.
	Proto pfconf.Proto
	// Direction is that of the packet that made the state.
	Direction pfconf.Direction
	// Interface is the only one on which the state holds; "": all of them.
	Interface string
	// Lan and Gateway are the near end inside and outside of a translation, the
	// same without one; for an incoming flow the near end is its destination.
	// ICMP has its identifier as port.
	Lan, Gateway netip.AddrPort
	// Ext is the far end as the inside sees it, ExtGateway as the outside does.
	Ext, ExtGateway netip.AddrPort
	// Opener and Answerer are how far the two ends are, as pfctl words it:
	// ESTABLISHED and the like for TCP, NO_TRAFFIC, SINGLE or MULTIPLE, for ICMP
	// numbers.
	Opener, Answerer string
	// Rule made the state; nil: the default rule. Loaded: it still is.
	Rule   *pfconf.Rule
	Anchor string
	Loaded bool
	// Translation is the nat, binat or rdr rule, nil without.
	Translation *pfconf.Rule
	// Age is the time since the first packet and Expires how long the state
	// lives without another one, both in whole seconds.
	Age, Expires time.Duration
}

// String returns the state as a line of pfctl -s states.
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

// hostText writes an end of a state as pfctl does: 192.0.2.1:80, 2001:db8::1[80].
func hostText(a netip.AddrPort) string {
	switch {
	case a.Port() == 0:
		return a.Addr().String()
	case a.Addr().Is4():
		return a.String()
	}
	return fmt.Sprintf("%s[%d]", a.Addr(), a.Port())
}

var (
	tcpPhases = [...]string{
		"CLOSED", "LISTEN", "SYN_SENT", "SYN_RCVD", "ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT_1", "CLOSING",
		"LAST_ACK", "FIN_WAIT_2", "TIME_WAIT",
	}
	otherPhases = [...]string{"NO_TRAFFIC", "SINGLE", "MULTIPLE"}
)

// phase is pfctl's word for one end of a state.
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

// StateCount returns how many states there are.
func (m *PF) StateCount() int { return m.states.n }

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

// KillStates removes the states from src to dst, as pfctl -k src -k dst does,
// and returns how many. The source of a state is its opener, by the inner
// address when it is translated. dst without a value means any.
//
// pfctl itself prints the number modulo 256, because the kernel returns it in
// one byte.
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

// FlushStates removes all states, as pfctl -F states does, and returns how many.
func (m *Machine) FlushStates() int {
	n := m.states.n
	for m.states.first != nil {
		m.removeState(m.states.first)
	}
	return n
}

func contains(p netip.Prefix, a netip.Addr) bool { return p.IsValid() && p.Contains(a) }
