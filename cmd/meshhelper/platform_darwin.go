package main

import (
	"log/slog"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/daemon"
	"github.com/meshhelper/meshhelper/internal/macos"
)

// platforms returns the platforms of this build.
func platforms() map[string]newPlatform {
	return map[string]newPlatform{
		"darwin": func(stateDir string, log *slog.Logger) (daemon.Platform, error) {
			return macos.NewPlatform(macos.PlatformOptions{
				StateDir: stateDir, Runner: darwin.Exec{}, Kernel: darwin.System{}, Log: log,
			})
		},
	}
}
