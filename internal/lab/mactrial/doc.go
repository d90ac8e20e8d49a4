// Package mactrial puts the product on trial on the simulated Mac: the real
// daemon, guard, backend and darwin primitives run on simmac, and what its pf and
// its IP stack let through, packet by packet, is held against the policy. It is to
// macOS what package trial is to Linux.
//
// Packets are judged two ways: through the guard, as a peer's are, and put on the
// tunnel's interface behind it, so that the packet filter has to hold alone.
package mactrial
