package macos

import (
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// builder collects an anchor's lines in the order that pf.conf(5) requires.
type builder struct {
	ruleset *policy.Ruleset
	host    policy.Host     // the ruleset's, with the interface of the options
	sets    map[string]set  // the content of each table, by name
	used    map[string]bool // the tables that a rule refers to
	lines   []Line          // all but the tables
	options AnchorOptions
}

func newBuilder(r *policy.Ruleset, o AnchorOptions) *builder {
	b := &builder{ruleset: r, host: r.Host(), sets: tableContents(r), used: map[string]bool{}, options: o}
	if o.Interface != "" {
		b.host.Interface = o.Interface
	}
	b.sets[tableCut] = set{in: hostPrefixes(o.Cut)}
	return b
}

// add appends a rule, unless it requires an address from an empty table and so can
// never match. An empty table isn't written at all, and a rule that names a table
// which its anchor lacks would use the main ruleset's of that name
// (pfr_attach_table in xnu bsd/net/pf_table.c).
func (b *builder) add(rule pfconf.Rule, why string) {
	for _, end := range []*pfconf.Endpoint{&rule.From, &rule.To} {
		for _, a := range end.Addrs {
			if a.Kind != pfconf.AddrTable {
				continue
			}
			if len(b.sets[a.Name].in) > 0 {
				b.used[a.Name] = true
				continue
			}
			if !a.Not {
				return
			}
			end.Addrs = nil // "! <empty>" matches every address
		}
	}
	b.lines = append(b.lines, Line{&rule, why})
}

// block appends a rule that drops without an answer and ends the evaluation. It says
// drop explicitly: a bare block follows the block-policy of the main ruleset, which
// may be return.
func (b *builder) block(rule pfconf.Rule, label, why string) {
	rule.Action = pfconf.Block
	rule.Return.Kind = pfconf.ReturnDrop
	rule.Quick = true
	rule.Label = labelPrefix + label
	b.add(rule, why)
}

// pass appends a rule that creates states and ends the evaluation. The states are
// if-bound: a floating state, pf's default, would also match a packet with the same
// addresses and ports on another interface, so a host on the LAN could inject
// packets into a peer's flow. With flags any instead of the default S/SA, a segment
// from the middle of a connection creates the state again after it was lost.
func (b *builder) pass(rule pfconf.Rule, label, why string) {
	rule.Action = pfconf.Pass
	rule.Quick = true
	rule.Flags = &pfconf.Flags{}
	rule.State = pfconf.KeepState
	rule.StateOptions.Policy = pfconf.IfBound
	rule.StateOptions.Timeouts = timeouts()
	rule.Label = labelPrefix + label
	b.add(rule, why)
}

// tableLines returns the tables that the rules use, sorted by name.
func (b *builder) tableLines() []Line {
	var names []string
	for name := range b.used {
		names = append(names, name)
	}
	slices.Sort(names)
	lines := make([]Line, len(names))
	for i, name := range names {
		lines[i] = Line{b.sets[name].table(name), reasonOf(name)}
	}
	return lines
}

// on returns a rule for one direction on an interface. The interface is always
// named: macOS's pf has no interface groups such as egress (xnu bsd/net/pf_if.c).
func on(d pfconf.Direction, name string) pfconf.Rule {
	return pfconf.Rule{Direction: d, Interfaces: []pfconf.InterfaceMatch{{Name: name}}}
}

// notOn returns a rule for all interfaces but one. It also matches interfaces that
// appear after it was loaded.
func notOn(d pfconf.Direction, name string) pfconf.Rule {
	return pfconf.Rule{Direction: d, Interfaces: []pfconf.InterfaceMatch{{Name: name, Not: true}}}
}

// inTable matches the addresses in a table.
func inTable(name string) pfconf.Endpoint {
	return pfconf.Endpoint{Addrs: []pfconf.Address{{Kind: pfconf.AddrTable, Name: name}}}
}

// notInTable matches all addresses but those in a table.
func notInTable(name string) pfconf.Endpoint {
	return pfconf.Endpoint{Addrs: []pfconf.Address{{Kind: pfconf.AddrTable, Name: name, Not: true}}}
}

// timeouts returns the state timeouts of our rules, in seconds. They are the
// guard's, so that a flow which the guard has expired expires in the kernel too;
// pf's default keeps an idle TCP connection for a day (tcp.established 86400, xnu
// bsd/net/pfvar.h), and dead states would use up a peer's share.
func timeouts() []pfconf.Timeout {
	var out []pfconf.Timeout
	for _, t := range flow.Timeouts() {
		out = append(out, pfconf.Timeout{Name: t.Name, Seconds: uint32(t.Idle / time.Second)})
	}
	return out
}
