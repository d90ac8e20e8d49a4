// Package pfsim simulates macOS's packet filter: it evaluates packets against rulesets as
// the kernel does, on any machine and without sending a packet. It
// answers what a rule of another product would do to a packet, and stands for pf in
// tests.
//
// A [Machine] holds what the kernel holds: interfaces with their addresses, the main
// ruleset and the anchors, tables, states, fragments and counters. [Machine.LoadMain]
// and [Machine.LoadAnchor] load what package pfconf has parsed, as pfctl -f does;
// [Machine.Forward], [Machine.Receive] and [Machine.Send] hand in a [Packet] and
// return a [Judgement]: whether it passes, what decided about it at each of the two
// hooks that it meets, and how it looks after translation. A [PF] is a machine to which
// all else can be done that is done to a packet filter: tests use it.
//
// It follows xnu's bsd/net/pf*.c as of macOS 15.5, its oddities included, and is held
// against the conformance vectors in testdata: what Apple's own code did with the
// same rulesets and packets.
package pfsim
