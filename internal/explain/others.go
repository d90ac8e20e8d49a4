package explain

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"runtime/debug"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/retry"
)

const (
	// OthersLimit bounds one examination of other software ([host.Others]).
	OthersLimit = 10 * time.Second
	// othersPause is the shortest pause between two examinations. One that took long is
	// followed by a pause othersFactor times as long, up to othersMaxPause, so that rulesets
	// that are expensive to evaluate take at most a twentieth of a core.
	othersPause    = 100 * time.Millisecond
	othersFactor   = 20
	othersMaxPause = time.Minute
)

// MaxOuter is how many devices' outer addresses an examination includes. The rules are
// evaluated for each of them, so the number bounds what a mesh of thousands of peers costs.
const MaxOuter = 32

// outerAddresses returns the outer addresses of the devices with the latest handshakes, at most
// MaxOuter. The host may cache by this list, so it is sorted, and the same devices give the
// same list whichever of them made a handshake last.
func outerAddresses(n held.Numbers) (out []netip.AddrPort) {
	keys := slices.SortedFunc(maps.Keys(n.Tunnel), func(a, b mesh.PublicKey) int {
		return cmp.Or(n.Tunnel[b].LastHandshake.Compare(n.Tunnel[a].LastHandshake), bytes.Compare(a[:], b[:]))
	})
	for _, key := range keys {
		if at := n.Tunnel[key].Endpoint; at.IsValid() && len(out) < MaxOuter {
			out = append(out, netip.AddrPortFrom(at.Addr().Unmap().WithZone(""), at.Port()))
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

// followOthers has other software examined after each round of the loop, with pauses that
// depend on the cost.
func (x *Explainer) followOthers(ctx context.Context) error {
	for {
		c, changed := x.o.Held()
		began := time.Now()
		x.examineOthers(ctx, c)
		if ctx.Err() != nil {
			return nil
		}
		if !retry.Sleep(ctx, max(othersPause, min(othersFactor*time.Since(began), othersMaxPause))) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// examineOthers asks the host which of other software's rules stop what the ruleset in force
// passes, and keeps the result, unless ctx ends before. Doctor and Run both call it: one waits
// for the other, so that an older result never replaces a newer one.
func (x *Explainer) examineOthers(ctx context.Context, c held.State) {
	if c.Loaded == nil {
		return
	}
	limit, cancel := context.WithTimeout(ctx, OthersLimit)
	defer cancel()
	select {
	case x.examining <- struct{}{}:
		defer func() { <-x.examining }()
	case <-limit.Done():
		return
	}
	found, err := x.hostsProblems(limit, c)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		// It is reported, but doesn't make the helper close: our own rules are still enforced.
		found = append(found, host.Problem{
			Step: "look at other software", Message: "not all of it can be read: " + err.Error(), Hint: "the helper tries again",
		})
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.othersProblems = found
}

// lastOthersProblems returns the result of the last examination.
func (x *Explainer) lastOthersProblems() []host.Problem {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.othersProblems
}

// hostsProblems asks the host. A panic is an error: rules of other software may be anything,
// and what they do to the code that judges them must not end the helper.
func (x *Explainer) hostsProblems(ctx context.Context, c held.State) (found []host.Problem, err error) {
	defer func() {
		if v := recover(); v != nil {
			x.o.Logger.Error("a bug in what examines other software's rules", "panic", v, "stack", string(debug.Stack()))
			found, err = nil, fmt.Errorf("a bug of meshhelper's, see the log: %v", v)
		}
	}()
	return x.o.Host.Others.Others(ctx, c.Loaded, outerAddresses(c.Counted))
}
