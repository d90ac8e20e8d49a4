// Package hostfake is a host in memory that enforces nothing. It records what it is told
// and refuses what a real host refuses, so everything above the contract of package host
// can be tested on any machine without privileges.
package hostfake

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Host is a host with an uplink and a LAN. Its methods may be called by any goroutine.
type Host struct {
	delivered atomic.Int64

	mu    sync.Mutex
	fault func(step string) error
	// hangs is the step that hangs until goOn is closed; "" for none.
	hangs   string
	goOn    chan struct{}
	facts   policy.Host
	iface   string // empty while there is no interface
	device  *device
	loaded  *policy.Ruleset
	drift   []host.Problem
	foreign []host.Problem
	// unexamined is what Inspect returns as such.
	unexamined map[host.ProblemKind]string
	cuts       [][]policy.Narrowed
	calls      []string
	changed    chan struct{}
}

// New returns a host with the uplink eth0 and a LAN on eth1, which doesn't forward.
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

// Host returns the parts that h has. No real host has its name or language.
func (h *Host) Host() host.Host {
	return host.Host{Name: "fake", Language: "fake", Link: h, Observer: h, Enforcer: h}
}

// step records a call and returns its fault. h.mu is held, and released while the step
// hangs.
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

// HangAt makes a step hang until its context ends or HangAt is called again; "" is none.
func (h *Host) HangAt(step string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.goOn != nil {
		close(h.goOn)
	}
	h.hangs, h.goOn = step, make(chan struct{})
}

// SetFault makes steps return the error of f, which is called with "open", "observe",
// "enforce", "inspect", "cut" or "close". Nil removes it.
func (h *Host) SetFault(f func(step string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fault = f
}

// Open creates the mesh interface, named wg-test unless cfg has a name.
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

// Observe returns the facts with the mesh interface's name.
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

// Enforce loads r completely or not at all.
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

// Inspect reports what [Host.Drift] changed, and if another ruleset than r is loaded.
func (h *Host) Inspect(ctx context.Context, r *policy.Ruleset) (host.Report, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.step(ctx, "inspect"); err != nil {
		return host.Report{}, err
	}
	report := host.Report{Drift: slices.Clone(h.drift), Problems: slices.Clone(h.foreign), Unexamined: maps.Clone(h.unexamined)}
	if h.loaded != r {
		report.Drift = append(report.Drift, host.Problem{Step: "load filter", Message: "another ruleset is loaded"})
	}
	if h.loaded != nil {
		report.Forwarding = h.loaded.Host().Forwarding
	}
	return report, nil
}

// Cut records the narrowed peers. r must be loaded: otherwise the flows could be opened
// again at once.
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

// Limits returns none: there is no packet filter, and memory alone bounds peers' flows.
func (h *Host) Limits() host.Limits { return host.Limits{} }

// Close removes everything. It also works without Open.
func (h *Host) Close(ctx context.Context) ([]host.Problem, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.step(ctx, "close"); err != nil {
		return nil, err
	}
	h.loaded, h.iface = nil, ""
	return nil, nil
}

// Watch calls changed after each call of [Host.Change], [Host.Drift] or [Host.Foreign].
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

// Change changes the facts and reports the change as a host does.
func (h *Host) Change(f func(*policy.Host)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(&h.facts)
	h.report()
}

// Drift changes what is enforced, as another program may, and reports the change.
func (h *Host) Drift(message string) {
	h.DriftQuietly(message)
	h.report()
}

// DriftQuietly is Drift without the report, for a change that a host doesn't notice.
func (h *Host) DriftQuietly(message string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drift = append(h.drift, host.Problem{Step: "load filter", Message: message})
}

// Foreign adds a problem that Inspect returns, such as another program's rule.
func (h *Host) Foreign(p host.Problem) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.foreign = append(h.foreign, p)
	h.report()
}

// Unexamined makes Inspect return that this kind of problem isn't examined.
func (h *Host) Unexamined(kind host.ProblemKind, reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.unexamined = map[host.ProblemKind]string{kind: reason}
	h.report()
}

// report reports a change and never blocks: a pending report stands for this one, too.
func (h *Host) report() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// Unplug removes the mesh interface, as a person can with "ip link delete".
func (h *Host) Unplug() error {
	h.mu.Lock()
	d := h.device
	h.mu.Unlock()
	return d.Close()
}

// Delivered returns how many packets of peers were written to mesh interfaces. It may be
// called while a step runs.
func (h *Host) Delivered() int { return int(h.delivered.Load()) }

// Loaded returns the enforced ruleset, or nil.
func (h *Host) Loaded() *policy.Ruleset {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.loaded
}

// Cuts returns the narrowed peers of each call of Cut.
func (h *Host) Cuts() [][]policy.Narrowed {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.cuts)
}

// Calls returns the names of the steps in order.
func (h *Host) Calls() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.calls)
}
