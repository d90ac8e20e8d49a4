// Package api is the local socket: HTTP/1.1 with JSON over a unix socket, by
// which the command and scripts talk to the helper.
//
// The wire types stand in types.go and are the contract with scripts. [Server]
// answers requests from a [Service], which the daemon implements, after asking
// the kernel which user is at the other end of the connection ([Access] says what
// each may do). [Client] is the other end.
//
// Every local user may connect, so nothing here trusts a client: the number of
// connections, the size of a body and the time that a request may take are
// bounded per user, and what a stranger does costs the operator nothing.
package api
