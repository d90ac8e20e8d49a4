package main

import (
	"log/slog"

	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/linux"
)

// platforms returns the platforms of this build.
func platforms() map[string]newPlatform {
	return map[string]newPlatform{
		"linux": func(stateDir string, log *slog.Logger) (daemon.Platform, error) {
			return linux.New(linux.Options{StateDir: stateDir, Log: log})
		},
	}
}
