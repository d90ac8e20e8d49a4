package mactest

// Addresses and names that nothing else on a Mac uses.

import "net/netip"

// scratchOwn and scratchFar are in TEST-NET-3 (RFC 5737), which no network uses.
var scratchOwn, scratchFar = netip.MustParseAddr("203.0.113.213"), netip.MustParseAddr("203.0.113.214")

// scratchLabel is the label of the service that is installed on a Mac, and the name of its
// anchor.
const scratchLabel = "org.meshhelper.mactest"
