package main

import (
	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/linux"
)

// platforms returns the platforms of this build.
func platforms() map[string]newPlatform {
	return map[string]newPlatform{
		"linux": func(o platformOptions) (daemon.Platform, error) {
			return linux.New(linux.Options{StateDir: o.stateDir, Log: o.log})
		},
	}
}
