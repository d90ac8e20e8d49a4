// Package simmac is a simulated Mac to run the product on where there is none:
// what it may be told through commands and routing messages, the kernel behind
// them, and the packets that the kernel would let through.
//
// A [Mac] is a darwin.Runner, a darwin.Kernel and a maker of tunnels. Below the
// command lines stand pf as pfconf evaluates it, a routing table, kernel
// variables and launchd. It refuses what a Mac refuses, and it has a Mac's
// traps: exit status 0 for an anchor that doesn't exist, the token on stderr, a
// route's deletion that ignores the gateway, a bootstrap that answers 5 for some
// seconds, a reboot that forgets tokens, and other software that reloads the main
// ruleset, turns pf off or takes tunnel numbers.
//
// Packets go in by [Mac.Receive] and [Mac.Send], as values or, through a tunnel
// device, as bytes; the result says what became of each, and which rule decided.
//
// What is simulated was read or captured, not tried on a Mac by us. Each such
// thing is one of the [Assumptions], with its source and a check that runs on this
// Mac in the tests and on a real one with `make test-mac`.
package simmac
