// Package trial tests the product as a whole on Linux: the real meshhelper program runs
// on the host B of netlab's picture, tests run its commands there, and stock WireGuard
// ends on A, C and D use the configurations that it prints.
//
// The package uses the product by its commands only (see [Mesh.Do]), by its socket, and
// by its policy, which gives the expected verdicts. A test that has to stop the helper
// at a step, or to disable an enforcer, builds a helper with some lines of the source
// replaced; the product has no code for that.
//
// The flag -soak runs the long versions of the tests.
package trial
