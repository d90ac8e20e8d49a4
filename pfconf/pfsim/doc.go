// Package pfsim simulates macOS's packet filter: it evaluates packets against rulesets as
// the kernel does, on any machine and without sending a packet. A program can ask it what
// the rules of another product would do to a packet, and tests use it in place of pf.
//
// A [Machine] has the state of the kernel's pf: interfaces with their addresses, the main
// ruleset and the anchors, tables, states, fragments and counters. [Machine.LoadMain]
// and [Machine.LoadAnchor] load rulesets that package pfconf has parsed, as pfctl -f does.
// [Machine.Forward], [Machine.Receive] and [Machine.Send] evaluate a [Packet] and return a
// [Judgement]: whether the packet passes, which rule or state decided at each hook, and
// its addresses after translation. A [PF] is a Machine with the operations that only tests
// need: time passes, interfaces change, pfctl kills states and changes tables.
//
// It follows xnu's bsd/net/pf*.c as of macOS 15.5 (xnu-11417), including behaviour that
// looks like a bug. The comments name the kernel's function that a part follows. The tests
// compare it with the conformance vectors in testdata, which record what Apple's own code
// did with the same rulesets and packets.
package pfsim
