// Package daemon is the running helper: it connects the rooms that keep one host equal to its
// wanted state, and implements the service behind the local socket.
//
// Package wanted has the document with peers and permissions, and each change of it makes a new
// generation. Package reconcile makes the host enforce it, package resolve looks up the names
// in endpoints, and package explain answers questions. [New] builds them, and [Daemon.Run] runs
// each in a goroutine of its own.
//
// # A change
//
// [Daemon.ChangePeer] has package wanted validate and make the change. If it revokes a
// permission, the guard enforces that before the call returns. Then the loop is woken, and the
// command waits until the loop has published a state with the generation of the change or a
// later one. A command that waits longer than its limit gets the error "saved, not in force".
//
// # Answers
//
// The daemon itself makes what combines several rooms: a peer with its numbers, its
// configuration, and the plan for other mesh prefixes. It reads the wanted document, the
// published [held.State] and what was learned of peers, and never the host.
package daemon
