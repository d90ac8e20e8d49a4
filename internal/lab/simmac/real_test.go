//go:build darwin && mactest

package simmac

// The assumptions, checked on a real Mac.

import (
	"os"
	"testing"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/darwin"
)

// TestAssumptionsOnThisMac is run by `make test-mac` as root. A failure names what
// this release of macOS does differently from the simulated Mac.
func TestAssumptionsOnThisMac(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root: sudo make test-mac")
	}
	h := Host{Runner: darwin.Exec{}, Kernel: darwin.System{}, CreateTUN: tun.CreateTUN, Root: "/"}
	for _, a := range Assumptions() {
		t.Run(a.Name, func(t *testing.T) {
			if err := a.Check(t.Context(), h); err != nil {
				t.Errorf("%v\nassumed because of: %s", err, a.Source)
			}
		})
	}
}
