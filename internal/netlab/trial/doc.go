// Package trial puts the product on trial: the real meshhelper program runs on
// the host B of netlab's picture, its commands are typed there, and stock
// WireGuard ends on A, C and D use the configurations that it prints.
//
// The package knows the product only by its commands (see [Mesh.Do]) and by its
// policy, which says what the packets should find.
package trial
