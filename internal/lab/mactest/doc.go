// Package mactest tests the product on a real Mac, end to end, and saves the output of
// the Mac's own commands: `sudo make test-mac` runs it there.
//
// [NewPeer] makes a peer without a host of its own: a stock WireGuard device on a
// TCP/IP stack in this process, so one Mac is both host and peer. Its packets reach the
// helper through the loopback interface. From there the Mac treats them as any others: the
// kernel forwards them, pf judges and translates them.
//
// [Probe] sends real packets to find out whether pf evaluates a child of the anchor
// com.apple, separately for filter, nat and rdr rules.
//
// [Outputs] lists the commands whose output is saved before the helper is installed and
// after it is removed. [Normalise] removes from an output what changes by itself, and
// [Comparison.Diff] returns the differences that remain.
//
// Tests that need a Mac have the build tag mactest. `make test` runs the same script
// against the helper on Linux, so a failure that only a Mac shows has its cause there.
package mactest
