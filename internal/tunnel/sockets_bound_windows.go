package tunnel

// bound reports that the socket is in order; one that isn't fails when it is
// used.
func bound(uintptr) bool { return true }
