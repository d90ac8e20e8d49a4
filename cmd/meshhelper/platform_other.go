//go:build !linux && !darwin

package main

// platforms returns the platforms of this build: none yet.
func platforms() map[string]newPlatform { return nil }
