package linux

import (
	"context"
	"fmt"
	"testing"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// onHost runs f on a host of its own, in a network namespace.
func onHost(b *testing.B, f func() error) {
	b.Helper()
	if err := netlab.Unavailable(); err != nil {
		b.Skip("no hosts to try things on:", err)
	}
	lab, err := netlab.New()
	if err != nil {
		b.Fatal(err)
	}
	defer lab.Close()
	h, err := lab.Host("host")
	if err != nil {
		b.Fatal(err)
	}
	if err := h.Do(f); err != nil {
		b.Fatal(err)
	}
}

// withFilter runs f with nftables open on a host of its own.
func withFilter(b *testing.B, f func(*filter) error) {
	b.Helper()
	onHost(b, func() error {
		flt, err := openFilter()
		if err != nil {
			return err
		}
		defer flt.close()
		return f(flt)
	})
}

// BenchmarkChange compares toggling one peer's permission by set elements with loading
// the whole table and with reading it back.
func BenchmarkChange(b *testing.B) {
	for _, peers := range []int{10, 1000, 10000} {
		m := crowd(peers)
		on := compile(ruleset(b, m, someHost()), params{mtu: testMTU})
		m.Peers[peers/2].Permissions = mesh.Granted(0)
		denied := ruleset(b, m, someHost())
		off := compile(denied, params{mtu: testMTU})
		both := [2]*table{on, off}
		for name, op := range map[string]func(*filter, int) error{
			"compile": func(_ *filter, i int) error { compile(denied, params{mtu: testMTU}); return nil },
			"toggle":  func(f *filter, i int) error { return f.apply(both[i%2]) },
			"load":    func(f *filter, i int) error { return f.load(both[i%2]) },
			"read back": func(f *filter, i int) error {
				if differs, err := f.compare(); err != nil || len(differs) > 0 {
					return fmt.Errorf("%v, %w", differs, err)
				}
				return nil
			},
			"inspect": func(f *filter, i int) error {
				if differs, err := f.drift(); err != nil || len(differs) > 0 {
					return fmt.Errorf("%v, %w", differs, err)
				}
				return nil
			},
		} {
			b.Run(fmt.Sprintf("%s/%d", name, peers), func(b *testing.B) {
				withFilter(b, func(f *filter) error {
					if err := f.load(on); err != nil {
						return err
					}
					b.ResetTimer()
					for i := 1; b.Loop(); i++ {
						if err := op(f, i); err != nil {
							return err
						}
					}
					return nil
				})
			})
		}
	}
}

// BenchmarkToggle measures a toggle through the backend: enforce, inspect, cut.
func BenchmarkToggle(b *testing.B) {
	for _, peers := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprint(peers), func(b *testing.B) {
			onHost(b, func() error { return toggle(b, crowd(peers)) })
		})
	}
}

func toggle(b *testing.B, m policy.Mesh) error {
	ctx := context.Background()
	p, err := New(Options{StateDir: b.TempDir()})
	if err != nil {
		return err
	}
	defer p.Close(ctx)
	if _, err := p.Open(ctx, host.Interface{Name: meshName, MTU: testMTU, Addresses: m.Addresses, Prefixes: m.Prefixes}); err != nil {
		return err
	}
	facts, err := p.Observe(ctx)
	if err != nil {
		return err
	}
	var both [2]*policy.Ruleset
	for i, have := range []mesh.Permissions{mesh.Routing, 0} {
		m.Peers[len(m.Peers)/2].Permissions = mesh.Granted(have)
		both[i] = ruleset(b, m, facts)
	}
	if err := p.Enforce(ctx, both[0]); err != nil {
		return err
	}
	b.ResetTimer()
	for i := 1; b.Loop(); i++ {
		r := both[i%2]
		if err := p.Enforce(ctx, r); err != nil {
			return err
		}
		report, err := p.Inspect(ctx, r)
		if err != nil || len(report.Drift) > 0 {
			return fmt.Errorf("%v, %w", report.Drift, err)
		}
		if err := p.Cut(ctx, r, policy.Diff(both[1-i%2], r)); err != nil {
			return err
		}
	}
	return nil
}
