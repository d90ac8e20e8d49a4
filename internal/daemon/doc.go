// Package daemon keeps a host equal to what its operator wants.
//
// What is wanted is the document of package wanted, of which every change makes a new
// generation. What is done about it is one loop (loop.go):
// it observes the host, compiles the policy, and has the guard and a [host.Host]
// enforce it; reads back what is enforced; and cuts the flows of peers that lost a
// permission. The loop is woken by changes of the document, by the host's
// watcher, by grants that end, and by a tick that finds what no event
// reports.
//
// A command's way: [Daemon.ChangePeer] has wanted check and make the change, which narrows
// the guard at once (gate.go). Then the loop is woken, and the command waits until the loop
// has published a
// condition whose generation is the change's or a later one. Where the host can't be
// brought to hold it, the loop closes: it enforces the mesh without any permission,
// says why in the status, and tries again with growing pauses. A command that waits
// longer than its limit is answered "saved, not in force".
//
// The rule for changes here: the loop alone talks to the host's link and enforcer, and
// is the only writer of what it publishes; a published document or condition is
// never changed. The gate alone talks to the guard.
package daemon
