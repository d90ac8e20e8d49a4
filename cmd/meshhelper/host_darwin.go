package main

import (
	"context"
	"os"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/macos"
	"github.com/meshhelper/meshhelper/internal/install"
)

// hosts returns the hosts that this build can run on, by the name that --platform takes.
func hosts() map[string]newHost {
	return map[string]newHost{
		"darwin": func(o hostOptions) (host.Host, error) {
			p, err := macos.New(macos.Options{
				StateDir: o.stateDir, Label: o.label, Runner: darwin.Exec{}, Kernel: darwin.System{}, Log: o.log,
			})
			if err != nil {
				return host.Host{}, err
			}
			return p.Host(), nil
		},
	}
}

// serviceTimeout bounds each launchctl command. `launchctl bootout` may wait until the
// helper has ended, or until launchd kills it ExitTimeOut seconds after SIGTERM; 10 s are
// left for launchd itself.
const serviceTimeout = time.Duration(install.ExitTimeOut+10) * time.Second

// thisService returns this Mac, with launchd as its service manager.
func thisService() *serviceHost {
	return &serviceHost{
		runner:     darwin.Exec{Timeout: serviceTimeout},
		executable: os.Executable,
		restore: func(ctx context.Context, stateDir string) error {
			p, err := macos.New(macos.Options{StateDir: stateDir, Runner: darwin.Exec{}, Kernel: darwin.System{}})
			if err != nil {
				return err
			}
			_, err = p.Close(ctx)
			return err
		},
	}
}
