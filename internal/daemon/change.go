package daemon

import (
	"context"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// AddPeer adds a peer. One that already exists, with all that p says of it,
// is no error.
func (d *Daemon) AddPeer(ctx context.Context, p api.NewPeer) (api.Changed, error) {
	return d.change(ctx, func(ctx context.Context) (wanted.Outcome, error) { return d.wanted.AddPeer(ctx, p) })
}

// ChangePeer changes what c names of a peer and leaves the rest.
func (d *Daemon) ChangePeer(ctx context.Context, ref string, c api.PeerChange) (api.Changed, error) {
	return d.change(ctx, func(ctx context.Context) (wanted.Outcome, error) { return d.wanted.ChangePeer(ctx, ref, c) })
}

// RemovePeer removes a peer, and answers with what it was.
func (d *Daemon) RemovePeer(ctx context.Context, ref string) (api.Changed, error) {
	now, _ := d.loop.State()
	was := now.Numbers() // before the guard and the tunnel forget the peer
	var gone *mesh.Peer
	out, err := d.change(ctx, func(ctx context.Context) (wanted.Outcome, error) {
		o, err := d.wanted.RemovePeer(ctx, ref)
		gone = o.Gone
		return o, err
	})
	if err == nil && gone != nil {
		out.Peer = d.viewOf(gone, was, d.wanted.Now())
	}
	return out, err
}

// answerWithin returns how long a change may take to be answered: a little less than
// the limit that commands are promised.
func (d *Daemon) answerWithin() time.Duration { return d.opts.Wait * 9 / 10 }

// saveWithin returns how long a change waits for the disk.
func (d *Daemon) saveWithin() time.Duration { return d.opts.Wait / 2 }

// change has the wanted state changed, wakes the loop, and waits until the host holds it
// and the disk, too.
func (d *Daemon) change(ctx context.Context, make func(context.Context) (wanted.Outcome, error)) (api.Changed, error) {
	began := time.Now()
	saving, cancel := context.WithDeadline(ctx, began.Add(d.saveWithin()))
	defer cancel()
	o, refused := make(saving)
	if o.Document == nil {
		return api.Changed{}, refused
	}
	var out api.Changed
	d.loop.Wake()
	// The loop works while the disk does.
	notHeld := d.await(ctx, o.Document.Generation, began.Add(d.answerWithin()))
	notKept := d.wanted.AwaitSaved(saving, o)
	switch {
	case refused != nil: // the part that takes away holds
		return api.Changed{}, refused
	case notKept != nil:
		return api.Changed{}, d.wanted.NotSaved(o, notKept, notHeld)
	case notHeld != nil:
		return api.Changed{}, notHeld
	case o.After != nil:
		return api.Changed{}, o.After
	}
	out.Already = o.Already
	// Another change may have taken the peer away since, or given it another key.
	for _, doc := range []*wanted.Document{d.wanted.Document(), o.Document} {
		if i := doc.ByKey(o.Key); i >= 0 {
			out.Peer = d.view(&doc.Peers[i], d.wanted.Now())
			break
		}
	}
	return out, nil
}

// await waits until the host holds the generation, or says why it doesn't.
func (d *Daemon) await(ctx context.Context, generation uint64, deadline time.Time) error {
	began := time.Now()
	limit := time.NewTimer(time.Until(deadline))
	defer limit.Stop()
	for {
		s, changed := d.loop.State()
		if s.Enforced >= generation {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return api.Errorf(api.CodeNotInForce, "saved, not in force: the helper is stopping")
		case <-limit.C:
			return notInForce(s, time.Since(began).Round(time.Second))
		}
	}
}

// notInForce is the answer to a change that is saved and that the host doesn't hold, by the
// problem that keeps it from that.
func notInForce(s held.State, waited time.Duration) error {
	if len(s.Problems) == 0 {
		return api.Errorf(api.CodeNotInForce, "saved, not in force after %v: the host is slow", waited).
			WithHint("see `meshhelper status`")
	}
	p := s.Problems[0]
	hint := p.Hint
	if hint == "" {
		hint = "it is tried again; see `meshhelper status`"
	}
	return api.Errorf(api.CodeNotInForce, "saved, not in force: %s: %s", p.Step, p.Message).WithHint("%s", hint)
}
