// Package simmac simulates a Mac, so that the product runs on any machine: the commands
// and routing messages that it uses, the kernel behind them, and the packets that the
// kernel would pass.
//
// A [Mac] implements darwin.Runner and darwin.Kernel, and creates utun devices. Behind
// the commands are pf as pfsim evaluates it, a routing table, sysctls and launchd. The
// Mac refuses what a Mac refuses, and behaves as unexpectedly: exit status 0 for an
// anchor that doesn't exist, the token on stderr, a route deletion that ignores the
// gateway, a bootstrap that fails with 5 for some seconds, tokens that are lost at
// reboot, and other software that reloads the main ruleset, disables pf or takes utun
// numbers.
//
// Tests send packets with [Mac.Receive] and [Mac.Send], as values, or as bytes through
// a tunnel device; the [Outcome] says what became of each, and which rule decided.
//
// The simulated behaviour was read in sources or captured by others. Each fact that the
// product relies on is one of the [Assumptions], with its source and a check that runs
// on the simulated Mac in the tests and on a real one with `make test-mac`.
package simmac
