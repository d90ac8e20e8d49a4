// Package mesh says what a mesh is, as values: keys, the prefixes and the
// addresses derived from keys, names, kinds of peers, a peer as it is wanted,
// and the permissions that a host can give it.
//
// A newcomer starts at [Peer], and at [AllPermissions], the one table of
// permissions: what commands, completion, the socket, the document on disk,
// metrics and the policy know of a permission, they take from there. To add
// one is to add its entry, and a line of package policy that says what it
// opens.
//
// The package does no I/O and knows no other package of the product.
package mesh
