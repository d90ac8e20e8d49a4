// Package daemon is the running helper: the rooms that keep one host equal to what its
// operator wants, put together, and the service that the local socket asks.
//
// What is wanted is the document of package wanted, of which every change makes a new
// generation. Package reconcile makes the host hold it, package resolve keeps the addresses
// of endpoints given by name, and package explain answers questions.
//
// A command's way: [Daemon.ChangePeer] has wanted check and make the change, which narrows
// the guard at once. Then the loop is woken, and the command waits until it has published a
// state whose generation is the change's or a later one. A command that waits longer than
// its limit is answered "saved, not in force". What people are told of a peer besides, its
// configuration above all, is made here of the three states.
package daemon
