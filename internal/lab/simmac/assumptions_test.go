package simmac

// The assumptions checked on the simulated Mac, and that each check can fail.

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestAssumptionsOnTheSimulatedMac checks that the simulated Mac is what a Mac is
// assumed to be, and that the checks put back what they change.
func TestAssumptionsOnTheSimulatedMac(t *testing.T) {
	for _, a := range Assumptions() {
		t.Run(a.Name, func(t *testing.T) {
			root := t.TempDir()
			must(t, os.MkdirAll(filepath.Join(root, "Library/LaunchDaemons"), 0o755))
			synctest.Test(t, func(t *testing.T) {
				m := New(Options{Root: root})
				must(t, m.AddEthernet("en0", []string{"203.0.113.1/24"}, "203.0.113.254"))
				m.Launchd.Draining, m.Launchd.Settling = 3*time.Second, 3*time.Second
				found := m.Dump()
				if err := a.Check(context.Background(), m.Host()); err != nil {
					t.Error(err)
				}
				if diff := cmp.Diff(found, m.Dump()); diff != "" {
					t.Errorf("not put back (-found +left):\n%s", diff)
				}
				if left, err := os.ReadDir(filepath.Join(root, "Library/LaunchDaemons")); err != nil || len(left) > 0 {
					t.Errorf("left: %v, %v", left, err)
				}
			})
		})
	}
}

func TestAssumptionsAreNamed(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range Assumptions() {
		if a.Name == "" || strings.ContainsAny(a.Name, " _") || seen[a.Name] || a.Source == "" {
			t.Errorf("assumption %q from %q", a.Name, a.Source)
		}
		seen[a.Name] = true
	}
}

// silent is a Runner whose commands print nothing and exit with status 0.
type silent struct{}

func (silent) Run(context.Context, []byte, string, ...string) ([]byte, []byte, int, error) {
	return nil, nil, 0, nil
}

// withoutCommands names the assumptions whose checks run no command.
var withoutCommands = []string{"route-mark-stays", "utun-number-taken-is-an-error", "sysctl-boot-session-is-a-uuid",
	"tunnels-are-closed-without-forwarding", "sysctl-lists-sockets"}

// TestAssumptionsCanFail has commands do nothing: a check that passes then would
// check nothing.
func TestAssumptionsCanFail(t *testing.T) {
	for _, a := range Assumptions() {
		t.Run(a.Name, func(t *testing.T) {
			root := t.TempDir()
			must(t, os.MkdirAll(filepath.Join(root, "Library/LaunchDaemons"), 0o755))
			synctest.Test(t, func(t *testing.T) {
				m := New(Options{Root: root})
				h := m.Host()
				h.Runner = silent{}
				err := a.Check(context.Background(), h)
				if usesCommands := !slices.Contains(withoutCommands, a.Name); usesCommands == (err == nil) {
					t.Errorf("with commands that do nothing: %v", err)
				}
			})
		})
	}
}
