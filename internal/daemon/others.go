package daemon

import (
	"bytes"
	"cmp"
	"context"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// othersLimit bounds one look at other software. Between two of them is a pause of
// othersPause, or of as many times as long as a look took, so that rulesets that take
// long to judge don't take a core.
const (
	othersLimit  = 10 * time.Second
	othersPause  = 100 * time.Millisecond
	othersFactor = 20
)

// maxOuter bounds for how many devices others' rules are looked at one by one.
const maxOuter = 32

// outerOf returns where WireGuard knows devices to be, of those that were heard last; in an
// order that doesn't change with each handshake.
func outerOf(n numbers) (out []netip.AddrPort) {
	keys := slices.SortedFunc(maps.Keys(n.tunnel), func(a, b mesh.PublicKey) int {
		return cmp.Or(n.tunnel[b].LastHandshake.Compare(n.tunnel[a].LastHandshake), bytes.Compare(a[:], b[:]))
	})
	for _, key := range keys {
		if at := n.tunnel[key].Endpoint; at.IsValid() && len(out) < maxOuter {
			out = append(out, netip.AddrPortFrom(at.Addr().Unmap().WithZone(""), at.Port()))
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

// lookAtOthers asks the host what of other software stands in the way of what is in force, each
// time that the loop found or changed something. The loop doesn't wait for it: it only
// informs.
func (d *Daemon) lookAtOthers(ctx context.Context) error {
	for {
		c, changed := d.condition()
		began := time.Now()
		d.lookOnce(ctx, c)
		if ctx.Err() != nil {
			return nil
		}
		if !sleep(ctx, max(othersPause, min(othersFactor*time.Since(began), time.Minute))) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// lookOnce has a look at others, and keeps what it finds unless ctx ends. Another look that
// runs is waited for, so that what is kept is of the last one that began.
func (d *Daemon) lookOnce(ctx context.Context, c condition) {
	if c.loaded == nil {
		return
	}
	limit, cancel := context.WithTimeout(ctx, othersLimit)
	defer cancel()
	select {
	case d.looking <- struct{}{}:
		defer func() { <-d.looking }()
	case <-limit.Done():
		return
	}
	found, err := d.opts.Host.Others.Others(limit, c.loaded, outerOf(c.numbers()))
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		// What can't be read is said, and is no reason to doubt what is enforced.
		found = append(found, host.Problem{
			Step: "look at other software", Message: "not all of it can be read: " + err.Error(), Hint: "the helper tries again",
		})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.byOthers = found
}

// obstacles returns what lookAtOthers found last.
func (d *Daemon) obstacles() []host.Problem {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.byOthers
}
