// Package mesh defines the values that make up a mesh: keys, prefixes, the
// addresses derived from keys, names, kinds of peers, a configured peer, and
// the permissions that a host can give it.
//
// Start at [Peer], and at [AllPermissions], the only table of permissions:
// commands, completion, the socket, the document on disk, metrics and the
// policy take from it everything they know about a permission. A new
// permission needs an entry there, and a line in package policy for the
// traffic that it opens.
//
// The package does no I/O and imports no other package of the product.
package mesh
