// Package macos makes a Mac enforce a policy.
//
// [Compile] turns a compiled policy into the ruleset of one pf anchor, a child
// of com.apple, which the main ruleset that every Mac is shipped with evaluates.
// It holds the policy by itself, without the guard at the tunnel, but for what
// docs/pf.md names: what a peer may reach, what may reach a peer, network address
// translation, and the clamping of TCP's segment size.
//
// The anchor's number of rules doesn't depend on the number of peers: their
// addresses and permissions are in tables. [Anchor.Lines] gives each line with the
// reason for it, and docs/pf.md shows them.
//
// pf judges the first packet of a flow by its rules, and all others by the state
// that the first one made. So a change that takes something away isn't in force
// before the states of what it narrows are gone: [Kills] names them.
//
// [Backend] puts it in force, step by step ([Steps]), and takes it back: the
// mesh interface, addresses and routes, the anchor, a token that keeps pf on, and
// forwarding. What it changes is in a journal before. It is made of the
// primitives of package darwin, so it runs on the simulated Mac as on a real one.
//
// While the host doesn't change, a tick runs one process at most, which gives a
// sign when pf no longer holds what was loaded; all of it is read back on such a
// sign, and every few minutes.
//
// [FindForeign] says which rules of other software win over ours.
package macos
