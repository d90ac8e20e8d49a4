//go:build !darwin && !linux

package main

// thisService returns nil: there is no service manager here that is known.
func thisService() *serviceHost { return nil }
