// Package mactrial tests the product as a whole on the simulated Mac: the real
// loop, guard, host backend and darwin primitives run on simmac, and each packet that
// its pf and its IP stack pass or drop is compared with the policy. It is for macOS what
// package trial is for Linux.
//
// Packets enter in two ways: through the guard, as a peer's do, and on the tunnel's
// interface behind it, so that the packet filter must enforce the policy alone.
package mactrial
