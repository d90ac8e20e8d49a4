package linux

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// killed is the value that Options.Step panics with, in place of a SIGKILL.
type killed struct{ at int }

// life is a whole run of the backend: start, changes, stop. It ends early if Options.Step
// panics.
func (g *rig) life() (err error) {
	defer func() {
		if k, ok := recover().(killed); ok {
			err = fmt.Errorf("killed at call %d of Step", k.at)
		}
	}()
	ctx := context.Background()
	if err := g.start(); err != nil {
		return err
	}
	var old *policy.Ruleset
	for _, m := range []policy.Mesh{meshOf(grants{}), meshOf(grants{ann: all}), meshOf(grants{bob: mesh.Routing}), meshOf(grants{})} {
		r, err := g.round(m)
		if err != nil {
			return err
		}
		if err := g.p.Cut(ctx, r, policy.Diff(old, r)); err != nil {
			return err
		}
		old = r
	}
	_, err = g.p.Close(ctx)
	g.p, g.dev = nil, nil
	return err
}

// TestKilledAtEveryStep kills the backend before and after each of its steps. While it is
// dead nothing leaks, and the next one leaves the host as the first found it.
func TestKilledAtEveryStep(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	before := w.snapshot()
	w.do(w.life) // also counts the calls
	if diff := before.Diff(w.snapshot()); len(diff) > 0 {
		t.Fatalf("the host isn't as it was: %v", diff)
	}
	calls := w.steps
	n, kills := 0, 0
	for at, step := range calls {
		// One kill before the first of several equal steps, one after it.
		if at > 1 && calls[at-1] == step && calls[at-2] == step && testing.Short() {
			continue
		}
		kills++
		w.steps = nil
		w.killAt = at + 1
		err := w.pic.B.Do(w.life)
		w.killAt = 0
		if err == nil {
			t.Fatalf("call %d, %q: not killed", at, step)
		}
		w.die()
		// Before the closed table nothing was opened; after the last step nothing is left
		// to do.
		if at > slices.Index(calls, StepClosed) && at < len(calls)-1 {
			w.closedToOutside(&n, fmt.Sprintf("dead at call %d, %q", at, step))
		}
		w.do(func() error {
			p, err := New(Options{StateDir: w.state})
			if err != nil {
				return err
			}
			_, err = p.Close(context.Background())
			return err
		})
		if diff := before.Diff(w.snapshot()); len(diff) > 0 {
			t.Fatalf("killed at call %d, %q: the host isn't as it was: %v", at, step, diff)
		}
	}
	t.Logf("%d kills at %d calls of Step, %d packets that had to stay", kills, len(calls), n)
}
