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

const (
	// OthersLimit bounds one question to the host about other software.
	OthersLimit = 10 * time.Second
	// othersPause is the shortest pause between two questions. A question that took long is
	// followed by a pause othersFactor times as long, up to a minute, so that rulesets
	// that are expensive to judge take at most a twentieth of a core.
	othersPause  = 100 * time.Millisecond
	othersFactor = 20
)

// MaxOuter is how many devices' outer addresses are judged by other software's rules, one
// by one, in each question.
const MaxOuter = 32

// outerOf returns the outer addresses of the devices that were heard last, at most MaxOuter.
// They are sorted, so that the list doesn't change with each handshake.
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

// followOthers asks the host, after each round of the loop, which of other software's rules
// stand in the way of the ruleset in force. The loop doesn't wait for it.
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

// askOthers asks once and keeps the answer, unless ctx ends. It waits for a question that is
// running, so that the answer that is kept is that of the last question.
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

// foundByOthers returns what followOthers found last.
func (x *Explainer) foundByOthers() []host.Problem {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.byOthers
}
