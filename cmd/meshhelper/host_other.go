//go:build !linux && !darwin

package main

// hosts returns the hosts that this build can run on: none yet.
func hosts() map[string]newHost { return nil }
