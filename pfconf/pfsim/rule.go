package pfsim

import (
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/pfconf"
)

// ruleList is one of the kernel's five lists of rules of an anchor, PF_RULESET_*.
type ruleList uint8

const (
	scrubList ruleList = iota
	natList
	binatList
	rdrList
	filterList
	ruleLists
)

// translates reports whether the list is one of translation rules, in which the first
// match ends the search.
func (l ruleList) translates() bool { return l == natList || l == binatList || l == rdrList }

// crule is a rule compiled for matching, with its counters, the kernel's pf_rule.
type crule struct {
	rule   *pfconf.Rule // nil: the default rule
	anchor string       // path of the anchor that has it
	loaded bool         // in force; otherwise it exists for its states only
	// states counts the states of which this is the rule, the translation or the anchor.
	states int

	evaluations, packets, bytes uint64 // see RuleCounters
	// skips are the numbers of rules to advance if one of these criteria isn't met.
	skips [skipFields]int32

	action pfconf.Action
	// call is the anchor that an anchor rule calls. With wildcard it calls the anchor's
	// children instead.
	call     *anchorNode
	wildcard bool
	quick    bool

	// Criteria that a packet must meet. A zero value is met by every packet.

	kif    *kif
	ifNot  bool // any interface but kif
	dir    pfconf.Direction
	family pfconf.Family
	proto  pfconf.Proto
	from   cendpoint
	to     cendpoint
	noOS   bool // never matches: requires an operating system, which isn't modelled
	noUser bool // never matches: requires the owner of a socket, which no packet has

	icmpType, icmpCode int // one more than the number; 0: any
	flags, flagMask    pfconf.TCPFlags
	tos                uint8 // one of these bits
	fragment           bool
	allowOpts          bool
	prob               float64
	tag, tagged        int // numbers, see Machine.tag: to set, to require
	notTagged          bool

	// Effects of a filter rule. block return sets returnReset and returnICMP: TCP gets a
	// reset, and the rest an unreachable, as do TCP resets, which can't be reset.

	block       bool
	returnReset bool
	returnICMP  bool

	// keep is StateDefault for a rule that makes no state. bound ties states to the
	// interface, max limits their number (0: no limit), and timeouts are in seconds, 0
	// being that of the machine.
	keep     pfconf.StateKind
	bound    bool
	max      uint32
	timeouts [timeoutMax]uint32

	// log matters for the answer to translated packets, see evaluation.answer.
	log bool

	// track says how the rule counts sources, and sources is the number of nodes that it
	// has. overload is the table for sources that exceed a limit; nil: none.
	track    pfconf.SourceTrack
	sources  int
	overload *ktable

	// Effects of translation and scrub rules.

	natPass  bool // the packet skips the filter
	pool     cpool
	normTCP  bool // scrub reassemble tcp
	noDF     bool
	fragKeep bool // scrub fragment crop or drop-ovl: fragments pass as they are
}

// cendpoint is one side of a packet as a rule requires it.
type cendpoint struct {
	addr caddr
	port cport
}

// caddr is a compiled address, the kernel's pf_addr_wrap.
type caddr struct {
	kind   pfconf.AddressKind
	not    bool
	prefix netip.Prefix
	last   netip.Addr
	table  *ktable
	dyn    *dynAddr
}

// cport is a compiled comparison of ports. With any it matches every port.
type cport struct {
	any    bool
	op     pfconf.CompareOp
	lo, hi uint16
}

// matches reports whether port n matches (pf_match).
func (p cport) matches(n uint16) bool {
	if p.any {
		return true
	}
	switch p.op {
	case pfconf.Equal:
		return n == p.lo
	case pfconf.NotEqual:
		return n != p.lo
	case pfconf.Less:
		return n < p.lo
	case pfconf.LessEqual:
		return n <= p.lo
	case pfconf.Greater:
		return n > p.lo
	case pfconf.GreaterEqual:
		return n >= p.lo
	case pfconf.Range:
		return n >= p.lo && n <= p.hi
	case pfconf.Inside:
		return n > p.lo && n < p.hi
	case pfconf.Outside:
		return n < p.lo || n > p.hi
	}
	return false
}

// matches reports whether a matches the address, with its negation (PF_MISMATCHAW).
func (c *caddr) matches(m *Machine, a netip.Addr) bool {
	return c.contains(m, a) != c.not
}

// contains is matches without the negation.
func (c *caddr) contains(m *Machine, a netip.Addr) bool {
	switch c.kind {
	case pfconf.AddrAny:
		return true
	case pfconf.AddrPrefix:
		// A network of length 0 matches both families: the rule's own has been compared
		// before.
		return c.prefix.Contains(a) || c.prefix.Bits() == 0
	case pfconf.AddrTable:
		return c.table.contains(a)
	case pfconf.AddrDynamic:
		return c.dyn.contains(m, a)
	case pfconf.AddrRange:
		return c.prefix.Addr().Compare(a) <= 0 && a.Compare(c.last) <= 0
	}
	// no-route and urpf-failed match nothing: macOS considers every address routable
	// (pf_routable returns 1).
	return false
}

// dynAddr is an interface in parentheses, the kernel's pfi_dynaddr. Its prefixes are
// computed again after addresses of the machine have changed, not for each packet.
type dynAddr struct {
	kif    *kif
	self   bool          // (self)
	family pfconf.Family // of the rule
	mod    pfconf.AddressModifier
	bits   int            // prefix length that was written; 0: none
	gen    int            // Machine.ifGen + 1 when v4 and v6 were computed
	v4, v6 []netip.Prefix // ascending
}

// contains reports whether a is in one of the prefixes.
func (d *dynAddr) contains(m *Machine, a netip.Addr) bool {
	for _, p := range d.prefixes(m, a.Is4()) {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// prefixes returns the interface's current prefixes of a family, ascending.
func (d *dynAddr) prefixes(m *Machine, v4 bool) []netip.Prefix {
	if d.gen != m.ifGen+1 {
		d.update(m)
	}
	if v4 {
		return d.v4
	}
	return d.v6
}

// update computes the prefixes (pfi_instance_add in pf_if.c). (self) has none: the kernel
// looks for an interface of that name.
func (d *dynAddr) update(m *Machine) {
	d.gen = m.ifGen + 1
	d.v4, d.v6 = nil, nil
	if d.self || !d.kif.exists {
		return
	}
	// The set removes duplicates and sorts; round-robin goes by that order.
	var set prefixSet
	var got4, got6 bool
	for _, p := range d.kif.addrs {
		a := p.Addr().WithZone("")
		got := &got6
		if a.Is4() {
			got = &got4
		}
		if d.skips(a) || d.mod&pfconf.ModNoAlias != 0 && *got {
			continue
		}
		*got = true
		if q, ok := d.entry(a, p.Bits()); ok {
			set.set(q, false)
		}
	}
	for _, e := range set.entries() {
		switch v4 := e.prefix.Addr().Is4(); {
		case v4 && d.family != pfconf.Inet6:
			d.v4 = append(d.v4, e.prefix)
		case !v4 && d.family != pfconf.Inet:
			d.v6 = append(d.v6, e.prefix)
		}
	}
}

// skips reports whether the kernel leaves the address out: because of the modifiers, or as
// an IPv6 link-local one.
func (d *dynAddr) skips(a netip.Addr) bool {
	on := pfconf.Interface{Name: d.kif.name}
	switch {
	case d.mod&pfconf.ModBroadcast != 0 && (a.Is6() || on.IsLoopback() || on.IsPointToPoint()):
		return true
	case d.mod&pfconf.ModPeer != 0:
		return true // pfconf.Interface has no remote addresses
	}
	return a.Is6() && a.IsLinkLocalUnicast()
}

// entry returns the prefix for an address with its network's length: the address itself,
// its network or its broadcast address, by the modifiers.
func (d *dynAddr) entry(a netip.Addr, length int) (netip.Prefix, bool) {
	if d.mod&pfconf.ModBroadcast != 0 {
		a = endOf(netip.PrefixFrom(a, length).Masked())
	}
	bits := a.BitLen()
	switch {
	case d.bits > 0:
		bits = min(d.bits, bits)
	case d.mod&pfconf.ModNetwork != 0:
		bits = length
	}
	p, err := a.Prefix(bits)
	return p, err == nil
}

// endOf returns the highest address of a prefix.
func endOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// compiler compiles the rules of one anchor.
type compiler struct {
	m      *Machine
	anchor string
}

// compile returns the compiled rule, which has references to its tables and its anchor. On
// an error it may return one with some of them, for the caller to release.
func (c compiler) compile(r *pfconf.Rule) (*crule, error) {
	out := &crule{
		rule: r, anchor: c.anchor, loaded: true,
		action: r.Action, quick: r.Quick, dir: r.Direction, family: r.Family,
		tos: deref(r.TOS), fragment: r.Fragment, allowOpts: r.AllowOpts, prob: r.Probability,
		tag: c.m.tag(r.Tag), tagged: c.m.tag(r.Tagged), notTagged: r.NotTagged,
		noOS:   len(r.OS) > 0,
		noUser: !noSocket(r.Users) || !noSocket(r.Groups),
	}
	if len(r.Interfaces) > 1 || len(r.Protos) > 1 || len(r.ICMP) > 1 {
		return nil, fmt.Errorf("compile rule: it isn't expanded")
	}
	for _, i := range r.Interfaces {
		out.kif, out.ifNot = c.m.kif(i.Name), i.Not
	}
	for _, p := range r.Protos {
		out.proto = p
	}
	for _, t := range r.ICMP {
		out.icmpType = int(t.Type) + 1
		if t.Code != nil {
			out.icmpCode = int(*t.Code) + 1
		}
	}
	if r.Flags != nil {
		out.flags, out.flagMask = r.Flags.Set, r.Flags.Mask
	}
	c.filterParts(out)
	c.normalizeParts(out)
	if err := c.endpoints(out); err != nil {
		return out, err
	}
	return out, c.target(out)
}

// noSocket reports whether a packet that belongs to no socket matches a rule's users or
// groups: it matches unknown, and differs from each that is named.
func noSocket(ids []pfconf.IDMatch) bool {
	for _, id := range ids {
		if id.Op != pfconf.Equal && id.Op != pfconf.NotEqual || id.Unknown != (id.Op == pfconf.Equal) {
			return false
		}
	}
	return true
}

// deref returns *p, or 0 for nil.
func deref(p *uint8) uint8 {
	if p == nil {
		return 0
	}
	return *p
}

// filterParts compiles the effects of a pass or block rule.
func (c compiler) filterParts(out *crule) {
	r := out.rule
	out.natPass = r.Pass
	out.block = r.Action == pfconf.Block
	if out.block {
		out.returnReset = r.Return.Kind == pfconf.ReturnAll || r.Return.Kind == pfconf.ReturnRST
		out.returnICMP = r.Return.Kind == pfconf.ReturnAll || r.Return.Kind == pfconf.ReturnICMP
	}
	switch {
	case r.State != pfconf.StateDefault:
		out.keep = r.State
	case r.Action == pfconf.Pass:
		out.keep = pfconf.KeepState
	}
	if out.keep == pfconf.NoState {
		out.keep = pfconf.StateDefault
	}
	// Expand has written set state-policy into each rule.
	out.bound = r.StateOptions.Policy == pfconf.IfBound
	out.max = r.StateOptions.Max
	setTimeouts(&out.timeouts, r.StateOptions.Timeouts)
	out.log = r.Log != nil
	out.track = r.StateOptions.SourceTrack
	if name := r.StateOptions.Overload; name != "" {
		out.overload = c.m.attachTable(tableName{c.anchor, name})
		c.m.setTableFlags(out.overload, out.overload.flags|tableActive)
	}
}

// normalizeParts compiles the effects of a scrub rule, as far as verdicts depend on them.
func (c compiler) normalizeParts(out *crule) {
	n := out.rule.Normalize
	out.normTCP, out.noDF = n.ReassembleTCP, n.NoDF
	out.fragKeep = n.Fragment == pfconf.FragmentCrop || n.Fragment == pfconf.FragmentDropOvl
}

// endpoints compiles both sides of a rule.
func (c compiler) endpoints(out *crule) error {
	for _, e := range []struct {
		to   *cendpoint
		from pfconf.Endpoint
	}{{&out.from, out.rule.From}, {&out.to, out.rule.To}} {
		if len(e.from.Addrs) > 1 || len(e.from.Ports) > 1 {
			return fmt.Errorf("compile rule: it isn't expanded")
		}
		e.to.port.any = true
		for _, p := range e.from.Ports {
			e.to.port = cport{op: p.Op, lo: p.Lo, hi: p.Hi}
		}
		for _, a := range e.from.Addrs {
			ca, err := c.address(a, out.family)
			if err != nil {
				return err
			}
			e.to.addr = ca
		}
	}
	return nil
}

// address compiles an address of a rule of family f.
func (c compiler) address(a pfconf.Address, f pfconf.Family) (caddr, error) {
	out := caddr{kind: a.Kind, not: a.Not, last: a.Last.WithZone("")}
	switch a.Kind {
	case pfconf.AddrPrefix:
		if !a.Prefix.IsValid() {
			return out, fmt.Errorf("compile address: invalid prefix")
		}
		out.prefix = netip.PrefixFrom(a.Prefix.Addr().WithZone(""), a.Prefix.Bits()).Masked()
	case pfconf.AddrRange:
		out.prefix = netip.PrefixFrom(a.Prefix.Addr().WithZone(""), a.Prefix.Addr().BitLen())
	case pfconf.AddrTable:
		out.table = c.m.attachTable(tableName{c.anchor, a.Name})
	case pfconf.AddrDynamic:
		out.dyn = &dynAddr{
			kif: c.m.kif(a.Name), self: a.Name == "self", family: f, mod: a.Mod, bits: int(deref(a.Bits)),
		}
	case pfconf.AddrInterface:
		return out, fmt.Errorf("compile address: interface %s isn't resolved", a.Name)
	}
	return out, nil
}

// target compiles the anchor that a rule calls, or its pool.
func (c compiler) target(out *crule) error {
	switch out.action {
	case pfconf.Anchor, pfconf.NatAnchor, pfconf.BinatAnchor, pfconf.RdrAnchor, pfconf.ScrubAnchor:
		return c.anchorCall(out)
	case pfconf.Nat, pfconf.Binat, pfconf.Rdr:
		return c.makePool(out)
	}
	return nil
}

// releaseRule releases a rule's references to tables and its anchor if it is neither
// loaded nor used by a state (pf_rm_rule).
func (m *Machine) releaseRule(r *crule) {
	if r.loaded || r.states > 0 || r.rule == nil {
		return
	}
	for _, a := range [...]*caddr{&r.from.addr, &r.to.addr} {
		m.releaseAddr(a)
	}
	if r.overload != nil {
		m.detachTable(r.overload)
		r.overload = nil
	}
	for i := range r.pool.addrs {
		m.releaseAddr(&r.pool.addrs[i])
	}
	if r.call != nil {
		r.call.calls--
		r.call.release()
	}
}

// releaseAddr releases an address's reference to a table.
func (m *Machine) releaseAddr(a *caddr) {
	if a.table != nil {
		m.detachTable(a.table)
		a.table = nil
	}
}
