//go:build !darwin && !linux

package main

// thisService returns nil: the helper can't be installed as a service on this platform.
func thisService() *serviceHost { return nil }
