package mactest

// Addresses and names that nothing else on a Mac has.

import "net/netip"

// scratchOwn and scratchFar are of TEST-NET-3 (RFC 5737), which no network has.
var scratchOwn, scratchFar = netip.MustParseAddr("203.0.113.213"), netip.MustParseAddr("203.0.113.214")

// scratchLabel names the service that is installed on a Mac, and its anchor.
const scratchLabel = "org.meshhelper.mactest"
