package main

import (
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/linux"
)

// hosts returns the hosts that this build can run on, by the name that --platform takes.
func hosts() map[string]newHost {
	return map[string]newHost{
		"linux": func(o hostOptions) (host.Host, error) {
			p, err := linux.New(linux.Options{StateDir: o.stateDir, Log: o.log})
			if err != nil {
				return host.Host{}, err
			}
			return p.Host(), nil
		},
	}
}

// systemctlLimit bounds each systemctl command. `systemctl start` waits until the helper is
// ready, or for the 90 s of the unit's TimeoutStartSec.
const systemctlLimit = 2 * time.Minute

// thisService returns this host, with systemd as its service manager if that runs.
func thisService() *serviceHost {
	return &serviceHost{
		systemd:    true,
		runner:     darwin.Exec{Timeout: systemctlLimit},
		executable: os.Executable,
		inUse:      linux.InUse,
		restore: func(ctx context.Context, stateDir string) error {
			p, err := linux.New(linux.Options{StateDir: stateDir, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				return err
			}
			_, err = p.Close(ctx)
			return err
		},
	}
}
