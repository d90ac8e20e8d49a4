//go:build !linux

package linux

import (
	"context"
	"errors"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// errNotLinux is what everything answers where there is no Linux.
var errNotLinux = errors.New("the platform linux needs a Linux kernel")

// Platform stands for the platform where there is none.
type Platform struct{}

// New returns an error: this isn't Linux.
func New(Options) (*Platform, error) { return nil, errNotLinux }

// Open returns an error.
func (*Platform) Open(context.Context, host.Interface) (tun.Device, error) {
	return nil, errNotLinux
}

// Observe returns an error.
func (*Platform) Observe(context.Context) (policy.Host, error) { return policy.Host{}, errNotLinux }

// Enforce returns an error.
func (*Platform) Enforce(context.Context, *policy.Ruleset) error { return errNotLinux }

// Inspect returns an error.
func (*Platform) Inspect(context.Context, *policy.Ruleset) (host.Report, error) {
	return host.Report{}, errNotLinux
}

// Cut returns an error.
func (*Platform) Cut(context.Context, *policy.Ruleset, []policy.Narrowed) error { return errNotLinux }

// Close returns an error.
func (*Platform) Close(context.Context) ([]host.Problem, error) { return nil, errNotLinux }

// Watch returns an error.
func (*Platform) Watch(context.Context, func()) error { return errNotLinux }

// Way returns an error.
func (*Platform) Way(context.Context, host.Packet) (host.Way, error) {
	return host.Way{}, errNotLinux
}
