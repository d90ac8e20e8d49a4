package pfsim

import (
	"fmt"
	"strings"

	"github.com/meshhelper/meshhelper/pfconf"
)

// RuleCounters are what pf counts for a rule, from the time at which it was loaded.
type RuleCounters struct {
	// Evaluations is how many packets were held against the rule. pf doesn't hold
	// a packet against rules that ask for the same as an earlier one that it
	// didn't match, and doesn't ask any for a packet of a state. The first filter
	// rule of an anchor is evaluated for each packet that comes to the anchor
	// without a state, whatever becomes of it.
	Evaluations uint64
	// Packets and Bytes are those about which the rule decided, with all packets of
	// its states. Bytes count from the IP header on, and no options of TCP.
	Packets, Bytes uint64
	// States is how many states of the rule there are now.
	States uint64
}

// String returns the line that pfctl -v prints below a rule.
func (c RuleCounters) String() string {
	return fmt.Sprintf("  [ Evaluations: %-8d  Packets: %-8d  Bytes: %-10d  States: %-6d]", c.Evaluations, c.Packets, c.Bytes, c.States)
}

// A CountedRule is a rule as pfctl shows it, with its counters. Text has several
// lines for a nameless inline anchor, whose rules are in it without their own.
type CountedRule struct {
	Text string
	RuleCounters
}

// CountedRules returns what pfctl -v -sr shows of an anchor, "" being the main
// ruleset: scrub and filter rules. The error is ErrNoAnchor.
func (m *PF) CountedRules(anchor string) ([]CountedRule, error) {
	return m.counted(anchor, scrubList, filterList)
}

// CountedNat returns what pfctl -v -sn shows: nat, then rdr, then binat rules.
func (m *PF) CountedNat(anchor string) ([]CountedRule, error) {
	return m.counted(anchor, natList, rdrList, binatList)
}

func (m *Machine) counted(anchor string, lists ...ruleList) ([]CountedRule, error) {
	a := m.main.find(anchor)
	if a == nil {
		return nil, fmt.Errorf("anchor %q: %w", anchor, ErrNoAnchor)
	}
	inline := namelessAnchors(a, nil)
	var out []CountedRule
	for _, l := range lists {
		for _, r := range a.lists[l] {
			one := &pfconf.Loaded{Path: anchor, Anchors: inline, Filter: []*pfconf.Rule{r.rule}}
			lines := one.ShowRules()
			out = append(out, CountedRule{strings.Join(lines, "\n"), r.counters()})
		}
	}
	return out, nil
}

func (r *crule) counters() RuleCounters {
	return RuleCounters{r.evaluations, r.packets, r.bytes, uint64(r.states)}
}

// count adds a packet about which the rule decided.
func (r *crule) count(bytes int) {
	r.packets++
	r.bytes += uint64(bytes)
}

// counter is one of the totals of pfctl -s info, PFRES_ of bsd/net/pfvar.h and
// those of the state table.
type counter uint8

const (
	countMatch counter = iota
	countFragment
	countNormalize
	countMemory
	countOption
	countChecksum
	countMismatch
	countInsertFailed
	countStateLimit
	countSourceLimit
	countSearches
	countInserts
	countRemovals
	counterMax
)

var counterNames = [counterMax]string{"match", "fragment", "normalize", "memory", "ip-option", "proto-cksum",
	"state-mismatch", "state-insert", "state-limit", "src-limit", "searches", "inserts", "removals"}

// Counters returns the totals since the machine was made, by the names that pfctl
// -s info has for them: match is how many packets filter rules were asked about,
// searches, inserts and removals are those of the state table, and the rest are
// reasons for which packets were dropped. Those that are never counted here are
// missing.
func (m *PF) Counters() map[string]uint64 {
	out := make(map[string]uint64, counterMax)
	for i, name := range counterNames {
		out[name] = m.totals[i]
	}
	return out
}

// size is the packet's length from the IP header on.
func (p *Packet) size() int {
	n := ipv6Header
	if p.Src.Is4() {
		if n = ipv4Header; p.Options {
			n += ipv4Option
		}
	}
	switch {
	case p.Fragment && p.FragmentLen > 0:
		if n += int(p.FragmentLen); p.Src.Is6() {
			n += fragmentHeader
		}
		return n
	case p.Proto == pfconf.ProtoTCP:
		n += tcpHeader
	case p.Proto == pfconf.ProtoUDP, p.Proto == pfconf.ProtoICMP, p.Proto == pfconf.ProtoICMPv6:
		n += udpHeader
	}
	return n + int(p.Len)
}

// account counts a packet for those that decided about it, when it passed or a
// rule blocked it (the end of pf_test).
func (e *evaluation) account() {
	if e.verdict != VerdictPass && !e.rule.block {
		return
	}
	n := e.p.size()
	e.rule.count(n)
	if e.anchor != nil {
		e.anchor.count(n)
	}
	if s := e.state; s != nil && s.nat != nil {
		s.nat.count(n)
	}
}

// mismatch is the first thing of a rule that a packet doesn't have, in the order in
// which pf compares. Those up to skipFields pf looks for in the rules that follow,
// too: it goes on with the first that asks for something else (skip steps).
type mismatch uint8

const (
	skipInterface mismatch = iota
	skipDirection
	skipFamily
	skipProto
	skipSource
	skipSourcePort
	skipDestination
	skipDestinationPort
	skipFields
	mismatchOther
	matched
)

// setSkips works out for each rule of a list how many to go on by when one of its
// fields doesn't match (pf_calc_skip_steps).
func setSkips(rules []*crule) {
	for i := len(rules) - 1; i >= 0; i-- {
		r := rules[i]
		for f := range skipFields {
			r.skips[f] = 1
			if i+1 < len(rules) && sameField(f, r, rules[i+1]) {
				r.skips[f] += rules[i+1].skips[f]
			}
		}
	}
}

// sameField says whether the rule after a asks for the same.
func sameField(f mismatch, a, b *crule) bool {
	switch f {
	case skipInterface:
		return a.kif == b.kif && a.ifNot == b.ifNot
	case skipDirection:
		return a.dir == b.dir
	case skipFamily:
		return a.family == b.family
	case skipProto:
		return a.proto == b.proto
	case skipSource:
		return a.from.addr.same(&b.from.addr)
	case skipDestination:
		return a.to.addr.same(&b.to.addr)
	case skipSourcePort:
		return !a.portless() && !b.portless() && a.from.port == b.from.port
	}
	if a.portless() || b.portless() {
		return a.proto == b.proto
	}
	return a.to.port == b.to.port
}

// portless is true for the protocols that have something else in a port's place.
func (r *crule) portless() bool { return r.proto == protoGRE || r.proto == protoESP }

// same is false for addresses that the kernel holds for different
// (pf_addr_wrap_neq), even if they mean the same.
func (c *caddr) same(o *caddr) bool {
	switch {
	case c.not != o.not:
		return false
	case c.isAny() || o.isAny():
		return c.isAny() && o.isAny()
	case c.kind != o.kind:
		return false
	case c.kind == pfconf.AddrDynamic:
		return c.dyn.kif == o.dyn.kif && c.dyn.self == o.dyn.self && c.dyn.family == o.dyn.family &&
			c.dyn.mod == o.dyn.mod && c.dyn.bits == o.dyn.bits
	}
	return c.table == o.table && c.prefix == o.prefix && c.last == o.last
}

func (c *caddr) isAny() bool {
	return c.kind == pfconf.AddrAny || c.kind == pfconf.AddrPrefix && c.prefix.Bits() == 0
}
