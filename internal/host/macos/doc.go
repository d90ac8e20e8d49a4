// Package macos makes a Mac enforce a policy, with pf.
//
// [Compile] turns a compiled policy into the ruleset of one pf anchor. The anchor
// is a child of com.apple, so the main ruleset that Apple ships (/etc/pf.conf)
// evaluates it and needn't be changed. The anchor enforces the whole policy without
// the guard at the tunnel, except for what docs/pf.md lists: what a peer may
// reach, what may reach a peer, network address translation, and TCP MSS clamping.
//
// The number of rules doesn't depend on the number of peers: addresses and
// permissions are in tables. [Anchor.Lines] pairs each line with the reason for it;
// docs/pf.md is generated from them.
//
// pf evaluates its rules for the first packet of a flow only; later packets match
// the state that the first one created. So a permission isn't revoked until the
// states that it allowed are killed: [Kills] computes which.
//
// [Backend] applies the anchor step by step ([Steps]) and undoes it: the mesh
// interface, its addresses and routes, the anchor, a token that keeps pf enabled
// (pfctl -E), and the forwarding sysctls. Each change is recorded in a journal on
// disk before it is made, so that a helper that starts after a crash can undo it.
// Backend is built on package darwin, and runs on the simulated Mac (internal/lab/simmac)
// as on a real one.
//
// While nothing changes, one tick runs at most one pfctl process, which shows
// whether pf still holds what was loaded. Everything is read back when it doesn't,
// after an event of the routing socket, and every few minutes.
//
// [FindForeign] reports which rules of other software override the anchor.
//
// Where to start: enforce.go for the order of the steps, rules.go for the anchor,
// kill.go for flows that must end, inspect.go for drift.
package macos
