package explain

import (
	"bytes"
	"cmp"
	"context"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/retry"
)

// OthersLimit bounds one look at other software. Between two of them is a pause of
// othersPause, or of as many times as long as a look took, so that rulesets that take
// long to judge don't take a core.
const (
	OthersLimit  = 10 * time.Second
	othersPause  = 100 * time.Millisecond
	othersFactor = 20
)

// MaxOuter bounds for how many devices others' rules are looked at one by one.
const MaxOuter = 32

// outerOf returns where WireGuard knows devices to be, of those that were heard last; in an
// order that doesn't change with each handshake.
func outerOf(n held.Numbers) (out []netip.AddrPort) {
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

// followOthers asks the host what of other software stands in the way of what is in force, each
// time that the loop found or changed something. The loop doesn't wait for it: it only
// informs.
func (x *Explainer) followOthers(ctx context.Context) error {
	for {
		c, changed := x.o.Held()
		began := time.Now()
		x.askOthers(ctx, c)
		if ctx.Err() != nil {
			return nil
		}
		if !retry.Sleep(ctx, max(othersPause, min(othersFactor*time.Since(began), time.Minute))) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// askOthers asks about other software, and keeps what it finds unless ctx ends. Another look that
// runs is waited for, so that what is kept is of the last one that began.
func (x *Explainer) askOthers(ctx context.Context, c held.State) {
	if c.Loaded == nil {
		return
	}
	limit, cancel := context.WithTimeout(ctx, OthersLimit)
	defer cancel()
	select {
	case x.asking <- struct{}{}:
		defer func() { <-x.asking }()
	case <-limit.Done():
		return
	}
	found, err := x.o.Host.Others.Others(limit, c.Loaded, outerOf(c.Counted))
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		// What can't be read is said, and is no reason to doubt what is enforced.
		found = append(found, host.Problem{
			Step: "look at other software", Message: "not all of it can be read: " + err.Error(), Hint: "the helper tries again",
		})
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.byOthers = found
}

// obstacles returns what followOthers found last.
func (x *Explainer) obstacles() []host.Problem {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.byOthers
}
