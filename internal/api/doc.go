// Package api is the local socket: HTTP/1.1 with JSON over a unix socket, by
// which the command and scripts talk to the helper.
//
// The wire types stand in types.go and are the contract with scripts. [Server]
// answers requests from a [Service], which the daemon implements. Before anything else it
// asks the kernel for the user at the other end of the connection; [Access] decides what
// that user may do. [Client] is the client for Go.
//
// Every local user may connect, so the server trusts no client. The number of connections
// per user, the size of a body and the duration of a request are limited, and a user without
// rights can't use up the connections of one that has them.
package api
