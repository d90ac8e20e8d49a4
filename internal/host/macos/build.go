package macos

import (
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
)

// builder collects an anchor's lines in the order in which pf wants them.
type builder struct {
	ruleset *policy.Ruleset
	host    policy.Host
	sets    map[string]set
	used    map[string]bool // tables that a rule refers to
	lines   []Line
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

// add appends a rule, unless it needs an address of a table that is empty: then
// it could never match. Such tables don't come to exist, for pf looks a table
// that an anchor lacks up in the main ruleset.
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
			end.Addrs = nil // not in an empty table: any
		}
	}
	b.lines = append(b.lines, Line{&rule, why})
}

// block appends a rule that drops in silence and ends the evaluation. It says
// drop itself, for a bare block does what the main ruleset's block-policy says.
func (b *builder) block(rule pfconf.Rule, label, why string) {
	rule.Action = pfconf.Block
	rule.Return.Kind = pfconf.ReturnDrop
	rule.Quick = true
	rule.Label = labelPrefix + label
	b.add(rule, why)
}

// pass appends a rule that makes states and ends the evaluation. The states are
// bound to the interface: a floating one would let the same addresses and ports
// in by any other. With flags any, a TCP packet from the middle of a connection
// makes its flow known again after its state was lost.
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

// tableLines returns the tables that the rules use, in the order of their names.
func (b *builder) tableLines() []Line {
	var names []string
	for name := range b.used {
		names = append(names, name)
	}
	slices.Sort(names)
	lines := make([]Line, len(names))
	for i, name := range names {
		lines[i] = Line{b.sets[name].table(name), tableReasons[name]}
	}
	return lines
}

// on returns a rule for one direction of an interface.
func on(d pfconf.Direction, name string) pfconf.Rule {
	return pfconf.Rule{Direction: d, Interfaces: []pfconf.InterfaceMatch{{Name: name}}}
}

// notOn returns a rule for all interfaces but one. It holds for interfaces too
// that appear after it was loaded.
func notOn(d pfconf.Direction, name string) pfconf.Rule {
	return pfconf.Rule{Direction: d, Interfaces: []pfconf.InterfaceMatch{{Name: name, Not: true}}}
}

func inTable(name string) pfconf.Endpoint {
	return pfconf.Endpoint{Addrs: []pfconf.Address{{Kind: pfconf.AddrTable, Name: name}}}
}

func notInTable(name string) pfconf.Endpoint {
	return pfconf.Endpoint{Addrs: []pfconf.Address{{Kind: pfconf.AddrTable, Name: name, Not: true}}}
}

// timeouts are those of every rule of ours that keeps state: the guard's, so that
// what it has forgotten ends in the kernel too. pf's own keep an idle connection
// for a day.
func timeouts() []pfconf.Timeout {
	var out []pfconf.Timeout
	for _, t := range flow.Timeouts() {
		out = append(out, pfconf.Timeout{Name: t.Name, Seconds: uint32(t.Idle / time.Second)})
	}
	return out
}
