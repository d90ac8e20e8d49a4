package pfsim

import (
	"fmt"
	"strings"

	"github.com/meshhelper/meshhelper/pfconf"
)

// RuleCounters are the counters of a rule since it was loaded.
type RuleCounters struct {
	// Evaluations counts the packets that were compared with the rule. Packets of a state
	// are compared with none, and pf skips rules with the same criterion as an earlier
	// one that didn't match. The first filter rule of an anchor is compared with every
	// packet without a state that reaches the anchor.
	Evaluations uint64
	// Packets and Bytes count the packets about which the rule decided, and all packets of
	// its states. Bytes are counted from the IP header on, without TCP options.
	Packets, Bytes uint64
	// States is the current number of the rule's states.
	States uint64
}

// String returns the line that pfctl -v prints below a rule.
func (c RuleCounters) String() string {
	return fmt.Sprintf("  [ Evaluations: %-8d  Packets: %-8d  Bytes: %-10d  States: %-6d]", c.Evaluations, c.Packets, c.Bytes, c.States)
}

// A CountedRule is a rule as pfctl shows it, with its counters. For a nameless inline
// anchor, Text also has the lines of its rules, whose counters aren't shown.
type CountedRule struct {
	Text string
	RuleCounters
}

// CountedRules returns the scrub and filter rules of an anchor, "" being the main
// ruleset, as pfctl -v -sr shows them. The error is [ErrNoAnchor].
func (m *PF) CountedRules(anchor string) ([]CountedRule, error) {
	return m.counted(anchor, scrubList, filterList)
}

// CountedNat is CountedRules for pfctl -v -sn: nat, then rdr, then binat rules.
func (m *PF) CountedNat(anchor string) ([]CountedRule, error) {
	return m.counted(anchor, natList, rdrList, binatList)
}

// counted returns the rules of some lists of an anchor with their counters.
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

// count counts a packet about which the rule decided.
func (r *crule) count(bytes int) {
	r.packets++
	r.bytes += uint64(bytes)
}

// counter is one of the totals of pfctl -s info: PFRES_*, LCNT_* and FCNT_* of xnu
// bsd/net/pfvar.h, as far as a Machine counts them.
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

// counterNames are pfctl's names of the counters.
var counterNames = [counterMax]string{"match", "fragment", "normalize", "memory", "ip-option", "proto-cksum",
	"state-mismatch", "state-insert", "state-limit", "src-limit", "searches", "inserts", "removals"}

// Counters returns the totals since the machine was made, by their names in pfctl -s
// info: match counts the packets that filter rules judged, searches, inserts and removals
// are those of the state table, and the others count packets dropped for that reason.
// Counters that a machine never increments are missing.
func (m *PF) Counters() map[string]uint64 {
	out := make(map[string]uint64, counterMax)
	for i, name := range counterNames {
		out[name] = m.totals[i]
	}
	return out
}

// size returns the packet's length in bytes from the IP header on.
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

// account counts a packet that passed, or that a rule blocked, for the rules that
// decided about it (the end of pf_test). A packet dropped otherwise counts for none.
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

// mismatch is the first criterion of a rule that a packet doesn't meet, in the order in
// which pf compares them. Those below skipFields are PF_SKIP_* of xnu bsd/net/pfvar.h:
// after such a mismatch pf continues with the next rule in which that criterion differs.
// This makes a long list of similar rules fast, and shows in the count of evaluations.
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

// setSkips computes, for each rule of a list and each criterion, how many rules to advance
// if that criterion isn't met (pf_calc_skip_steps).
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

// sameField reports whether two rules have the same criterion f.
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

// portless reports whether the rule is for a protocol that has something else in place of
// ports: the kernel keeps a call id or an SPI there.
func (r *crule) portless() bool { return r.proto == protoGRE || r.proto == protoESP }

// same reports whether the kernel considers two addresses equal (pf_addr_wrap_neq). It may
// consider addresses different that match the same packets.
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

// isAny reports whether the address matches all: the kernel holds any as a network of
// length 0.
func (c *caddr) isAny() bool {
	return c.kind == pfconf.AddrAny || c.kind == pfconf.AddrPrefix && c.prefix.Bits() == 0
}
