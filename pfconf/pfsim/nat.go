package pfsim

import (
	"fmt"
	"net/netip"

	"github.com/meshhelper/meshhelper/pfconf"
)

// cpool is where a translation rule leads, and where round-robin stands.
type cpool struct {
	addrs  []caddr
	kind   pfconf.PoolKind // PoolDefault: the one address
	family pfconf.Family
	// lo and hi are the ports: for nat the range to choose from, both 0 to keep
	// the port; for rdr the first and the last, hi 0 for lo alone.
	lo, hi uint16
	// extFilter and extMap are those of UDP.
	extFilter, extMap endpointFilter

	cur     int        // index in addrs
	entry   int        // in the table or interface at cur; -1: its beginning
	counter netip.Addr // the next address
	seed    uint64     // of source-hash
}

// natPorts is the range from which nat chooses a port unless told otherwise,
// from pfctl.
const (
	natPortLo = 50001
	natPortHi = 65535
	// ikePort is never changed by nat: IKE used to insist on it.
	ikePort = 500
	// ikeMinimum is the shortest payload between two ports 500 that the kernel
	// takes for IKE (PF_IKE_PACKET_MINSIZE).
	ikeMinimum = 28
)

// makePool compiles what stands behind ->.
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

// severalAddresses is pfctl's reason to make a pool round-robin.
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

// translation is what a translation rule makes of a packet.
type translation struct {
	rule     *crule
	src, dst netip.Addr
	port     uint32 // the new source port outbound, the new destination port inbound
}

// findTranslation looks for a rule in the order of the kernel and works out
// what it does (pf_get_translation_aux). A rule that can't do it, for want of an
// address or a port, is as good as none.
func (e *evaluation) findTranslation() (t translation, ok bool) {
	// The order of the lists is the kernel's own, however the text has them.
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

// matchTranslation returns the first rule of a list that matches, nil for a no
// rule.
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

// translationMismatch says by what a translation rule, or the call of an anchor of
// them, isn't for the packet. Against their direction, binat and rdr ask whether the
// packet is an answer of what they lead to.
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

// rdrBackMismatch: from where an rdr rule leads, to those it is for.
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

func (e *evaluation) endMatches(r *crule, end *cendpoint, a netip.Addr, port uint32) bool {
	return end.addr.matches(e.m, a) && portMatches(r.proto, end.port, port)
}

// portMatches is pf_match_xport: rules for ESP compare the SPI with none, so
// they match no ESP packet's destination.
func portMatches(rule pfconf.Proto, want cport, n uint32) bool {
	switch rule {
	case protoESP:
		return n == 0
	case pfconf.ProtoTCP, pfconf.ProtoUDP, pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		return want.matches(uint16(n))
	}
	return true
}

// nat chooses the new source (pf_get_sport).
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
	// macOS gives all connections of one inner port the same outer one, which
	// peers behind NAT need to find each other.
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

// freePort finds a port for t.src that no state towards the packet's
// destination uses.
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
	// From a port chosen by chance upwards, then from there downwards.
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

// portFree says whether the kernel takes the port for free: whether an answer to
// it would find no state. For UDP it looks with the rule's extfilter, and without
// that with a kind of key that no state has. A collision then shows when the
// state is made, and drops the packet.
func (e *evaluation) portFree(t *translation, port uint32) bool {
	return e.outsideFree(t, t.rule.pool.extFilter, port)
}

// portUsable says whether a state can be made with the port. By choosing so, the
// machine spares UDP flows the collisions that a kernel has by chance.
func (e *evaluation) portUsable(t *translation, port uint32) bool {
	return e.outsideFree(t, max(t.rule.pool.extFilter, addrPortDependent), port)
}

func (e *evaluation) outsideFree(t *translation, filter endpointFilter, port uint32) bool {
	e.m.totals[countSearches]++
	k := outsideKey(e.p.Proto, filter, stateHost{t.src, port}, stateHost{e.p.Dst, e.dport})
	return e.m.states.outside[k] == nil
}

// binat maps one network on another, in both directions.
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

// onePrefix returns the prefix that an address stands for, of an interface its
// first.
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

func unspecified(f pfconf.Family) netip.Addr {
	if f == pfconf.Inet {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// rdr chooses the new destination inbound. Outbound it gives answers of the
// target their old source.
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
		// A range maps on a range by the distance from its beginning.
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

// graft keeps the prefix's network and the address's host part (PF_POOLMASK).
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

// mapAddr takes the pool's next address for a packet from src (pf_map_addr).
func (e *evaluation) mapAddr(r *crule, src netip.Addr) (netip.Addr, bool) {
	p := &r.pool
	cur := &p.addrs[p.cur]
	if p.family == pfconf.AnyFamily {
		// The kernel copies an address of no family: nothing changes. Going
		// round, it finds a place to stand on all the same.
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

func (e *evaluation) randomAddr(v4 bool) netip.Addr {
	k := prefixKey{e.m.rand.Uint64(), e.m.rand.Uint64()}
	return k.addr(v4)
}

// hashAddr spreads addresses over a pool; the kernel's own function differs.
func hashAddr(seed uint64, a netip.Addr) netip.Addr {
	k := keyOf(a)
	hi := mix(mix(seed^k.hi) ^ k.lo)
	return prefixKey{hi, mix(hi)}.addr(a.Is4())
}

// mix is the finalizer of splitmix64.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// roundRobin goes through the pool. Since the kernel's counter begins at zero,
// which is in no block, it begins with the second address.
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
	// After the highest address there is no next.
	a := p.counter
	if !a.IsValid() {
		return a, false
	}
	p.counter = a.Next()
	return a, true
}

// familylessRound is roundRobin for a rule without a family. Where the pool stands,
// the kernel looks for an address of the packet's family; once it has gone past
// the end, for one of no family, which there isn't, so that the packet isn't
// translated and the next one finds the beginning.
func (e *evaluation) familylessRound(p *cpool) bool {
	if cur := &p.addrs[p.cur]; cur.kind == pfconf.AddrDynamic && e.nextEntry(p, cur) {
		return true
	}
	p.entry = -1
	return false
}

// poolEntries returns what a table or an interface has of the packet's family.
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

// nextEntry moves the pool's counter to the next address of a table or an
// interface and reports whether there is one (pfr_pool_get). Negated entries are
// holes, and so are entries within others, which come in their own turn.
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

// outsideNested returns the first address from a on that is in the block and in
// none within it; the zero Addr if there is none.
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
