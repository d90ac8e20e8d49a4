//go:build !darwin

package main

// thisService returns nil: there is no launchd here.
func thisService() *serviceHost { return nil }
