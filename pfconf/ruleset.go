package pfconf

import (
	"net/netip"
	"strings"
)

// A Ruleset is what one file or one anchor holds: its statements in the order
// in which they are written. pf wants them sorted: options, scrub rules,
// translation, filter rules; macros and tables stand anywhere. [Ruleset.Validate]
// checks it.
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

// A Macro is name = "value". pf replaces $name while it reads, before any
// grammar, so the rules of a parsed ruleset hold what the macro stood for and
// the definition stays here for the reader only.
type Macro struct {
	Name  string
	Value string
}

// An Option is a set line. Only those of the main ruleset have an effect: pfctl
// ignores them in an anchor.
type Option struct {
	// Name is the word after set: skip, timeout, limit, block-policy and so on.
	Name string
	// Values are its arguments. For timeout and limit there is one for each
	// pair, such as "udp.first 10"; for skip one for each interface.
	Values []string
}

// An Antispoof is antispoof for an interface, which stands for block rules
// against packets that claim the interface's own addresses.
type Antispoof struct {
	Quick      bool
	Log        *Log // nil: not logged
	Interfaces []AntispoofInterface
	Family     Family
	Label      string
	RTable     *uint8
}

// An AntispoofInterface is an interface of antispoof; Dynamic is (en0), whose
// addresses are looked up when the packet comes.
type AntispoofInterface struct {
	Name    string
	Dynamic bool
}

// A LoadAnchor is load anchor "name" from "file". The file is read by pfctl.
type LoadAnchor struct {
	Anchor string
	File   string
}

// A Text is a statement that this package keeps but doesn't understand, such as
// a dummynet rule. It is never evaluated. Rulesets with it are reported by
// [Ruleset.Unknown].
type Text struct {
	Text string
}

// An Interface is a network interface of the host on which a ruleset is loaded.
// Names lo* are loopback, utun* point-to-point, all others broadcast.
type Interface struct {
	Name string
	// Addresses are the interface's addresses with the lengths of their
	// networks, such as 192.0.2.7/24, in the order of the host.
	Addresses []netip.Prefix
}

// IsLoopback goes by the name, which is all that a ruleset tells of an interface.
func (i Interface) IsLoopback() bool { return strings.HasPrefix(i.Name, "lo") }

// IsPointToPoint goes by the name, as IsLoopback does.
func (i Interface) IsPointToPoint() bool { return len(i.Name) > 4 && i.Name[:4] == "utun" }

// A Loaded is a ruleset as the kernel holds it: one rule for each combination
// of a written rule's lists, each list with at most one entry, defaults
// written out, names of interfaces that stand for addresses resolved.
type Loaded struct {
	// Path is the anchor's path; "" is the main ruleset.
	Path string
	// Scrub, Nat, Binat, Rdr and Filter are the kernel's five lists of an
	// anchor, with the anchor calls of the kind between the rules.
	Scrub  []*Rule
	Nat    []*Rule
	Binat  []*Rule
	Rdr    []*Rule
	Filter []*Rule
	// Dummynet holds the calls of dummynet anchors; nothing runs them.
	Dummynet []*Rule
	// Tables are those that come to exist: persistent ones and those that a
	// rule uses, in the order of their declaration.
	Tables []*Table
	// Options are the set lines that have an effect; none in an anchor.
	Options []*Option
	// Anchors are the bodies of inline anchors, in the order in which they were
	// read. Paths are whole: anchor "b" { } loaded into "a" is "a/b".
	Anchors []LoadedAnchor
	// Files are the load anchor lines, for a caller that can read files.
	Files []*LoadAnchor

	// Declared are all tables of the text, also those that no rule here uses: the
	// kernel keeps one alive for the rules of another anchor.
	Declared []*Table
}

// A LoadedAnchor is an inline anchor's body with the path at which it is loaded.
type LoadedAnchor struct {
	Path   string
	Loaded *Loaded
}
