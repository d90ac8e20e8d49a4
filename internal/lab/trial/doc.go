// Package trial puts the product on trial: the real meshhelper program runs on
// the host B of netlab's picture, its commands are typed there, and stock
// WireGuard ends on A, C and D use the configurations that it prints.
//
// The package knows the product only by its commands (see [Mesh.Do]), its socket
// and its policy, which says what the packets should find. Where a test has to stop
// the helper at a step, or to switch an enforcer off, it builds a helper of its own
// with some lines of the source replaced; nothing in the product is made for that.
//
// The long versions of the proofs are run with the flag -soak.
package trial
