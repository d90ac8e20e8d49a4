package linux

import (
	"fmt"
	"testing"

	"github.com/meshhelper/meshhelper/internal/netlab"
)

// onHost opens our table on a host of its own.
func onHost(b *testing.B, f func(*filter) error) {
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
	if err := h.Do(func() error {
		flt, err := openFilter()
		if err != nil {
			return err
		}
		defer flt.close()
		return f(flt)
	}); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkChange compares a toggle of one peer's permission, done as a change of
// elements, with a load of the whole table, and with reading it all back.
func BenchmarkChange(b *testing.B) {
	for _, peers := range []int{10, 1000, 10000} {
		m := crowd(peers)
		on := compile(ruleset(b, m, someHost()), params{mtu: DefaultMTU})
		m.Peers[peers/2].Grants = allowed(0)
		denied := ruleset(b, m, someHost())
		off := compile(denied, params{mtu: DefaultMTU})
		both := [2]*table{on, off}
		for name, op := range map[string]func(*filter, int) error{
			"compile": func(_ *filter, i int) error { compile(denied, params{mtu: DefaultMTU}); return nil },
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
				onHost(b, func(f *filter) error {
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
