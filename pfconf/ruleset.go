package pfconf

import (
	"net/netip"
	"strings"
)

// A Ruleset is the content of one file or one anchor: its statements as written, in
// their order. pf requires options first, then scrub rules, translation rules and
// filter rules; macros and tables may stand anywhere. [Ruleset.Validate] checks the
// order.
type Ruleset struct {
	Statements []Statement
}

// A Statement is one line of a ruleset: [*Macro], [*Option], [*Table], [*Rule],
// [*Antispoof], [*LoadAnchor] or [*Text].
type Statement interface {
	// String returns the statement as text of pf.conf, without a newline at
	// its end.
	String() string
	statement()
}

func (*Macro) statement()      {}
func (*Option) statement()     {}
func (*Table) statement()      {}
func (*Rule) statement()       {}
func (*Antispoof) statement()  {}
func (*LoadAnchor) statement() {}
func (*Text) statement()       {}

// A Macro is name = "value". pfctl replaces $name in its lexer, before the grammar
// applies, so the rules of a parsed ruleset already hold the value. The definition is
// kept so that printing the ruleset doesn't lose it.
type Macro struct {
	Name  string
	Value string
}

// An Option is a set line (pf.conf(5), section OPTIONS). In an anchor pfctl applies only
// block-policy, state-policy and require-order, which its parser itself needs, and
// ignores the rest.
type Option struct {
	// Name is the word after set: skip, timeout, limit, block-policy and so on.
	Name string
	// Values are the arguments: for timeout and limit one for each pair, such as
	// "udp.first 10" (timeouts in seconds), for skip one for each interface, for all
	// others exactly one.
	Values []string
}

// An Antispoof is antispoof for interfaces (pf.conf(5), section BLOCKING SPOOFED
// TRAFFIC). pfctl turns it into block rules: one against packets that claim to be from
// an interface's networks but arrive on another, and one against packets that claim
// the interface's own addresses.
type Antispoof struct {
	Quick      bool
	Log        *Log // nil: not logged
	Interfaces []AntispoofInterface
	Family     Family
	Label      string
	RTable     *uint8
}

// An AntispoofInterface is an interface of antispoof. Dynamic is (en0): its
// addresses are looked up when the packet arrives, not when the ruleset is loaded.
type AntispoofInterface struct {
	Name    string
	Dynamic bool
}

// A LoadAnchor is load anchor "Anchor" from "File". pfctl reads the file after the
// rest of the ruleset, and only for the main ruleset.
type LoadAnchor struct {
	Anchor string
	File   string
}

// A Text is a statement that this package keeps without understanding it, such as
// a dummynet rule. It is printed as it was read and never evaluated.
// [Ruleset.Unknown] returns those of a ruleset.
type Text struct {
	Text string
}

// An Interface is a network interface of the host on which a ruleset is loaded.
// Its kind follows from its name: lo* are loopback, utun* point-to-point, and all
// others broadcast.
type Interface struct {
	Name string
	// Addresses are the interface's addresses with the lengths of their
	// networks, such as 192.0.2.7/24, in the order in which the host lists them.
	Addresses []netip.Prefix
}

// IsLoopback reports whether the interface is a loopback interface, judged by its name.
func (i Interface) IsLoopback() bool { return strings.HasPrefix(i.Name, "lo") }

// IsPointToPoint reports whether the interface is a point-to-point interface, judged by
// its name.
func (i Interface) IsPointToPoint() bool { return len(i.Name) > 4 && i.Name[:4] == "utun" }

// A Loaded is a ruleset as the kernel holds it: one rule for each combination
// of a written rule's lists, each list with at most one entry, defaults
// written out, and interface names that stand for addresses resolved.
type Loaded struct {
	// Path is the anchor's path; "" is the main ruleset.
	Path string
	// Scrub, Nat, Binat, Rdr and Filter are the five lists of rules that the kernel
	// keeps for an anchor (PF_RULESET_* of xnu bsd/net/pfvar.h). Each also has the anchor
	// calls of its kind.
	Scrub  []*Rule
	Nat    []*Rule
	Binat  []*Rule
	Rdr    []*Rule
	Filter []*Rule
	// Dummynet has the calls of dummynet anchors. Nothing here evaluates them.
	Dummynet []*Rule
	// Tables are the tables that exist after the load: persistent ones and those that a
	// rule uses, in the order of their declaration.
	Tables []*Table
	// Options are the set lines that have an effect; none in an anchor.
	Options []*Option
	// Anchors are the bodies of inline anchors, in the order in which they were
	// read, with their whole paths: anchor "b" { } loaded into "a" is "a/b".
	Anchors []LoadedAnchor
	// Files are the load anchor lines. The caller has to read the files.
	Files []*LoadAnchor

	// Declared are all tables of the text, also those that no rule here uses: such a
	// table exists if a rule in another anchor refers to it.
	Declared []*Table
}

// A LoadedAnchor is an inline anchor's body with the path at which it is loaded.
type LoadedAnchor struct {
	Path   string
	Loaded *Loaded
}
