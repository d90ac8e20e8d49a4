// Package daemon keeps a host equal to what its operator wants. The wanted state
// is one versioned document on disk with a generation; one reconcile loop,
// woken by changes of either side, compiles it and has a [Platform] enforce it.
package daemon
