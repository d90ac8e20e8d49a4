package pfsim

import (
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/pfconf"
)

// cpool is the compiled pool of a translation rule, the kernel's pf_pool, with the position
// of round-robin in it.
type cpool struct {
	addrs  []caddr
	kind   pfconf.PoolKind // PoolDefault: addrs has one address
	family pfconf.Family   // of the rule
	// lo and hi are ports. For nat they are the range to choose from, both 0 to keep the
	// port; for rdr the first and the last, with hi 0 for lo alone.
	lo, hi uint16
	// extFilter and extMap apply to UDP through nat.
	extFilter, extMap endpointFilter

	cur     int        // index in addrs
	entry   int        // index in the table or interface at cur; -1: its beginning
	counter netip.Addr // the next address to use
	seed    uint64     // of source-hash
}

const (
	// natPortLo and natPortHi are the range from which nat chooses a port if the rule names
	// none (PF_NAT_PROXY_PORT_LOW and _HIGH in pfctl).
	natPortLo = 50001
	natPortHi = 65535
	// ikePort is UDP port 500, which nat never changes as a source: IKE implementations
	// used to require it (RFC 3715, section 2.1).
	ikePort = 500
	// ikeMinimum is the shortest UDP payload in bytes that the kernel takes for IKE if both
	// ports are 500: the length of an ISAKMP header (PF_IKE_PACKET_MINSIZE).
	ikeMinimum = 28
)

// makePool compiles the pool of a translation rule.
func (c compiler) makePool(out *crule) error {
	p := out.rule.Pool
	if p == nil || len(p.Addrs) == 0 {
		return fmt.Errorf("compile translation rule: no address to translate to")
	}
	out.pool = cpool{kind: p.Kind, family: out.family, seed: c.m.rand.Uint64()}
	out.pool.extFilter, out.pool.extMap = endpointFilters[p.ExtFilter], endpointFilters[p.ExtMap]
	for _, a := range p.Addrs {
		ca, err := c.address(a, out.family)
		if err != nil {
			return err
		}
		out.pool.addrs = append(out.pool.addrs, ca)
	}
	if p.Kind == pfconf.PoolDefault && severalAddresses(p.Addrs) {
		out.pool.kind = pfconf.RoundRobin
	}
	out.pool.lo, out.pool.hi = poolPorts(out)
	return nil
}

// severalAddresses reports whether a pool without a type is a round-robin one for pfctl: it
// has, or may come to have, several addresses.
func severalAddresses(as []pfconf.Address) bool {
	if len(as) > 1 {
		return true
	}
	a := as[0]
	if a.Kind == pfconf.AddrDynamic {
		n := len(a.Name)
		return a.Mod&pfconf.ModNoAlias == 0 || n == 0 || a.Name[n-1] < '0' || a.Name[n-1] > '9'
	}
	return a.Kind == pfconf.AddrTable
}

// poolPorts returns the ports of a compiled pool, see cpool.
func poolPorts(out *crule) (lo, hi uint16) {
	p := out.rule.Pool
	lo, hi = p.PortLo, p.PortHi
	switch out.action {
	case pfconf.Nat:
		switch {
		case p.StaticPort:
			return 0, 0
		case lo == 0 && hi == 0:
			return natPortLo, natPortHi
		case hi == 0:
			return lo, lo
		}
	case pfconf.Rdr:
		if p.PortStar {
			if q := out.to.port; !q.any {
				return lo, lo + max(q.hi, q.lo) - q.lo
			}
			return lo, lo
		}
	}
	return lo, hi
}

// translation is the result of a translation rule for a packet.
type translation struct {
	rule     *crule
	src, dst netip.Addr
	port     uint32 // the new source port outbound, the new destination port inbound
}

// findTranslation looks for a matching translation rule and computes its result
// (pf_get_translation_aux). It reports whether the packet is to be translated: not if no
// rule matches, and not if the rule has no address or port left, since the packet then
// leaves untranslated.
func (e *evaluation) findTranslation() (t translation, ok bool) {
	// The kernel searches the lists in this order, whatever their order in the text.
	order := [...]ruleList{rdrList, binatList}
	lists := order[:]
	if e.dir == pfconf.Out {
		out := [...]ruleList{binatList, rdrList, natList}
		lists = out[:]
	}
	for _, l := range lists {
		if t.rule = e.matchTranslation(l); t.rule != nil {
			break
		}
	}
	if t.rule == nil {
		return t, false
	}
	t.src, t.dst = e.p.Src, e.p.Dst
	if t.port = e.dport; e.dir == pfconf.Out {
		t.port = e.sport
	}
	switch t.rule.action {
	case pfconf.Nat:
		ok = e.nat(&t)
	case pfconf.Binat:
		ok = e.binat(&t)
	case pfconf.Rdr:
		ok = e.rdr(&t)
	}
	return t, ok
}

// matchTranslation returns the first rule of a list that matches (pf_match_translation),
// nil if there is none or it begins with no. Tags of matching anchor calls stay on the
// packet.
func (e *evaluation) matchTranslation(l ruleList) *crule {
	w := &e.m.walk
	w.begin(e.m, l)
	tag := noTag
	var found *crule
	for r := w.next(); r != nil; r = w.next() {
		if by := e.translationMismatch(r, tag); by != matched {
			w.miss(r, by)
			continue
		}
		if r.tag != 0 {
			tag = r.tag
		}
		if r.call == nil {
			found = r
			break
		}
		w.stepInto(r)
	}
	if tag != noTag {
		e.tag = tag
	}
	if found != nil && (found.action == pfconf.NoNat || found.action == pfconf.NoBinat || found.action == pfconf.NoRdr) {
		return nil
	}
	return found
}

// translationMismatch returns the first criterion of a translation rule, or of the call of
// an anchor, that the packet doesn't meet. Against their own direction, binat and rdr
// rules match a packet that comes from their target.
func (e *evaluation) translationMismatch(r *crule, tag int) mismatch {
	if by := e.scopeMismatch(r); by != matched {
		return by
	}
	pool := (*caddr)(nil)
	if len(r.pool.addrs) > 0 {
		pool = &r.pool.addrs[r.pool.cur]
	}
	by := matched
	switch {
	case (r.action == pfconf.Binat || r.action == pfconf.BinatAnchor) && e.dir == pfconf.In:
		switch {
		case !r.to.addr.matches(e.m, e.p.Src):
			by = mismatchOther
		case !portMatches(r.proto, r.to.port, e.sport):
			by = skipDestinationPort
		case pool != nil && !pool.matches(e.m, e.p.Dst):
			by = mismatchOther
		}
	case (r.action == pfconf.Rdr || r.action == pfconf.RdrAnchor) && e.dir == pfconf.Out:
		by = e.rdrBackMismatch(r, pool)
	case !r.from.addr.matches(e.m, e.p.Src):
		by = mismatchOther
	case !portMatches(r.proto, r.from.port, e.sport):
		by = skipSourcePort
	case !r.to.addr.matches(e.m, e.p.Dst):
		by = skipDestination
	case !portMatches(r.proto, r.to.port, e.dport):
		by = skipDestinationPort
	}
	if by == matched && r.tagged != 0 && !e.tagMatches(r, tag) {
		return mismatchOther
	}
	return by
}

// rdrBackMismatch is translationMismatch for an rdr rule and an outbound packet: it must
// come from the rule's target and go to one of its sources.
func (e *evaluation) rdrBackMismatch(r *crule, pool *caddr) mismatch {
	if pool == nil {
		if e.endMatches(r, &r.to, e.p.Src, e.sport) && e.endMatches(r, &r.from, e.p.Dst, e.dport) {
			return matched
		}
		return mismatchOther
	}
	target := cport{op: pfconf.Equal, lo: r.pool.lo}
	if pool.matches(e.m, e.p.Src) && r.pool.lo != 0 && portMatches(r.proto, target, e.sport) &&
		e.endMatches(r, &r.from, e.p.Dst, e.dport) {
		return matched
	}
	return mismatchOther
}

// endMatches reports whether an address and port are those that one side of a rule
// requires.
func (e *evaluation) endMatches(r *crule, end *cendpoint, a netip.Addr, port uint32) bool {
	return end.addr.matches(e.m, a) && portMatches(r.proto, end.port, port)
}

// portMatches reports whether n is a port that a rule for this protocol requires
// (pf_match_xport). A rule for ESP requires the SPI to be that of the rule, which has
// none, so it never matches the destination of an ESP packet.
func portMatches(rule pfconf.Proto, want cport, n uint32) bool {
	switch rule {
	case protoESP:
		return n == 0
	case pfconf.ProtoTCP, pfconf.ProtoUDP, pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		return want.matches(uint16(n))
	}
	return true
}

// nat chooses the new source and reports whether there was one (pf_get_sport).
func (e *evaluation) nat(t *translation) bool {
	r, inner := t.rule, t.src
	first, ok := e.mapAddr(r, inner)
	if !ok {
		return false
	}
	t.src = first
	if e.p.Proto == pfconf.ProtoUDP && e.sport == ikePort {
		t.port = e.sport
		return true
	}
	// macOS gives all connections from one inner port the same outer port
	// (endpoint-independent mapping, RFC 4787), on which hole punching depends.
	if b, ok := bindingOf(r, e.p.Proto, stateHost{inner, e.sport}, e.p.Dst); ok {
		if used := e.m.states.bindings[b]; used != nil {
			t.port = used.port
			return true
		}
	}
	for {
		if e.freePort(t) {
			return true
		}
		if r.pool.kind != pfconf.RoundRobin && r.pool.kind != pfconf.Random {
			return false
		}
		if t.src, ok = e.mapAddr(r, inner); !ok || t.src == first {
			return false
		}
	}
}

// freePort sets t.port to one that no state to the packet's destination uses with t.src,
// and reports whether there is one. It keeps the port if the pool has no range.
func (e *evaluation) freePort(t *translation) bool {
	lo, hi := uint32(t.rule.pool.lo), uint32(t.rule.pool.hi)
	switch e.p.Proto {
	case pfconf.ProtoTCP, pfconf.ProtoUDP:
	case pfconf.ProtoICMP:
		lo, hi = 1, 65535
	default:
		return e.portFree(t, e.dport)
	}
	if lo == 0 && hi == 0 {
		return e.portFree(t, t.port)
	}
	if lo > hi {
		lo, hi = hi, lo
	}
	// The kernel starts at a random port and tries upwards, then downwards.
	cut := lo + e.m.rand.Uint32N(hi-lo+1)
	for _, span := range [...]struct{ from, to, step uint32 }{{cut, hi + 1, 1}, {cut - 1, lo - 1, ^uint32(0)}} {
		for port := span.from; port != span.to; port += span.step {
			if e.portUsable(t, port) {
				t.port = port
				return true
			}
		}
	}
	t.port = cut
	return e.portFree(t, cut)
}

// portFree reports whether the kernel considers the port free: whether an answer to it
// would find no state. For UDP the kernel looks up a key with the rule's extfilter; if the
// rule has none, no state has such a key. A collision then only shows when the state is
// made, and the packet is dropped.
func (e *evaluation) portFree(t *translation, port uint32) bool {
	return e.outsideFree(t, t.rule.pool.extFilter, port)
}

// portUsable reports whether a state can be made with the port. The machine chooses a port
// by this, unlike the kernel, and so avoids random collisions of UDP flows: its results
// don't depend on chance.
func (e *evaluation) portUsable(t *translation, port uint32) bool {
	return e.outsideFree(t, max(t.rule.pool.extFilter, addrPortDependent), port)
}

// outsideFree reports whether no state has t.src and port as its outside end towards the
// packet's destination.
func (e *evaluation) outsideFree(t *translation, filter endpointFilter, port uint32) bool {
	e.m.totals[countSearches]++
	k := outsideKey(e.p.Proto, filter, stateHost{t.src, port}, stateHost{e.p.Dst, e.dport})
	return e.m.states.outside[k] == nil
}

// binat maps one network to another: the source of an outbound packet, the destination of
// an inbound one. It reports whether there was an address to map to.
func (e *evaluation) binat(t *translation) bool {
	if e.dir == pfconf.Out {
		p, ok := e.onePrefix(&t.rule.pool.addrs[t.rule.pool.cur])
		t.src = graft(p, t.src)
		return ok
	}
	p, ok := e.onePrefix(&t.rule.from.addr)
	t.dst = graft(p, t.dst)
	return ok
}

// onePrefix returns the prefix that an address stands for, for an interface its first, and
// whether there is one.
func (e *evaluation) onePrefix(a *caddr) (netip.Prefix, bool) {
	switch a.kind {
	case pfconf.AddrPrefix:
		return a.prefix, true
	case pfconf.AddrDynamic:
		ps := a.dyn.prefixes(e.m, e.p.Src.Is4())
		if len(ps) == 0 {
			return netip.Prefix{}, false
		}
		return ps[0], true
	}
	return netip.PrefixFrom(unspecified(e.family), 0), true
}

// unspecified returns the all-zero address of a family.
func unspecified(f pfconf.Family) netip.Addr {
	if f == pfconf.Inet {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// rdr chooses the new destination of an inbound packet. For an outbound one, an answer
// from the target, it restores the source. It reports whether there was an address.
func (e *evaluation) rdr(t *translation) bool {
	r := t.rule
	if e.dir == pfconf.Out {
		p, ok := e.onePrefix(&r.to.addr)
		t.src = graft(p, t.dst)
		if !r.to.port.any && r.to.port.lo != 0 {
			t.port = uint32(r.to.port.lo)
		}
		return ok
	}
	a, ok := e.mapAddr(r, t.src)
	if !ok {
		return false
	}
	if t.dst = a; r.pool.kind == pfconf.Bitmask {
		p, _ := e.onePrefix(&r.pool.addrs[r.pool.cur])
		t.dst = graft(netip.PrefixFrom(a, p.Bits()), e.p.Dst)
	}
	switch lo, hi := int64(r.pool.lo), int64(r.pool.hi); {
	case hi != 0:
		// A range maps to a range by the distance from its beginning.
		n := (int64(e.dport)-int64(r.to.port.lo))%(max(hi-lo, 0)+1) + lo
		if n > 65535 {
			n -= 65535
		}
		t.port = uint32(uint16(n))
	case lo != 0:
		t.port = uint32(lo)
	}
	return true
}

// graft returns the address with the prefix's network and a's host part (PF_POOLMASK).
func graft(p netip.Prefix, a netip.Addr) netip.Addr {
	if !p.IsValid() || p.Addr().BitLen() != a.BitLen() {
		return a
	}
	n, h := p.Addr().AsSlice(), a.AsSlice()
	for i := p.Bits(); i < len(n)*8; i++ {
		bit := byte(0x80 >> (i % 8))
		n[i/8] = n[i/8]&^bit | h[i/8]&bit
	}
	out, _ := netip.AddrFromSlice(n)
	return out
}

// mapAddr returns the pool's next address for a packet from src, and whether there is one
// (pf_map_addr).
func (e *evaluation) mapAddr(r *crule, src netip.Addr) (netip.Addr, bool) {
	p := &r.pool
	cur := &p.addrs[p.cur]
	if p.family == pfconf.AnyFamily {
		// The rule has no family, so the kernel copies no address and nothing changes.
		// Round-robin advances all the same.
		return src, cur.kind != pfconf.AddrTable && (p.kind != pfconf.RoundRobin || e.familylessRound(p))
	}
	if p.kind == pfconf.RoundRobin {
		return e.roundRobin(p)
	}
	prefix, ok := e.onePrefix(cur)
	if !ok || cur.kind == pfconf.AddrTable || cur.kind == pfconf.AddrNoRoute {
		return src, false
	}
	switch p.kind {
	case pfconf.Bitmask:
		return graft(prefix, src), true
	case pfconf.Random:
		return graft(prefix, e.randomAddr(src.Is4())), true
	case pfconf.SourceHash:
		return graft(prefix, hashAddr(p.seed, src)), true
	}
	return prefix.Addr(), true
}

// randomAddr returns a random address, of whose bits mapAddr takes the host part.
func (e *evaluation) randomAddr(v4 bool) netip.Addr {
	k := prefixKey{e.m.rand.Uint64(), e.m.rand.Uint64()}
	return k.addr(v4)
}

// hashAddr returns a hash of an address, which spreads sources over a pool. The kernel's
// function differs (pf_hash), so its results do too.
func hashAddr(seed uint64, a netip.Addr) netip.Addr {
	k := keyOf(a)
	hi := mix(mix(seed^k.hi) ^ k.lo)
	return prefixKey{hi, mix(hi)}.addr(a.Is4())
}

// mix is the finalizer of the random number generator SplitMix64.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// roundRobin returns the pool's next address. The kernel's counter starts at zero, which is
// in none of the pool's blocks, so it starts with the second one.
func (e *evaluation) roundRobin(p *cpool) (netip.Addr, bool) {
	begin := p.cur
	cur := &p.addrs[p.cur]
	ok := false
	if cur.kind == pfconf.AddrTable || cur.kind == pfconf.AddrDynamic {
		ok = e.nextEntry(p, cur)
	} else {
		ok = cur.prefix.Contains(p.counter)
	}
	for !ok {
		p.cur = (p.cur + 1) % len(p.addrs)
		cur = &p.addrs[p.cur]
		if cur.kind != pfconf.AddrTable && cur.kind != pfconf.AddrDynamic {
			p.counter = cur.prefix.Addr()
			break
		}
		p.entry = -1
		if ok = e.nextEntry(p, cur); !ok && p.cur == begin {
			return netip.Addr{}, false
		}
	}
	// Behind the highest address of all there is no next one.
	a := p.counter
	if !a.IsValid() {
		return a, false
	}
	p.counter = a.Next()
	return a, true
}

// familylessRound is roundRobin for a rule without a family; it reports whether there was
// an address. At the pool's current position the kernel looks for an address of the
// packet's family. Past the end it looks for one of no family, which doesn't exist: that
// packet isn't translated, and the next one starts at the beginning.
func (e *evaluation) familylessRound(p *cpool) bool {
	if cur := &p.addrs[p.cur]; cur.kind == pfconf.AddrDynamic && e.nextEntry(p, cur) {
		return true
	}
	p.entry = -1
	return false
}

// poolEntries returns the entries of a table or an interface of the packet's family.
func (e *evaluation) poolEntries(a *caddr) []prefixEntry {
	var out []prefixEntry
	switch a.kind {
	case pfconf.AddrDynamic:
		for _, p := range a.dyn.prefixes(e.m, e.p.Src.Is4()) {
			out = append(out, prefixEntry{prefix: p})
		}
	case pfconf.AddrTable:
		if t := a.table.effective(); t != nil {
			for _, x := range t.set.entries() {
				if x.prefix.Addr().Is4() == e.p.Src.Is4() {
					out = append(out, x)
				}
			}
		}
	}
	return out
}

// nextEntry moves the pool's counter to the next address of a table or an interface and
// reports whether there is one (pfr_pool_get in pf_table.c). Negated entries are left out
// of those that contain them; so are other entries, whose addresses follow in their own
// turn.
func (e *evaluation) nextEntry(p *cpool, a *caddr) bool {
	all := e.poolEntries(a)
	var blocks []netip.Prefix
	for _, x := range all {
		if !x.not {
			blocks = append(blocks, x.prefix)
		}
	}
	useCounter := p.entry >= 0
	for i := max(p.entry, 0); i < len(blocks); i++ {
		addr := blocks[i].Addr()
		if useCounter {
			if !blocks[i].Contains(p.counter) {
				useCounter = false
				continue
			}
			addr = p.counter
		}
		useCounter = false
		if addr = outsideNested(all, blocks[i], addr); addr.IsValid() {
			p.counter, p.entry = addr, i
			return true
		}
	}
	return false
}

// outsideNested returns the first address from a on that is in the block and in no entry
// within it, or the zero Addr.
func outsideNested(all []prefixEntry, block netip.Prefix, a netip.Addr) netip.Addr {
	for range all {
		if !a.IsValid() || !block.Contains(a) {
			return netip.Addr{}
		}
		longest := block
		for _, x := range all {
			if x.prefix.Bits() > longest.Bits() && x.prefix.Contains(a) {
				longest = x.prefix
			}
		}
		if longest == block {
			return a
		}
		a = endOf(longest).Next()
	}
	return netip.Addr{}
}
