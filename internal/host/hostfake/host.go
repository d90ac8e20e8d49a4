// Package hostfake is a host that enforces nothing: it keeps what it was
// told, and refuses what a real host refuses, so that everything above the
// contract of package host can be tried on any machine and without rights.
package hostfake

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Host is a host with an uplink and a LAN. Its methods may be called by several
// goroutines.
type Host struct {
	delivered atomic.Int64

	mu      sync.Mutex
	fault   func(step string) error
	hangs   string // a step
	goOn    chan struct{}
	facts   policy.Host
	iface   string // empty while it doesn't exist
	device  *device
	loaded  *policy.Ruleset
	drift   []host.Problem
	foreign []host.Problem
	cuts    [][]policy.Narrowed
	calls   []string
	changed chan struct{}
}

// New returns a host whose uplink is eth0 and which has a LAN on eth1. It
// doesn't forward.
func New() *Host {
	return &Host{
		changed: make(chan struct{}, 1),
		facts: policy.Host{
			Uplink4: "eth0",
			Interfaces: []policy.Interface{
				{Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("198.51.100.2/24")}},
				{Name: "eth1", Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.77.1/24")}},
			},
			Lasting: []netip.Addr{netip.MustParseAddr("198.51.100.2")},
			Routes:  []policy.Route{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Interface: "eth0"}},
		},
	}
}

// Host returns the parts that h has of a host. Its language is one that no program writes.
func (h *Host) Host() host.Host {
	return host.Host{Name: "fake", Language: "fake", Link: h, Observer: h, Enforcer: h}
}

// step notes a call and returns its fault.
func (h *Host) step(ctx context.Context, name string) error {
	h.calls = append(h.calls, name)
	if err := ctx.Err(); err != nil {
		return err
	}
	if h.hangs == name {
		goOn := h.goOn
		h.mu.Unlock()
		defer h.mu.Lock()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-goOn:
			return nil
		}
	}
	if h.fault == nil {
		return nil
	}
	return h.fault(name)
}

// HangAt has a step do nothing until its context ends, or HangAt is called again; "" is
// none.
func (h *Host) HangAt(step string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.goOn != nil {
		close(h.goOn)
	}
	h.hangs, h.goOn = step, make(chan struct{})
}

// SetFault has f return the error with which a step fails from now on; steps are
// "open", "observe", "enforce", "inspect", "cut" and "close". Nil ends it.
func (h *Host) SetFault(f func(step string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fault = f
}

// Open makes the mesh interface, called wg-test unless cfg names one.
func (h *Host) Open(ctx context.Context, cfg host.Interface) (tun.Device, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.step(ctx, "open"); err != nil {
		return nil, err
	}
	switch {
	case cfg.MTU < 1280 || cfg.MTU > 65535:
		return nil, fmt.Errorf("MTU %d is out of range", cfg.MTU)
	case len(cfg.Addresses) != 2:
		return nil, fmt.Errorf("%d addresses, want one IPv4 and one IPv6", len(cfg.Addresses))
	case h.iface != "":
		return nil, fmt.Errorf("interface %q already exists", h.iface)
	}
	h.iface = cfg.Name
	if h.iface == "" {
		h.iface = "wg-test"
	}
	h.device = newDevice(h, cfg)
	return h.device, nil
}

// Observe returns the facts, with the mesh interface's name.
func (h *Host) Observe(ctx context.Context) (policy.Host, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.step(ctx, "observe"); err != nil {
		return policy.Host{}, err
	}
	facts := h.facts
	facts.Interface = h.iface
	facts.Forwarding = policy.Families{IPv4: facts.Uplink4 != "", IPv6: facts.Uplink6 != ""}
	facts.Interfaces = slices.Clone(facts.Interfaces)
	facts.Routes = slices.Clone(facts.Routes)
	return facts, nil
}

// Enforce loads r, whole or not at all.
func (h *Host) Enforce(ctx context.Context, r *policy.Ruleset) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.step(ctx, "enforce"); err != nil {
		return err
	}
	if h.iface == "" || r.Host().Interface != h.iface {
		return &host.StepError{Step: "set addresses", Err: fmt.Errorf("interface %q does not exist", r.Host().Interface)}
	}
	h.loaded, h.drift = r, nil
	return nil
}

// Inspect reports what [Host.Drift] changed, and a ruleset that isn't the one
// loaded.
func (h *Host) Inspect(ctx context.Context, r *policy.Ruleset) (host.Report, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.step(ctx, "inspect"); err != nil {
		return host.Report{}, err
	}
	report := host.Report{Drift: slices.Clone(h.drift), Problems: slices.Clone(h.foreign)}
	if h.loaded != r {
		report.Drift = append(report.Drift, host.Problem{Step: "load filter", Message: "another ruleset is loaded"})
	}
	if h.loaded != nil {
		report.Forwarding = h.loaded.Host().Forwarding
	}
	return report, nil
}

// Cut notes whose flows were cut. The ruleset must be loaded, or new flows would
// come to be at once.
func (h *Host) Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.step(ctx, "cut"); err != nil {
		return err
	}
	if h.loaded != r {
		return errors.New("the ruleset isn't loaded")
	}
	h.cuts = append(h.cuts, slices.Clone(narrowed))
	return nil
}

// Limits says that memory alone bounds peers' flows: there is no packet filter.
func (h *Host) Limits() host.Limits { return host.Limits{} }

// Close takes everything away. It works without Open.
func (h *Host) Close(ctx context.Context) ([]host.Problem, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.step(ctx, "close"); err != nil {
		return nil, err
	}
	h.loaded, h.iface = nil, ""
	return nil, nil
}

// Watch calls changed after each [Host.Change] and [Host.Drift].
func (h *Host) Watch(ctx context.Context, changed func()) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.changed:
			changed()
		}
	}
}

// Change changes the facts, and reports it as a host does.
func (h *Host) Change(f func(*policy.Host)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(&h.facts)
	h.report()
}

// Drift has another program change what is enforced, and reports it.
func (h *Host) Drift(message string) {
	h.DriftQuietly(message)
	h.report()
}

// DriftQuietly is Drift of what a host doesn't report.
func (h *Host) DriftQuietly(message string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drift = append(h.drift, host.Problem{Step: "load filter", Message: message})
}

// Foreign has something stand in the way that isn't ours.
func (h *Host) Foreign(p host.Problem) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.foreign = append(h.foreign, p)
	h.report()
}

// report never waits: a report that wasn't heard yet stands for this one, too.
func (h *Host) report() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// Unplug takes the mesh interface away, as a person can with ip link delete.
func (h *Host) Unplug() error {
	h.mu.Lock()
	d := h.device
	h.mu.Unlock()
	return d.Close()
}

// Delivered returns how many packets of peers came out of the mesh interfaces.
// It may be called while a step runs.
func (h *Host) Delivered() int { return int(h.delivered.Load()) }

// Loaded returns the ruleset that is enforced, or nil.
func (h *Host) Loaded() *policy.Ruleset {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.loaded
}

// Cuts returns what each Cut was given.
func (h *Host) Cuts() [][]policy.Narrowed {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.cuts)
}

// Calls returns the steps in order.
func (h *Host) Calls() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.calls)
}
