package tunnel

// bound always reports true: on Windows, a broken socket shows only when it is used.
func bound(uintptr) bool { return true }
