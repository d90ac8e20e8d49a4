// Package mactest proves the product on a real Mac, end to end, and keeps what
// the Mac printed: `sudo make test-mac` runs it there.
//
// [NewPeer] makes a peer without a host of its own: a stock WireGuard device on a
// TCP/IP stack in this process, so that one Mac is enough to be host and peer.
// Its packets go over the loopback interface to the helper, and from there they
// are real ones: the kernel forwards them, pf judges and translates them.
//
// [Probe] tries with real packets whether a child of the anchor com.apple is
// evaluated at all, for filter, nat and rdr each.
//
// [Outputs] are the commands whose outputs are kept from before the helper came
// and from after it went. [Normalise] takes out of an output what moves by
// itself, and [Diff] says what is left.
//
// What needs a Mac has the build tag mactest. The same script runs in `make test`
// against the helper on Linux, so that a failure on a Mac is the Mac's.
package mactest
